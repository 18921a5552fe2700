"""What one computes on packed data: per sequence (first, last, segment_*), over its steps (softmax), along features.

`mean`, `var` and `std` are over all real steps of a batch; `broadcast_to_steps` is the way back from a value for each
sequence to one for each step.

Sequences of length 0 give the identity of each reduction: 0 for sums, means, variances, first and last, -inf for maxima
and logsumexp, inf for minima, -1 for the place of an extremum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpack._dtypes import as_jax
from jaxpack._packed.broadcast import expand
from jaxpack._packed.gather import cells_of, real_cells, slot_lengths, slot_spans
from jaxpack._packed.indices import same_sequences
from jaxpack._packed.packed_sequence import PackedSequence, check_packed
from jaxpack._packed.slack import checked_slot_fits, in_caller_order, poison, zero_slack
from jaxpack._types import PyTree


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
    return _first(check_packed(packed, "first"))


@jax.jit
def _first(packed: PackedSequence) -> PyTree:
    return _at_step(packed, jnp.zeros_like(packed.lengths))


def last(packed: PackedSequence) -> PyTree:
    """The value at each sequence's own last step.

    Of a bidirectional layer's output the backward half has seen but one step there: its summary of a whole sequence is
    in the final state, `layer.final_output(state)`.

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
    return _segment_sum(check_packed(packed, "segment_sum"))


@jax.jit
def _segment_sum(packed: PackedSequence) -> PyTree:
    return in_caller_order(packed, jax.tree.map(lambda leaf: _sum(packed, leaf).astype(_sum_dtype(leaf)), packed.data))


def segment_mean(packed: PackedSequence) -> PyTree:
    """The mean over each sequence's own steps; 0 for a sequence of length 0. As `segment_sum`; integers give floats.

    Examples:
      >>> jaxpack.segment_mean(jaxpack.pack_sequence([[1, 2, 3], [4]])).tolist()
      [2.0, 4.0]
    """
    return _segment_mean(check_packed(packed, "segment_mean"))


@jax.jit
def _segment_mean(packed: PackedSequence) -> PyTree:
    def mean(leaf: jax.Array) -> jax.Array:
        leaf = _as_inexact(leaf)
        return _mean(packed, leaf).astype(leaf.dtype)

    return in_caller_order(packed, jax.tree.map(mean, packed.data))


def segment_var(packed: PackedSequence) -> PyTree:
    """The variance over each sequence's own steps, of the population as in jnp.var. As `segment_mean`.

    Examples:
      >>> jaxpack.segment_var(jaxpack.pack_sequence([[1, 3], [4]])).tolist()
      [1.0, 0.0]
    """
    return _segment_var(check_packed(packed, "segment_var"))


@jax.jit
def _segment_var(packed: PackedSequence) -> PyTree:
    return in_caller_order(packed, jax.tree.map(lambda leaf: _var(packed, leaf), packed.data))


def segment_std(packed: PackedSequence) -> PyTree:
    """The standard deviation over each sequence's own steps. As `segment_var`; where it is 0 its gradient is 0.

    Examples:
      >>> jaxpack.segment_std(jaxpack.pack_sequence([[1, 3], [4]])).tolist()
      [1.0, 0.0]

      Each sequence normalised by its own statistics:

      >>> packed = jaxpack.pack_sequence([[1.0, 3.0], [4.0]])
      >>> mean, std = (jaxpack.broadcast_to_steps(f(packed), packed) for f in (jaxpack.segment_mean, segment_std))
      >>> [each.tolist() for each in jaxpack.unpack_sequence((packed - mean) / (std + 1e-6))]
      [[-0.99999..., 0.99999...], [0.0]]
    """
    return _segment_std(check_packed(packed, "segment_std"))


@jax.jit
def _segment_std(packed: PackedSequence) -> PyTree:
    return in_caller_order(packed, jax.tree.map(lambda leaf: _root(_var(packed, leaf)), packed.data))


