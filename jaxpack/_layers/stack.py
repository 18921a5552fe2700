"""The stack of layers that runs over a packed batch: directions, dropout between layers, initial and final states."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._cells.cell import Carry, Cell, Params
from jaxpack._layers.regularization import OFF, Noise, Regularization
from jaxpack._packed.dropout import Origins
from jaxpack._packed.gather import CellMaps, rearrange, slot_spans
from jaxpack._packed.merge import merge_directions
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._packed.resets import Resets, reversed_resets
from jaxpack._packed.slack import checked_slot_fits, poison
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._recurrence.derivative import BatchShape, Cells, Recurrence, Schedules, recur
from jaxpack._recurrence.slots import BatchCells, RealCells


class Stack(NamedTuple):
    """The static part of a stack: what a compiled program depends on, besides the plan and the shapes.

    Attributes:
      cell: the cell that every layer and direction runs.
      num_directions: 1, or 2 for a bidirectional stack.
      merge: how the outputs of directions are joined.
      dropout: the rate of dropout between layers.
      planned: whether the plan is a choice; otherwise it is the `batch_plan` of a padded batch.
      forward_mode: whether to run the plain scan, which JAX differentiates in forward mode too.
      all_states: whether to return the states after each step.
      final_only: whether to return no outputs of steps.
      schedules: how each platform runs the loops.
      regularization: the regularisers, which act if there is a dropout key; zoneout acts without one, too.
    """

    cell: Cell
    num_directions: int
    merge: str | None = "concat"
    dropout: float = 0.0
    planned: bool = True
    forward_mode: bool = False
    all_states: bool = False
    final_only: bool = False
    schedules: Schedules = Schedules()
    regularization: Regularization = OFF


@functools.partial(jax.jit, static_argnames="stack")
def run_stack(
    stack: Stack,
    params: Sequence[Params],
    packed: PackedSequence,
    state: Any,
    dropout_key: jax.Array | None = None,
    resets: Resets | None = None,
    fresh: Any = None,
) -> tuple[Any, ...]:
    """Runs a stack. Jitted, so each plan is one compilation.

    Args:
      stack: the static part.
      params: the parameters of every layer and direction, in PyTorch's order: l0, l0_reverse, l1, ...
      packed: data [S, F], in the dtype of products and outputs.
      state: the initial state, leaves [num_layers * D, B, size] in the caller's row order; size 1 for zeros. It has the
        dtype of the parameters.
      dropout_key: None for evaluation.
      resets: None for none.
      fresh: the state to which resets return, in the layout of the initial state; None for that.

    Returns:
      The outputs of the last layer [S, D*H], or as merge says; None with final_only. The final states of all layers.
      With all_states, the states after each step too, leaves [S, num_layers * D, size], zero in slack.
    """
    num_directions, sizes = stack.num_directions, stack.cell.state_sizes
    if not packed.plan.size:
        return _of_no_sequences(stack, packed, state)
    plan, real, reverse = _cells(packed, stack.planned)
    origins = Origins.of(packed) if isinstance(plan, BucketPlan) else Origins.of_batch(*plan)
    noise = Noise(stack.regularization, stack.dropout, dropout_key, origins)
    cells = Cells(real, _resets_of_directions(packed, real.mask, resets, num_directions))
    zoneout = stack.regularization.zoneout_of(stack.cell)
    recurrence = Recurrence(stack.cell, plan, stack.forward_mode, stack.all_states, False, stack.schedules, zoneout)
    # A sequence that does not fit starts from NaN in every layer, so all its results are NaN, gradients included.
    fits = checked_slot_fits(packed, None if resets is None else resets.agree)
    state, fresh = jax.tree.map(
        lambda leaf: jax.vmap(poison, (0, None))(leaf[:, packed.sorted_indices], fits), (state, fresh)
    )
    data: Any = packed.data
    finals: list[Carry] = []
    states: list[Carry] = []
    for first in range(0, len(params), num_directions):
        data = noise.on_inputs(data, first)
        inputs = [data, rearrange(data, reverse, reverse)][:num_directions]
        each = range(first, first + num_directions)
        carries, to_fresh = ([_of_direction(tree, i) for i in each if tree is not None] for tree in (state, fresh))
        if stack.final_only and each.stop == len(params):
            recurrence = recurrence._replace(final_only=True)
        weights = [noise.on_weights(params[i], i) for i in each]
        masks = [mask for i in each if (mask := noise.masks(stack.cell, i, carries[0][0].dtype))]
        results = recur(recurrence, weights, inputs, carries, cells._replace(masks=tuple(masks)), to_fresh)
        finals.extend(result.carry for result in results)
        if recurrence.final_only:
            break
        after = [(result.y, *result.memory) for result in results]
        after[1:] = [tuple(rearrange(leaf, reverse, reverse) for leaf in each) for each in after[1:]]
        merged = merge_directions([y for y, *_ in after], stack.merge)
        data = jax.tree.map(lambda leaf, dtype=packed.data.dtype: leaf.astype(dtype), merged)
        states.extend(after)
    by_slot = _side_by_side(finals, sizes)
    final_state = jax.tree.map(lambda leaf: jnp.swapaxes(leaf[packed.unsorted_indices], 0, 1), by_slot)
    if stack.final_only:
        return None, final_state
    if not stack.all_states:
        return noise.on_output(data, fits), final_state
    return noise.on_output(data, fits), final_state, _side_by_side(states, sizes)


def _of_no_sequences(stack: Stack, packed: PackedSequence, state: Any) -> tuple[Any, ...]:
    """Returns the results for a batch of no sequences."""
    final = jax.tree.map(lambda leaf, n: leaf[:, :0, :1].repeat(n, -1), state, stack.cell.state_sizes)
    outputs = [lax.full_like(packed.data, 0, shape=(0, stack.cell.output_size))] * stack.num_directions
    empty = None if stack.final_only else merge_directions(outputs, stack.merge)
    return (empty, final, jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), final))[: 2 + stack.all_states]


def _of_direction(state: Any, i: int) -> Carry:
    """Returns the carry of one layer and direction."""
    return tuple(leaf[i] for leaf in jax.tree.leaves(state))


def _side_by_side(carries: Sequence[Carry], sizes: Any) -> Any:
    """Returns the carries of all layers and directions as one state, leaves [N, num_layers * D, size]."""
    leaves = [jnp.stack(each, 1) for each in zip(*carries, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(sizes), leaves)


def _cells(packed: PackedSequence, planned: bool) -> tuple[BucketPlan | BatchShape, RealCells | BatchCells, jax.Array]:
    """Returns the shape that a recurrence has, its real cells, and the permutation of cells that reverses sequences."""
    plan = packed.plan
    if planned:
        maps = CellMaps.of(packed)
        return plan, RealCells.of(packed, maps), maps.reverse
    spans, shape = slot_spans(packed)[:, None], BatchShape(plan.num_sequences, plan.max_length)
    steps = jnp.arange(shape.max_length, dtype=jnp.int32)[None]
    first = jnp.arange(shape.num_sequences, dtype=jnp.int32)[:, None] * shape.max_length
    reverse = first + jnp.where(steps < spans, spans - 1 - steps, steps)
    return shape, BatchCells.of(spans[:, 0], shape.max_length), reverse.reshape(-1)


def _resets_of_directions(
    packed: PackedSequence, mask: jax.Array, resets: Resets | None, num_directions: int
) -> tuple[jax.Array, ...]:
    """Returns the real cells at which each direction begins an episode; () for none."""
    if resets is None:
        return ()
    backwards = (reversed_resets(packed, resets.cells) for _ in range(1, num_directions))
    return resets.cells & mask, *backwards


@contextlib.contextmanager
def explain_forward_mode(what: str, call: str) -> Iterator[None]:
    """Turns JAX's error about forward mode into one that names the keyword argument of `call(...)` that allows it."""
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            f"{what} has its own derivative, which is for reverse mode. For jax.jvp, jax.jacfwd or jax.linearize of it "
            f"pass {call}(..., forward_mode=True)."
        ) from error
