"""Weighted means of a score over tokens or sequences, shared by cross-entropies and accuracies."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxpack._packed.gather import real_cells
from jaxpack._packed.indices import same_sequences, values_of
from jaxpack._packed.maps import spread
from jaxpack._packed.packed_sequence import PackedSequence, check_packed
from jaxpack._packed.slack import checked_slot_fits
from jaxpack._traced_checks import checked
from jaxpack.losses._checks import (
    Weights,
    as_array,
    as_labels,
    check_classes,
    check_token_weights,
    check_weights,
    ignored_number,
    outside,
    refuse,
    widened,
)
from jaxpack.losses._mean import Mean

Score = Callable[[jax.Array, jax.Array], jax.Array]


class _Scoring(NamedTuple):
    """The static part of a weighted mean.

    Attributes:
      score: a function of logits [N, C] and labels [N], which returns [N].
      ignored: a label of weight 0; None if there is none.
      per_token: whether weights are per token rather than per sequence.
    """

    score: Score
    ignored: int | None
    per_token: bool = False


def over_tokens(
    score: Score,
    logits: PackedSequence | ArrayLike,
    labels: PackedSequence | ArrayLike,
    weights: Weights,
    ignore_label: int | None,
    function: str,
) -> Mean:
    """Computes the weighted mean over tokens of a score of logits [N, C] and labels [N]; errors name `function`."""
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
    scoring = _Scoring(score, ignored_number(ignore_label, labels.data), isinstance(weights, PackedSequence))
    _check_tokens(scoring, logits, labels.data, given)
    return _over_tokens(scoring, logits, labels.data, given, same)


def _check_tokens(scoring: _Scoring, logits: PackedSequence, labels: jax.Array, weights: jax.Array | None) -> None:
    """Raises ValueError for a label that counts and is not a class, if all values are known."""
    indices = logits.lengths, logits.sorted_indices
    values = values_of(labels, *indices, *([] if weights is None else [weights]))
    if values is None:
        return
    classes, lengths, order, *rest = values
    plan = logits.plan
    counted = (lengths[order][plan.cell_slots] > plan.cell_steps) & (classes != scoring.ignored)
    for given in rest:
        counted &= (given if scoring.per_token else given[order][plan.cell_slots]) != 0
    refuse(counted & outside(classes, logits.shape[1]), "labels.data", classes, _rule(logits.shape[1]))


@functools.partial(jax.jit, static_argnames="scoring")
def _over_tokens(
    scoring: _Scoring,
    logits: PackedSequence,
    labels: jax.Array,
    weights: jax.Array | None,
    same: jax.Array | None,
) -> Mean:
    """Computes `over_tokens` without checks.

    Args:
      scoring: the static part.
      logits: data [S, C].
      labels: [S].
      weights: [S] if per token, else [B]; None for ones.
      same: bool [B], which slots hold sequences of the same length in all batches; None if all do.
    """
    dtype = widened(logits.data).dtype
    fits = checked_slot_fits(logits, same)
    weights = jnp.ones(logits.plan.num_sequences, dtype) if weights is None else weights.astype(dtype)
    of_cells = weights if scoring.per_token else spread(logits.plan, weights[logits.sorted_indices])
    counted = real_cells(logits)
    if scoring.ignored is not None:
        counted &= labels != scoring.ignored
    of_cells = jnp.where(spread(logits.plan, fits), jnp.where(counted, of_cells, 0), jnp.nan)
    return _mean(scoring.score, logits.data, labels, of_cells, "labels.data")


def over_sequences(
    score: Score,
    logits: PackedSequence | ArrayLike,
    labels: PackedSequence | ArrayLike,
    weights: Weights,
    ignore_label: int | None,
    function: str,
) -> Mean:
    """Computes the weighted mean over sequences of a score of logits [B, C] and labels [B]; as `over_tokens`."""
    if isinstance(logits, PackedSequence) or isinstance(labels, PackedSequence):
        raise TypeError(
            f"{function} takes a row of logits and a label for each sequence, got a PackedSequence. Reduce it to one "
            f"row per sequence (jaxpack.last, jaxpack.segment_mean); for a label per token pack both."
        )
    rows = as_array(logits, "logits", function, "Give a row of logits for each sequence, [B, C].")
    classes = as_labels(labels, "labels", function, "For a label per token pack logits and labels.")
    check_classes(rows, classes, "B", function)
    given = check_weights(weights, len(classes), function)
    scoring = _Scoring(score, ignored_number(ignore_label, classes))
    values = values_of(classes, *([] if given is None else [given]))
    if values is not None:
        counted = np.logical_and.reduce([values[0] != scoring.ignored, *(each != 0 for each in values[1:])])
        refuse(counted & outside(values[0], rows.shape[1]), "labels", values[0], _rule(rows.shape[1]))
    return _over_sequences(scoring, rows, classes, given)


@functools.partial(jax.jit, static_argnames="scoring")
def _over_sequences(scoring: _Scoring, logits: jax.Array, labels: jax.Array, weights: jax.Array | None) -> Mean:
    """Computes `over_sequences` without checks."""
    dtype = widened(logits).dtype
    weights = jnp.ones(len(labels), dtype) if weights is None else weights.astype(dtype)
    if scoring.ignored is not None:
        weights = jnp.where(labels == scoring.ignored, 0, weights)
    return _mean(scoring.score, logits, labels, weights, "labels")


def weighted(scores: jax.Array, weights: jax.Array) -> Mean:
    """Returns the weighted mean of scores."""
    return Mean(jnp.sum(weights * scores), jnp.sum(weights))


def _mean(score: Score, logits: jax.Array, labels: jax.Array, weights: jax.Array, name: str) -> Mean:
    """Computes the weighted mean of scores; logits of weight 0 are set to 0, so that no gradient is NaN there."""
    counted = weights != 0
    bad = counted & outside(labels, logits.shape[1])
    bad = checked(bad, ~jnp.any(bad), f"{name} must {_rule(logits.shape[1])}.")
    scores = score(jnp.where(counted[:, None], widened(logits), 0), jnp.where(counted & ~bad, labels, 0))
    return weighted(jnp.where(counted, scores, 0), jnp.where(bad, jnp.nan, weights))


def _rule(num_classes: int) -> str:
    return (
        f"be in 0 to {num_classes - 1}, as the logits have {num_classes} classes (for a label that counts for nothing "
        f"give ignore_label)"
    )
