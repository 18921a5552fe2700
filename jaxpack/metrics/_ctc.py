"""Decoding of outputs trained with CTC."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._packed.gather import slot_fits
from jaxpack._packed.layout import pad
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack.losses._ctc import check_frames, split_frames


def ctc_greedy_decode(
    logits: PackedSequence, *, blank_id: int = 0, frames_per_step: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Decodes the best path of each sequence: the likeliest class of each frame, repeats merged, blanks removed.

    Examples:
      >>> frames = np.eye(3)[[1, 1, 0, 1, 2, 2]]  # a a _ a b b, with the blank _
      >>> labels, lengths = jax.jit(ctc_greedy_decode)(jaxpack.pack_sequence([frames]))
      >>> labels.tolist(), lengths.tolist()
      ([[1, 1, 2, 0, 0, 0]], [3])

    Args:
      logits: floating data [S, K * C], for K frames a step, as in jaxpack.losses.ctc.
      blank_id: the class that stands for no label.
      frames_per_step: K.

    Returns:
      int32 [B, plan.max_length * K], the labels with blank_id past them; and int32 [B], the numbers of labels, -1 for a
      sequence that does not fit its plan. To make a list: jaxpack.unpad_sequence(labels, lengths, True).

    Raises:
      TypeError: if logits are not packed, or not floating.
      ValueError: if K does not divide the features, or blank_id is not a class.
    Source: Graves et al., Connectionist temporal classification, ICML 2006, "best path decoding".
    """
    return _greedy_decode(*check_frames(logits, blank_id, frames_per_step, "ctc_greedy_decode"))


@functools.partial(jax.jit, static_argnames=("blank_id", "frames_per_step"))
def _greedy_decode(logits: PackedSequence, blank_id: int, frames_per_step: int) -> tuple[jax.Array, jax.Array]:
    """Computes `ctc_greedy_decode` without checks."""
    frames = split_frames(logits.data, frames_per_step)
    classes = logits.replace(data=jnp.argmax(frames, -1).astype(jnp.int32))
    path = pad(classes, jnp.int32(blank_id), logits.plan.max_length)
    path = path.reshape(len(path), logits.plan.max_length * frames_per_step)
    starts = jnp.pad(path[:, 1:] != path[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    kept = starts & (path != blank_id)
    places = jnp.where(kept, jnp.cumsum(kept, 1) - 1, path.shape[1])
    labels = lax.full_like(path, blank_id).at[jnp.arange(len(path))[:, None], places].set(path, mode="drop")
    fits = slot_fits(logits)[logits.unsorted_indices]
    return labels, jnp.where(fits, kept.sum(1), -1).astype(jnp.int32)
