"""Lengths of a corpus on each of its time axes, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpack._checks import concrete_lengths


def lengths_by_axis(lengths: Any, names: Sequence[str]) -> np.ndarray:
    """Returns lengths on each time axis, [N, A].

    Examples:
      >>> lengths_by_axis({"target": [7, 9], "source": [3, 5]}, ("source", "target")).tolist()
      [[3, 7], [5, 9]]

    Args:
      lengths: [N]; where time axes have names, a mapping from the names to such arrays.
      names: the names of the time axes; none for a single axis without a name.

    Raises:
      TypeError: if several axes have no mapping, or as in `concrete_lengths`.
      ValueError: if the mapping has other names, the axes have different numbers of lengths, or as in
        `concrete_lengths`.
    """
    if not isinstance(lengths, Mapping) or not names:
        if len(names) > 1:
            wanted = ", ".join(f'"{name}": [...]' for name in names)
            raise TypeError(f"examples have several time axes: pass the lengths on each, lengths={{{wanted}}}.")
        return concrete_lengths(lengths)[:, None]
    if set(lengths) != set(names):
        raise ValueError(f"lengths has the time axes {list(lengths)}, but examples have {list(names)}.")
    columns = [concrete_lengths(lengths[name], f"lengths[{name!r}]") for name in names]
    counts = {name: len(column) for name, column in zip(names, columns, strict=True)}
    if len(set(counts.values())) > 1:
        raise ValueError(f"lengths must be of the same number of examples on each time axis, got {counts}.")
    return np.stack(columns, axis=1)