def segment_max(packed: PackedSequence) -> PyTree:
    """The maximum over each sequence's steps; -inf (the least integer) for a sequence of length 0. As `segment_sum`.

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
    """The minimum over each sequence's steps; inf (the largest integer) for a sequence of length 0. As `segment_max`.

    Examples:
      >>> jaxpack.segment_min(jaxpack.pack_sequence([[3, 1, 2], [4]])).tolist()
      [1, 4]
    """
    return _segment_min(check_packed(packed, "segment_min"))


@jax.jit
def _segment_min(packed: PackedSequence) -> PyTree:
    return in_caller_order(packed, jax.tree.map(lambda leaf: _min(packed, leaf), packed.data))


def segment_argmax(packed: PackedSequence) -> PyTree:
    """The step of each sequence, counted from 0, at which its maximum is; of several the first, as in jnp.argmax.

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
    """The step of each sequence at which its minimum is. As `segment_argmax`.

    Examples:
      >>> jaxpack.segment_argmin(jaxpack.pack_sequence([[3, 1, 2], [4]])).tolist()
      [1, 0]
    """
    return _segment_argmin(check_packed(packed, "segment_argmin"))


@jax.jit
def _segment_argmin(packed: PackedSequence) -> PyTree:
    return jax.tree.map(lambda leaf: _place(packed, leaf, _min(packed, leaf)), packed.data)


def segment_logsumexp(packed: PackedSequence) -> PyTree:
    """log(sum(exp)) over each sequence's steps, without overflow; -inf for a sequence of length 0. As `segment_sum`.

    Examples:
      >>> result = jaxpack.segment_logsumexp(jaxpack.pack_sequence([[0, 0, -1000], [1000]]))
      >>> [round(each, 3) for each in result.tolist()]  # log 2, and 1000
      [0.693, 1000.0]
    """
    return _segment_logsumexp(check_packed(packed, "segment_logsumexp"))


@jax.jit
def _segment_logsumexp(packed: PackedSequence) -> PyTree:
    def logsumexp(leaf: jax.Array) -> jax.Array:
        leaf = _as_inexact(leaf)
        powers, largest = _powers(packed, leaf)
        total = _sum(packed, powers)
        empty = total == 0
        return jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1, total)) + largest).astype(leaf.dtype)

    return in_caller_order(packed, jax.tree.map(logsumexp, packed.data))


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
    return packed.replace(data=_softmax(packed))


@jax.jit
def _softmax(packed: PackedSequence) -> PyTree:
    def normalise(leaf: jax.Array) -> jax.Array:
        leaf = _as_inexact(leaf)
        powers, _ = _powers(packed, leaf)
        total = _sum(packed, powers)
        return (powers / jnp.where(total == 0, 1, total)[packed.plan.cell_slots]).astype(leaf.dtype)

    return zero_slack(packed, jax.tree.map(normalise, packed.data))


def mean(packed: PackedSequence) -> PyTree:
    """The mean over all real steps of all sequences, feature by feature; 0 where there are none.

    Examples:
      >>> packed = jaxpack.pack_sequence([[1, 2, 3], [6]], plan=jaxpack.plan_padded(2, 3))
      >>> float(jaxpack.mean(packed))  # jnp.mean(packed.data) would count the slack
      3.0

    Args:
      packed: data [S, *F].

    Returns:
      [*F], the same under every plan; NaN if a sequence does not fit. Integers give floats.

    Raises:
      TypeError: if given a padded array (pass it through pack_padded_sequence first).
    """
    return _batch_mean(check_packed(packed, "mean"))


@jax.jit
def _batch_mean(packed: PackedSequence) -> PyTree:
    return _of_batch(packed, lambda leaf: _total_mean(packed, leaf))


def var(packed: PackedSequence) -> PyTree:
    """The variance over all real steps of all sequences, of the population as in jnp.var. As `mean`.

    Examples:
      >>> float(jaxpack.var(jaxpack.pack_sequence([[1, 2, 3], [6]], plan=jaxpack.plan_padded(2, 3))))
      3.5
    """
    return _batch_var(check_packed(packed, "var"))


@jax.jit
def _batch_var(packed: PackedSequence) -> PyTree:
    return _of_batch(packed, lambda leaf: _total_var(packed, leaf))


def std(packed: PackedSequence) -> PyTree:
    """The standard deviation over all real steps of all sequences. As `var`; where it is 0 its gradient is 0.

    Examples:
      >>> packed = jaxpack.pack_sequence([[1.0, 3.0, 3.0], [1.0]])
      >>> float(jaxpack.std(packed))
      1.0
      >>> ((packed - jaxpack.mean(packed)) / jaxpack.std(packed)).data.tolist()  # standardised, step by step
      [-1.0, -1.0, 1.0, 1.0]
    """
    return _batch_std(check_packed(packed, "std"))


@jax.jit
def _batch_std(packed: PackedSequence) -> PyTree:
    return _of_batch(packed, lambda leaf: _root(_total_var(packed, leaf)))


