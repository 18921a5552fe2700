"""What one computes on packed data: per sequence (first, last, segment_*), over its steps (softmax), along features.

Sequences of length 0 give the identity of each reduction: 0 for sums, means, first and last, -inf for maxima and
logsumexp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import checkify

from jaxpack.sequence import (
    PackedSequence,
    PyTree,
    cells_of,
    check_packed,
    expand,
    is_traced,
    poison,
    seal,
    seal_states,
    slot_lengths,
)


def first(packed: PackedSequence) -> PyTree:
    """The value at each sequence's first step.

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
    packed = check_packed(packed, "first")
    return _at_step(packed, jnp.zeros_like(packed.lengths))


def last(packed: PackedSequence) -> PyTree:
    """The value at each sequence's own last step.

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
    packed = check_packed(packed, "last")
    return _at_step(packed, slot_lengths(packed) - 1)


def segment_sum(packed: PackedSequence) -> PyTree:
    """The sum over each sequence's steps.

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
    packed = check_packed(packed, "segment_sum")
    return seal_states(packed, jax.tree.map(lambda leaf: _sum(packed, leaf).astype(_sum_dtype(leaf)), packed.data))


def segment_mean(packed: PackedSequence) -> PyTree:
    """The mean over each sequence's own steps; 0 for a sequence of length 0. As `segment_sum`; integers give floats.

    Examples:
      >>> jaxpack.segment_mean(jaxpack.pack_sequence([[1, 2, 3], [4]])).tolist()
      [2.0, 4.0]
    """
    packed = check_packed(packed, "segment_mean")
    counts = jnp.maximum(slot_lengths(packed), 1)

    def mean(leaf: jax.Array) -> jax.Array:
        leaf = leaf.astype(jnp.result_type(leaf, float))
        total = _sum(packed, leaf)
        return (total / expand(counts, total).astype(total.dtype)).astype(leaf.dtype)

    return seal_states(packed, jax.tree.map(mean, packed.data))


def segment_max(packed: PackedSequence) -> PyTree:
    """The maximum over each sequence's steps; -inf (the least integer) for a sequence of length 0. As `segment_sum`.

    Steps that share a maximum share its gradient, as in jnp.max.

    Examples:
      >>> jaxpack.segment_max(jaxpack.pack_sequence([[1, 2, 3], [4]])).tolist()
      [3, 4]
    """
    packed = check_packed(packed, "segment_max")
    return seal_states(packed, jax.tree.map(lambda leaf: _max(packed, leaf), packed.data))


def segment_logsumexp(packed: PackedSequence) -> PyTree:
    """log(sum(exp)) over each sequence's steps, without overflow; -inf for a sequence of length 0. As `segment_sum`.

    Examples:
      >>> result = jaxpack.segment_logsumexp(jaxpack.pack_sequence([[0, 0, -1000], [1000]]))
      >>> [round(each, 3) for each in result.tolist()]  # log 2, and 1000
      [0.693, 1000.0]
    """
    packed = check_packed(packed, "segment_logsumexp")

    def logsumexp(leaf: jax.Array) -> jax.Array:
        leaf = leaf.astype(jnp.result_type(leaf, float))
        powers, largest = _powers(packed, leaf)
        total = _sum(packed, powers)
        empty = total == 0
        return jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1, total)) + largest).astype(leaf.dtype)

    return seal_states(packed, jax.tree.map(logsumexp, packed.data))


def softmax(packed: PackedSequence) -> PackedSequence:
    """Softmax over each sequence's own steps, feature by feature: attention weights from scores.

    Examples:
      >>> weights = jaxpack.softmax(jaxpack.pack_sequence([[0, 0, -1000], [7]]))
      >>> [each.tolist() for each in jaxpack.unpack_sequence(weights)]
      [[0.5, 0.5, 0.0], [1.0]]

    Args:
      packed: floating data [S, *F].

    Raises:
      TypeError: if given a padded array (pass it through pack_padded_sequence first).
    """
    packed = check_packed(packed, "softmax")

    def normalise(leaf: jax.Array) -> jax.Array:
        leaf = leaf.astype(jnp.result_type(leaf, float))
        powers, _ = _powers(packed, leaf)
        total = _sum(packed, powers)
        return (powers / jnp.where(total == 0, 1, total)[packed.plan.cell_slots]).astype(leaf.dtype)

    return packed.replace(data=seal(packed, jax.tree.map(normalise, packed.data)))


