"""Slack and misfits: slack is filled before a function sees it, and zeroed after; misfits become NaN."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._packed.broadcast import expand
from jaxpack._packed.gather import (
    PACK_ANEW,
    Cells,
    Indexed,
    indices_agree,
    real_cells,
    slot_fits,
    slot_lengths,
)
from jaxpack._packed.maps import cells_of, room_of_slots, spread, take
from jaxpack._traced_checks import checked
from jaxpack._types import PyTree


def fill_slack(packed: Cells) -> PyTree:
    """Fills slack with the first real cell of its sequence, or of the longest sequence if its own is empty.

    No constant is safe for every function of a user (log(0), 1 / (1 - x) at 1): its gradient would be NaN even where a
    `where` discards its value. Real data is safe, and stop_gradient keeps the copies out of the gradient.
    """
    plan, mask = packed.plan, real_cells(packed)
    if not plan.size:
        return packed.data
    slots = spread(plan, stand_in_slots(packed))
    any_real = jnp.any(slot_lengths(packed) > 0)

    def replace(leaf: jax.Array) -> jax.Array:
        real = take(lax.stop_gradient(leaf), cells_of(plan, slots, 0))
        return jnp.where(expand(mask, leaf), leaf, jnp.where(any_real, real, jnp.ones_like(real)))

    return jax.tree.map(replace, packed.data)


def stand_in_slots(packed: Indexed) -> jax.Array:
    """Returns for each slot one with a real first step: itself, or the longest if it is empty. int32 [B]."""
    lengths = slot_lengths(packed)
    slots = jnp.arange(packed.plan.num_sequences, dtype=jnp.int32)
    return jnp.where(lengths > 0, slots, jnp.argmax(lengths).astype(jnp.int32))


def zero_slack(packed: Indexed, cells: PyTree, also: jax.Array | None = None) -> PyTree:
    """Sets values per cell [S, ...] to zero in slack and to NaN for sequences that do not fit.

    Args:
      packed: the batch.
      cells: [S, ...], or a pytree of such arrays.
      also: bool [B], a further condition that the sequence of each slot must meet.
    """
    mask, fits = real_cells(packed), spread(packed.plan, checked_slot_fits(packed, also))
    return jax.tree.map(lambda leaf: select_or_poison(leaf, mask, jnp.zeros_like(leaf), fits), cells)


def in_caller_order(packed: Indexed, states: PyTree, also: jax.Array | None = None) -> PyTree:
    """Brings values per slot [B, ...] to the caller's order, and sets those of sequences that do not fit to NaN.

    Args:
      packed: the batch.
      states: [B, ...], or a pytree of such arrays.
      also: as in `zero_slack`.
    """
    fits = checked_slot_fits(packed, also)
    return jax.tree.map(lambda leaf: poison(leaf, fits)[packed.unsorted_indices], states)


def checked_slot_fits(packed: Indexed, also: jax.Array | None = None) -> jax.Array:
    """Returns `slot_fits`, and the further condition `also`: bool [B].

    Under checkify a sequence that does not fit is an error.
    """
    fits = slot_fits(packed)
    if len(fits):
        agree = indices_agree(packed)
        fits = checked(fits, agree, f"lengths, sorted_indices and unsorted_indices do not belong together: {PACK_ANEW}")
        slot = jnp.argmin(fits)
        fits = checked(
            fits,
            jnp.all(fits) | ~agree,
            "lengths[{row}] = {length} does not fit the plan: its row has room for {room} steps (a negative length was "
            "below 0, or longer than its padded batch). Use a plan that covers it (jaxpack.plan_buckets(lengths)) or "
            "truncate the sequence.",
            row=packed.sorted_indices[slot],
            length=slot_lengths(packed)[slot],
            room=room_of_slots(packed.plan)[slot],
        )
    return fits if also is None else fits & also


def select_or_poison(leaf: jax.Array, taken: jax.Array, filling: jax.Array, fits: jax.Array) -> jax.Array:
    """Returns the leaf where taken, the filling elsewhere, and NaN in rows that do not fit.

    Rows that do not fit must be taken. The multiplication by NaN comes before the selection: after it, XLA may write
    the factor out as an array as large as the leaf, to multiply a loss by it.
    """
    return jnp.where(expand(taken, leaf), poison(leaf, fits), filling)


def poison(leaf: jax.Array, fits: jax.Array) -> jax.Array:
    """Sets rows that do not fit to NaN, if the dtype has one.

    The product makes gradients NaN as well. The selection is needed because XLA simplifies a product with a bool that
    was cast to 0 or 1, to 0 where the bool is False.
    """
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):  # inf * (1 + 0j) would be inf + nan j
        return lax.complex(poison(leaf.real, fits), poison(leaf.imag, fits))
    fits = expand(fits, leaf)
    return jnp.where(fits, leaf * jnp.where(fits, 1, jnp.nan).astype(leaf.dtype), jnp.nan)
