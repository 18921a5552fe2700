"""Index maps between the caller's rows, slots and cells, and moves along them."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree

PACK_ANEW = "For arithmetic write packed + other, for functions of data packed.map(fn, *others); else pack anew."


class Indexed(Protocol):
    """The part of a PackedSequence that index maps are computed from."""

    @property
    def lengths(self) -> jax.Array:
        """int32 [B], in the caller's order."""

    @property
    def sorted_indices(self) -> jax.Array:
        """int32 [B], the caller's row in each slot."""

    @property
    def unsorted_indices(self) -> jax.Array:
        """int32 [B], the slot of each of the caller's rows."""

    @property
    def plan(self) -> BucketPlan:
        """The static shape."""

    @property
    def _is_sorted(self) -> bool:
        """Whether slots are in the order of lengths."""


class Cells(Indexed, Protocol):
    """A PackedSequence with its data."""

    @property
    def data(self) -> PyTree:
        """[S, *F], or a pytree of such arrays."""


def slot_lengths(packed: Indexed) -> jax.Array:
    """int32 [B]: the length in each slot, longest first."""
    return jnp.asarray(packed.lengths)[packed.sorted_indices]


def slot_fits(packed: Indexed) -> jax.Array:
    """bool [B]: which slots hold a sequence that fits them; none, if lengths and indices do not belong together."""
    lengths = slot_lengths(packed)
    return (lengths >= 0) & (lengths <= packed.plan.room) & consistent(packed)


def consistent(packed: Indexed) -> jax.Array:
    """bool: whether the permutations are inverse to each other, and bring the longest first."""
    order, slots = jnp.asarray(packed.sorted_indices), jnp.asarray(packed.unsorted_indices)
    rows = jnp.arange(len(order), dtype=slots.dtype)
    inverse = (order[slots] == rows) & (slots >= 0) & (slots < len(order))  # then sorted_indices are in range, too
    ranked = jnp.asarray(packed.lengths)[order]
    return inverse.all() & (not packed._is_sorted or (ranked[1:] <= ranked[:-1]).all())


def slot_spans(packed: Indexed) -> jax.Array:
    """int32 [B]: how many cells of each slot count as real: its length, or all if its sequence does not fit."""
    return jnp.where(slot_fits(packed), slot_lengths(packed), packed.plan.room)


def real_cells(packed: Indexed) -> jax.Array:
    """bool [S]: what `PackedSequence.mask` is."""
    return slot_spans(packed)[packed.plan.cell_slots] > packed.plan.cell_steps


def reversed_cells(packed: Indexed) -> jax.Array:
    """int32 [S]: for each cell, the cell that takes its place when valid spans are reversed. A permutation."""
    plan = packed.plan
    lengths = jnp.where(slot_fits(packed), slot_lengths(packed), 0)[plan.cell_slots]
    steps = jnp.where(lengths > plan.cell_steps, lengths - 1 - plan.cell_steps, plan.cell_steps)
    return cells_of(plan, plan.cell_slots, steps)


def cells_of(plan: BucketPlan, slots: ArrayLike, steps: ArrayLike) -> jax.Array:
    """The cell of a step of a slot. Dynamic indices of any one shape; steps must lie within the slot's room."""
    offsets, starts, rows = (jnp.asarray(a) for a in (plan.step_offsets, plan.slot_starts, plan.slot_rows))
    return offsets[starts[slots] + steps] + rows[slots]


def rearrange(leaf: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """Moves entries of the leading axis, each to at most one place: row i of the result is leaf[source[i]].

    Args:
      leaf: [N, ...].
      source: int [M], which entry of the leaf each row of the result is; N or more for none, which makes it 0.
      target: int [N], the inverse: the row of the result that each entry goes to; M or more for none.

    The derivative is written as a scatter, whose transpose is a gather, where JAX would transpose the gather to a
    scatter, which a CPU does row by row (training from padded inputs to padded outputs took 10 to 20 % longer).
    """
    if not (len(source) and len(target)):  # nothing to move, and nothing that JAX could index
        return lax.full_like(leaf, 0, shape=(len(source), *leaf.shape[1:]))
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf.at[source].get(mode="fill", fill_value=0)
    return _rearrange(leaf, source, target)


@jax.custom_jvp
def _rearrange(leaf: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    return leaf.at[source].get(mode="fill", fill_value=0)


@_rearrange.defjvp
def _rearrange_jvp(primals: tuple[jax.Array, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    leaf, source, target = primals
    result = _rearrange(leaf, source, target)
    zeros = jnp.zeros_like(result)
    return result, zeros.at[target].set(tangents[0], mode="drop", unique_indices=True)
