"""How the outputs of several directions become one: side by side, or added up, averaged or multiplied."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

MERGES = ("concat", "sum", "mean", "mul", None)


def check_merge(merge: object) -> None:
    """Raises ValueError unless the argument merge names a way to join directions, or is None.

    Examples:
      >>> check_merge("ave")
      Traceback (most recent call last):
      ValueError: merge must be "concat", "sum", "mean", "mul" or None (one output for each direction), got 'ave'.
    """
    if not (merge is None or isinstance(merge, str)) or merge not in MERGES:
        names = ", ".join(f'"{name}"' for name in MERGES[:-2])
        raise ValueError(
            f'merge must be {names}, "{MERGES[-2]}" or None (one output for each direction), got {merge!r}.'
        )


def merge_directions(outputs: Sequence[jax.Array], merge: str | None) -> Any:
    """Joins the outputs of directions at each step.

    Examples:
      >>> merge_directions([jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])], "mean").tolist()
      [2.0, 3.0]

    Args:
      outputs: one array [..., H] for each direction; unless merge is "concat" or None, of one shape.
      merge: "concat" joins the last axis, "sum", "mean" and "mul" compute value by value, None joins nothing.

    Returns:
      One array in the dtype of the outputs; for None the tuple of the outputs.
    """
    if merge is None:
        return tuple(outputs)
    if merge == "concat":
        return jnp.concatenate(outputs, axis=-1)
    if merge == "mul":
        return functools.reduce(operator.mul, outputs)
    total = functools.reduce(operator.add, outputs)
    return total / len(outputs) if merge == "mean" else total


def merged_width(widths: Sequence[int], merge: str | None) -> int:
    """Returns the width of the joined output, or of each one if merge is None, from those of the directions."""
    return sum(widths) if merge == "concat" else widths[0]
