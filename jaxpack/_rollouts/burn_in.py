"""burn_in: the first steps of each sequence warm its state up, without a gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxpack._checks import at_least_one
from jaxpack._packed.broadcast import expand
from jaxpack._packed.gather import rearrange
from jaxpack._packed.inputs import padded_batch
from jaxpack._packed.maps import by_cell, cells_of, room_of_slots
from jaxpack._packed.packed_sequence import PackedSequence, check_packed
from jaxpack._packed.slack import zero_slack
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._plans.planners import plan_best
from jaxpack._rollouts.chunks import checked_lengths, lengths_of_piece, refuse_both_directions
from jaxpack._types import PyTree


def burn_in(
    apply: Callable[..., tuple[Any, PyTree]],
    params: PyTree,
    inputs: PackedSequence | ArrayLike,
    initial_state: PyTree = None,
    *,
    steps: int,
    lengths: ArrayLike | Sequence[int] | None = None,
) -> tuple[Any, PyTree]:
    """Runs a layer of which the first steps of each sequence have no gradient.

    A stored state was computed with older parameters. After a few steps the state is nearly that of the present ones,
    and from there the sequence is trained on. Values are those of one run over the whole sequence.

    Examples:
      >>> gru = jaxpack.GRU(2, 4)
      >>> params, x = gru.init(jax.random.key(0)), jnp.ones((1, 5, 2))
      >>> output, state = burn_in(gru.apply, params, x, steps=2)
      >>> bool(jnp.allclose(output, gru.apply(params, x)[0], atol=1e-6))
      True
      >>> gradient = jax.grad(lambda x: burn_in(gru.apply, params, x, steps=2)[0].sum())(x)
      >>> jnp.any(gradient != 0, axis=2).tolist()
      [[False, False, True, True, True]]

    Args:
      apply: the layer: apply(params, inputs, state) -> (outputs, state), with `lengths=` if lengths are given. Such as
        `lstm.apply`, for one direction; bind other options with functools.partial.
      params: the layer's parameters, a pytree.
      inputs: packed data [S, *F], or padded [B, T, *F] (batch first).
      initial_state: as the layer takes it, stored or None. It gets no gradient.
      steps: the number of steps k of the burn-in. A sequence of at most k steps has no gradient at all.
      lengths: int [B], for padded inputs. Default: all T.

    Returns:
      (outputs, final state), as `apply` of the whole. The outputs of the burn-in have no gradient; leave them out of
      the loss, too.

    Raises:
      TypeError: if steps is not an int, or inputs are packed and lengths are given too.
      ValueError: if steps is below 1, lengths do not fit the inputs, or the layer is bidirectional; and whatever
        `apply` raises. Traced lengths that do not fit make their sequences NaN.
    Source: Kapturowski et al. 2019, R2D2 (https://openreview.net/forum?id=r1lyTjAqYX).
    """
    steps = at_least_one("steps", steps)
    refuse_both_directions(apply)
    first = functools.partial(_without_gradient, apply, params)
    if isinstance(inputs, PackedSequence):
        if lengths is not None:
            raise TypeError("inputs are packed, and carry their lengths: do not give lengths=.")
        packed = check_packed(inputs, "burn_in")
        if packed.plan.max_length <= steps or not packed.plan.num_sequences:
            return first(packed, initial_state)
        head, tail = _split(packed, steps)
        warm, state = first(head, initial_state)
        outputs, final = apply(params, tail, state)
        return packed.replace(data=_join(packed.replace(data=None), warm, outputs, steps)), final
    batch, size, length = padded_batch(inputs, True, "inputs")
    given = checked_lengths(lengths, size, length)
    if length <= steps:
        return first(batch, initial_state, **lengths_of_piece(given, 0, length, length))
    head, tail = jax.tree.map(lambda leaf: leaf[:, :steps], batch), jax.tree.map(lambda leaf: leaf[:, steps:], batch)
    warm, state = first(head, initial_state, **lengths_of_piece(given, 0, steps, length))
    outputs, final = apply(params, tail, state, **lengths_of_piece(given, steps, length - steps, length))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, 1), warm, outputs), final


def _without_gradient(apply: Callable[..., Any], params: PyTree, inputs: Any, state: PyTree, **options: Any) -> Any:
    """Returns apply(params, inputs, state) as a constant. No argument has a gradient, so nothing is saved for one."""
    params, inputs, state = jax.tree.map(lax.stop_gradient, (params, inputs, state))
    return jax.tree.map(lax.stop_gradient, apply(params, inputs, state, **options))


@functools.lru_cache(maxsize=256)
def _plans(plan: BucketPlan, steps: int) -> tuple[BucketPlan, BucketPlan]:
    """Returns plans for the first steps of all that fits a plan, and for the rest. Slot i is slot i of the plan."""
    return plan_best(np.minimum(plan.room, steps)), plan_best(np.maximum(plan.room - steps, 0))


@functools.partial(jax.jit, static_argnames="steps")
def _split(packed: PackedSequence, steps: int) -> tuple[PackedSequence, PackedSequence]:
    """Splits each sequence after its first steps. A sequence that does not fit is NaN in the first part."""
    data = zero_slack(packed, packed.data)
    parts = []
    for part, plan in enumerate(_plans(packed.plan, steps)):
        source, target = _maps(packed.plan, plan, steps, part)
        lengths = jnp.maximum(packed.lengths - steps, 0) if part else jnp.minimum(packed.lengths, steps)
        cells = jax.tree.map(lambda leaf, source=source, target=target: rearrange(leaf, source, target), data)
        parts.append(PackedSequence(cells, lengths, packed.sorted_indices, packed.unsorted_indices, plan))
    return parts[0], parts[1]


@functools.partial(jax.jit, static_argnames="steps")
def _join(whole: PackedSequence, head: PackedSequence, tail: PackedSequence, steps: int) -> PyTree:
    """Returns the data of sequences that were split."""
    in_head = by_cell(whole.plan).steps < steps
    maps = [_maps(whole.plan, part.plan, steps, i) for i, part in enumerate((head, tail))]

    def choose(*leaves: jax.Array) -> jax.Array:
        first, rest = (rearrange(leaf, *reversed(map_)) for leaf, map_ in zip(leaves, maps, strict=True))
        return jnp.where(expand(in_head, first), first, rest)

    return zero_slack(whole, jax.tree.map(choose, head.data, tail.data))


def _maps(plan: BucketPlan, of_part: BucketPlan, steps: int, part: int) -> tuple[jax.Array, jax.Array]:
    """Returns the cell of the whole for each cell of a part (S if there is none), and the inverse.

    Args:
      plan, of_part: the plans of the whole and of the part.
      steps: the number of steps of the first part.
      part: 0 for the first part, 1 for the rest.
    """
    shift = steps * part
    slots, inner = by_cell(of_part)
    at = inner + shift
    held = at < (room_of_slots(plan) if part else jnp.minimum(room_of_slots(plan), steps))[slots]
    source = jnp.where(held, cells_of(plan, slots, jnp.where(held, at, 0)), plan.size)
    slots, at = by_cell(plan)
    held = at >= steps if part else at < steps
    target = jnp.where(held, cells_of(of_part, slots, jnp.where(held, at - shift, 0)), of_part.size)
    return source, target
