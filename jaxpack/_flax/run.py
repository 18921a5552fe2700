"""run: one call of a drop-in, in one direction or two.

Known cells run in jaxpack's recurrence, both directions at once if their cells are of one kind. Other cells run in
packed_scan, with a scan that Flax lifts. Batches whose sizes no plan has are scanned as padded batches.

Lengths are checked once, when a call comes in. A call of a known cell is then one program, in which lengths are
traced: outside jit, such a call neither checks lengths again nor waits for results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpack._flax.call import Call, Direction
from jaxpack._flax.known import KnownCell, flip
from jaxpack._flax.layout import Layout
from jaxpack._flax.padded_scan import scan_padded
from jaxpack._layers.stack import Stack, explain_forward_mode, run_stack
from jaxpack._packed.inputs import batch_plan
from jaxpack._packed.layout import reverse
from jaxpack._packed.masks import ValidSteps, lengths_of
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._packed.resets import Resets, packed_beside, reversed_resets
from jaxpack._packed.scan import scan_packed
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree


class _Config(NamedTuple):
    """The static part of a run of one direction, or of two that share their steps.

    Attributes:
      layout: the axes of the inputs.
      plan: the plan to run under.
      planned: True if the plan is a choice; False if it is only the shape of the padded batch.
      sort: True to put the longest sequence first. Otherwise rows stay in the caller's order, as do a cell's variables.
      reverse: True to read each sequence from its end.
      restore_order: True to bring the outputs back to the order of the inputs then.
      forward_mode: True to differentiate in forward mode.
    """

    layout: Layout
    plan: BucketPlan
    planned: bool
    sort: bool
    reverse: bool
    restore_order: bool
    forward_mode: bool

    def pack(
        self, inputs: PackedSequence | jax.Array, lengths: jax.Array | None, resets: Resets | jax.Array | None
    ) -> tuple[PackedSequence, Resets | None]:
        """Packs the inputs and their resets in the order in which the recurrence reads them."""
        if isinstance(inputs, PackedSequence):
            packed, begins = inputs, resets
        else:
            assert lengths is not None
            packed, begins = packed_beside(self.layout.pack((inputs, resets), lengths, self.plan, self.sort))
        assert begins is None or isinstance(begins, Resets)
        if not self.reverse:
            return packed, begins
        if begins is not None:
            begins = begins._replace(cells=reversed_resets(packed, begins.cells))
        return packed.replace(data=reverse(packed)), begins

    def restore(self, outputs: PackedSequence) -> PyTree:
        """Returns the outputs in the order and layout of the inputs."""
        outputs = outputs.replace(data=reverse(outputs)) if self.restore_order else outputs
        return self.layout.restore(outputs)


_pack = jax.jit(_Config.pack, static_argnums=0)
_restore = jax.jit(_Config.restore, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _compact(layout: Layout, mask: jax.Array, inputs: jax.Array, resets: Any) -> tuple[ValidSteps, jax.Array, Any]:
    """Moves valid steps and their resets to the start of their rows, in the layout of the inputs."""
    steps = ValidSteps.of(mask)
    inputs = steps.compact(layout.flatten_inputs(inputs))
    if resets is not None:
        resets = layout.restore_outputs(steps.compact_resets(layout.flatten_inputs(resets)))
    return steps, layout.restore_outputs(inputs), resets


@functools.partial(jax.jit, static_argnums=0)
def _scatter_back(layout: Layout, steps: ValidSteps, outputs: PyTree) -> PyTree:
    """Moves outputs in the layout of the inputs back to the valid steps."""
    return layout.restore_outputs(steps.scatter_back(jax.tree.map(layout.flatten_inputs, outputs)))


def run(call: Call, directions: Sequence[Direction]) -> list[tuple[PyTree, PyTree]]:
    """Runs one or two directions. The second of two reads backwards and keeps the order.

    Returns:
      For each direction the final carry [*batch, ...], and the outputs in the layout of the inputs, zero past lengths.

    Raises:
      ValueError, TypeError: if lengths, plan or carries do not fit the inputs.
    """
    if call.mask is not None:
        return _run_on_valid_steps(call, directions)
    inputs, layout, packed = call.inputs, call.layout, isinstance(call.inputs, PackedSequence)
    if not packed and not layout.has_plans:
        return [scan_padded(call, each) for each in directions]
    check_lengths = functools.cache(functools.partial(layout.check_lengths, call.seq_lengths))
    results: list[tuple[PyTree, PyTree]] = []
    for group in [directions] if _share_steps(directions) else [[each] for each in directions]:
        first = group[0]
        lengths, plan = _lengths_and_plan(inputs, first, check_lengths)
        reversed_alone = len(group) == 1 and first.reverse
        planned = packed or first.plan is not None or call.seq_lengths is None or not layout.num_steps
        if first.known is not None and not planned:
            plan = batch_plan(plan.num_sequences, plan.max_length)
        config = _Config(
            layout=layout,
            plan=plan,
            planned=planned,
            sort=planned and (first.known is not None or (first.plan is not None and not first.stacks_variables)),
            reverse=reversed_alone,
            restore_order=reversed_alone and first.keep_order,
            forward_mode=call.forward_mode,
        )
        carries = [layout.flatten_carry(each.carry) for each in group]
        cells = [each.known for each in group if each.known is not None]
        if cells:
            states = [cell.state(carry) for cell, carry in zip(cells, carries, strict=True)]
            with explain_forward_mode("jaxpack's RNN", "rnn"):
                results += run_known(config, cells, states, inputs, lengths, call.resets)
        else:  # not one program: Flax lifts the cell's state into the scan, outside jax.jit
            packed_inputs, begins = _pack(config, inputs, lengths, call.resets)
            carry, outputs = scan_packed(first.scan, carries[0], packed_inputs, begins)
            results.append((layout.restore_carry(carry), _restore(config, outputs)))
    if isinstance(inputs, PackedSequence):  # with the index arrays as given, so that reading them waits for nothing
        results = [(carry, inputs.replace(data=outputs.data)) for carry, outputs in results]
    return results


def _run_on_valid_steps(call: Call, directions: Sequence[Direction]) -> list[tuple[PyTree, PyTree]]:
    """Computes `run` of a call with a mask."""
    assert call.mask is not None
    if any(each.stacks_variables for each in directions):
        raise ValueError(
            "variables of the cell are given a time axis, along which a mask would move steps: pass seq_lengths= "
            "in place of mask=."
        )
    layout = call.layout
    mask = layout.flatten_inputs(call.mask)
    lengths = lengths_of(mask).reshape(layout.batch_shape)
    steps, inputs, resets = _compact(layout, mask, call.inputs, call.resets)
    compacted = call._replace(inputs=inputs, resets=resets, seq_lengths=lengths, mask=None)
    return [(carry, _scatter_back(layout, steps, outputs)) for carry, outputs in run(compacted, directions)]


@functools.partial(jax.jit, static_argnames="config")
def run_known(
    config: _Config,
    cells: Sequence[KnownCell],
    states: Sequence[PyTree],
    inputs: PackedSequence | jax.Array,
    lengths: jax.Array | None,
    resets: Resets | jax.Array | None = None,
) -> list[tuple[PyTree, PyTree]]:
    """Runs known cells of one kind, one for each direction, in one program from inputs as given to outputs like them.

    Args:
      states: their initial states [B, ...].
      lengths: int32 [B]; None if the inputs are packed.
      resets: as in `Call`.
    """
    cell, dtype = cells[0].cell, cells[0].dtype
    params, (packed, begins) = [each.params() for each in cells], config.pack(inputs, lengths, resets)
    packed = packed.replace(data=packed.data.astype(dtype))
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    stack = Stack(cell, len(cells), planned=config.planned, forward_mode=config.forward_mode)
    outputs, final = run_stack(stack, params, packed, state, resets=begins)
    results = []
    for i, data in enumerate(jnp.split(outputs, len(cells), axis=-1)):
        carry = flip(jax.tree.map(lambda leaf, i=i: leaf[i], final))
        results.append((config.layout.restore_carry(carry), config.restore(packed.replace(data=data))))
    return results


def _share_steps(directions: Sequence[Direction]) -> bool:
    """Returns True if there are two directions, and one loop can run both."""
    if len(directions) != 2:
        return False
    a, b = directions
    if a.known is None or b.known is None:
        return False
    return a.plan == b.plan and a.known.cell == b.known.cell and a.known.dtype == b.known.dtype


def _lengths_and_plan(
    inputs: PackedSequence | jax.Array, direction: Direction, check_lengths: Callable[[BucketPlan | None], Any]
) -> tuple[Any, BucketPlan]:
    """Returns the lengths of padded inputs (None for packed ones, which hold them), and the plan to run under."""
    if not isinstance(inputs, PackedSequence):
        return check_lengths(None if direction.stacks_variables else direction.plan)
    if direction.stacks_variables:
        raise ValueError(
            "variables of the cell are given a time axis, which packed inputs do not have: pass a padded batch with "
            "seq_lengths=."
        )
    return None, inputs.plan
