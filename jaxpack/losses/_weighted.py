"""The weighted mean of a score, over tokens or over sequences: what cross-entropies and accuracies share."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxpack._packed.gather import real_cells
from jaxpack._packed.indices import same_sequences, values_of
from jaxpack._packed.packed_sequence import PackedSequence, check_packed
from jaxpack._packed.slack import checked_slot_fits
from jaxpack.losses._checks import (
    Weights,
    as_array,
    as_labels,
    check_classes,
    check_token_weights,
    check_weights,
    debug_refuse,
    ignored_number,
    outside,
    refuse,
    widened,
)
from jaxpack.losses._mean import Mean

Score = Callable[[jax.Array, jax.Array], jax.Array]


def over_tokens(
    score: Score,
    logits: PackedSequence | ArrayLike,
    labels: PackedSequence | ArrayLike,
    weights: Weights,
    ignore_label: int | None,
    function: str,
) -> Mean:
    """The weighted mean over tokens of a score of logits [N, C] and labels [N]; checks and raises for `function`."""
    logits = check_packed(logits, function)
    labels = check_packed(labels, f"{function}(labels=...)")
    same = same_sequences(logits, labels, function, ("logits have", "labels have"))
    check_classes(logits, labels, "S", function)
    if isinstance(weights, PackedSequence):
        packed = check_packed(weights, f"{function}(weights=...)")
        same = same_sequences(logits, packed, function, ("logits have", "weights have"), same)
        given: jax.Array | None = check_token_weights(packed, function)
    else:
        given = check_weights(weights, logits.plan.num_sequences, function, per_token=True)
    ignored, per_token = ignored_number(ignore_label, labels.data), isinstance(weights, PackedSequence)
    _check_tokens(logits, labels.data, given, ignored, per_token)
    return _over_tokens(score, ignored, per_token, logits, labels.data, given, same)


def _check_tokens(
    logits: PackedSequence, labels: jax.Array, weights: jax.Array | None, ignored: int | None, per_token: bool
) -> None:
    """Raises ValueError at a label that is no class and counts, if what says so is known."""
    indices = logits.lengths, logits.sorted_indices
    values = values_of(labels, *indices, *([] if weights is None else [weights]))
    if values is None:
        return
    classes, lengths, order, *rest = values
    plan = logits.plan
    counted = (lengths[order][plan.cell_slots] > plan.cell_steps) & (classes != ignored)
    for given in rest:
        counted &= (given if per_token else given[order][plan.cell_slots]) != 0
    refuse(counted & outside(classes, logits.shape[1]), "labels.data", classes, _rule(logits.shape[1]))


@functools.partial(jax.jit, static_argnames=("score", "ignored", "per_token"))
def _over_tokens(
    score: Score,
    ignored: int | None,
    per_token: bool,
    logits: PackedSequence,
    labels: jax.Array,
    weights: jax.Array | None,
    same: jax.Array | None,
) -> Mean:
    """`over_tokens`, checked.

    Args:
      weights: [S] if `per_token`, else [B]; None for ones.
    """
    dtype, slots = widened(logits.data).dtype, logits.plan.cell_slots
    fits = checked_slot_fits(logits) if same is None else checked_slot_fits(logits) & same
    weights = jnp.ones(logits.plan.num_sequences, dtype) if weights is None else weights.astype(dtype)
    of_cells = weights if per_token else weights[logits.sorted_indices][slots]
    counted = real_cells(logits) if ignored is None else real_cells(logits) & (labels != ignored)
    of_cells = jnp.where(fits[slots], jnp.where(counted, of_cells, 0), jnp.nan)
    return _mean(score, logits.data, labels, of_cells, "labels.data")


def over_sequences(
    score: Score,
    logits: PackedSequence | ArrayLike,
    labels: PackedSequence | ArrayLike,
    weights: Weights,
    ignore_label: int | None,
    function: str,
) -> Mean:
    """The weighted mean over sequences of a score of logits [B, C] and labels [B]; as `over_tokens`."""
    if isinstance(logits, PackedSequence) or isinstance(labels, PackedSequence):
        raise TypeError(
            f"{function} takes a row of logits and a label for each sequence, got a PackedSequence. Reduce it to that "
            f"(jaxpack.last, jaxpack.segment_mean); for one per token pack both."
        )
    rows = as_array(logits, "logits", function, "Give a row of logits for each sequence, [B, C].")
    classes = as_labels(labels, "labels", function, "For a label per token pack logits and labels.")
    check_classes(rows, classes, "B", function)
    given = check_weights(weights, len(classes), function)
    ignored = ignored_number(ignore_label, classes)
    values = values_of(classes, *([] if given is None else [given]))
    if values is not None:
        counted = np.logical_and.reduce([values[0] != ignored, *(each != 0 for each in values[1:])])
        refuse(counted & outside(values[0], rows.shape[1]), "labels", values[0], _rule(rows.shape[1]))
    return _over_sequences(score, ignored, rows, classes, given)


@functools.partial(jax.jit, static_argnames=("score", "ignored"))
def _over_sequences(
    score: Score, ignored: int | None, logits: jax.Array, labels: jax.Array, weights: jax.Array | None
) -> Mean:
    """`over_sequences`, checked."""
    dtype = widened(logits).dtype
    weights = jnp.ones(len(labels), dtype) if weights is None else weights.astype(dtype)
    weights = weights if ignored is None else jnp.where(labels == ignored, 0, weights)
    return _mean(score, logits, labels, weights, "labels")


def weighted(scores: jax.Array, weights: jax.Array) -> Mean:
    """The weighted mean of scores: their weighted sum beside the sum of weights."""
    return Mean(jnp.sum(weights * scores), jnp.sum(weights))


def _mean(score: Score, logits: jax.Array, labels: jax.Array, weights: jax.Array, name: str) -> Mean:
    """The weighted mean of scores. Where the weight is 0 logits are 0, so that no gradient can be NaN there."""
    counted = weights != 0
    bad = counted & outside(labels, logits.shape[1])
    debug_refuse(bad, name, _rule(logits.shape[1]))
    scores = score(jnp.where(counted[:, None], widened(logits), 0), jnp.where(counted & ~bad, labels, 0))
    return weighted(jnp.where(counted, scores, 0), jnp.where(bad, jnp.nan, weights))


def _rule(num_classes: int) -> str:
    return (
        f"lie in 0 to {num_classes - 1}, as the logits have {num_classes} classes (for a label that counts for nothing "
        f"give ignore_label)"
    )
