"""Causal convolution over the steps of each sequence, with a carry for decoding."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxpack._checks import at_least_one
from jaxpack._dtypes import as_jax
from jaxpack._packed.broadcast import expand
from jaxpack._packed.gather import real_cells, rearrange, slot_fits, slot_lengths, slot_spans
from jaxpack._packed.inputs import as_batch, batch_shape, lengths_and_plan, padded_plan
from jaxpack._packed.layout import lay_out, pad
from jaxpack._packed.maps import by_cell, cells_of, room_of_slots, spread
from jaxpack._packed.packed_sequence import PackedSequence, check_packed
from jaxpack._packed.resets import Entering
from jaxpack._packed.slack import in_caller_order, zero_slack
from jaxpack._packed.statistics import as_inexact
from jaxpack._plans.bucket_plan import BucketPlan


def causal_conv(
    inputs: PackedSequence | ArrayLike,
    kernel: ArrayLike,
    carry: ArrayLike | None = None,
    *,
    lengths: ArrayLike | Sequence[int] | None = None,
    dilation: int = 1,
) -> tuple[Any, jax.Array]:
    """Convolves the steps of each sequence with a kernel that sees only the current and earlier ones.

    y_t = sum_j kernel[j] * x_(t - (K-1-j) * dilation), over K entries; x is 0, or the carry, before the first step

    Examples:
      >>> packed = jaxpack.pack_sequence([[[1.0], [2.0], [3.0]], [[4.0]]])
      >>> output, carry = jaxpack.causal_conv(packed, [[10.0], [1.0]])  # the last entry multiplies the current step
      >>> [each.ravel().tolist() for each in jaxpack.unpack_sequence(output)]
      [[1.0, 12.0, 23.0], [4.0]]
      >>> output, carry = jaxpack.causal_conv(np.ones((2, 1, 1)), [[10.0], [1.0]], carry)  # one step more
      >>> output.ravel().tolist(), carry.ravel().tolist()
      ([31.0, 41.0], [1.0, 1.0])

    Args:
      inputs: packed data [S, F]; or padded [B, T, F] (batch first), with `lengths`.
      kernel: [K, F] for a depthwise convolution, [K, F, G] for a full one.
      carry: [B, (K-1) * dilation, F], the inputs before each sequence's first step, oldest first, as an earlier call
        returned them. Default: zeros.
      lengths: int [B], for padded inputs; they may be traced. Default: all T.
      dilation: the number of steps between entries of the kernel.

    Returns:
      A pair (output, carry). The output is laid out as the inputs are, with F features, or G. The carry is the last
      inputs of each sequence, [B, (K-1) * dilation, F], in the caller's row order.

    Raises:
      TypeError: if inputs are packed and lengths are given too, or dilation is not an int.
      ValueError: if a shape does not match, dilation is below 1, or the kernel reaches back further than the longest
        sequence that the plan has room for, and there is no carry.
    Source: torch.nn.Conv1d with padding on the left, groups=F if depthwise; its weight [G, F / groups, K] is the kernel
    with axes reversed. `causal_conv1d` of Dao-AILab computes the same on padded batches.
    """
    dilation, kernel = at_least_one("dilation", dilation), as_jax(kernel, "kernel")
    if isinstance(inputs, PackedSequence):
        if lengths is not None:
            raise TypeError("inputs are packed, and carry their lengths: do not give lengths=.")
        return _packed_conv(check_packed(inputs, "causal_conv"), kernel, carry, dilation)
    batch = as_batch(inputs, "inputs")
    size, steps = batch_shape(batch, "inputs")
    plan, lengths = padded_plan(size, steps), np.full(size, steps) if lengths is None else lengths
    packed = lay_out(batch, *lengths_and_plan(lengths, plan, size, steps), sort=False)
    output, carry = _packed_conv(packed, kernel, carry, dilation)
    return pad(output, jnp.zeros((), output.dtype), steps), carry


def _packed_conv(
    packed: PackedSequence, kernel: jax.Array, carry: ArrayLike | None, dilation: int
) -> tuple[PackedSequence, jax.Array]:
    """Validates the arguments of a convolution against a checked batch, and computes it."""
    shape = jnp.shape(packed.data)
    if len(shape) != 2:
        raise ValueError(f"causal_conv takes inputs with one axis of features, [S, F] or [B, T, F], got {packed!r}.")
    if kernel.ndim not in (2, 3) or not len(kernel) or kernel.shape[1] != shape[1]:
        raise ValueError(
            f"kernel must be [K, {shape[1]}] (depthwise) or [K, {shape[1]}, G] (full) for inputs of {shape[1]} "
            f"features, got shape {kernel.shape}. The kernel of a torch.nn.Conv1d is its weight with axes reversed."
        )
    reach = (len(kernel) - 1) * dilation
    expected = (packed.plan.num_sequences, reach, shape[1])
    if carry is not None:
        carry = as_jax(carry, "carry")
        if carry.shape != expected:
            raise ValueError(f"carry must be [B, (K-1) * dilation, F] = {list(expected)}, got shape {carry.shape}.")
    elif reach >= packed.plan.num_steps and packed.plan.num_sequences:
        raise ValueError(
            f"the kernel reaches back {reach} steps, (K-1) * dilation, but no sequence has more than "
            f"{packed.plan.num_steps}: its first entry would have no effect. Is its first axis K? If it is, pass the "
            f"inputs before each sequence as carry {list(expected)}, zeros if there are none."
        )
    output, after = _convolve(packed, kernel, carry, dilation)
    return packed.replace(data=output), after


@functools.partial(jax.jit, static_argnames="dilation")
def _convolve(
    packed: PackedSequence, kernel: jax.Array, carry: jax.Array | None, dilation: int
) -> tuple[jax.Array, jax.Array]:
    return convolve(packed, kernel, Entering(carry), dilation)


def convolve(
    packed: PackedSequence,
    kernel: jax.Array,
    entering: Entering,
    dilation: int = 1,
    starts: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes the data and the carry of `causal_conv`.

    Args:
      packed, kernel, dilation: as there, checked.
      entering: the inputs before sequences and before episodes, [B, (K-1) * dilation, F] each.
      starts: bool [S], the cells at which an episode begins; None for none.
    """
    data = packed.data.astype(jnp.result_type(packed.data, *jax.tree.leaves(entering)))
    kept = real_cells(packed) & spread(packed.plan, slot_fits(packed))
    data = jnp.where(expand(kept, data), data, 0)
    by_slot = jax.tree.map(lambda leaf: leaf.astype(data.dtype)[packed.sorted_indices], entering)
    empty = (slot_spans(packed) == 0)[:, None, None]
    used, fresh = jax.tree.map(lambda leaf: jnp.where(empty, 0, leaf), by_slot)  # the others may be NaN
    fresh = used if entering.fresh is None else fresh
    reach = (len(kernel) - 1) * dilation
    since = None if starts is None or not reach else _steps_since(packed.plan, starts, reach)
    total: jax.Array | None = None
    shifts = _shifts(packed.plan, data, used, len(kernel), dilation)
    for j, (entry, shifted) in enumerate(zip(kernel, shifts, strict=True)):
        back = reach - j * dilation
        if since is not None and back:
            shifted = jnp.where((since >= back)[:, None], shifted, _entry(fresh, packed.plan, j * dilation + since))
        term = shifted * entry[None] if entry.ndim == 1 else shifted @ entry
        total = term if total is None else total + term
    assert total is not None
    last = _last_inputs(packed, data, by_slot, since, reach)
    return zero_slack(packed, as_inexact(total)), in_caller_order(packed, last)


