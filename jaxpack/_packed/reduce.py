"""Reductions of each sequence over its own steps: first, last and segment_*.

A sequence of length 0 gives the identity of the reduction: 0 for sums, means, variances, first and last, -inf for
maxima and logsumexp, inf for minima, -1 for the step of an extremum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._packed.broadcast import expand
from jaxpack._packed.gather import real_cells, slot_lengths
from jaxpack._packed.maps import by_cell, cells_of, room_of_slots, spread
from jaxpack._packed.packed_sequence import PackedSequence, check_packed
from jaxpack._packed.slack import checked_slot_fits, in_caller_order
from jaxpack._packed.statistics import (
    as_inexact,
    is_inexact,
    slot_means,
    slot_sums,
    slot_variances,
    square_root,
    sum_dtype,
)
from jaxpack._types import PyTree


def first(packed: PackedSequence) -> PyTree:
    """Returns the value of each sequence at its first step.

    Examples:
      >>> jaxpack.first(jaxpack.pack_sequence([[1, 2, 3], [4]])).tolist()
      [1, 4]

    Args:
      packed: data [S, *F].

    Returns:
      [B, *F], in the caller's row order; zeros for a sequence of length 0.

    Raises:
      TypeError: if given a padded array (pass it through pack_padded_sequence first).
    """
    return _first(check_packed(packed, "first"))


@jax.jit
def _first(packed: PackedSequence) -> PyTree:
    return _at_step(packed, jnp.zeros_like(packed.lengths))


def last(packed: PackedSequence) -> PyTree:
    """Returns the value of each sequence at its last step.

    In the output of a bidirectional layer, the backward half has seen only one step there. Its summary of the whole
    sequence is in the final state: `layer.final_output(state)`.

    Examples:
      >>> jaxpack.last(jaxpack.pack_sequence([[1, 2, 3], [4]])).tolist()
      [3, 4]

    Args:
      packed: data [S, *F].

    Returns:
      [B, *F], in the caller's row order; zeros for a sequence of length 0.

    Raises:
      TypeError: if given a padded array (pass it through pack_padded_sequence first).
    """
    return _last(check_packed(packed, "last"))


@jax.jit
def _last(packed: PackedSequence) -> PyTree:
    return _at_step(packed, slot_lengths(packed) - 1)


def segment_sum(packed: PackedSequence) -> PyTree:
    """Sums over the steps of each sequence.

    Examples:
      >>> jaxpack.segment_sum(jaxpack.pack_sequence([[1, 2, 3], [4]])).tolist()
      [6, 4]

    Args:
      packed: data [S, *F].

    Returns:
      [B, *F], in the caller's row order.

    Raises:
      TypeError: if given a padded array (pass it through pack_padded_sequence first).
    Source: jax.ops.segment_sum, with sequences as segments.
    """
    return _segment_sum(check_packed(packed, "segment_sum"))


@jax.jit
def _segment_sum(packed: PackedSequence) -> PyTree:
    def total(leaf: jax.Array) -> jax.Array:
        return slot_sums(packed, leaf).astype(sum_dtype(leaf))

    return in_caller_order(packed, jax.tree.map(total, packed.data))


def segment_mean(packed: PackedSequence) -> PyTree:
    """Computes the mean over the steps of each sequence; 0 for length 0. As `segment_sum`; integers give floats.

    Examples:
      >>> jaxpack.segment_mean(jaxpack.pack_sequence([[1, 2, 3], [4]])).tolist()
      [2.0, 4.0]
    """
    return _segment_mean(check_packed(packed, "segment_mean"))


@jax.jit
def _segment_mean(packed: PackedSequence) -> PyTree:
    def mean(leaf: jax.Array) -> jax.Array:
        leaf = as_inexact(leaf)
        return slot_means(packed, leaf).astype(leaf.dtype)

    return in_caller_order(packed, jax.tree.map(mean, packed.data))


def segment_var(packed: PackedSequence) -> PyTree:
    """Computes the (population) variance over the steps of each sequence, as jnp.var. As `segment_mean`.

    Examples:
      >>> jaxpack.segment_var(jaxpack.pack_sequence([[1, 3], [4]])).tolist()
      [1.0, 0.0]
    """
    return _segment_var(check_packed(packed, "segment_var"))


@jax.jit
def _segment_var(packed: PackedSequence) -> PyTree:
    return in_caller_order(packed, jax.tree.map(lambda leaf: slot_variances(packed, leaf), packed.data))


def segment_std(packed: PackedSequence) -> PyTree:
    """Computes the standard deviation over the steps of each sequence. As `segment_var`; the gradient at 0 is 0.

    Examples:
      >>> jaxpack.segment_std(jaxpack.pack_sequence([[1, 3], [4]])).tolist()
      [1.0, 0.0]

      To normalise each sequence by its own statistics:

      >>> packed = jaxpack.pack_sequence([[1.0, 3.0], [4.0]])
      >>> mean, std = (jaxpack.broadcast_to_steps(f(packed), packed) for f in (jaxpack.segment_mean, segment_std))
      >>> [each.tolist() for each in jaxpack.unpack_sequence((packed - mean) / (std + 1e-6))]
      [[-0.99999..., 0.99999...], [0.0]]
    """
    return _segment_std(check_packed(packed, "segment_std"))


@jax.jit
def _segment_std(packed: PackedSequence) -> PyTree:
    return in_caller_order(packed, jax.tree.map(lambda leaf: square_root(slot_variances(packed, leaf)), packed.data))


def segment_max(packed: PackedSequence) -> PyTree:
    """Computes the maximum over the steps of each sequence; -inf (the least integer) for length 0. As `segment_sum`.

    Steps that share a maximum share its gradient, as in jnp.max.

    Examples:
      >>> jaxpack.segment_max(jaxpack.pack_sequence([[1, 2, 3], [4]])).tolist()
      [3, 4]
    """
    return _segment_max(check_packed(packed, "segment_max"))


@jax.jit
def _segment_max(packed: PackedSequence) -> PyTree:
    return in_caller_order(packed, jax.tree.map(lambda leaf: _max(packed, leaf), packed.data))


def segment_min(packed: PackedSequence) -> PyTree:
    """Computes the minimum over the steps of each sequence; inf (the largest integer) for length 0. As `segment_max`.

    Examples:
      >>> jaxpack.segment_min(jaxpack.pack_sequence([[3, 1, 2], [4]])).tolist()
      [1, 4]
    """
    return _segment_min(check_packed(packed, "segment_min"))


@jax.jit
def _segment_min(packed: PackedSequence) -> PyTree:
    return in_caller_order(packed, jax.tree.map(lambda leaf: _min(packed, leaf), packed.data))


def segment_argmax(packed: PackedSequence) -> PyTree:
    """Returns the step of each sequence, from 0, that holds its maximum; the first of several, as jnp.argmax.

    Examples:
      >>> jaxpack.segment_argmax(jaxpack.pack_sequence([[1, 3, 2], [4]])).tolist()
      [1, 0]

    Args:
      packed: data [S, *F].

    Returns:
      int32 [B, *F], in the caller's row order; -1 for a sequence of length 0, and for one that does not fit its plan.

    Raises:
      TypeError: if given a padded array (pass it through pack_padded_sequence first).
    """
    return _segment_argmax(check_packed(packed, "segment_argmax"))


@jax.jit
def _segment_argmax(packed: PackedSequence) -> PyTree:
    return jax.tree.map(lambda leaf: _place(packed, leaf, _max(packed, leaf)), packed.data)


def segment_argmin(packed: PackedSequence) -> PyTree:
    """Returns the step of each sequence that holds its minimum. As `segment_argmax`.

    Examples:
      >>> jaxpack.segment_argmin(jaxpack.pack_sequence([[3, 1, 2], [4]])).tolist()
      [1, 0]
    """
    return _segment_argmin(check_packed(packed, "segment_argmin"))


@jax.jit
def _segment_argmin(packed: PackedSequence) -> PyTree:
    return jax.tree.map(lambda leaf: _place(packed, leaf, _min(packed, leaf)), packed.data)


def segment_logsumexp(packed: PackedSequence) -> PyTree:
    """Computes log(sum(exp)) over the steps of each sequence, without overflow; -inf for length 0. As `segment_sum`.

    Examples:
      >>> result = jaxpack.segment_logsumexp(jaxpack.pack_sequence([[0, 0, -1000], [1000]]))
      >>> [round(each, 3) for each in result.tolist()]  # log 2, and 1000
      [0.693, 1000.0]
    """
    return _segment_logsumexp(check_packed(packed, "segment_logsumexp"))


@jax.jit
def _segment_logsumexp(packed: PackedSequence) -> PyTree:
    def logsumexp(leaf: jax.Array) -> jax.Array:
        leaf = as_inexact(leaf)
        powers, largest = exponentials(packed, leaf)
        total = slot_sums(packed, powers)
        empty = total == 0
        return jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1, total)) + largest).astype(leaf.dtype)

    return in_caller_order(packed, jax.tree.map(logsumexp, packed.data))


def _at_step(packed: PackedSequence, steps: jax.Array) -> PyTree:
    """Returns the values at one step of each slot, in the caller's order; zeros for sequences of length 0."""
    plan = packed.plan
    if not plan.num_sequences:
        return packed.data
    cells = cells_of(plan, lax.iota(jnp.int32, plan.num_sequences), jnp.clip(steps, 0, room_of_slots(plan) - 1))
    any_step = slot_lengths(packed) > 0

    def take(leaf: jax.Array) -> jax.Array:
        values = leaf[cells]
        return jnp.where(expand(any_step, values), values, jnp.zeros_like(values))

    return in_caller_order(packed, jax.tree.map(take, packed.data))


