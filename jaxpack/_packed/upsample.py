"""repeat_steps, which lengthens sequences again after they were shortened."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxpack._checks import at_least_one
from jaxpack._packed.gather import slot_lengths
from jaxpack._packed.maps import by_cell, cells_of, room_of_slots, spread
from jaxpack._packed.packed_sequence import PackedSequence, check_packed
from jaxpack._packed.slack import checked_slot_fits, zero_slack
from jaxpack._packed.windows import checked_batch, real_data, with_counts
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._plans.resized import resized


def repeat_steps(packed: PackedSequence, repeats: int, like: PackedSequence | None = None) -> PackedSequence:
    """Repeats each step of each sequence, to undo `subsample` or pooling: step t of the result is step t // repeats.

    Examples:
      >>> packed = jaxpack.pack_sequence([[1, 2, 3, 4, 5], [6]])
      >>> short = jaxpack.subsample(packed, 2)
      >>> [each.tolist() for each in jaxpack.unpack_sequence(jaxpack.repeat_steps(short, 2))]
      [[1, 1, 3, 3, 5, 5], [6, 6]]
      >>> [each.tolist() for each in jaxpack.unpack_sequence(jaxpack.repeat_steps(short, 2, like=packed))]
      [[1, 1, 3, 3, 5], [6]]
      >>> (packed - jaxpack.repeat_steps(short, 2, like=packed)).data.tolist()
      [0, 0, 1, 0, 1, 0]

    Args:
      packed: data [S, *F], or a pytree of such arrays.
      repeats: how often each step is repeated.
      like: a batch of as many sequences, whose lengths and plan the result takes; its data is not read. Where its
        sequence is longer than length * repeats, the last step goes on to its end. Steps of an empty sequence are 0.

    Returns:
      data [S', *F]: of length * repeats steps of each sequence under the plan that follows from the old one; or packed
      like the other batch.

    Raises:
      TypeError: if given a padded array (pass it through pack_padded_sequence first), or repeats is not an int.
      ValueError: if repeats is below 1, or the other batch has another number of sequences.
    Source: jnp.repeat for each sequence; torch.nn.Upsample with mode="nearest".
    """
    repeats, packed = at_least_one("repeats", repeats), check_packed(packed, "repeat_steps")
    if like is None:
        return checked_batch(_repeat(packed, repeats))
    like = check_packed(like, "repeat_steps(like)")
    if like.plan.num_sequences != packed.plan.num_sequences:
        raise ValueError(
            f"repeat_steps: like has {like.plan.num_sequences} sequences, the batch {packed.plan.num_sequences}."
        )
    return like.replace(data=_repeat_like(packed, repeats, like.replace(data=None)))


@functools.partial(jax.jit, static_argnames="repeats")
def _repeat(packed: PackedSequence, repeats: int) -> PackedSequence:
    plan = _repeated_plan(packed.plan, repeats)
    new, order, _ = with_counts(packed, slot_lengths(packed) * repeats, plan)
    return new.replace(data=zero_slack(new, _spread_out(packed, repeats, new, order)))


@functools.partial(jax.jit, static_argnames="repeats")
def _repeat_like(packed: PackedSequence, repeats: int, like: PackedSequence) -> PackedSequence:
    slots = packed.unsorted_indices[like.sorted_indices]
    return zero_slack(like, _spread_out(packed, repeats, like, slots), checked_slot_fits(packed)[slots])


def _spread_out(packed: PackedSequence, repeats: int, new: PackedSequence, slots: jax.Array) -> PackedSequence:
    """Returns the data [S', *F] of the new batch, whose slots hold the sequences of these old slots, int32 [B]."""
    plan = packed.plan
    if not plan.num_sequences:
        return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, shape=(new.plan.size, *leaf.shape[1:])), packed.data)
    slots = spread(new.plan, slots)
    last = jnp.minimum(slot_lengths(packed), room_of_slots(plan)) - 1
    steps = jnp.clip(by_cell(new.plan).steps // repeats, 0, jnp.maximum(last, 0)[slots])
    cells = cells_of(plan, slots, steps)
    return jax.tree.map(lambda leaf: leaf[cells], real_data(packed))


@functools.lru_cache(maxsize=256)
def _repeated_plan(plan: BucketPlan, repeats: int) -> BucketPlan:
    return resized(plan, lambda lengths: lengths * repeats)