def broadcast_to_steps(values: PyTree, packed: PackedSequence) -> PackedSequence:
    """A value for each sequence, at each of its steps: a speaker's vector, a dropout mask, statistics to normalise by.

    Examples:
      >>> packed = jaxpack.pack_sequence([[1, 2, 3], [4]])
      >>> jaxpack.broadcast_to_steps(jnp.array([10, 20]), packed).data.tolist()
      [10, 20, 10, 10]
      >>> (packed - jaxpack.broadcast_to_steps(jaxpack.segment_max(packed), packed)).data.tolist()
      [-2, 0, -1, 0]

    Args:
      values: [B, *F], or a pytree of such arrays, in the caller's row order.
      packed: a batch of the sequences; its data is not read.

    Returns:
      data [S, *F], packed as the batch is, zero in slack.

    Raises:
      TypeError: if packed is no PackedSequence.
      ValueError: if an array has another leading axis than B.
    Source: the gather that is the transpose of jax.ops.segment_sum.
    """
    packed = check_packed(packed, "broadcast_to_steps")
    values, size = jax.tree.map(lambda leaf: as_jax(leaf, "values"), values), packed.plan.num_sequences
    for leaf in jax.tree.leaves(values):
        if leaf.ndim < 1 or leaf.shape[0] != size:
            raise ValueError(
                f"broadcast_to_steps: values must have a leading axis of {size} sequences, got shape {leaf.shape}."
            )
    return packed.replace(data=_broadcast_to_steps(values, packed.replace(data=None)))


@jax.jit
def _broadcast_to_steps(values: PyTree, packed: PackedSequence) -> PyTree:
    rows = packed.sorted_indices[packed.plan.cell_slots]
    return zero_slack(packed, jax.tree.map(lambda leaf: leaf[rows], values))


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
    same = None
    for i, other in enumerate(packed):
        same = same_sequences(packed[0], other, "concatenate", ("packed[0] has", f"packed[{i}] has"), same)
        if any(leaf.ndim < 2 for leaf in jax.tree.leaves(other.data)):
            raise ValueError(f"concatenate joins the last axis, but packed[{i}] has data without a feature axis.")
    return packed[0].replace(data=_concatenate(packed, same))


@jax.jit
def _concatenate(packed: Sequence[PackedSequence], same: jax.Array | None) -> PyTree:
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, -1), *(other.data for other in packed))
    return zero_slack(packed[0], joined, same)


def _at_step(packed: PackedSequence, steps: jax.Array) -> PyTree:
    """The value at one step of each slot, in the caller's order; zeros for slots without steps."""
    plan = packed.plan
    if not plan.num_sequences:
        return packed.data
    cells = cells_of(plan, np.arange(plan.num_sequences), jnp.clip(steps, 0, plan.room - 1))
    any_step = slot_lengths(packed) > 0

    def take(leaf: jax.Array) -> jax.Array:
        values = leaf[cells]
        return jnp.where(expand(any_step, values), values, jnp.zeros_like(values))

    return in_caller_order(packed, jax.tree.map(take, packed.data))


def _sum(packed: PackedSequence, leaf: jax.Array) -> jax.Array:
    """Sums over the real cells of each slot, in float32 or wider, and in the integers that jnp.sum gives."""
    return jax.ops.segment_sum(_real(packed, leaf), packed.plan.cell_slots, packed.plan.num_sequences)


def _real(packed: PackedSequence, leaf: jax.Array) -> jax.Array:
    """The leaf, 0 in slack, in the dtype in which it is summed."""
    real = jnp.where(expand(real_cells(packed), leaf), leaf, jnp.zeros_like(leaf))
    return real.astype(jnp.promote_types(_sum_dtype(leaf), jnp.float32) if _is_inexact(leaf) else _sum_dtype(leaf))


def _mean(packed: PackedSequence, leaf: jax.Array) -> jax.Array:
    """Means over the real cells of each slot, of an inexact leaf, in float32 or wider."""
    total, counts = _sum(packed, leaf), jnp.maximum(slot_lengths(packed), 1)
    return total / expand(counts, total).astype(total.dtype)


def _var(packed: PackedSequence, leaf: jax.Array) -> jax.Array:
    """Variances over the real cells of each slot."""
    leaf = _as_inexact(leaf)
    apart = _real(packed, leaf) - _mean(packed, leaf)[packed.plan.cell_slots]
    return _mean(packed, _power(apart)).astype(_power(leaf).dtype)


