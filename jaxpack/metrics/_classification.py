"""Metrics of predicted classes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._packed.slack import poison
from jaxpack.losses import Mean
from jaxpack.losses._weighted import over_sequences, over_tokens


def perplexity(mean: Mean) -> jax.Array:
    """Returns exp of a mean cross-entropy, such as token_cross_entropy's: of C classes all as likely it is C.

    Examples:
      >>> round(float(perplexity(Mean(2 * np.log(8), 2))), 3)
      8.0
      >>> float(perplexity(Mean(0.0, 0)))
      nan

    Args:
      mean: of a cross-entropy in nats.

    Returns:
      exp(mean.value); NaN for a mean of nothing (weight 0, total 0), where exp(0) = 1 would be a perfect score.
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
    """The share of tokens, or of sequences, whose largest logit is the label's; of equal logits the first is taken.

    Examples:
      >>> labels = jaxpack.pack_sequence([[1, 2, 3], [4]])
      >>> logits = labels.replace(data=np.eye(5)[[1, 4, 2, 0]])  # labels.data is [1, 4, 2, 3]
      >>> mean = jax.jit(accuracy)(logits, labels)
      >>> float(mean.total), float(mean.weight)
      (3.0, 4.0)

    Args:
      logits: packed data [S, C] for tokens; an array [B, C] for sequences. NaN in what counts makes the result NaN.
      labels: whole numbers in [0, C): packed alike, data [S]; or [B].
      weights: [B], in the caller's order, the weight of a sequence or of each of its tokens; or of each token, data
        [S], packed as the logits are. Default: 1.
      ignore_label: a label that counts for nothing, as in jaxpack.losses.token_cross_entropy. Default: none.

    Raises:
      TypeError: as jaxpack.losses.token_cross_entropy and sequence_cross_entropy.
      ValueError: as those.
    """
    over = over_tokens if isinstance(logits, PackedSequence) else over_sequences
    return over(_hits, logits, labels, weights, ignore_label, "accuracy")


def _hits(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1 where the largest logit is the label's, 0 where it is not, NaN where a logit is."""
    hits = (jnp.argmax(logits, -1) == labels).astype(logits.dtype)
    return poison(hits, ~jnp.isnan(logits).any(-1))
