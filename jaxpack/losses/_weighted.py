"""The weighted mean of a score, over tokens or over sequences: what cross-entropies and accuracies share."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxpack.losses._checks import check_classes, check_weights, outside, refuse, same_lengths, widened
from jaxpack.losses._mean import Mean
from jaxpack.sequence import PackedSequence, check_packed, who_fits

Score = Callable[[jax.Array, jax.Array], jax.Array]


def over_tokens(
    score: Score,
    logits: PackedSequence | ArrayLike,
    labels: PackedSequence | ArrayLike,
    weights: ArrayLike | None,
    function: str,
) -> Mean:
    """The weighted mean over tokens of a score of logits [N, C] and labels [N]; checks and raises for `function`."""
    logits = check_packed(logits, function)
    labels = check_packed(labels, f"{function}(labels=...)")
    same = same_lengths(logits, labels, function)
    check_classes(logits, labels, "S", function)
    weights = check_weights(weights, logits.plan.num_sequences, widened(logits.data).dtype, function)
    broken = ~(same & who_fits(logits))[logits.plan.cell_slots]
    weights = jnp.where(logits.mask, weights[logits.sorted_indices][logits.plan.cell_slots], 0)
    return _mean(score, logits.data, labels.data, jnp.where(broken, jnp.nan, weights), "labels.data")


def over_sequences(
    score: Score,
    logits: PackedSequence | ArrayLike,
    labels: PackedSequence | ArrayLike,
    weights: ArrayLike | None,
    function: str,
) -> Mean:
    """The weighted mean over sequences of a score of logits [B, C] and labels [B]; as `over_tokens`."""
    if isinstance(logits, PackedSequence) or isinstance(labels, PackedSequence):
        raise TypeError(
            f"{function} takes a row of logits and a label for each sequence, got a PackedSequence. Reduce it to that "
            f"(jaxpack.last, jaxpack.segment_mean); for one per token pack both."
        )
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    check_classes(logits, labels, "B", function)
    weights = check_weights(weights, len(labels), widened(logits).dtype, function)
    return _mean(score, logits, labels, weights, "labels")


def _mean(score: Score, logits: jax.Array, labels: jax.Array, weights: jax.Array, name: str) -> Mean:
    """The weighted mean of scores. Where the weight is 0 logits are 0, so that no gradient can be NaN there."""
    counted = weights != 0
    bad = counted & outside(labels, logits.shape[1])
    refuse(bad, name, labels, f"lie in 0 to {logits.shape[1] - 1}, as the logits have {logits.shape[1]} classes")
    scores = score(jnp.where(counted[:, None], widened(logits), 0), jnp.where(counted & ~bad, labels, 0))
    return weighted(jnp.where(counted, scores, 0), jnp.where(bad, jnp.nan, weights))


def weighted(scores: jax.Array, weights: jax.Array) -> Mean:
    return Mean(jnp.sum(weights * scores), jnp.sum(weights))
