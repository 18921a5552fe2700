"""Rows of several sequences, end to end: the layout of attention, [R, T, ...] with segment ids and positions."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpack._dtypes import as_jax
from jaxpack._packed.gather import real_cells, rearrange
from jaxpack._packed.maps import by_cell, cells_of, room_of_slots, spread
from jaxpack._packed.packed_sequence import PackedSequence, check_packed
from jaxpack._packed.slack import zero_slack
from jaxpack._plans.best_fit import Distinct, best_fit, slot_starts
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree


class Rows(NamedTuple):
    """A packed batch as R rows of T steps, each row with several sequences end to end; made by `to_rows`.

    Examples:
      >>> isinstance(jaxpack.to_rows(jaxpack.pack_sequence([[1, 2, 3], [4]])), jaxpack.Rows)
      True

    Attributes:
      data: [R, T, *F], or a pytree of such arrays; zero in slack.
      segment_ids: int32 [R, T], from 1 on in the order of the sequences in a row, 0 in slack.
      positions: int32 [R, T], the step of each cell in its own sequence, 0 in slack.
    """

    data: PyTree
    segment_ids: jax.Array
    positions: jax.Array


def to_rows(packed: PackedSequence) -> Rows:
    """Lays out a packed batch as rows, for attention and other functions that take segment ids.

    A plan of one bucket (`plan_rows`, `plan_padded`) keeps its rows. The sequences of a staircase are placed end to end
    by best fit, in rows as long as its longest. The shapes follow from the plan alone.

    Examples:
      >>> packed = jaxpack.pack_sequence([[1, 2, 3, 4], [5, 6], [7]])
      >>> rows = jaxpack.to_rows(packed)
      >>> rows.data.tolist(), rows.segment_ids.tolist(), rows.positions.tolist()
      ([[1, 2, 3, 4], [5, 6, 7, 0]], [[1, 1, 1, 1], [1, 1, 2, 0]], [[0, 1, 2, 3], [0, 1, 0, 0]])

    The same arrays fit other functions of rows:

    - `jax.nn.dot_product_attention` and Flax's attention take `mask=`, bool [R, 1, T, T], where
      `segment_ids[:, None, :, None] == segment_ids[:, None, None, :]`. `flax.nnx.make_attention_mask(segment_ids,
      segment_ids, jnp.equal)` makes it, `make_causal_mask` and `combine_masks` add to it. (`attention` does this.)
    - Pallas's TPU kernels (`jax.experimental.pallas.ops.tpu.flash_attention` and `splash_attention`) take
      `SegmentIds(q=segment_ids, kv=segment_ids)`, and data as [R, heads, T, head size]. They need T to be a multiple of
      their block, which a plan of one bucket settles: `BucketPlan((T,), ...)`.
    - Positions are for rotary or learnt position embeddings. (`rotary` embeds packed data itself.)

    Args:
      packed: data [S, *F].

    Returns:
      `Rows`. Sequences that do not fit the plan are NaN, which attention would spread over their row; `attention`
      confines it.

    Raises:
      TypeError: if given a padded array (pass it through pack_padded_sequence first).
    Source: segment ids as in jax.experimental.pallas.ops.tpu.flash_attention and T5X's packed examples.
    """
    return _to_rows(check_packed(packed, "to_rows"))


@jax.jit
def _to_rows(packed: PackedSequence) -> Rows:
    plan, mask = packed.plan, real_cells(packed)
    ids, steps = (jnp.where(mask, values, 0) for values in (segment_ids(plan), by_cell(plan).steps))
    return jax.tree.map(functools.partial(into_rows, plan), Rows(zero_slack(packed, packed.data), ids, steps))


def from_rows(data: PyTree, packed: PackedSequence) -> PackedSequence:
    """Packs rows again: the inverse of `to_rows`.

    Examples:
      >>> packed = jaxpack.pack_sequence([[1, 2, 3], [4]])
      >>> jaxpack.unpack_sequence(jaxpack.from_rows(jaxpack.to_rows(packed).data * 2, packed))[0].tolist()
      [2, 4, 6]

    Args:
      data: [R, T, *G], or a pytree of such arrays, in the rows of `to_rows(packed)`. What is in slack is dropped.
      packed: the batch of which they are rows, whose data is not read.

    Returns:
      data [S, *G], packed like the batch.

    Raises:
      TypeError: if packed is not a PackedSequence.
      ValueError: if the leading axes of an array are not R and T.
    """
    packed = check_packed(packed, "from_rows")
    data = jax.tree.map(functools.partial(as_jax, name="data"), data)
    shape = rows_shape(packed.plan)
    for leaf in jax.tree.leaves(data):
        if leaf.shape[:2] != shape:
            raise ValueError(
                f"from_rows: data must be rows of to_rows(packed), [{shape[0]}, {shape[1]}, ...], "
                f"got shape {leaf.shape}."
            )
    return packed.replace(data=_from_rows(data, packed.replace(data=None)))


@jax.jit
def _from_rows(data: PyTree, packed: PackedSequence) -> PyTree:
    return zero_slack(packed, jax.tree.map(functools.partial(out_of_rows, packed.plan), data))


def rows_shape(plan: BucketPlan) -> tuple[int, int]:
    """Returns the number of rows R and of steps T of a plan's rows."""
    rows = rows_plan(plan)
    return rows.rows[0], rows.num_steps