def _steps_since(plan: BucketPlan, starts: jax.Array, reach: int) -> jax.Array:
    """Returns the steps from the last start of an episode to each cell, int32 [S]; at most reach."""
    since = jnp.full(plan.size, reach, jnp.int32)
    shifted = list(_shifts(plan, starts[:, None], None, reach, 1))  # the current step comes last
    for back, began in enumerate(reversed(shifted)):
        since = jnp.where(began[:, 0] & (since == reach), back, since)
    return since


def _entry(before: jax.Array | None, plan: BucketPlan, index: jax.Array) -> jax.Array | int:
    """Returns an entry [S, F] of the inputs before the first step, [B, reach, F], for each cell."""
    if before is None:
        return 0
    return before[by_cell(plan).slots, jnp.minimum(index, before.shape[1] - 1)]


def _shifts(
    plan: BucketPlan, data: jax.Array, before: jax.Array | None, entries: int, dilation: int
) -> Iterator[jax.Array]:
    """Yields the inputs [S, F] that each entry of a kernel multiplies, those of the first entry first.

    Steps of a plan of one bucket are a fixed number of cells apart, so a shift is a slice. Otherwise, or with inputs
    before the first step, [B, reach, F], it is a gather.
    """
    reach = (entries - 1) * dilation
    for back in range(reach, -1, -dilation):
        if not back:
            yield data
        elif before is None and plan.num_buckets == 1:
            cells = min(back * plan.rows[0], plan.size)
            moved = lax.pad(data[: plan.size - cells], jnp.zeros((), data.dtype), ((cells, 0, 0), (0, 0, 0)))
            yield jnp.where(expand(by_cell(plan).steps >= back, data), moved, jnp.zeros_like(moved))
        else:
            source, target = _moves_back(plan, back, 0 if before is None else reach)
            joined = data if before is None else jnp.concatenate([data, before.reshape(-1, data.shape[1])])
            yield rearrange(joined, source, target)


