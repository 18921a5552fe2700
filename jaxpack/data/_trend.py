"""Trend: a warning where the lengths of a stream follow its order, which no buffer of a part of it makes up for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from jaxpack.data._ranks import ranks

_BLOCKS = 8
_SMALLEST = 512  # examples that are looked at together
_EXPLAINED = 0.3  # share of the variance of the lengths' ranks that lies between blocks, above which it is a trend
_CERTAIN = 60.0  # in random order that share times the examples is chi square with 7 degrees: 2e-10 of it lies above


class Trend:
    """Watches the lengths of a stream as they come, and warns once if they have a trend.

    As many examples as two buffers hold are looked at together, so that a stream whose order is local, within a buffer,
    passes. They are cut into blocks: in random order these have like lengths.

    Args:
      buffer_size: how many examples are drawn from.
    """

    def __init__(self, buffer_size: int) -> None:
        self._buffer_size: float = buffer_size
        self._window = max(2 * buffer_size, _SMALLEST)
        self._lengths: list[Sequence[int]] = []
        self._count = 0

    def add(self, lengths: Sequence[int]) -> None:
        """Counts an example with these lengths on its time axes."""
        if self._buffer_size == np.inf:
            return
        self._lengths.append(lengths)
        self._count += 1
        if len(self._lengths) == self._window:
            self._look()
            del self._lengths[: self._window // 2]

    def end(self) -> None:
        """Looks at those that were left. A stream that a buffer holds as a whole is in no order."""
        if self._count > self._buffer_size:
            self._look()

    def _look(self) -> None:
        lengths = np.array(self._lengths)
        if len(lengths) < _CERTAIN:
            return
        explained = max(_explained(column) for column in lengths.T)
        if explained < _EXPLAINED or explained * len(lengths) < _CERTAIN:
            return
        self._buffer_size = np.inf  # enough is said
        warnings.warn(
            f"the examples of the stream are ordered by length: where they come explains {explained:.0%} of the "
            f"variance of the last {len(lengths):,} lengths (their ranks). Batches drawn from a buffer of part of them "
            f"are far from full, or all of like lengths one after another. Shuffle the stream before, or give a "
            f"larger buffer_size.",
            UserWarning,
            stacklevel=2,
        )


def _explained(lengths: np.ndarray) -> float:
    """Eta squared: the share of the variance of ranks that lies between blocks of the order; 0 where all are tied."""
    ranked = ranks(lengths)
    total = np.sum((ranked - ranked.mean()) ** 2)
    between = sum(len(block) * (block.mean() - ranked.mean()) ** 2 for block in np.array_split(ranked, _BLOCKS))
    return float(between / total) if total else 0.0
