"""Lengths of a corpus, as they are given at this package's entrances."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxpack.arguments import concrete_lengths


def corpus_lengths(lengths: npt.ArrayLike, name: str = "lengths") -> np.ndarray:
    """Returns lengths as an int64 vector [N], read by position (as those of a pandas Series).

    Examples:
      >>> corpus_lengths([3, 5]).tolist()
      [3, 5]

    Raises:
      TypeError: if they are given as what has no order or is read once, or are no numbers.
      ValueError: if they are no vector, not whole, or negative.
    """
    if isinstance(lengths, Iterator):
        raise TypeError(f"{name} must be a vector [N] of integers, got {_type(lengths)}, read once: write list(...).")
    if isinstance(lengths, (str, bytes, Mapping, Set)):
        hint = ": write list(lengths.values())" if isinstance(lengths, Mapping) else ""
        raise TypeError(f"{name} must be a vector [N] of integers, one for each example, got {_type(lengths)}{hint}.")
    return concrete_lengths(lengths)


def lengths_by_axis(lengths: Any, names: Sequence[str]) -> np.ndarray:
    """Returns lengths on each time axis, [N, A].

    Examples:
      >>> lengths_by_axis({"target": [7, 9], "source": [3, 5]}, ("source", "target")).tolist()
      [[3, 7], [5, 9]]

    Args:
      lengths: [N]; where time axes have names, a mapping from these.
      names: of the time axes; none if there is one without a name.

    Raises:
      TypeError: if they are not given so, or as `corpus_lengths`.
      ValueError: if the names are others, those of one axis are not as many as of another, or as `corpus_lengths`.
    """
    if not isinstance(lengths, Mapping) or not names:
        if len(names) > 1:
            wanted = ", ".join(f'"{name}": [...]' for name in names)
            raise TypeError(f"examples have several time axes: give the lengths on each, lengths={{{wanted}}}.")
        return corpus_lengths(lengths)[:, None]
    if set(lengths) != set(names):
        raise ValueError(f"lengths are those of {list(lengths)}, but the time axes are {list(names)}.")
    columns = [corpus_lengths(lengths[name], f"lengths[{name!r}]") for name in names]
    counts = {name: len(column) for name, column in zip(names, columns, strict=True)}
    if len(set(counts.values())) > 1:
        raise ValueError(f"lengths must be of as many examples on each time axis, got {counts}.")
    return np.stack(columns, axis=1)


def _type(value: object) -> str:
    return f"a {type(value).__name__}"
