"""The weighted mean of a score, over tokens or over sequences: what cross-entropies and accuracies share."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxpack.losses._checks import (
    Weights,
    as_array,
    as_labels,
    check_classes,
    check_ignored,
    check_token_weights,
    check_weights,
    outside,
    refuse,
    widened,
)
from jaxpack.losses._mean import Mean
from jaxpack.sequence import PackedSequence, check_packed, same_sequences, who_fits

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
    dtype, slots = widened(logits.data).dtype, logits.plan.cell_slots
    if isinstance(weights, PackedSequence):
        packed = check_packed(weights, f"{function}(weights=...)")
        same = same_sequences(logits, packed, function, ("logits have", "weights have"), same)
        of_cells = check_token_weights(packed, dtype, function)
    else:
        of_rows = check_weights(weights, logits.plan.num_sequences, dtype, function, per_token=True)
        of_cells = of_rows[logits.sorted_indices][slots]
    fits = who_fits(logits) if same is None else who_fits(logits) & same
    counted = logits.mask & ~check_ignored(ignore_label, labels.data)
    of_cells = jnp.where(fits[slots], jnp.where(counted, of_cells, 0), jnp.nan)
    return _mean(score, logits.data, labels.data, of_cells, "labels.data")


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
    of_rows = check_weights(weights, len(classes), widened(rows).dtype, function)
    of_rows = jnp.where(check_ignored(ignore_label, classes), 0, of_rows)
    return _mean(score, rows, classes, of_rows, "labels")


def weighted(scores: jax.Array, weights: jax.Array) -> Mean:
    """The weighted mean of scores: their weighted sum beside the sum of weights."""
    return Mean(jnp.sum(weights * scores), jnp.sum(weights))


def _mean(score: Score, logits: jax.Array, labels: jax.Array, weights: jax.Array, name: str) -> Mean:
    """The weighted mean of scores. Where the weight is 0 logits are 0, so that no gradient can be NaN there."""
    counted = weights != 0
    bad = counted & outside(labels, logits.shape[1])
    rule = (
        f"lie in 0 to {logits.shape[1] - 1}, as the logits have {logits.shape[1]} classes (for a label that counts for "
        f"nothing give ignore_label)"
    )
    refuse(bad, name, labels, rule)
    scores = score(jnp.where(counted[:, None], widened(logits), 0), jnp.where(counted & ~bad, labels, 0))
    return weighted(jnp.where(counted, scores, 0), jnp.where(bad, jnp.nan, weights))
