"""Functions with a result for each step: softmax, broadcast_to_steps and concatenate."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxpack._dtypes import as_jax
from jaxpack._packed.indices import same_sequences
from jaxpack._packed.maps import spread
from jaxpack._packed.packed_sequence import PackedSequence, check_packed
from jaxpack._packed.reduce import exponentials
from jaxpack._packed.slack import zero_slack
from jaxpack._packed.statistics import as_inexact, slot_sums
from jaxpack._types import PyTree


def softmax(packed: PackedSequence) -> PackedSequence:
    """Computes the softmax over the steps of each sequence, feature by feature: attention weights from scores.

    Examples:
      >>> weights = jaxpack.softmax(jaxpack.pack_sequence([[0, 0, -1000], [7]]))
      >>> [each.tolist() for each in jaxpack.unpack_sequence(weights)]
      [[0.5, 0.5, 0.0], [1.0]]

    Args:
      packed: floating data [S, *F].

    Raises:
      TypeError: if given a padded array (pass it through pack_padded_sequence first).
    """
    packed = check_packed(packed, "softmax")
    return packed.replace(data=_softmax(packed))


@jax.jit
def _softmax(packed: PackedSequence) -> PyTree:
    def normalise(leaf: jax.Array) -> jax.Array:
        leaf = as_inexact(leaf)
        powers, _ = exponentials(packed, leaf)
        total = slot_sums(packed, powers)
        return (powers / spread(packed.plan, jnp.where(total == 0, 1, total))).astype(leaf.dtype)

    return zero_slack(packed, jax.tree.map(normalise, packed.data))


def broadcast_to_steps(values: PyTree, packed: PackedSequence) -> PackedSequence:
    """Repeats a value for each sequence at each of its steps: a speaker embedding, a mask, statistics.

    Examples:
      >>> packed = jaxpack.pack_sequence([[1, 2, 3], [4]])
      >>> jaxpack.broadcast_to_steps(jnp.array([10, 20]), packed).data.tolist()
      [10, 20, 10, 10]
      >>> (packed - jaxpack.broadcast_to_steps(jaxpack.segment_max(packed), packed)).data.tolist()
      [-2, 0, -1, 0]

    Args:
      values: [B, *F], or a pytree of such arrays, in the caller's row order.
      packed: a batch of the same sequences, whose data is not read.

    Returns:
      data [S, *F], packed like the batch, zero in slack.

    Raises:
      TypeError: if packed is not a PackedSequence.
      ValueError: if the leading axis of an array is not B.
    Source: the gather that is the transpose of jax.ops.segment_sum.
    """
    packed = check_packed(packed, "broadcast_to_steps")
    values, size = jax.tree.map(lambda leaf: as_jax(leaf, "values"), values), packed.plan.num_sequences
    for leaf in jax.tree.leaves(values):
        if leaf.ndim < 1 or leaf.shape[0] != size:
            raise ValueError(
                f"broadcast_to_steps: values must have a leading axis of {size} sequences, got shape {leaf.shape}."
            )
    return packed.replace(data=_broadcast_to_steps(values, packed.replace(data=None)))


@jax.jit
def _broadcast_to_steps(values: PyTree, packed: PackedSequence) -> PyTree:
    rows = spread(packed.plan, packed.sorted_indices)
    return zero_slack(packed, jax.tree.map(lambda leaf: leaf[rows], values))


def concatenate(packed: Sequence[PackedSequence]) -> PackedSequence:
    """Concatenates the features of batches of the same sequences: arrays [S, ..., F_i] to [S, ..., sum F_i].

    Examples:
      >>> letters = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
      >>> both = jaxpack.concatenate([letters, letters.map(lambda x: 10 * x)])
      >>> both.data[0].tolist()
      [1.0, 1.0, 10.0, 10.0]

    Raises:
      TypeError: if an entry is not a PackedSequence.
      ValueError: if there are no entries, plans or concrete lengths differ, or data has no feature axis. If traced
        lengths differ, the result is NaN.
    """
    if not isinstance(packed, (list, tuple)):
        raise TypeError(f"concatenate takes a list of PackedSequence, got {type(packed).__name__}.")
    if not packed:
        raise ValueError("concatenate needs at least one PackedSequence.")
    packed = [check_packed(other, "concatenate") for other in packed]
    same = None
    for i, other in enumerate(packed):
        same = same_sequences(packed[0], other, "concatenate", ("packed[0] has", f"packed[{i}] has"), same)
        if any(leaf.ndim < 2 for leaf in jax.tree.leaves(other.data)):
            raise ValueError(f"concatenate joins the last axis, but packed[{i}] has data without a feature axis.")
    return packed[0].replace(data=_concatenate(packed, same))


@jax.jit
def _concatenate(packed: Sequence[PackedSequence], same: jax.Array | None) -> PyTree:
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, -1), *(other.data for other in packed))
    return zero_slack(packed[0], joined, same)
