"""dropout, and the random masks of all regularisers, which depend on the sequence and not on the plan.

A mask follows from the key, the sequence's row in the caller's order, the step within the sequence, and the feature. So
it is the same under every plan, in every batch size and without a plan. Each is a bit of the Threefry hash of (row,
step and feature), which every platform computes alike, whatever the implementation of the user's key.
"""

from __future__ import annotations

import functools
import math
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.random import threefry_2x32

from jaxpack._packed.broadcast import expand, vary_like
from jaxpack._packed.maps import by_cell, take
from jaxpack._packed.packed_sequence import PackedSequence, check_packed
from jaxpack._packed.slack import zero_slack
from jaxpack._types import PyTree


class Origins(NamedTuple):
    """Where cells of a batch come from: the caller's row, and the step within it.

    Attributes:
      rows: int32 [B], the caller's row of each slot.
      slots: int32, the slot of each cell: [S], or [B, T] of a padded batch.
      steps: int32, the step of each cell, in the shape of slots.
    """

    rows: jax.Array
    slots: jax.Array
    steps: jax.Array

    @classmethod
    def of(cls, packed: PackedSequence) -> Origins:
        """Returns the origins of the cells of a packed batch."""
        return cls(packed.sorted_indices, *by_cell(packed.plan))

    @classmethod
    def of_batch(cls, num_sequences: int, max_length: int) -> Origins:
        """Returns the origins of the cells of a padded batch, [B * T]."""
        shape = num_sequences, max_length
        slots, steps = (lax.broadcasted_iota(jnp.int32, shape, axis).reshape(-1) for axis in range(2))
        return cls(lax.iota(jnp.int32, num_sequences), slots, steps)


def check_rate(name: str, rate: object) -> float:
    """Returns a probability as a float.

    Raises:
      ValueError: if it is not a number in [0, 1].
    """
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not 0 <= float(rate) <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], a probability, got {rate!r}.")
    return float(rate)


def draw_steps(key: jax.Array, rate: float, origins: Origins, features: tuple[int, ...]) -> jax.Array:
    """Draws a mask that is True with probability `rate`, independently at each cell and feature: bool [S, *F]."""
    return _draw(key, rate, take(origins.rows, origins.slots), origins.steps, features)


def draw_sequences(key: jax.Array, rate: float, origins: Origins, features: tuple[int, ...]) -> jax.Array:
    """Draws a mask that is True with probability `rate`, the same at all steps of a sequence: of each slot [B, *F]."""
    return _draw(key, rate, origins.rows, jnp.zeros_like(origins.rows), features)


def drop_steps(key: jax.Array, data: jax.Array, origins: Origins, rate: float) -> jax.Array:
    """Zeroes features with probability `rate` at each cell, and scales the others so that the mean stays.

    Args:
      key: a random key.
      data: [S, *F]; or [B, T, *F] with origins of that shape.
      origins: of the cells.
      rate: the probability, static.
    """
    return scale_kept(data, draw_steps(key, rate, origins, data.shape[origins.steps.ndim :]), rate)


def drop_sequences(key: jax.Array, data: jax.Array, origins: Origins, rate: float) -> jax.Array:
    """Does what `drop_steps` does, with one mask for all steps of a sequence."""
    dropped = draw_sequences(key, rate, origins, data.shape[origins.steps.ndim :])
    return scale_kept(data, take(dropped, origins.slots), rate)


def drop_weights(key: jax.Array, weights: jax.Array, rate: float) -> jax.Array:
    """Zeroes entries [N, ...] with probability `rate`, and scales the others so that the mean stays."""
    rows = lax.iota(jnp.int32, len(weights))
    return scale_kept(weights, _draw(key, rate, rows, jnp.zeros_like(rows), weights.shape[1:]), rate)


def scale_kept(data: jax.Array, dropped: jax.Array, rate: float) -> jax.Array:
    """Returns zeros where a mask, drawn with this rate, is True, and the data over 1 - rate elsewhere."""
    return jnp.where(dropped, 0, data / (1 - rate) if rate < 1 else data)


def dropout(packed: PackedSequence, rate: float, key: jax.Array, *, locked: bool = False) -> PackedSequence:
    """Zeroes features at random, and scales the others by 1 / (1 - rate).

    Masks depend on the key, the sequence's row in the caller's order, the step within the sequence and the feature, and
    on nothing else. The same key gives the same result under every plan, and in a batch with more sequences.

    Examples:
      >>> packed = jaxpack.pack_sequence([np.ones((3, 4)), np.ones((1, 4))])
      >>> dropped = jaxpack.dropout(packed, 0.5, jax.random.key(0), locked=True)
      >>> set(dropped.data.ravel().tolist()) <= {0.0, 2.0}
      True
      >>> first, second, third = jaxpack.unpack_sequence(dropped)[0].tolist()
      >>> first == second == third  # one mask for all steps of a sequence
      True

    Args:
      packed: floating data [S, *F], or a pytree of such arrays, each of which has masks of its own.
      rate: the probability of a zero, in [0, 1]; a Python number.
      key: a JAX random key of any implementation.
      locked: whether all steps of a sequence have one mask (variational or locked dropout). Default: each step has its
        own.

    Returns:
      Data of the same shapes and dtypes, zero in slack.

    Raises:
      TypeError: if packed is not a PackedSequence, or its data is not floating.
      ValueError: if the rate is not a number in [0, 1].
    Source: Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from overfitting"; for locked
      Gal & Ghahramani 2016, "A theoretically grounded application of dropout in recurrent neural networks".
    """
    packed, rate = check_packed(packed, "dropout"), check_rate("rate", rate)
    for leaf in jax.tree.leaves(packed.data):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(f"dropout: data must be floating, got {leaf.dtype}. Drop what an embedding makes of it.")
    return packed.replace(data=_dropout(packed, rate, key, bool(locked)))


@functools.partial(jax.jit, static_argnames=("rate", "locked"))
def _dropout(packed: PackedSequence, rate: float, key: jax.Array, locked: bool) -> PyTree:
    leaves, structure = jax.tree.flatten(packed.data)
    if rate and packed.plan.size:
        drop, origins = drop_sequences if locked else drop_steps, Origins.of(packed)
        leaves = [drop(jax.random.fold_in(key, i), leaf, origins, rate) for i, leaf in enumerate(leaves)]
    return zero_slack(packed, jax.tree.unflatten(structure, leaves))


def _draw(key: jax.Array, rate: float, rows: jax.Array, steps: jax.Array, features: tuple[int, ...]) -> jax.Array:
    """Draws a mask that is True with probability `rate`: bool [*cells, *F] for rows and steps of the same shape."""
    width = math.prod(features)
    blocks = -(-width // 2)  # each hash makes two words
    words = jax.random.bits(key, (2,), jnp.uint32)
    words, rows, steps = vary_like((words, rows, steps), (words, rows, steps))
    shape = *rows.shape, blocks
    block = lax.broadcasted_iota(jnp.uint32, shape, rows.ndim)
    row = jnp.broadcast_to(expand(rows.astype(jnp.uint32), block), shape)
    counts = jnp.stack([row, expand(steps.astype(jnp.uint32), block) * jnp.uint32(blocks) + block])
    hashes = threefry_2x32((words[0], words[1]), counts)
    bits = jnp.concatenate([hashes[0], hashes[1]], axis=-1)[..., :width].reshape(*rows.shape, *features)
    if rate >= 1:
        return jnp.ones_like(bits, bool)
    return bits < jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