def _max(packed: PackedSequence, leaf: jax.Array) -> jax.Array:
    """Computes the maximum over the real cells of each slot; for bools, whether any is True."""
    return _extremum(packed, leaf, jax.ops.segment_max, -jnp.inf, lambda info: info.min)


def _min(packed: PackedSequence, leaf: jax.Array) -> jax.Array:
    """Computes the minimum over the real cells of each slot; for bools, whether all are True."""
    return _extremum(packed, leaf, jax.ops.segment_min, jnp.inf, lambda info: info.max)


def _extremum(
    packed: PackedSequence,
    leaf: jax.Array,
    reduce: Callable[..., jax.Array],
    infinity: float,
    bound: Callable[[Any], int],
) -> jax.Array:
    """Computes segment_max or segment_min, with slack set to a value that never wins."""
    if leaf.dtype == bool:
        return _extremum(packed, leaf.astype(jnp.int8), reduce, infinity, bound) > 0
    filling = infinity if is_inexact(leaf) else bound(jnp.iinfo(leaf.dtype))
    real = jnp.where(expand(real_cells(packed), leaf), leaf, jnp.full_like(leaf, filling))
    return reduce(real, by_cell(packed.plan).slots, packed.plan.num_sequences, mode="promise_in_bounds")


def _place(packed: PackedSequence, leaf: jax.Array, extremum: jax.Array) -> jax.Array:
    """Returns the first step that holds the extremum of its sequence: int32 [B, *F]; -1 if empty or not fitting."""
    plan = packed.plan
    slots, steps = by_cell(plan)
    here = spread(plan, extremum)
    found = expand(real_cells(packed), leaf) & ((leaf == here) | ((leaf != leaf) & (here != here)))
    steps = jnp.where(found, expand(steps, leaf), jnp.iinfo(jnp.int32).max)
    steps = jax.ops.segment_min(steps, slots, plan.num_sequences, mode="promise_in_bounds")
    held = checked_slot_fits(packed) & (slot_lengths(packed) > 0)
    return jnp.where(expand(held, steps), steps, -1)[packed.unsorted_indices]


def exponentials(packed: PackedSequence, leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes exp(x - m) at real cells, in float32 or wider, and the finite maximum m of each slot."""
    leaf = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    largest = lax.stop_gradient(_max(packed, leaf))
    largest = jnp.where(jnp.isfinite(largest), largest, jnp.zeros_like(largest))
    shifted = leaf - spread(packed.plan, largest)
    mask = expand(real_cells(packed), leaf)
    return jnp.where(mask, jnp.exp(jnp.where(mask, shifted, 0)), 0), largest
