"""Maps of a plan inside a program: the slot and the step of each cell, and the room of each slot.

A map of few cells is a constant of the program. A program computes larger ones from the plan's buckets and, where slots
share rows, from arrays with an entry for each slot, so that its text, and every export and cache entry, does not grow
with the cells. A constant is a jitted function of the plan: the text of a program holds it once, whoever asks for it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpack._plans.bucket_plan import BucketPlan

# At most so many cells have constants, 4 bytes of text each. A computed map costs up to 1 ns a cell, where functions of
# one feature take 5 to 10: of 40,000 cells such a function took up to 1.2 times as long in buckets, and 1.4 in rows.
MOST_CONSTANT = 32_768
_FEW_BUCKETS = 32  # at most so many are laid out one by one; more would make a long program


class ByCell(NamedTuple):
    """The slot that each cell belongs to, and the cell's step within the slot: int32 [S] each."""

    slots: jax.Array
    steps: jax.Array


@functools.partial(jax.jit, static_argnames="plan")
def by_cell(plan: BucketPlan) -> ByCell:
    """Returns the slot and the step of each cell."""
    if plan.size <= MOST_CONSTANT:
        return ByCell(_constant(plan, "cell_slots"), _constant(plan, "cell_steps"))
    if plan.starts:
        return _of_shared_rows(plan)
    if plan.num_buckets > _FEW_BUCKETS:
        return _of_many_buckets(plan)
    return ByCell(_laid_out(plan, 1), _laid_out(plan, 0))


def cells_of(plan: BucketPlan, slots: jax.Array, steps: jax.Array | int) -> jax.Array:
    """Returns the cells of steps of slots: dynamic indices of one shape, with steps below the room of their slot."""
    if plan.starts:
        rows, starts = _rows_and_starts(plan)
        slots, steps = rows[slots], starts[slots] + steps
    if plan.num_buckets == 1:
        return plan.rows[0] * steps + slots
    return _constant(plan, "step_offsets")[jnp.asarray(steps)] + slots


def room_of_slots(plan: BucketPlan) -> jax.Array:
    """Returns how many steps the sequence in each slot may have: int32 [B]."""
    return _constant(plan, "room")


def spread(plan: BucketPlan, values: jax.Array) -> jax.Array:
    """Returns at each cell the value of its slot: [S, ...] from [B, ...]."""
    return take(values, by_cell(plan).slots)


def take(values: jax.Array, indices: jax.Array) -> jax.Array:
    """Returns values[indices] for indices that follow from a plan alone: all are in range."""
    return values.at[indices].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _laid_out(plan: BucketPlan, axis: int) -> jax.Array:
    """Returns the step (axis 0) or the row (axis 1) of each cell, written bucket by bucket."""
    blocks = [lax.broadcasted_iota(jnp.int32, (bucket.steps, bucket.rows), axis) for bucket in plan.buckets]
    if len(blocks) == 1:
        # Looked up in a table, because XLA computes a gather once, but an iota anew for whatever reads it.
        table = lax.optimization_barrier(lax.iota(jnp.int32, blocks[0].shape[axis]))
        return take(table, blocks[0].reshape(-1))
    # For the same reason, and because a concatenation asks at each cell which part it belongs to.
    cells = jnp.zeros(plan.size, jnp.int32)
    for block, bucket in zip(blocks, plan.buckets, strict=True):
        block = block.reshape(-1) if axis else block.reshape(-1) + bucket.start
        cells = lax.dynamic_update_slice(cells, block, (bucket.offset,))
    return cells


def _of_many_buckets(plan: BucketPlan) -> ByCell:
    """Computes `by_cell` from the first cell of each step."""
    offsets = lax.optimization_barrier(_constant(plan, "step_offsets")[:-1])
    steps = _fill(plan.size, offsets, 1, plan.rows[0])
    return ByCell(lax.iota(jnp.int32, plan.size) - take(offsets, steps), steps)


def _of_shared_rows(plan: BucketPlan) -> ByCell:
    """Computes `by_cell` from the slots of each row, in the rectangle that holds all buckets."""
    num_rows, shape = plan.rows[0], (plan.num_steps, plan.rows[0])
    slots, rows, starts = _slots_by_row(plan)
    numbers = _fill(shape[0] * shape[1], starts * num_rows + rows, num_rows, plan.max_length)
    times = lax.broadcasted_iota(jnp.int32, shape, 0).reshape(-1)
    rectangle = ByCell(take(slots, numbers), times - take(starts, numbers))
    if plan.num_buckets == 1:
        return rectangle

    def cut(cells: jax.Array) -> jax.Array:
        cells = cells.reshape(shape)
        blocks = [cells[bucket.start : bucket.stop, : bucket.rows].reshape(-1) for bucket in plan.buckets]
        return lax.concatenate(blocks, 0)

    return ByCell(*map(cut, rectangle))


def _rows_and_starts(plan: BucketPlan) -> tuple[jax.Array, jax.Array]:
    """Returns the row and the first step of each slot: int32 [B] each."""
    if plan.size <= MOST_CONSTANT:
        return _constant(plan, "slot_rows"), _constant(plan, "slot_starts")
    slots, rows, starts = _slots_by_row(plan)
    zeros = jnp.zeros_like(slots)
    return zeros.at[slots].set(rows, unique_indices=True), zeros.at[slots].set(starts, unique_indices=True)


def _slots_by_row(plan: BucketPlan) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns `plan.slots_by_row`, and the row and the first step of each of these slots: int32 [B] each."""
    # Behind a barrier, or XLA would compute all that follows while it compiles, and keep it as a constant.
    slots, firsts, room = lax.optimization_barrier(
        (_constant(plan, "slots_by_row"), _constant(plan, "row_firsts"), room_of_slots(plan))
    )
    rows = _fill(plan.num_sequences, firsts, 1, max(map(len, plan.starts)))
    room = take(room, slots)
    before = lax.cumsum(room) - room  # steps of all slots before, of which a row's own begin with its first slot
    return slots, rows, before - take(take(before, firsts), rows)


def _fill(size: int, begins: jax.Array, stride: int, longest: int) -> jax.Array:
    """Returns for each cell the number of the last begin that is at it, or a multiple of the stride before it.

    Each of a logarithm of passes doubles the reach. JAX's running maximum took five times as long, and a binary
    search for each cell twenty times.

    Args:
      size: the number of cells S.
      begins: int32 [N], cells; of two that are strides apart the later one has the larger number.
      stride: the distance to the next cell that the same begin counts for.
      longest: for how many cells a begin counts at most.

    Returns:
      int32 [S].
    """
    dtype = np.min_scalar_type(len(begins))  # of two bytes rather than four, passes take half as long
    numbers = lax.iota(dtype, len(begins))
    cells = jnp.zeros(size, dtype).at[begins].set(numbers, mode="promise_in_bounds", unique_indices=True)
    reach = stride
    while reach < longest * stride:
        later = lax.max(cells[reach:], cells[:-reach])
        cells = lax.optimization_barrier(lax.concatenate([cells[:reach], later], 0))
        reach *= 2
    return lax.convert_element_type(cells, jnp.int32)


@functools.partial(jax.jit, static_argnames=("plan", "name"))
def _constant(plan: BucketPlan, name: str) -> jax.Array:
    """Returns an array of a plan as int32, which the text holds in as few bytes as its largest entry needs."""
    array = getattr(plan, name)
    return lax.convert_element_type(jnp.asarray(array.astype(np.min_scalar_type(array.max(initial=0)))), jnp.int32)
