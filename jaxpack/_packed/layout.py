"""Programs that move data between padded batches and the cells of a plan: gathers along the index maps, no checks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxpack._packed.gather import rearrange, reversed_cells
from jaxpack._packed.inputs import batch_plan
from jaxpack._packed.maps import by_cell, cells_of, room_of_slots, spread
from jaxpack._packed.packed_sequence import PackedSequence, Unsorted
from jaxpack._packed.slack import checked_slot_fits, select_or_poison, zero_slack
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._traced_checks import checked
from jaxpack._types import PyTree


@functools.partial(jax.jit, static_argnames=("plan", "sort"))
def lay_out(batch: PyTree, lengths: jax.Array, plan: BucketPlan, sort: bool = True) -> PackedSequence:
    """Packs [B, T, *F] with int32 lengths, as `pack_padded_sequence`.

    Equal lengths keep the caller's order. Without sorting, rows keep their places, which requires a plan whose slots
    all have the same room. Under the `batch_plan` slack keeps what the batch has there.
    """
    order = jnp.argsort(~lengths, stable=True) if sort else jnp.arange(len(lengths))  # ~ cannot overflow as - can
    order = order.astype(jnp.int32)
    kind = PackedSequence if sort else Unsorted
    packed = kind(None, lengths, order, jnp.argsort(order).astype(jnp.int32), plan)
    length = jax.tree.leaves(batch)[0].shape[1]
    if _is_batch(packed, length):
        return packed.replace(data=jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batch))
    places, cells = _places_of_cells(packed, length), _cells_of_steps(packed, length).reshape(-1)

    def gather(leaf: jax.Array) -> jax.Array:
        return rearrange(leaf.reshape(-1, *leaf.shape[2:]), places, cells)

    return packed.replace(data=zero_slack(packed, jax.tree.map(gather, batch)))


@functools.partial(jax.jit, static_argnames=("length", "batch_first"))
def pad(packed: PackedSequence, padding: PyTree, length: int, batch_first: bool = True) -> PyTree:
    """Computes the padded batch of `pad_packed_sequence`.

    Args:
      packed: data [S, *F].
      padding: for each array of the data a number of its dtype.
      length: the number of steps of the result.
      batch_first: whether the batch axis comes before time.

    Returns:
      [B, length, *F], or [length, B, *F] unless batch_first.
    """
    plan = packed.plan
    steps = jnp.arange(length, dtype=jnp.int32)[None]
    short = packed.lengths <= length
    if plan.num_sequences:
        short = checked(
            short,
            jnp.all(short),
            f"lengths[{{row}}] = {{length}} is above total_length = {length}.",
            row=jnp.argmin(short),
            length=packed.lengths[jnp.argmin(short)],
        )
    fits = checked_slot_fits(packed)[packed.unsorted_indices] & short
    taken = steps < packed.lengths[:, None]
    in_place = _is_batch(packed, length)
    if not in_place:
        places, cells = _places_of_cells(packed, length), _cells_of_steps(packed, length)
        taken &= cells < plan.size
    taken |= ~fits[:, None]

    def gather(leaf: jax.Array, padding: jax.Array) -> jax.Array:
        padded = leaf if in_place else rearrange(leaf, cells.reshape(-1), places)
        padded = padded.reshape(*taken.shape, *leaf.shape[1:])
        padded = select_or_poison(padded, taken, padding, fits)
        return padded if batch_first else jnp.swapaxes(padded, 0, 1)

    return jax.tree.map(gather, packed.data, padding)


@jax.jit
def reverse(packed: PackedSequence) -> PyTree:
    """Computes the data of `reverse_sequences`."""
    cells = reversed_cells(packed)
    return zero_slack(packed, jax.tree.map(lambda leaf: rearrange(leaf, cells, cells), packed.data))


def _is_batch(packed: PackedSequence, length: int) -> bool:
    """Returns whether the cells are those of a padded batch [B, length] as it is in memory."""
    number = packed.plan.num_sequences
    return not packed._is_sorted and number * length > 0 and packed.plan == batch_plan(number, length)


def _places_of_cells(packed: PackedSequence, length: int) -> jax.Array:
    """Returns the place of each cell in a flattened padded batch [B, length]: int32 [S]; B * length for none."""
    plan = packed.plan
    steps = by_cell(plan).steps
    places = spread(plan, packed.sorted_indices) * length + steps
    return jnp.where(steps < length, places, plan.num_sequences * length)


def _cells_of_steps(packed: PackedSequence, length: int) -> jax.Array:
    """Returns the cell of each step of a padded batch: int32 [B, length]; S if its slot has no room for the step."""
    plan, slots = packed.plan, packed.unsorted_indices[:, None]
    steps = jnp.arange(length, dtype=jnp.int32)[None]
    held = steps < room_of_slots(plan)[slots]
    return jnp.where(held, cells_of(plan, slots, jnp.where(held, steps, 0)), plan.size)
