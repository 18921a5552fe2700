"""States from which the spans of a rollout start: rows of a state, and fresh ones where a reset begins a span."""

from __future__ import annotations

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxpack._checks import as_int
from jaxpack._dtypes import as_jax
from jaxpack._types import PyTree


class Spans(Protocol):
    """Runs of steps in the rows of a rollout: M of them, each an entry of the vectors."""

    @property
    def rows(self) -> Any:
        """int32 [M], the row of each."""

    @property
    def starts(self) -> Any:
        """int32 [M], its first step."""

    @property
    def begins(self) -> Any:
        """bool [M], whether a reset begins it."""

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the rollout, (T, N) or (N, T)."""

    @property
    def axis(self) -> int:
        """The time axis of the rollout."""


def checked_rows(state: PyTree, name: str, axis: int, *counts: int) -> PyTree:
    """Returns a state as arrays; raises ValueError unless it has one of these numbers of rows at an axis."""
    axis = as_int("batch_axis", axis)
    state = jax.tree.map(functools.partial(as_jax, name=name), state)
    for leaf in jax.tree.leaves(state):
        if not 0 <= axis < leaf.ndim or leaf.shape[axis] not in counts:
            raise ValueError(
                f"{name} must have {' or '.join(map(str, counts))} rows at axis {axis}, got shape {leaf.shape}. Is "
                f"batch_axis right? It is 1 for RNN, LSTM and GRU, and 0 where rows come first."
            )
    return state


def picked(state: PyTree, rows: Any, axis: int) -> PyTree:
    """Returns these rows of a state."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis, mode="clip"), state)


def started(spans: Spans, continued: PyTree, fresh: PyTree, axis: int) -> PyTree:
    """Returns a state of M rows, and in its place the fresh one where a reset begins the span.

    Args:
      spans: where the spans are.
      continued: the state, with M rows at the axis.
      fresh: None for zeros; or a state with one row, or one for each row of the rollout.
      axis: the axis of rows.
    """
    if fresh is None:
        begun = jax.tree.map(jnp.zeros_like, continued)
    else:
        fresh = checked_fresh(fresh, continued, "the state", axis, spans.shape[1 - spans.axis], 1)
        begun = picked(fresh, spans.rows, axis)
    return _where_rows(spans.begins, begun, continued, axis)


def checked_fresh(fresh: PyTree, like: PyTree, name: str, axis: int, *counts: int) -> PyTree:
    """Returns a fresh state as `checked_rows` does; raises ValueError unless its structure is that of another state."""
    found: Any = jax.tree.structure(fresh)
    expected: Any = jax.tree.structure(like)
    if found != expected:
        raise ValueError(f"fresh must have the structure of {name}, {expected}, got {found}.")
    return checked_rows(fresh, "fresh", axis, *counts)


def _where_rows(flags: jax.Array, new: PyTree, old: PyTree, axis: int) -> PyTree:
    """Returns the old state, and the new one in the rows [N] with a flag."""

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        here = jnp.reshape(flags, (1,) * axis + (-1,) + (1,) * (old.ndim - axis - 1))
        return jnp.where(here, new, old)

    return jax.tree.map(choose, new, old)


def stored(spans: Spans, states: PyTree, fresh: PyTree, batch_axis: int) -> PyTree:
    """Returns the state at the first step of each span, out of states [T, *state]; fresh where a reset begins it."""
    states = jax.tree.map(functools.partial(as_jax, name="states"), states)
    steps = spans.shape[spans.axis]
    for leaf in jax.tree.leaves(states):
        if not leaf.ndim or leaf.shape[0] != steps:
            raise ValueError(f"states must be stacked over the {steps} steps in front, got shape {leaf.shape}.")
    row_axis = as_int("batch_axis", batch_axis) + 1
    checked_rows(states, "states", row_axis, spans.shape[1 - spans.axis])

    def pick(leaf: jax.Array) -> jax.Array:
        by_row = jnp.moveaxis(leaf, row_axis, 1)[spans.starts, spans.rows]
        return jnp.moveaxis(by_row, 0, batch_axis)

    return started(spans, jax.tree.map(pick, states), fresh, batch_axis)


def checked_arrays(rollout: PyTree, spans: Spans) -> PyTree:
    """Returns arrays of a rollout; raises ValueError unless they begin with its axes."""
    arrays = jax.tree.map(functools.partial(as_jax, name="rollout"), rollout)
    for leaf in jax.tree.leaves(arrays):
        if leaf.shape[:2] != spans.shape:
            names = "[T, N, ...]" if spans.axis == 0 else "[N, T, ...]"
            raise ValueError(
                f"the rollout was cut along axis {spans.axis} as {list(spans.shape)}, so its arrays are {names}, got "
                f"shape {list(leaf.shape)}. Swap the axes (jnp.swapaxes(array, 0, 1)) or cut along the other."
            )
    return arrays
