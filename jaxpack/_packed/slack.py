"""Slack and misfits: what fills slack before a function sees it, and what is made of its results."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import checkify

from jaxpack._packed.broadcast import expand
from jaxpack._packed.gather import (
    PACK_ANEW,
    Cells,
    Indexed,
    cells_of,
    consistent,
    real_cells,
    slot_fits,
    slot_lengths,
)
from jaxpack._types import PyTree


def fill_slack(packed: Cells) -> PyTree:
    """The data with slack replaced by real cells: each sequence's first, or any sequence's if it has none.

    No constant is a safe stand-in for a user's function (log of 0, 1 / (1 - x) of 1): its gradient would be NaN even
    where a `where` discards its value. Data is; and stop_gradient keeps it out of the gradient.
    """
    plan, mask = packed.plan, real_cells(packed)
    if not plan.size:
        return packed.data
    slots = stand_in_slots(packed)[plan.cell_slots]
    any_real = jnp.any(slot_lengths(packed) > 0)

    def replace(leaf: jax.Array) -> jax.Array:
        real = lax.stop_gradient(leaf)[cells_of(plan, slots, 0)]
        return jnp.where(expand(mask, leaf), leaf, jnp.where(any_real, real, jnp.ones_like(real)))

    return jax.tree.map(replace, packed.data)


def stand_in_slots(packed: Indexed) -> jax.Array:
    """int32 [B]: for each slot one that holds a real first step: itself, or the longest if its sequence is empty."""
    lengths = slot_lengths(packed)
    slots = jnp.arange(packed.plan.num_sequences, dtype=jnp.int32)
    return jnp.where(lengths > 0, slots, jnp.argmax(lengths).astype(jnp.int32))


def zero_slack(packed: Indexed, cells: PyTree, also: jax.Array | None = None) -> PyTree:
    """Values per cell [S, ...] with slack set to zero and sequences that do not fit set to NaN.

    Args:
      also: bool [B], which slots meet a further condition, if there is one.
    """
    fits = checked_slot_fits(packed) if also is None else checked_slot_fits(packed) & also
    mask, fits = real_cells(packed), fits[packed.plan.cell_slots]
    return jax.tree.map(lambda leaf: select_or_poison(leaf, mask, jnp.zeros_like(leaf), fits), cells)


def in_caller_order(packed: Indexed, states: PyTree) -> PyTree:
    """Values per slot [B, ...] brought to the caller's order, those of sequences that do not fit set to NaN."""
    fits = checked_slot_fits(packed)
    return jax.tree.map(lambda leaf: poison(leaf, fits)[packed.unsorted_indices], states)


def checked_slot_fits(packed: Indexed) -> jax.Array:
    """bool [B]: which slots hold a sequence that fits. Under checkify a misfit is an error."""
    fits = slot_fits(packed)
    if not len(fits):
        return fits
    belong = consistent(packed)
    checkify.debug_check(
        belong,
        f"lengths, sorted_indices and unsorted_indices do not belong together: {PACK_ANEW}",
    )
    slot = jnp.argmin(fits)
    checkify.debug_check(
        jnp.all(fits) | ~belong,
        "lengths[{row}] = {length} does not fit the plan: its row has room for {room} steps (a negative length was "
        "below 0, or longer than its padded batch). Use a plan that covers it (jaxpack.plan_buckets(lengths)) or "
        "truncate the sequence.",
        row=packed.sorted_indices[slot],
        length=slot_lengths(packed)[slot],
        room=jnp.asarray(packed.plan.room)[slot],
    )
    return fits


def select_or_poison(leaf: jax.Array, taken: jax.Array, filling: jax.Array, fits: jax.Array) -> jax.Array:
    """The leaf where taken, else the filling; and NaN in the rows that do not fit, which count as taken all over.

    The product that makes NaN comes before the choice. After it, XLA may write its factor out as an array as large as
    the leaf, to multiply a loss with it.
    """
    return jnp.where(expand(taken, leaf), poison(leaf, fits), filling)


def poison(leaf: jax.Array, fits: jax.Array) -> jax.Array:
    """NaN in the rows that do not fit, if the dtype has one.

    A product, so that gradients are NaN there too; and a choice, for XLA takes the product of NaN and a bool, as 0 or
    1, to be 0 where the bool is False.
    """
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):  # where inf * (1 + 0j) would be inf + nan j
        return lax.complex(poison(leaf.real, fits), poison(leaf.imag, fits))
    fits = expand(fits, leaf)
    return jnp.where(fits, leaf * jnp.where(fits, 1, jnp.nan).astype(leaf.dtype), jnp.nan)
