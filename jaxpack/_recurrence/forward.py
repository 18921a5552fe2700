"""The forward pass of the fast recurrence: one direction of one layer.

Each stair is gone through in chunks of steps. The product of the inputs with their weights is done for a whole chunk at
once, while the chunk is in cache. Slack runs free: its inputs are zeros, its outputs are zeroed, and nothing of it
reaches a real cell.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._cells.cell import Carry, Fused
from jaxpack._recurrence.buffers import Outputs, buffer, loop, run_steps, write
from jaxpack._recurrence.loops import Kept, Loops, Operands, Results, factors, widened
from jaxpack._recurrence.slots import zone
from jaxpack._recurrence.windows import Stair


def forward(loops: Loops, kept: Kept, operands: Operands) -> tuple[Results, Kept]:
    """Runs the recurrence.

    Args:
      loops: how to run it.
      kept: arrays to write to what is kept.
      operands: of one direction.
    """
    weights, x, initial, fresh = operands
    weights, dtype = lax.optimization_barrier(factors(weights, x.dtype)), initial[0].dtype
    run = _Forward(loops, weights, x, loops.real.entering(initial, fresh))
    wide = widened(loops.cell, initial)
    y = () if loops.final_only else buffer(x, (loops.size, loops.sizes[0]), 0, dtype)
    states = tuple(buffer(x, (loops.size, size), 8, dtype) for size in loops.sizes[1:]) if loops.all_states else ()
    carry, ended = loops.start(wide), wide[run.first_ended :]
    for stair in loops.stairs:
        state = _ForwardState(tuple(leaf[: stair.rows] for leaf in carry), ended, y, states, kept)
        carry, ended, y, states, kept = loop(0, stair.number, functools.partial(run.chunk, stair), state)
        if loops.real.borders is None:
            ended = tuple(write(leaf, rows, 0) for leaf, rows in zip(ended, carry[run.first_ended :], strict=True))
    final = loops.where_real(ended if loops.final_only else (y[loops.real.last], *ended), wide)
    y, states = jax.tree.map(loops.real.restore, (y, states))
    return Results(y, final, states), kept


class _ForwardState(NamedTuple):
    """The state of the loop over chunks.

    Attributes:
      carry: the carry of the stair's rows.
      ended: the final carry of each slot that has ended, without what the outputs have, leaves [B, H].
      y: the outputs; () for none.
      states: the memory after each step, if it is asked for.
      kept: what is kept.
    """

    carry: Carry
    ended: Carry
    y: Any
    states: Carry
    kept: Kept


class _Forward(NamedTuple):
    """What the chunks of the forward pass read: arguments of `forward`, and the carries that enter."""

    loops: Loops
    weights: Fused
    x: jax.Array
    entering: Carry

    @property
    def first_ended(self) -> int:
        """The first leaf of the carry that is kept when a slot ends: h is in the outputs, if there are any."""
        return 0 if self.loops.final_only else 1

    def chunk(self, stair: Stair, index: Any, state: _ForwardState) -> _ForwardState:
        """Runs one chunk."""
        carry, ended, y, states, (activations, checkpoints) = state
        cell, real, window = self.loops.cell, self.loops.real, stair.window(index)
        if checkpoints:
            row = stair.checkpoint_row(index)
            checkpoints = tuple(write(leaf, c, row) for leaf, c in zip(checkpoints, carry[1:], strict=True))
        live = window.read(real.mask)[:, None]
        projected = cell.project(self.weights, jnp.where(live, real.read(window, self.x), 0)).astype(carry[0].dtype)
        keeps, collects = bool(jax.tree.leaves(activations)), real.borders is not None
        entry, scale = real.at_begins(window, self.entering), real.scale(window)
        keeps_value = real.keeps(window, self.loops.zoneout, carry[0].dtype)

        def step(carry: Carry, xs: Any, _: Any) -> Any:
            projected, live, cells, scaled, keep = xs
            before = entry.step(cells, carry)
            if self.loops.steps.stacked:  # one kernel before each product: XLA would compute c again from earlier steps
                before = lax.optimization_barrier(before)
            seen = scale.step(scaled, before[0]).astype(self.x.dtype), *before[1:]
            activations = cell.activate_from(self.weights, projected, seen)
            after = zone(keep, before, cell.advance(self.weights, activations, before))
            h, *memory = after
            # A row of its own keeps its carry in slack, so that its last one is final.
            first, kept = self.first_ended, after[self.first_ended :]
            if not collects:
                kept = tuple(jnp.where(live, *c) for c in zip(kept, before[first:], strict=True))
            states = tuple(jnp.where(live, c, 0) for c in memory) if self.loops.all_states else ()
            y = () if self.loops.final_only else jnp.where(live, h, 0)
            return (*after[:first], *kept), (y, activations if keeps else (), states), kept if collects else ()

        first = self.first_ended
        history = tuple(buffer(c, (window.size, c.shape[1]), 5) for c in carry[first:]) if collects else ()
        xs = projected, live, entry.cells, scale.cells, keeps_value
        outputs = Outputs((y, activations, states), history)
        carry, outputs = run_steps(window, step, carry, xs, outputs, self.loops.steps)
        y, activations, states = outputs.whole
        if collects:
            ended = tuple(window.collect(real.last, *each) for each in zip(outputs.own, ended, strict=True))
        return _ForwardState(carry, ended, y, states, Kept(activations, checkpoints))
