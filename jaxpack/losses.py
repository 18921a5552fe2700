"""Losses on packed outputs, as sums beside the weights they are divided by: `Mean`.

A row of weight 0 (which is what jaxpack.data gives to empty rows), slack and padding count for exactly nothing, in
values and in gradients, whatever they hold. A sequence that does not fit its plan makes total and weight NaN, whatever
its own weight: its weight is replaced by NaN. Losses are computed and summed in float32 or wider.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import checkify
from jax.typing import ArrayLike

from jaxpack.arguments import as_int
from jaxpack.packed import pad_packed_sequence
from jaxpack.sequence import PackedSequence, PyTree, check_packed, is_traced, slot_lengths, who_fits

__all__ = ["Mean", "ctc", "ctc_min_frames", "sequence_cross_entropy", "token_cross_entropy"]

Score = Callable[[jax.Array, jax.Array], jax.Array]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["total", "weight"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False)
class Mean:
    """A mean as a sum beside a sum of weights, so that means of parts add up to the mean of the whole.

    A pytree, so it passes through jit, scan and grad.

    Examples:
      >>> mean = Mean(6.0, 3) + Mean(4.0, 1)
      >>> mean
      Mean(total=10.0, weight=4)
      >>> float(mean.value)  # the mean of their means would be 3
      2.5

      For the gradient of one batch differentiate the value; of one spread over devices by jax.shard_map, that of
      `mean_loss(params, shard).psum("data")`:

      >>> def mean_loss(params, batch):
      ...     return Mean(jnp.sum(params * batch), batch.size)
      >>> params, batches = 1.0, (jnp.array([1.0, 3.0]), jnp.array([4.0, 8.0]))
      >>> loss, gradient = jax.value_and_grad(lambda params: mean_loss(params, batches[0]).value)(params)
      >>> float(gradient)
      2.0

      Over micro-batches no value is known before the last, so differentiate totals, which add up, and divide once:

      >>> def total(params, batch):
      ...     mean = mean_loss(params, batch)
      ...     return mean.total, mean
      >>> def micro_step(batch):
      ...     gradient, mean = jax.grad(total, has_aux=True)(params, batch)
      ...     return Mean(gradient, mean.weight)
      >>> float(sum(map(micro_step, batches)).value)
      4.0

      So too where gradients are summed over devices by hand, in jax.pmap or jax.shard_map(..., check_vma=False):
      `micro_step(shard).psum("data").value`.

    Attributes:
      total: a sum; a number, or a pytree of arrays, such as the gradient of one.
      weight: the sum of the weights in it: how many tokens, or sequences.
    """

    total: PyTree = 0.0
    weight: ArrayLike = 0.0

    @property
    def value(self) -> PyTree:
        """total / weight; 0, with a gradient of 0, where weight is 0."""
        nothing = jnp.asarray(self.weight) == 0
        weight = jnp.where(nothing, 1, self.weight)

        def divide(total: ArrayLike) -> jax.Array:
            return jnp.where(nothing, 0, total / weight).astype(jnp.result_type(total, float))

        return jax.tree.map(divide, self.total)

    def psum(self, axis_name: Hashable) -> Mean:
        """The sum over a mapped axis, such as the devices of jax.shard_map."""
        return lax.psum(self, axis_name)

    def __add__(self, other: Mean) -> Mean:
        if not isinstance(other, Mean):
            return NotImplemented
        return jax.tree.map(operator.add, self, other)

    def __radd__(self, other: int) -> Mean:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # sum starts at 0


def token_cross_entropy(logits: PackedSequence, labels: PackedSequence, weights: ArrayLike | None = None) -> Mean:
    """Σ w_b · -log softmax(logits)[label] over all tokens, beside Σ w_b.

    Examples:
      >>> labels = jaxpack.pack_sequence([[1, 2, 3], [4]])
      >>> logits = labels.replace(data=jnp.zeros((4, 5)))  # of 4 tokens for 5 classes, all as likely
      >>> mean = jax.jit(token_cross_entropy)(logits, labels)
      >>> int(mean.weight), round(float(mean.value), 3)  # log 5
      (4, 1.609)

    Args:
      logits: floating data [S, C].
      labels: whole numbers in [0, C), data [S]; packed as the logits are.
      weights: [B], the weight of each token of a sequence, in the caller's order. Default: 1.

    Raises:
      TypeError: if one is not packed, or their dtypes are of the wrong kind.
      ValueError: if plans, shapes or concrete lengths disagree, or a concrete label is no class. Where traced ones do,
        the loss is NaN.
    Source: optax.softmax_cross_entropy_with_integer_labels.
    """
    score = optax.softmax_cross_entropy_with_integer_labels
    return over_tokens(score, logits, labels, weights, "token_cross_entropy")


def sequence_cross_entropy(logits: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> Mean:
    """Σ w_b · -log softmax(logits)[label] over sequences, beside Σ w_b.

    Examples:
      >>> logits, labels, weights = jnp.zeros((2, 5)), jnp.array([1, 4]), jnp.array([1, 0])
      >>> mean = jax.jit(sequence_cross_entropy)(logits, labels, weights)
      >>> int(mean.weight), round(float(mean.value), 3)  # log 5
      (1, 1.609)

    Args:
      logits: [B, C], floating, such as a Dense of jaxpack.last(output).
      labels: [B], whole numbers in [0, C).
      weights: [B]. Default: 1.

    Raises:
      TypeError: if one is packed, or their dtypes are of the wrong kind.
      ValueError: if shapes disagree, or a concrete label is no class; where a traced one is none, the loss is NaN.
    Source: optax.softmax_cross_entropy_with_integer_labels.
    """
    score = optax.softmax_cross_entropy_with_integer_labels
    return over_sequences(score, logits, labels, weights, "sequence_cross_entropy")


def ctc(
    logits: PackedSequence,
    labels: ArrayLike,
    label_lengths: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    blank_id: int = 0,
    frames_per_step: int = 1,
) -> Mean:
    """Σ w_b · -log p(labels_b) over sequences, beside Σ w_b, where p sums over all alignments with the frames.

    An alignment needs a frame for each label, and one for a blank between equal neighbours (`ctc_min_frames`). Where
    there are fewer, p is 0 and the loss inf, as PyTorch's, but with a gradient of 0, so that the others still learn.
    Leave such sequences out by weight, or give more frames per step.

    Examples:
      >>> logits = jaxpack.pack_sequence([np.zeros((2, 3), np.float32)])  # 2 frames, 3 classes: 9 paths
      >>> labels, label_lengths = jnp.array([[1]]), jnp.array([1])  # read off blank 1, 1 blank, and 1 1
      >>> mean = jax.jit(ctc)(logits, labels, label_lengths)
      >>> round(float(mean.value), 3)  # -log(3 / 9)
      1.099
      >>> labels, label_lengths = jnp.array([[1, 1]]), jnp.array([2])  # take 3 frames
      >>> weights = logits.lengths >= ctc_min_frames(labels, label_lengths)  # lengths times frames_per_step
      >>> weights.tolist()
      [False]

    Args:
      logits: finite floating data [S, K * C], for K frames a step. A sequence of length 0 counts for nothing.
      labels: [B, N], whole numbers in [0, C) other than blank_id; past its length a row may hold anything.
      label_lengths: [B], from 0 to N.
      weights: [B], in the caller's order. Default: 1.
      blank_id: the class that stands for no label.
      frames_per_step: K, so that a step can emit up to K labels. Its features are the K frames one after the other.

    Raises:
      TypeError: if logits are not packed, or dtypes are of the wrong kind.
      ValueError: if shapes disagree, K does not divide the features, or a concrete label or label length is out of its
        range. Where traced ones are, the loss is NaN.
    Source: optax.ctc_loss; Graves et al., Connectionist temporal classification, ICML 2006.
    """
    logits, blank_id = as_frames(logits, blank_id, frames_per_step, "ctc")
    labels, label_lengths = _check_padded_labels(labels, label_lengths, logits.plan.num_sequences)
    logits = logits.replace(data=_widened(logits.data))
    lengths = logits.lengths * frames_per_step
    weights = jnp.where(lengths > 0, _check_weights(weights, len(lengths), logits.dtype, "ctc"), 0)
    counted = weights != 0
    broken = ~logits.fits | _bad_rows(labels, label_lengths, counted, logits.shape[-1], blank_id)
    scored = counted & (lengths >= ctc_min_frames(labels, label_lengths))
    frames = pad_packed_sequence(logits, batch_first=True)[0].reshape(len(lengths), -1, logits.shape[-1])
    frames = jnp.where(scored[:, None, None], frames, 0)  # so that no gradient can be NaN elsewhere
    losses = _optax_ctc(frames, lengths, labels, jnp.where(scored, label_lengths, 0), blank_id)
    losses = jnp.where(scored, losses.astype(weights.dtype), jnp.where(counted, jnp.inf, 0))
    return _weighted(losses, jnp.where(broken, jnp.nan, weights))


def ctc_min_frames(labels: ArrayLike, label_lengths: ArrayLike) -> jax.Array:
    """How many frames an alignment with these labels takes at least: one a label, one between equal neighbours.

    Examples:
      >>> ctc_min_frames([[1, 2, 2], [3, 0, 0]], [3, 1]).tolist()
      [4, 1]

    Args:
      labels: [B, N]; past its length a row may hold anything.
      label_lengths: [B].
    """
    labels, label_lengths = jnp.asarray(labels), jnp.asarray(label_lengths)
    inside = jnp.arange(1, labels.shape[1]) < label_lengths[:, None]
    return label_lengths + (inside & (labels[:, 1:] == labels[:, :-1])).sum(1)


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
    same = _same_lengths(logits, labels, function)
    _check_classes(logits, labels, "S", function)
    weights = _check_weights(weights, logits.plan.num_sequences, _widened(logits.data).dtype, function)
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
    _check_classes(logits, labels, "B", function)
    weights = _check_weights(weights, len(labels), _widened(logits).dtype, function)
    return _mean(score, logits, labels, weights, "labels")


def as_frames(logits: PackedSequence, blank_id: int, frames_per_step: int, function: str) -> tuple[PackedSequence, int]:
    """Logits [S, K * C] as K frames a step, [S, K, C], and the blank, checked."""
    logits = check_packed(logits, function)
    frames_per_step, blank_id = as_int("frames_per_step", frames_per_step), as_int("blank_id", blank_id)
    shape = logits.shape
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"{function}: logits must be floating, got dtype {logits.dtype}.")
    if len(shape) != 2 or frames_per_step < 1 or shape[1] % frames_per_step:
        raise ValueError(
            f"{function}: logits must have data [S, K * C] for K = frames_per_step = {frames_per_step} frames a step "
            f"of C classes each, got shape {shape}."
        )
    num_classes = shape[1] // frames_per_step
    if not 0 <= blank_id < num_classes:
        raise ValueError(f"{function}: blank_id = {blank_id} is none of the {num_classes} classes.")
    return logits.replace(data=logits.data.reshape(shape[0], frames_per_step, num_classes)), blank_id


def _optax_ctc(
    frames: jax.Array, lengths: jax.Array, labels: jax.Array, label_lengths: jax.Array, blank_id: int
) -> jax.Array:
    """[B] losses of frames [B, T, C] and labels [B, N]; what lies past a length counts for nothing."""
    labels = jnp.pad(labels, ((0, 0), (0, int(labels.shape[1] == 0))))  # optax wants a column
    padding = jnp.arange(frames.shape[1]) >= lengths[:, None]
    label_padding = jnp.arange(labels.shape[1]) >= label_lengths[:, None]
    # From the frames, so that under shard_map optax's carries vary over devices as they do.
    log_epsilon = lax.full_like(frames, -1e5, shape=())
    # Accelerators would round log-probabilities in optax's products with one-hot vectors.
    with jax.default_matmul_precision("highest"):
        return optax.ctc_loss(
            frames,
            padding.astype(frames.dtype),
            jnp.where(label_padding, blank_id, labels),
            label_padding.astype(frames.dtype),
            blank_id=blank_id,
            log_epsilon=log_epsilon,
        )


def _bad_rows(
    labels: jax.Array, label_lengths: jax.Array, counted: jax.Array, num_classes: int, blank_id: int
) -> jax.Array:
    """bool [B]: which counted rows have labels, or a length of them, out of range; raises ValueError if known to."""
    bad_lengths = counted & ((label_lengths < 0) | (label_lengths > labels.shape[1]))
    _refuse(bad_lengths, "label_lengths", label_lengths, f"lie in 0 to N = {labels.shape[1]}")
    labelled = counted[:, None] & (jnp.arange(labels.shape[1]) < label_lengths[:, None])
    bad = labelled & (_outside(labels, num_classes) | (labels == blank_id))
    _refuse(bad, "labels", labels, f"lie in 0 to {num_classes - 1} and not be the blank {blank_id}")
    return bad_lengths | bad.any(1)


def _mean(score: Score, logits: jax.Array, labels: jax.Array, weights: jax.Array, name: str) -> Mean:
    """The weighted mean of scores. Where the weight is 0 logits are 0, so that no gradient can be NaN there."""
    counted = weights != 0
    bad = counted & _outside(labels, logits.shape[1])
    _refuse(bad, name, labels, f"lie in 0 to {logits.shape[1] - 1}, as the logits have {logits.shape[1]} classes")
    scores = score(jnp.where(counted[:, None], _widened(logits), 0), jnp.where(counted & ~bad, labels, 0))
    return _weighted(jnp.where(counted, scores, 0), jnp.where(bad, jnp.nan, weights))


def _weighted(scores: jax.Array, weights: jax.Array) -> Mean:
    return Mean(jnp.sum(weights * scores), jnp.sum(weights))


def _widened(array: jax.Array) -> jax.Array:
    """In 32 bits or more: floats as float32 or float64, integers as integers."""
    least = jnp.float32 if jnp.issubdtype(array.dtype, jnp.floating) else jnp.int32
    return array.astype(jnp.promote_types(array.dtype, least))


def _outside(labels: jax.Array, num_classes: int) -> jax.Array:
    """Which labels are no class. Widened first, for a narrow integer may not hold num_classes."""
    labels = _widened(labels)
    return (labels < 0) | (labels >= num_classes)


def _refuse(bad: jax.Array, name: str, values: jax.Array, rule: str) -> None:
    """Raises ValueError at the first bad value, if values are known; under checkify a bad value is an error."""
    checkify.debug_check(~jnp.any(bad), f"{name} must {rule}.")
    if not is_traced(bad) and np.any(bad):
        index = tuple(np.argwhere(bad)[0])
        raise ValueError(f"{name} must {rule}, got {name}[{', '.join(map(str, index))}] = {values[index]}.")


def _same_lengths(logits: PackedSequence, labels: PackedSequence, function: str) -> jax.Array:
    """bool [B]: which slots hold sequences of the same length in both; raises ValueError if that is known to fail."""
    if labels.plan != logits.plan:
        raise ValueError(f"{function}: labels have the plan {labels.plan}, logits have {logits.plan}. Pack both alike.")
    known = not (is_traced(labels.lengths) or is_traced(logits.lengths))
    if known and (np.asarray(labels.lengths) != np.asarray(logits.lengths)).any():
        raise ValueError(f"{function}: labels have the lengths {labels.lengths}, logits have {logits.lengths}.")
    same = (labels.sorted_indices == logits.sorted_indices) & (slot_lengths(labels) == slot_lengths(logits))
    checkify.debug_check(jnp.all(same), f"{function}: logits and labels have different lengths.")
    return same


def _check_classes(
    logits: PackedSequence | jax.Array, labels: PackedSequence | jax.Array, axis: str, function: str
) -> None:
    """Raises unless shapes and dtypes are those of logits [axis, C] and labels [axis]."""
    if len(logits.shape) != 2 or logits.shape[1] < 1 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"{function}: logits must be [{axis}, C] and labels [{axis}], got shapes {logits.shape} and {labels.shape}."
        )
    if not (jnp.issubdtype(logits.dtype, jnp.floating) and jnp.issubdtype(labels.dtype, jnp.integer)):
        raise TypeError(
            f"{function}: logits must be floating and labels integers, got dtypes {logits.dtype} and {labels.dtype}."
        )


def _check_weights(weights: ArrayLike | None, batch_size: int, dtype: Any, function: str) -> jax.Array:
    """[B] weights of this dtype, ones by default."""
    weights = jnp.ones(batch_size, dtype) if weights is None else jnp.asarray(weights)
    if weights.shape != (batch_size,):
        raise ValueError(f"{function}: weights must be one per sequence, [{batch_size}], got shape {weights.shape}.")
    if jnp.issubdtype(weights.dtype, jnp.complexfloating):
        raise TypeError(f"{function}: weights must be real, got dtype {weights.dtype}.")
    return weights.astype(dtype)


def _check_padded_labels(labels: ArrayLike, label_lengths: ArrayLike, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """Labels [B, N] and their lengths [B] for `ctc`, integers of 32 bits or more."""
    if isinstance(labels, PackedSequence):
        raise TypeError("ctc: labels must be padded, [B, N], got a PackedSequence (jaxpack.pad_packed_sequence pads).")
    labels, label_lengths = jnp.asarray(labels), jnp.asarray(label_lengths)
    if labels.ndim != 2 or len(labels) != batch_size or label_lengths.shape != (batch_size,):
        raise ValueError(
            f"ctc: for logits of {batch_size} sequences labels must be [{batch_size}, N] and label_lengths "
            f"[{batch_size}], got shapes {labels.shape} and {label_lengths.shape}."
        )
    if not (jnp.issubdtype(labels.dtype, jnp.integer) and jnp.issubdtype(label_lengths.dtype, jnp.integer)):
        raise TypeError(
            f"ctc: labels and label_lengths must be integers, got dtypes {labels.dtype} and {label_lengths.dtype}."
        )
    return _widened(labels), _widened(label_lengths)