def into_rows(plan: BucketPlan, leaf: jax.Array) -> jax.Array:
    """Moves cells [S, ...] to rows [R, T, ...], zero where there is no cell."""
    shape = rows_shape(plan)
    if plan.num_buckets == 1:
        return jnp.swapaxes(leaf.reshape(*shape[::-1], *leaf.shape[1:]), 0, 1)
    cells, places = _moves(plan)
    return rearrange(leaf, cells, places).reshape(*shape, *leaf.shape[1:])


def out_of_rows(plan: BucketPlan, leaf: jax.Array) -> jax.Array:
    """Moves rows [R, T, ...] to cells [S, ...]."""
    flat = (-1, *leaf.shape[2:]) if leaf.size else (plan.size, *leaf.shape[2:])
    if plan.num_buckets == 1:
        return jnp.swapaxes(leaf, 0, 1).reshape(flat)
    cells, places = _moves(plan)
    return rearrange(leaf.reshape(flat), places, cells)


@functools.lru_cache(maxsize=64)
def rows_plan(plan: BucketPlan) -> BucketPlan:
    """Returns a plan of one bucket with the same slots: slot i has at least the room that it has in the given plan."""
    return plan if plan.num_buckets == 1 else end_to_end(plan.room, plan.num_steps)


def end_to_end(room: np.ndarray, width: int) -> BucketPlan:
    """Returns a plan of one bucket of a width, whose slot i has at least room[i]: [B], not increasing, at least 1."""
    dealt = best_fit(Distinct.of(room), width)
    return BucketPlan((width,), (dealt.num_rows,), slot_starts(dealt, sort_rows=False))


def ranks_in_row(plan: BucketPlan) -> np.ndarray:
    """Returns the place of each slot among those of its row in `rows_plan`, from 0 on: int32 [B]."""
    rows = rows_plan(plan)
    order = np.lexsort((rows.slot_starts, rows.slot_rows))
    counts = np.bincount(rows.slot_rows, minlength=1)
    ranks = np.empty(len(order), np.int32)
    ranks[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ranks


def segment_ids(plan: BucketPlan) -> jax.Array:
    """Returns the place of each cell's slot among those of its row in `rows_plan`, from 1 on: int32 [S]."""
    return spread(plan, jnp.asarray(ranks_in_row(plan))) + 1


def _moves(plan: BucketPlan) -> tuple[jax.Array, jax.Array]:
    """Returns the cell of each place in the rows, int32 [R * T] (S for none), and the place of each cell, [S]."""
    rows = rows_plan(plan)
    slots, steps = by_cell(rows)
    inside = steps < room_of_slots(plan)[slots]
    cells = jnp.where(inside, cells_of(plan, slots, jnp.where(inside, steps, 0)), plan.size)
    across = cells_of(rows, *by_cell(plan))  # step by step, all rows at once
    places = across % rows.rows[0] * rows.num_steps + across // rows.rows[0]
    return jnp.swapaxes(cells.reshape(rows.num_steps, -1), 0, 1).reshape(-1), places