def _moves_back(plan: BucketPlan, back: int, reach: int) -> tuple[jax.Array, jax.Array]:
    """Returns the index maps of a shift by `back` steps, for the cells followed by `reach` earlier inputs of each slot.

    Returns:
      For each cell, int32 [S], the entry that moves to it (one past the end for none); and its inverse, for each entry,
      int32 [S + B * reach], the cell to which it moves (S for none).
    """
    size, room, (slots, steps) = plan.size, room_of_slots(plan), by_cell(plan)
    entries = size + plan.num_sequences * reach
    outside = size + slots * reach + reach + steps - back if reach else jnp.full_like(steps, entries)
    source = jnp.where(steps >= back, cells_of(plan, slots, jnp.maximum(steps - back, 0)), outside)

    def cells(slots: jax.Array, steps: jax.Array) -> jax.Array:
        inside = (steps >= 0) & (steps < room[slots])
        return jnp.where(inside, cells_of(plan, slots, jnp.where(inside, steps, 0)), size)

    target = cells(slots, steps + back)
    if reach:
        earlier = jnp.arange(entries - size, dtype=jnp.int32)
        target = jnp.concatenate([target, cells(earlier // reach, earlier % reach + back - reach)])
    return source, target


def _last_inputs(
    packed: PackedSequence, data: jax.Array, entering: Entering, since: jax.Array | None, reach: int
) -> jax.Array:
    """Returns the last inputs of each slot, or of its last episode, oldest first: [B, reach, F]."""
    plan = packed.plan
    if not (plan.num_sequences and reach):
        return lax.full_like(data, 0, shape=(plan.num_sequences, reach, data.shape[1]))
    slots = jnp.arange(plan.num_sequences)[:, None]
    lengths = jnp.where(slot_fits(packed), slot_lengths(packed), 0)[:, None]
    steps = lengths - reach + jnp.arange(reach, dtype=jnp.int32)[None]
    taken, (before, fresh) = lengths, entering
    if since is not None:
        last = since[cells_of(plan, slots, jnp.maximum(lengths - 1, 0))]
        began = (last < reach) & (lengths > 0)
        taken = jnp.where(began, last + 1, lengths)
        if fresh is not None:
            before = jnp.where(began[..., None], fresh, 0 if before is None else before)
    index = taken + jnp.arange(reach, dtype=jnp.int32)[None]  # into the earlier inputs, followed by the steps taken
    inside = index >= reach
    last = data[cells_of(plan, slots, jnp.where(inside, steps, 0))]
    if before is None:
        return jnp.where(inside[..., None], last, 0)
    return jnp.where(inside[..., None], last, before[slots, jnp.where(inside, 0, index)])
