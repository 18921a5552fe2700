"""Connectionist temporal classification (CTC): the loss, and its checks of frames and labels."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from numpy.typing import ArrayLike

from jaxpack._checks import as_int
from jaxpack._packed.gather import slot_fits
from jaxpack._packed.indices import values_of
from jaxpack._packed.layout import pad
from jaxpack._packed.packed_sequence import PackedSequence, check_packed
from jaxpack._traced_checks import checked
from jaxpack.losses._checks import as_labels, check_weights, outside, refuse, widened
from jaxpack.losses._mean import Mean
from jaxpack.losses._weighted import weighted

_IMPOSSIBLE = -1e30  # the log-probability of an impossible class at a frame
_LOG_ZERO = -1e37  # of no alignment: below all paths of _IMPOSSIBLE, where optax's -1e5 is above paths of real logits


def ctc(
    logits: PackedSequence,
    labels: ArrayLike,
    label_lengths: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    blank_id: int = 0,
    frames_per_step: int = 1,
) -> Mean:
    """Computes Σ w_b · -log p(labels_b) over sequences, with its weight Σ w_b; p sums over all alignments.

    An alignment needs a frame for each label, and one for a blank between equal neighbours (`ctc_min_frames`). With
    fewer frames, p is 0 and the loss inf, as PyTorch's, but its gradient is 0, so that the other sequences still learn.
    Give such sequences weight 0, or more frames per step. No loss is below 0.

    Examples:
      >>> logits = jaxpack.pack_sequence([np.zeros((2, 3), np.float32)])  # 2 frames, 3 classes: 9 paths
      >>> labels, label_lengths = jnp.array([[1]]), jnp.array([1])  # of the paths blank 1, 1 blank, and 1 1
      >>> mean = jax.jit(ctc)(logits, labels, label_lengths)
      >>> round(float(mean.value), 3)  # -log(3 / 9)
      1.099
      >>> labels, label_lengths = jnp.array([[1, 1]]), jnp.array([2])  # needs 3 frames
      >>> weights = logits.lengths >= ctc_min_frames(labels, label_lengths)  # lengths times frames_per_step
      >>> weights.tolist()
      [False]

      The value is the mean over sequences. PyTorch's default (reduction="mean") first divides each loss by the number
      of its labels, then by the number of sequences:

      >>> logits = jaxpack.pack_sequence([np.zeros((4, 3), np.float32), np.zeros((3, 3), np.float32)])
      >>> labels, label_lengths = jnp.array([[1, 2], [2, 0]]), jnp.array([2, 1])
      >>> weights = 1 / jnp.maximum(label_lengths, 1)
      >>> mean = Mean(ctc(logits, labels, label_lengths, weights).total, len(label_lengths))
      >>> round(float(mean.value), 3)  # (-log(15 / 81) / 2 - log(6 / 27)) / 2
      1.174

    Args:
      logits: floating data [S, K * C], for K frames a step; -inf for an impossible class. A sequence of length 0 has
        weight 0.
      labels: [B, N], whole numbers in [0, C) other than blank_id; past its length a row may hold anything.
      label_lengths: [B], from 0 to N.
      weights: [B], in the caller's order. Default: 1.
      blank_id: the class that stands for no label.
      frames_per_step: K, the frames of a step, one after the other in its features. A step can emit up to K labels.

    Raises:
      TypeError: if logits are not packed, or dtypes are of the wrong kind.
      ValueError: if shapes disagree, K does not divide the features, or a concrete label or label length is out of
        range. With traced ones the loss is NaN instead.
    Source: optax.ctc_loss; Graves et al., Connectionist temporal classification, ICML 2006.
    """
    logits, blank_id, frames_per_step = check_frames(logits, blank_id, frames_per_step, "ctc")
    labels, label_lengths = _check_padded_labels(labels, label_lengths, logits.plan.num_sequences, "ctc")
    given = check_weights(weights, logits.plan.num_sequences, "ctc")
    values = values_of(labels, label_lengths, logits.lengths, *([] if given is None else [given]))
    if values is not None:
        counted = np.logical_and.reduce([values[2] > 0, *(each != 0 for each in values[3:])])
        num_classes = logits.shape[1] // frames_per_step
        for bad, name, array, rule in _bad(values[0], values[1], counted, num_classes, blank_id):
            refuse(bad, name, array, rule)
    return _ctc(logits, labels, label_lengths, given, blank_id, frames_per_step)


@functools.partial(jax.jit, static_argnames=("blank_id", "frames_per_step"))
def _ctc(
    logits: PackedSequence,
    labels: jax.Array,
    label_lengths: jax.Array,
    weights: jax.Array | None,
    blank_id: int,
    frames_per_step: int,
) -> Mean:
    """Computes `ctc` without checks."""
    logits = logits.replace(data=widened(split_frames(logits.data, frames_per_step)))
    lengths, num_classes = logits.lengths * frames_per_step, logits.shape[-1]
    weights = jnp.ones(len(lengths), logits.dtype) if weights is None else weights.astype(logits.dtype)
    weights = jnp.where(lengths > 0, weights, 0)
    counted = weights != 0
    broken = ~slot_fits(logits)[logits.unsorted_indices]
    for bad, name, _, rule in _bad(labels, label_lengths, counted, num_classes, blank_id):
        bad = checked(bad, ~jnp.any(bad), f"{name} must {rule}.")
        broken |= bad if bad.ndim == 1 else bad.any(1)
    scored = counted & (lengths >= _min_frames(labels, label_lengths))
    num_frames = logits.plan.max_length * frames_per_step
    frames = pad(logits, jnp.zeros((), logits.dtype), logits.plan.max_length).reshape(-1, num_frames, num_classes)
    frames = jnp.where(scored[:, None, None], frames, 0)  # no gradient can be NaN elsewhere
    losses = _optax_ctc(frames, lengths, labels, jnp.where(scored, label_lengths, 0), blank_id)
    possible = scored & ~(losses > -_IMPOSSIBLE / 2)
    losses = jnp.where(possible, _at_least_zero(losses).astype(weights.dtype), jnp.where(counted, jnp.inf, 0))
    return weighted(losses, jnp.where(broken, jnp.nan, weights))


def ctc_min_frames(labels: ArrayLike, label_lengths: ArrayLike) -> jax.Array:
    """Returns the least number of frames of an alignment: one per label, and one between equal neighbours.

    Examples:
      >>> ctc_min_frames([[1, 2, 2], [3, 0, 0]], [3, 1]).tolist()
      [4, 1]

    Args:
      labels: [B, N]; past its length a row may hold anything.
      label_lengths: [B].

    Returns:
      int [B].

    Raises:
      TypeError: if labels are packed, or dtypes are of the wrong kind.
      ValueError: if shapes disagree.
    """
    return _min_frames(*_check_padded_labels(labels, label_lengths, None, "ctc_min_frames"))


@jax.jit
def _min_frames(labels: jax.Array, label_lengths: jax.Array) -> jax.Array:
    repeats = _spans(label_lengths, labels.shape[1])[:, 1:] & (labels[:, 1:] == labels[:, :-1])
    return label_lengths + repeats.sum(1, dtype=label_lengths.dtype)


def check_frames(
    logits: PackedSequence, blank_id: int, frames_per_step: int, function: str
) -> tuple[PackedSequence, int, int]:
    """Validates logits [S, K * C], the blank and K, and returns them."""
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
    return logits, blank_id, frames_per_step


def split_frames(data: jax.Array, frames_per_step: int) -> jax.Array:
    """Reshapes [S, K * C] to [S, K, C]."""
    return data.reshape(len(data), frames_per_step, data.shape[1] // frames_per_step)


def _optax_ctc(
    frames: jax.Array, lengths: jax.Array, labels: jax.Array, label_lengths: jax.Array, blank_id: int
) -> jax.Array:
    """Computes losses [B] of frames [B, T, C] and labels [B, N]; values past a length have no effect.

    A loss is beyond -_IMPOSSIBLE if every alignment has a class of logit -inf.
    """
    labels = jnp.pad(labels, ((0, 0), (0, int(labels.shape[1] == 0))))  # optax needs a column
    label_padding = ~_spans(label_lengths, labels.shape[1])
    # Logits must be finite, or optax's products with zeros are NaN; and no path may fall below its log(0).
    frames = jnp.maximum(frames - lax.stop_gradient(jnp.max(frames, -1, keepdims=True)), _IMPOSSIBLE)
    # Made from the frames, so that under shard_map optax's carries vary over devices like them.
    log_epsilon = lax.full_like(frames, _LOG_ZERO, shape=())
    # By default, accelerators round log-probabilities in optax's products with one-hot vectors.
    with jax.default_matmul_precision("highest"):
        return optax.ctc_loss(
            frames,
            (~_spans(lengths, frames.shape[1])).astype(frames.dtype),
            jnp.where(label_padding, blank_id, labels),
            label_padding.astype(frames.dtype),
            blank_id=blank_id,
            log_epsilon=log_epsilon,
        )


def _at_least_zero(losses: jax.Array) -> jax.Array:
    """Raises losses that rounding brought below 0 to 0; keeps their gradient, which is that of other alignments."""
    return jnp.where(losses > 0, losses, losses - lax.stop_gradient(losses))


def _spans(lengths: Any, size: int) -> Any:
    """Returns a mask of the first `lengths` places of each row: bool [B, size]."""
    places = (np if isinstance(lengths, np.ndarray) else jnp).arange(size, dtype=lengths.dtype)
    return places[None] < lengths[:, None]


def _bad(
    labels: Any, label_lengths: Any, counted: Any, num_classes: int, blank_id: int
) -> Iterator[tuple[Any, str, Any, str]]:
    """Yields labels out of range in rows that count: their mask, argument name, values, and rule; NumPy or JAX."""
    size = labels.shape[1]
    yield (
        counted & ((label_lengths < 0) | (label_lengths > size)),
        "label_lengths",
        label_lengths,
        f"be in 0 to N = {size}",
    )
    bad = counted[:, None] & _spans(label_lengths, size) & (outside(labels, num_classes) | (labels == blank_id))
    yield bad, "labels", labels, f"be in 0 to {num_classes - 1} and not be the blank {blank_id}"


def _check_padded_labels(
    labels: ArrayLike, label_lengths: ArrayLike, batch_size: int | None, function: str
) -> tuple[jax.Array, jax.Array]:
    """Validates labels [B, N] and their lengths [B]; returns them as integers of 32 bits or more."""
    if isinstance(labels, PackedSequence):
        raise TypeError(
            f"{function}: labels must be padded, [B, N], got a PackedSequence. Pad it: labels, label_lengths = "
            f"jaxpack.pad_packed_sequence(labels, batch_first=True)."
        )
    pad = (
        "Pad them, labels = jaxpack.pad_sequence(labels, batch_first=True), and give the length of each row as "
        "label_lengths."
    )
    labels = as_labels(labels, "labels", function, pad)
    label_lengths = as_labels(label_lengths, "label_lengths", function, "Give one number for each row of labels.")
    rows = label_lengths.size if batch_size is None else batch_size
    if labels.ndim != 2 or len(labels) != rows or label_lengths.shape != (rows,):
        hint = ""
        if label_lengths.shape == (rows, 1):
            hint = " Drop the last axis: label_lengths[:, 0]."
        elif labels.ndim == 1:
            hint = f" Labels one after the other, as PyTorch takes them, are split first. {pad}"
        raise ValueError(
            f"{function}: for {rows} sequences labels must be [{rows}, N] and label_lengths [{rows}], got shapes "
            f"{labels.shape} and {label_lengths.shape}.{hint}"
        )
    for name, array in (("labels", labels), ("label_lengths", label_lengths)):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(
                f"{function}: {name} must be integers, got dtype {array.dtype}. If they are whole numbers: "
                f"{name}.astype(int)."
            )
    return widened(labels), widened(label_lengths)