def concatenate(packed: Sequence[PackedSequence]) -> PackedSequence:
    """Joins the features of packed batches of the same sequences: arrays [S, ..., F_i] to [S, ..., sum F_i].

    Examples:
      >>> letters = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
      >>> both = jaxpack.concatenate([letters, letters.map(lambda x: 10 * x)])
      >>> both.data[0].tolist()
      [1.0, 1.0, 10.0, 10.0]

    Raises:
      TypeError: if an entry is no PackedSequence.
      ValueError: if there is none, plans or concrete lengths differ (where traced ones do, the result is NaN), or data
        have no feature axis.
    """
    if not isinstance(packed, (list, tuple)):
        raise TypeError(f"concatenate takes a list of PackedSequence, got {type(packed).__name__}.")
    if not packed:
        raise ValueError("concatenate needs at least one PackedSequence.")
    packed = [check_packed(other, "concatenate") for other in packed]
    head = packed[0]
    for i, other in enumerate(packed):
        if other.plan != head.plan:
            raise ValueError(f"concatenate: packed[{i}] has the plan {other.plan}, packed[0] has {head.plan}.")
        known = not (is_traced(other.lengths) or is_traced(head.lengths))
        if known and (np.asarray(other.lengths) != np.asarray(head.lengths)).any():
            raise ValueError(f"concatenate: packed[{i}] has the lengths {other.lengths}, packed[0] {head.lengths}.")
        if any(leaf.ndim < 2 for leaf in jax.tree.leaves(other.data)):
            raise ValueError(f"concatenate joins the last axis, but packed[{i}] has data without a feature axis.")
    data = seal(head, jax.tree.map(lambda *leaves: jnp.concatenate(leaves, -1), *(p.data for p in packed)))
    for other in packed[1:]:
        same = (other.sorted_indices == head.sorted_indices) & (slot_lengths(other) == slot_lengths(head))
        checkify.debug_check(jnp.all(same), "concatenate: the sequences have different lengths.")
        data = jax.tree.map(lambda leaf, same=same: poison(leaf, same[head.plan.cell_slots]), data)
    return head.replace(data=data)


def _at_step(packed: PackedSequence, steps: jax.Array) -> PyTree:
    """The value at one step of each slot, in the caller's order; zeros for slots without steps."""
    plan = packed.plan
    cells = cells_of(plan, np.arange(plan.num_sequences), jnp.clip(steps, 0, plan.room - 1))
    any_step = slot_lengths(packed) > 0

    def take(leaf: jax.Array) -> jax.Array:
        values = leaf[cells]
        return jnp.where(expand(any_step, values), values, jnp.zeros_like(values))

    return seal_states(packed, jax.tree.map(take, packed.data))


def _sum(packed: PackedSequence, leaf: jax.Array) -> jax.Array:
    """Sums over the real cells of each slot, in float32 or wider, and in the integers that jnp.sum gives."""
    real = jnp.where(expand(packed.mask, leaf), leaf, jnp.zeros_like(leaf))
    real = real.astype(jnp.promote_types(_sum_dtype(leaf), jnp.float32) if _is_inexact(leaf) else _sum_dtype(leaf))
    return jax.ops.segment_sum(real, packed.plan.cell_slots, packed.plan.num_sequences)


def _sum_dtype(leaf: jax.Array) -> Any:
    """The dtype of jnp.sum(leaf): narrow integers and bools become wide ones."""
    return jax.eval_shape(jnp.sum, leaf).dtype


def _max(packed: PackedSequence, leaf: jax.Array) -> jax.Array:
    """Maxima over the real cells of each slot; of bools, whether any is True."""
    if leaf.dtype == bool:
        return _max(packed, leaf.astype(jnp.int8)) > 0
    least = -jnp.inf if _is_inexact(leaf) else jnp.iinfo(leaf.dtype).min
    real = jnp.where(expand(packed.mask, leaf), leaf, jnp.full_like(leaf, least))
    return jax.ops.segment_max(real, packed.plan.cell_slots, packed.plan.num_sequences)


def _powers(packed: PackedSequence, leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """exp(x - m) at the real cells, in float32 or wider, and the slot's finite maximum m, against overflow."""
    leaf = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    largest = lax.stop_gradient(_max(packed, leaf))
    largest = jnp.where(jnp.isfinite(largest), largest, jnp.zeros_like(largest))
    shifted = leaf - largest[packed.plan.cell_slots]
    mask = expand(packed.mask, leaf)
    return jnp.where(mask, jnp.exp(jnp.where(mask, shifted, 0)), 0), largest


def _is_inexact(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)
