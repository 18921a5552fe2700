"""Metrics of classification: perplexity and accuracy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._packed.slack import poison
from jaxpack.losses import Mean
from jaxpack.losses._weighted import over_sequences, over_tokens


def perplexity(mean: Mean) -> jax.Array:
    """Computes the perplexity exp(mean cross-entropy); it is C for C equally likely classes.

    Examples:
      >>> round(float(perplexity(Mean(2 * np.log(8), 2))), 3)
      8.0
      >>> float(perplexity(Mean(0.0, 0)))
      nan

    Args:
      mean: a mean cross-entropy in nats, such as that of jaxpack.losses.token_cross_entropy.

    Returns:
      exp(mean.value); NaN for a mean of nothing (weight 0, total 0), since exp(0) = 1 would be a perfect score.
    """
    nothing = (jnp.asarray(mean.weight) == 0) & (jnp.asarray(mean.total) == 0)
    return jnp.where(nothing, jnp.nan, jnp.exp(mean.value))


def accuracy(
    logits: PackedSequence | ArrayLike,
    labels: PackedSequence | ArrayLike,
    weights: ArrayLike | PackedSequence | None = None,
    *,
    ignore_label: int | None = None,
) -> Mean:
    """Computes the share of tokens or sequences whose label has the largest logit, the first of equal ones.

    Examples:
      >>> labels = jaxpack.pack_sequence([[1, 2, 3], [4]])
      >>> logits = labels.replace(data=np.eye(5)[[1, 4, 2, 0]])  # labels.data is [1, 4, 2, 3]
      >>> mean = jax.jit(accuracy)(logits, labels)
      >>> float(mean.total), float(mean.weight)
      (3.0, 4.0)

    Args:
      logits: packed data [S, C] for tokens; an array [B, C] for sequences. NaN at a nonzero weight gives NaN.
      labels: whole numbers in [0, C), packed like the logits, data [S]; or [B].
      weights: [B], in the caller's order: one weight for a sequence or for all its tokens; or packed like the logits,
        data [S]: one weight per token. Default: 1.
      ignore_label: a label of weight 0, as in jaxpack.losses.token_cross_entropy. Default: none.

    Raises:
      TypeError: as jaxpack.losses.token_cross_entropy and sequence_cross_entropy.
      ValueError: likewise.
    """
    over = over_tokens if isinstance(logits, PackedSequence) else over_sequences
    return over(_hits, logits, labels, weights, ignore_label, "accuracy")


def _hits(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns 1 where the label has the largest logit, else 0; NaN where a logit is NaN."""
    hits = (jnp.argmax(logits, -1) == labels).astype(logits.dtype)
    return poison(hits, ~jnp.isnan(logits).any(-1))