def _of_batch(packed: PackedSequence, reduce: Callable[[jax.Array], jax.Array]) -> PyTree:
    """A reduction over all real cells, NaN if a sequence does not fit."""
    fits = jnp.all(checked_slot_fits(packed))
    return jax.tree.map(lambda leaf: poison(reduce(_as_inexact(leaf)), fits), packed.data)


def _total_mean(packed: PackedSequence, leaf: jax.Array) -> jax.Array:
    """The mean over all real cells of an inexact leaf."""
    total = _real(packed, leaf).sum(0)
    return (total / jnp.maximum(slot_spans(packed).sum(), 1).astype(total.dtype)).astype(leaf.dtype)


def _total_var(packed: PackedSequence, leaf: jax.Array) -> jax.Array:
    """The variance over all real cells of an inexact leaf."""
    wide = _real(packed, leaf)
    apart = wide - _total_mean(packed, wide)[None]
    return _total_mean(packed, _power(apart)).astype(_power(leaf).dtype)


def _power(x: jax.Array) -> jax.Array:
    """|x|^2."""
    return x.real**2 + x.imag**2 if jnp.issubdtype(x.dtype, jnp.complexfloating) else x**2


def _root(x: jax.Array) -> jax.Array:
    """The square root, whose derivative at 0 is taken to be 0."""
    return jnp.where(x == 0, 0, jnp.sqrt(jnp.where(x == 0, 1, x)))


def _sum_dtype(leaf: jax.Array) -> Any:
    """The dtype of jnp.sum(leaf): narrow integers and bools become wide ones."""
    return jax.eval_shape(jnp.sum, leaf).dtype


def _max(packed: PackedSequence, leaf: jax.Array) -> jax.Array:
    """Maxima over the real cells of each slot; of bools, whether any is True."""
    return _extremum(packed, leaf, jax.ops.segment_max, -jnp.inf, lambda info: info.min)


def _min(packed: PackedSequence, leaf: jax.Array) -> jax.Array:
    """Minima over the real cells of each slot; of bools, whether all are True."""
    return _extremum(packed, leaf, jax.ops.segment_min, jnp.inf, lambda info: info.max)


def _extremum(
    packed: PackedSequence,
    leaf: jax.Array,
    reduce: Callable[..., jax.Array],
    infinity: float,
    bound: Callable[[Any], int],
) -> jax.Array:
    """segment_max or segment_min, with what gives way to every value in slack."""
    if leaf.dtype == bool:
        return _extremum(packed, leaf.astype(jnp.int8), reduce, infinity, bound) > 0
    filling = infinity if _is_inexact(leaf) else bound(jnp.iinfo(leaf.dtype))
    real = jnp.where(expand(real_cells(packed), leaf), leaf, jnp.full_like(leaf, filling))
    return reduce(real, packed.plan.cell_slots, packed.plan.num_sequences)


def _place(packed: PackedSequence, leaf: jax.Array, extremum: jax.Array) -> jax.Array:
    """int32 [B, *F]: the first step at which each sequence has its extremum, -1 if it has none or does not fit."""
    plan = packed.plan
    here = extremum[plan.cell_slots]
    found = expand(real_cells(packed), leaf) & ((leaf == here) | ((leaf != leaf) & (here != here)))
    steps = jnp.where(found, expand(jnp.asarray(plan.cell_steps), leaf), jnp.iinfo(jnp.int32).max)
    steps = jax.ops.segment_min(steps, plan.cell_slots, plan.num_sequences)
    held = checked_slot_fits(packed) & (slot_lengths(packed) > 0)
    return jnp.where(expand(held, steps), steps, -1)[packed.unsorted_indices]


def _powers(packed: PackedSequence, leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """exp(x - m) at the real cells, in float32 or wider, and the slot's finite maximum m, against overflow."""
    leaf = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    largest = lax.stop_gradient(_max(packed, leaf))
    largest = jnp.where(jnp.isfinite(largest), largest, jnp.zeros_like(largest))
    shifted = leaf - largest[packed.plan.cell_slots]
    mask = expand(real_cells(packed), leaf)
    return jnp.where(mask, jnp.exp(jnp.where(mask, shifted, 0)), 0), largest


def _as_inexact(leaf: jax.Array) -> jax.Array:
    """Floats from integers."""
    return leaf.astype(jnp.result_type(leaf, float))


def _is_inexact(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)
