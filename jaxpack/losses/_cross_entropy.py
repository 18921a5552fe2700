"""Cross-entropy losses of tokens and of sequences."""

from __future__ import annotations

import optax
from numpy.typing import ArrayLike

from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack.losses._mean import Mean
from jaxpack.losses._weighted import over_sequences, over_tokens


def token_cross_entropy(
    logits: PackedSequence,
    labels: PackedSequence,
    weights: ArrayLike | PackedSequence | None = None,
    *,
    ignore_label: int | None = None,
) -> Mean:
    """Computes Σ w · -log softmax(logits)[label] over all tokens, with its weight Σ w.

    Examples:
      >>> labels = jaxpack.pack_sequence([[1, 2, 3], [4]])
      >>> logits = labels.replace(data=jnp.zeros((4, 5)))  # 4 tokens, 5 equally likely classes
      >>> mean = jax.jit(token_cross_entropy)(logits, labels)
      >>> int(mean.weight), round(float(mean.value), 3)  # log 5
      (4, 1.609)

      To leave out tokens, such as a prompt or the later pieces of a word, give weights or an ignored label:

      >>> weights = jaxpack.pack_sequence([[0, 0, 1], [1]])
      >>> int(token_cross_entropy(logits, labels, weights).weight)
      2
      >>> labels = jaxpack.pack_sequence([[1, -100, 3], [4]])
      >>> int(token_cross_entropy(logits, labels, ignore_label=-100).weight)
      3

    Args:
      logits: floating data [S, C].
      labels: whole numbers in [0, C), data [S], packed like the logits.
      weights: real numbers or bools. [B]: one weight for all tokens of a sequence, in the caller's order; or packed
        like the logits, data [S]: one weight per token. Default: 1.
      ignore_label: a label whose tokens have weight 0, whatever `weights` holds, such as PyTorch's -100. Default: none.

    Raises:
      TypeError: if logits or labels are not packed, dtypes are of the wrong kind, or ignore_label is not an int.
      ValueError: if plans, shapes or concrete lengths disagree, or a concrete label is not a class. With traced lengths
        or labels the loss is NaN instead.
    Source: optax.softmax_cross_entropy_with_integer_labels; torch.nn.functional.cross_entropy's ignore_index.
    """
    score = optax.softmax_cross_entropy_with_integer_labels
    return over_tokens(score, logits, labels, weights, ignore_label, "token_cross_entropy")


def sequence_cross_entropy(
    logits: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None, *, ignore_label: int | None = None
) -> Mean:
    """Computes Σ w_b · -log softmax(logits)[label] over sequences, with its weight Σ w_b.

    Examples:
      >>> logits, labels, weights = jnp.zeros((2, 5)), jnp.array([1, 4]), jnp.array([1, 0])
      >>> mean = jax.jit(sequence_cross_entropy)(logits, labels, weights)
      >>> int(mean.weight), round(float(mean.value), 3)  # log 5
      (1, 1.609)

    Args:
      logits: [B, C], floating, for example a Dense layer applied to layer.final_output(state).
      labels: [B], whole numbers in [0, C).
      weights: [B], real numbers or bools. Default: 1.
      ignore_label: a label whose sequences have weight 0, as in `token_cross_entropy`. Default: none.

    Raises:
      TypeError: if an argument is packed, dtypes are of the wrong kind, or ignore_label is not an int.
      ValueError: if shapes disagree, or a concrete label is not a class. With traced labels the loss is NaN instead.
    Source: optax.softmax_cross_entropy_with_integer_labels; torch.nn.functional.cross_entropy's ignore_index.
    """
    score = optax.softmax_cross_entropy_with_integer_labels
    return over_sequences(score, logits, labels, weights, ignore_label, "sequence_cross_entropy")
