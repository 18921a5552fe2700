"""Trend: a warning about streams that are ordered by length, which a small buffer cannot shuffle."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from jaxpack.data._ranks import ranks

_BLOCKS = 8
_SMALLEST = 512  # the fewest examples in a window
_EXPLAINED = 0.3  # a trend explains more than this share of the variance of the lengths' ranks by their block
_CERTAIN = 60.0  # in random order that share times the examples is chi square with 7 degrees: P(above) = 2e-10


class Trend:
    """A check of the lengths of a stream, which warns once if they have a trend.

    A window holds as many examples as two buffers, so a stream whose order is local, within a buffer, passes. It is
    cut into blocks, whose lengths are similar in random order.

    Args:
      buffer_size: how many examples the stream's buffer holds.
    """

    def __init__(self, buffer_size: int) -> None:
        self._buffer_size: float = buffer_size
        self._window = max(2 * buffer_size, _SMALLEST)
        self._lengths: list[Sequence[int]] = []
        self._count = 0

    def add(self, lengths: Sequence[int]) -> None:
        """Adds an example with these lengths on its time axes."""
        if self._buffer_size == np.inf:
            return
        self._lengths.append(lengths)
        self._count += 1
        if len(self._lengths) == self._window:
            self._look()
            del self._lengths[: self._window // 2]

    def end(self) -> None:
        """Checks the remaining examples, unless the buffer holds the whole stream."""
        if self._count > self._buffer_size:
            self._look()

    def _look(self) -> None:
        lengths = np.array(self._lengths)
        if len(lengths) < _CERTAIN:
            return
        explained = max(_explained(column) for column in lengths.T)
        if explained < _EXPLAINED or explained * len(lengths) < _CERTAIN:
            return
        self._buffer_size = np.inf  # warns once
        warnings.warn(
            f"the examples of the stream are ordered by length: their order explains {explained:.0%} of the variance "
            f"of the last {len(lengths):,} lengths (their ranks). Batches drawn from a buffer of part of it are far "
            f"from full, or their lengths follow that order. Shuffle the stream first, or pass a larger buffer_size.",
            UserWarning,
            stacklevel=2,
        )


def _explained(lengths: np.ndarray) -> float:
    """Computes eta squared: the share of the variance of ranks between blocks of the order; 0 if all are tied."""
    ranked = ranks(lengths)
    total = np.sum((ranked - ranked.mean()) ** 2)
    between = sum(len(block) * (block.mean() - ranked.mean()) ** 2 for block in np.array_split(ranked, _BLOCKS))
    return float(between / total) if total else 0.0
