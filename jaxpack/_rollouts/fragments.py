"""Rollouts cut into fragments of episodes, which are packed under a plan and put back in place.

A rollout [T, N] holds the steps of N environments. A reset begins an episode, so a fragment is what stands in a row
between two resets. `T = 4`, `N = 2`, with x at a reset:

    row 0    . . x .     fragments of 2 and 2 steps; the first continues an episode from before the rollout
    row 1    x . . .     one fragment of 4 steps

Each step of the rollout is one cell of the plan, and a cell is a step or slack. Both directions are one gather each.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt

from jaxpack._checks import as_int, at_least_one, is_traced
from jaxpack._dtypes import without_torch
from jaxpack._packed.gather import rearrange
from jaxpack._packed.host_layout import HostLayout
from jaxpack._packed.indices import same_sequences
from jaxpack._packed.packed_sequence import PackedSequence, check_packed
from jaxpack._packed.slack import zero_slack
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._plans.planners import plan_best
from jaxpack._rollouts.states import checked_arrays, checked_rows, picked, started, stored
from jaxpack._types import PyTree


class Runs(NamedTuple):
    """Runs of steps in the rows of a rollout, row by row and in time: int64 [M] each, and bool [M].

    Attributes:
      rows: the row of each.
      starts: its first step.
      lengths: the number of its steps.
      begins: whether a reset begins it; else it continues an episode.
    """

    rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    begins: np.ndarray

    @classmethod
    def of(cls, resets: np.ndarray, max_length: int | None = None) -> Runs:
        """Returns the fragments of rows [N, T], cut again after each `max_length` steps."""
        steps = np.arange(resets.shape[1])
        borders = resets | (steps == 0)
        if max_length is not None:
            begun = np.maximum.accumulate(np.where(borders, steps, 0), axis=1)
            borders |= (steps - begun) % max_length == 0
        places = np.flatnonzero(borders)
        rows, starts = np.divmod(places, max(len(steps), 1))
        return cls(rows, starts, np.diff(np.append(places, borders.size)), resets[rows, starts])


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["places", "cells", "rows", "starts", "begins", "last"],
    meta_fields=["shape", "axis", "max_length"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Fragments:
    """The fragments of a rollout: how they are packed, from which states they start, and where they belong.

    Examples:
      >>> fragments = cut_rollout([[True, False], [False, False], [True, False]], axis=0)
      >>> fragments.lengths.tolist(), fragments.begins.tolist()
      ([2, 1, 3], [True, True, False])

    A pytree, made by `cut_rollout`. Its methods run inside `jit` and outside, and are differentiable. Rollouts of one
    shape under one plan are one program.

    Attributes:
      places: packed int32 [S], the place of each cell in the rollout, flattened; T * N in slack.
      cells: int32 [T * N], the inverse: the cell of each step.
      rows: int32 [B], the row of each fragment; 0 for sequences of the plan that stay empty.
      starts: int32 [B], the first step of each fragment.
      begins: bool [B], whether a reset begins the fragment. Else it continues an episode. True for empty sequences.
      last: int32 [N], the last fragment of each row.
      shape: (T, N) or (N, T) (static).
      axis: the time axis of the rollout (static).
      max_length: the most steps of a fragment, if `cut_rollout` was given it (static).
    """

    places: PackedSequence
    cells: jax.Array
    rows: jax.Array
    starts: jax.Array
    begins: jax.Array
    last: jax.Array
    shape: tuple[int, int]
    axis: int
    max_length: int | None

    @property
    def plan(self) -> BucketPlan:
        """The plan under which fragments are packed (static)."""
        return self.places.plan

    @property
    def lengths(self) -> jax.Array:
        """The length of each fragment, row by row and in time; 0 for sequences that stay empty. int32 [B]."""
        return self.places.lengths

    def pack(self, rollout: PyTree) -> PackedSequence:
        """Packs arrays of the rollout: each fragment is a sequence.

        Examples:
          >>> resets = [[True, False], [False, False], [True, False]]
          >>> fragments = cut_rollout(resets, axis=0)
          >>> packed = fragments.pack(jnp.array([[1, 10], [2, 20], [3, 30]]))
          >>> [sequence.tolist() for sequence in jaxpack.unpack_sequence(packed)]
          [[1, 2], [3], [10, 20, 30]]

        Args:
          rollout: an array [T, N, *F] (or [N, T, *F], as the resets were), or a pytree of such arrays.

        Raises:
          ValueError: if an array does not begin with the axes of the resets.
        """
        arrays = checked_arrays(rollout, self)
        return self.places.replace(data=_pack(self, arrays))

    def restore(self, packed: PackedSequence) -> PyTree:
        """Puts packed values back in place: the inverse of `pack`, bit for bit.

        Examples:
          >>> fragments = cut_rollout([[True, False], [False, False], [True, False]], axis=0)
          >>> values = jnp.array([[1, 10], [2, 20], [3, 30]])
          >>> fragments.restore(fragments.pack(values)).tolist()
          [[1, 10], [2, 20], [3, 30]]

        Args:
          packed: data [S, *F] of these fragments, such as a layer's output for them.

        Returns:
          [T, N, *F], or [N, T, *F], as the rollout.

        Raises:
          TypeError: if given anything but a PackedSequence.
          ValueError: if it holds other sequences; if its lengths are traced, the result is NaN where they differ.
        """
        packed = check_packed(packed, "restore")
        fits = same_sequences(self.places, packed, "restore", ("the rollout has", "the batch has"))
        return _restore(self, packed, fits)

    def initial_state(self, carried: PyTree, fresh: PyTree = None, *, batch_axis: int) -> PyTree:
        """Returns the state from which each fragment starts: the row's, or a fresh one where a reset begins it.

        Examples:
          >>> fragments = cut_rollout([[True, False], [False, False], [True, False]], axis=0)
          >>> fragments.initial_state(jnp.array([[5.0], [6.0]]), batch_axis=0).tolist()
          [[0.0], [0.0], [6.0]]

        Args:
          carried: the state of each row before the first step of the rollout, with N rows at the batch axis. The final
            state of the rollout before, for example.
          fresh: the state at the beginning of an episode, with N rows or one for all. Default: zeros.
          batch_axis: 1 for the states of RNN, LSTM and GRU, [num_layers * D, N, H]; 0 where N comes first.

        Returns:
          The same pytree with B rows, one for each fragment.

        Raises:
          ValueError: if a state has another number of rows, fresh has another structure, or fragments have a
            max_length, and so begin inside episodes.
        """
        if self.max_length is not None:
            raise ValueError(
                f"these fragments have max_length={self.max_length}, so some begin inside the rollout, where the state "
                f"of its first step is not theirs. Give the states of all steps to stored_state."
            )
        carried = checked_rows(carried, "carried", batch_axis, self.shape[1 - self.axis])
        return started(self, picked(carried, self.rows, batch_axis), fresh, batch_axis)

    def stored_state(self, states: PyTree, fresh: PyTree = None, *, batch_axis: int) -> PyTree:
        """Returns the state from which each fragment starts, out of those that were stored before every step.

        Where a reset begins a fragment it is fresh, whether states were stored before the reset or after it.

        Examples:
          >>> fragments = cut_rollout([[True, False, False, True]], axis=1, max_length=2)
          >>> fragments.lengths.tolist()
          [2, 1, 1]
          >>> states = jnp.array([[[10.0]], [[11.0]], [[12.0]], [[13.0]]])  # [T, N, H]
          >>> fragments.stored_state(states, batch_axis=0).tolist()
          [[0.0], [12.0], [0.0]]

        Args:
          states: the states before each step, stacked in front as jax.lax.scan does: [T, *state].
          fresh, batch_axis: as in `initial_state`; batch_axis counts the axes of one state, without T.

        Raises:
          ValueError: as `initial_state`, and if states have another number of steps.
        Source: Kapturowski et al. 2019, R2D2 (https://openreview.net/forum?id=r1lyTjAqYX).
        """
        return stored(self, states, fresh, batch_axis)

    def final_state(self, state: PyTree, *, batch_axis: int) -> PyTree:
        """Returns the state of each row after its last step, to carry to the next rollout.

        Examples:
          >>> fragments = cut_rollout([[True, False], [False, False], [True, False]], axis=0)
          >>> fragments.final_state(jnp.array([[1.0], [2.0], [3.0]]), batch_axis=0).tolist()
          [[2.0], [3.0]]

        Args:
          state: the final state of each fragment, as a layer returns it, with B rows at the batch axis.
          batch_axis: as in `initial_state`.

        Raises:
          ValueError: if state has another number of rows.
        """
        return picked(checked_rows(state, "state", batch_axis, len(self.rows)), self.last, batch_axis)


def cut_rollout(
    resets: npt.ArrayLike, *, axis: int, plan: BucketPlan | None = None, max_length: int | None = None
) -> Fragments:
    """Cuts a rollout into fragments of episodes, and lays these out under a plan.

    A recurrence over the fragments has as many steps one after the other as the plan, at least those of the longest
    fragment, where a recurrence over the rollout has T.

    Examples:
      >>> resets = np.zeros((2, 8), bool)  # [N, T]
      >>> resets[:, ::2] = True  # episodes of two steps
      >>> fragments = cut_rollout(resets, axis=1, plan=jaxpack.plan_padded(8, 2))
      >>> fragments.plan.num_steps, fragments.lengths.tolist()
      (2, [2, 2, 2, 2, 2, 2, 2, 2])

      A layer for it, and values back in place:

      >>> layer = jaxpack.GRU(3, 4)
      >>> params = layer.init(jax.random.key(0))
      >>> state = fragments.initial_state(jnp.zeros((1, 2, 4)), batch_axis=1)
      >>> output, final = layer.apply(params, fragments.pack(jnp.ones((2, 8, 3))), state)
      >>> fragments.restore(output).shape, fragments.final_state(final, batch_axis=1).shape
      ((2, 8, 4), (1, 2, 4))

    Args:
      resets: bool [T, N] or [N, T], concrete: True where a step begins an episode, as `resets_from_dones` returns it.
      axis: the time axis: 0 for [T, N], 1 for [N, T].
      plan: a plan that the fragments fit, with at least as many sequences. Default: plan_best of their lengths, which
        is a program for each rollout. For one program give jaxpack.data.plan_cover(lengths, batch_size, miss=...) of
        the `fragment_lengths` of a few rollouts.
      max_length: cut fragments again after so many steps. The pieces start from stored states (`stored_state`), and no
        gradient passes between them.

    Raises:
      TypeError: if resets are traced or not bool, axis or max_length are not ints, or plan is not a BucketPlan.
      ValueError: if resets are not two axes with at least one step and one row, axis is neither 0 nor 1, max_length is
        below 1, or the fragments do not fit the plan.
    """
    rows = rows_of_resets(resets, axis)
    limit = None if max_length is None else at_least_one("max_length", max_length)
    spans = Runs.of(rows, limit)
    if plan is None:
        plan = plan_best(spans.lengths)
    if not isinstance(plan, BucketPlan):
        raise TypeError(f"plan must be a jaxpack.BucketPlan, got {type(plan).__name__}.")
    plan.check(spans.lengths)
    layout = HostLayout.of(spans.lengths, plan)
    cells = layout.cells.reshape(rows.shape)
    by_step = (cells.T if axis == 0 else cells).reshape(-1)
    places = np.full(plan.size, rows.size, np.int32)
    places[by_step] = np.arange(rows.size)
    empty = (0, plan.num_sequences - len(spans.rows))
    last = np.searchsorted(spans.rows, np.arange(len(rows)), side="right") - 1
    fields: dict[str, Any] = {
        "cells": by_step.astype(np.int32),
        "rows": np.pad(spans.rows, empty).astype(np.int32),
        "starts": np.pad(spans.starts, empty).astype(np.int32),
        "begins": np.pad(spans.begins, empty, constant_values=True),
        "last": last.astype(np.int32),
    }
    shape = rows.shape[::-1] if axis == 0 else rows.shape
    packed = layout.packed(places)
    return jax.device_put(Fragments(packed, **fields, shape=shape, axis=axis, max_length=limit))


def fragment_lengths(resets: npt.ArrayLike, *, axis: int, max_length: int | None = None) -> np.ndarray:
    """Returns the lengths of the fragments of a rollout, row by row and in time: what plans are made for.

    Examples:
      >>> fragment_lengths([[True, False], [False, False], [True, False]], axis=0).tolist()
      [2, 1, 3]

    Args and errors: as `cut_rollout`.
    """
    limit = None if max_length is None else at_least_one("max_length", max_length)
    return Runs.of(rows_of_resets(resets, axis), limit).lengths


def rows_of_resets(resets: npt.ArrayLike, axis: int) -> np.ndarray:
    """Validates resets, and returns them as rows, bool [N, T]."""
    if is_traced(resets):
        raise TypeError(
            "resets are traced, but a rollout is cut by their values: cut it outside jit. Inside, pass resets= to the "
            "layer, which runs the rollout as it is."
        )
    array = np.asarray(without_torch(resets))
    if array.dtype != bool:
        raise TypeError(f"resets must be bool, got dtype {array.dtype}. Of zeros and ones write resets.astype(bool).")
    if array.ndim != 2 or not array.size:
        raise ValueError(f"resets must be [T, N] or [N, T], at least one step and one row, got {list(array.shape)}.")
    return array.T if checked_axis(axis) == 0 else array


def checked_axis(axis: int) -> int:
    """Returns the time axis of a rollout. Raises ValueError unless it is 0 or 1, TypeError unless it is an int."""
    axis = as_int("axis", axis)
    if axis not in (0, 1):
        raise ValueError(f"axis must be 0 for a rollout [T, N], or 1 for [N, T], got {axis}.")
    return axis


@jax.jit
def _pack(fragments: Fragments, arrays: PyTree) -> PyTree:
    """Computes the data of `Fragments.pack`."""

    def gather(leaf: jax.Array) -> jax.Array:
        return rearrange(leaf.reshape(-1, *leaf.shape[2:]), fragments.places.data, fragments.cells)

    return jax.tree.map(gather, arrays)


@jax.jit
def _restore(fragments: Fragments, packed: PackedSequence, fits: jax.Array | None) -> PyTree:
    """Computes `Fragments.restore`."""

    def gather(leaf: jax.Array) -> jax.Array:
        return rearrange(leaf, fragments.cells, fragments.places.data).reshape(*fragments.shape, *leaf.shape[1:])

    return jax.tree.map(gather, zero_slack(packed, packed.data, fits))
