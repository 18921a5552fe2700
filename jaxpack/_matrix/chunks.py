"""Chunks: a recurrence over chunks of consecutive steps, each of one sequence.

The room of every slot is rounded up to whole chunks, so a chunk belongs to one sequence: borders between sequences are
borders between chunks, where `scan_slots` starts a slot with its initial state and collects its final one. The chunks
of a batch are the cells of a plan of their own. A rule computes a chunk in matrix products, and the state that it
passes on. Only that state is saved for the backward pass: one for each chunk, where a step by step recurrence saves one
for each step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpack._packed.broadcast import expand, vary_like
from jaxpack._packed.gather import Indexed, real_cells, rearrange, slot_spans
from jaxpack._packed.maps import by_cell, cells_of, room_of_slots
from jaxpack._packed.resets import Entering
from jaxpack._packed.rows import end_to_end
from jaxpack._packed.scan import Starts, scan_of, scan_slots
from jaxpack._packed.slack import in_caller_order
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree

_SIZES = (1, 2, 4, 8, 16, 32, 64)
_STATE_COST = 32  # saving, reading and writing a state costs as much as this number of products with it


class Chunk(NamedTuple):
    """A chunk of each of R rows.

    Attributes:
      arrays: what a rule reads at each step, leaves [R, C, ...]; zero at steps past a sequence's end.
      real: bool [R, C], whether there is a step.
      episodes: int32 [R, C], the number of episodes that have begun in the chunk, this step's included; None if all of
        its steps follow the state that is passed to it.
    """

    arrays: dict[str, jax.Array]
    real: jax.Array
    episodes: jax.Array | None


# rule(state, fresh, chunk) -> (state, outputs [R, C, ...]): leaves of the states are [R, ...].
Rule = Callable[[PyTree, PyTree, Chunk], tuple[PyTree, jax.Array]]


def scan_chunks(
    rule: Rule, packed: Indexed, arrays: dict[str, jax.Array], entering: Entering, starts: jax.Array | None, size: int
) -> tuple[jax.Array, PyTree]:
    """Runs a rule over the chunks of each sequence.

    Args:
      rule: computes a chunk.
      packed: the batch, of at least one sequence.
      arrays: what the rule reads, leaves [S, ...]; slack may hold anything.
      entering: the states with which sequences and episodes begin, leaves [B, ...] in the caller's order.
      starts: bool [S], the cells at which an episode begins; None for none.
      size: the number of steps of a chunk.

    Returns:
      The outputs [S, ...], arbitrary in slack; and the final state, leaves [B, ...] in the caller's order.
    """
    plan = packed.plan
    chunks, cells, places = _layout(plan, size)
    real = real_cells(packed)
    empty = (slot_spans(packed) == 0)[packed.unsorted_indices]
    used = jax.tree.map(lambda leaf: jnp.where(expand(empty, leaf), 0, leaf), entering)  # others may be NaN
    by_slot, fresh = jax.tree.map(lambda leaf: leaf[packed.sorted_indices], vary_like(used, arrays))

    def gathered(leaf: jax.Array) -> jax.Array:
        leaf = jnp.where(expand(real, leaf), leaf, jnp.zeros_like(leaf))
        moved = rearrange(leaf, cells, places)
        return moved.reshape(chunks.size, size, *leaf.shape[1:])

    episodes = None if starts is None else jnp.cumsum(gathered(starts).astype(jnp.int32), 1)
    inputs = Chunk(jax.tree.map(gathered, arrays), gathered(real), episodes)

    @jax.checkpoint
    def step(carry: tuple[PyTree, PyTree], chunk: Chunk) -> tuple[tuple[PyTree, PyTree], jax.Array]:
        state, start = carry
        state, outputs = rule(state, state if chunk.episodes is None else start, chunk)
        return (state, start), outputs

    carry = by_slot, None if starts is None else by_slot if fresh is None else fresh
    everywhere = vary_like(jnp.ones(chunks.size, bool), inputs.real)
    (final, _), outputs = scan_slots(scan_of(step), Starts(carry, carry, carry), inputs, everywhere, chunks)
    outputs = outputs.reshape(chunks.size * size, *outputs.shape[2:])
    final = jax.tree.map(
        lambda leaf, old: jnp.where(expand(empty, leaf), old, leaf), in_caller_order(packed, final), entering.initial
    )
    return rearrange(outputs, places, cells), final


def chunk_size(plan: BucketPlan, key_size: int, value_size: int, per_key: bool = False) -> int:
    """Returns the number of steps of a chunk, of those in `_SIZES`, with which the plan costs least.

    A chunk of C steps costs C² (K + V) products among its steps, 2 C K V with the state, and the state's traffic.

    Args:
      plan: the plan.
      key_size, value_size: the shape K, V of the state of a head.
      per_key: whether each key has a decay of its own, for which the products among steps are C² K exponentials.
    """
    state, among = key_size * value_size, (16 * key_size if per_key else key_size) + value_size

    def cost(size: int) -> int:
        chunks = int((-(-plan.room // size)).sum())
        return chunks * (size * size * among + 2 * size * state + _STATE_COST * state)

    return min(_SIZES, key=cost)


@functools.lru_cache(maxsize=64)
def _chunk_plan(plan: BucketPlan, size: int) -> BucketPlan:
    """Returns the plan of chunks, of which a cell is one."""
    room = -(-plan.room // size)
    return end_to_end(room, int(room[0]))


def _layout(plan: BucketPlan, size: int) -> tuple[BucketPlan, jax.Array, jax.Array]:
    """Returns the plan of chunks; for each of their N * C steps its cell, S for none; for each cell its step."""
    chunks = _chunk_plan(plan, size)
    slots, index = (leaf[:, None] for leaf in by_cell(chunks))
    steps = index * size + jnp.arange(size, dtype=jnp.int32)[None]
    inside = steps < room_of_slots(plan)[slots]
    cells = jnp.where(inside, cells_of(plan, slots, jnp.where(inside, steps, 0)), plan.size)
    slots, steps = by_cell(plan)
    return chunks, cells.reshape(-1), cells_of(chunks, slots, steps // size) * size + steps % size


def first_episode(chunk: Chunk) -> Any:
    """Returns which steps follow the state that is passed to the chunk: bool [R, C]; True if all do."""
    return True if chunk.episodes is None else chunk.episodes == 0
