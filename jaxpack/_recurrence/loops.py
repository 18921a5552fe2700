"""The loops of the fast recurrence: one direction of one layer over stairs, forward and backward.

Both go through a stair in chunks of steps. What is not sequential is done for a whole chunk at once, while it is in
cache: forward, the input's product with its weights; backward, the gates again, all coefficients of the step by step
recurrence, and the gradients of inputs and weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._cells.cell import Carry, Cell, Fused, Linear, Tanh
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._recurrence.buffers import buffer, loop, read, write
from jaxpack._recurrence.slots import Crossings, Slots
from jaxpack._recurrence.windows import Stair, Window


class Schedule(NamedTuple):
    """How a platform runs the loops.

    Attributes:
      chunk_cells: about how many cells a chunk has; None for a whole bucket.
      unroll: steps in an iteration of the compiled loop.
      together: whether both directions of a layer run in one loop, as a batch of two.
      tanh: how it computes tanh.
    """

    chunk_cells: int | None
    unroll: int
    together: bool
    tanh: Tanh = jnp.tanh


def forward(
    cell: Cell,
    plan: BucketPlan,
    stairs: Sequence[Stair],
    kept_rows: int,
    schedule: Schedule,
    fused: Fused,
    x: jax.Array,
    mask: jax.Array,
    carry: Carry,
) -> tuple[jax.Array, Carry, Carry]:
    """The recurrence.

    Args:
      kept_rows: how many rows to keep memories in.
      x: [S, F], anything in slack.
      mask: bool [S], True at real cells.
      carry: per slot, leaves [B, ...].

    Returns:
      h after each cell's step [S, P], zero in slack; the carry after each slot's last step; and the memories c at the
      start of each chunk, leaves [kept_rows, H].
    """
    fused = lax.optimization_barrier(fused)
    slots = Slots.forward(plan, carry)
    y = buffer(x, (plan.size, cell.output_size), 0)
    kept = tuple(buffer(x, (kept_rows, *c.shape[1:]), 2) for c in carry[1:])
    by_row, by_slot = slots.start
    for stair in stairs:

        def chunk(index: Any, state: Any, stair: Stair = stair) -> Any:
            carry, by_slot, y, kept = state
            window = stair.window(index)
            at = stair.kept + index * stair.stride
            kept = tuple(write(k, c, at) for k, c in zip(kept, carry[1:], strict=True))
            real = window.read(mask)
            projected = cell.project(fused, _masked(window.read(x), real))
            crossings = slots.crossings(window)

            def step(j: Any, state: Any) -> Any:
                carry, y, trails = state
                carry = crossings.enter(j, carry)
                live = read(real, j * stair.rows, stair.rows)[:, None]
                projected_j = read(projected, j * stair.rows, stair.rows)
                select = functools.partial(_where, live)
                carry = cell.step(fused, carry, projected_j, select, schedule.tanh)
                y = write(y, jnp.where(live, carry[0], 0), window.cell(j))
                return carry, y, crossings.trace(j, carry, trails)

            carry, y, trails = loop(window.skip, stair.steps, step, (carry, y, crossings.trails), schedule.unroll)
            return carry, crossings.leave(trails, by_slot), y, kept

        carry = tuple(leaf[: stair.rows] for leaf in by_row)
        carry, by_slot, y, kept = loop(0, stair.number, chunk, (carry, by_slot, y, kept))
        by_row = tuple(write(leaf, rows, 0) for leaf, rows in zip(by_row, carry, strict=True))
    return y, slots.finish(by_row, by_slot), kept


def backward(
    cell: Cell,
    plan: BucketPlan,
    stairs: Sequence[Stair],
    schedule: Schedule,
    fused: Fused,
    x: jax.Array,
    mask: jax.Array,
    carry: Carry,
    y: jax.Array,
    kept: Carry,
    dy: jax.Array,
    dcarry: Carry,
) -> tuple[Fused, jax.Array, Carry]:
    """The cotangents of the weights, the inputs and the initial carry.

    fused, x, mask and carry are as given to `forward`, y and kept as it returned them.

    Args:
      dy: [S, P], anything in slack.
      dcarry: of the final carry.
    """
    fused = lax.optimization_barrier(fused)
    transposed = lax.optimization_barrier(jax.tree.map(lambda w: w.T, fused))  # once: in the loops it would be copied
    slots, dslots = Slots.forward(plan, carry), Slots.backward(plan, dcarry)
    reader = _Backward(cell, schedule, fused, transposed, slots, dslots, x, mask, y, kept, dy)
    by_row, by_slot = dslots.start
    dx, dfused = buffer(x, x.shape, 0), jax.tree.map(lambda w: buffer(x, w.shape, 0), fused)
    for k in reversed(range(len(stairs))):
        stair = stairs[k]
        before = stair.offset - stairs[k - 1].rows
        first_h = y[before : before + stair.rows] if stair.offset else slots.start[0][0][: stair.rows]
        # A count that the compiler cannot see: it would inline a single chunk, and keep all buckets' arrays at once.
        count = stair.number if schedule.chunk_cells is None else lax.optimization_barrier(jnp.int32(stair.number))
        dstate = tuple(leaf[: stair.rows] for leaf in by_row)
        chunk = functools.partial(reader.chunk, stair, first_h)
        dstate, by_slot, dx, dfused = loop(0, count, chunk, (dstate, by_slot, dx, dfused))
        by_row = tuple(write(leaf, rows, 0) for leaf, rows in zip(by_row, dstate, strict=True))
    return dfused, dx, dslots.finish(by_row, by_slot)


class _Backward(NamedTuple):
    """What the chunks of the backward pass read."""

    cell: Cell
    schedule: Schedule
    fused: Fused
    transposed: Fused
    slots: Slots
    dslots: Slots
    x: jax.Array
    mask: jax.Array
    y: jax.Array
    kept: Carry
    dy: jax.Array

    def chunk(self, stair: Stair, first_h: jax.Array, index: Any, state: Any) -> Any:
        """One chunk, counted from the last; first_h is h before the stair's block."""
        dstate, by_slot, dx, dfused = state
        index = stair.number - 1 - index
        window = stair.window(index)
        # Tied to the loop's state, or the compiler would do all chunks' work, and keep it, before the loop.
        y, kept, dstate = lax.optimization_barrier((self.y, self.kept, dstate))
        real = window.read(self.mask)
        x = _masked(window.read(self.x), real)
        real = real[:, None]
        own = real & window.own
        crossings = self.slots.crossings(window)
        h = crossings.enter_all(window.before(y, first_h))
        memory = tuple(read(leaf, stair.kept + index * stair.stride, stair.rows) for leaf in kept)
        recall = _recall(window, crossings, own, memory, self.schedule)
        linear = _at_slack(real, self.cell.linearise(self.fused, x, h, window.read(y), recall))
        gates = jnp.where(own, linear.gates, 0)
        d = jnp.where(own, window.read(self.dy), 0)
        gates, d, linear = lax.optimization_barrier((gates, d, linear))
        crossings = self.dslots.crossings(window)
        dstate, da, d, trails = self._pull_back(window, crossings, linear, gates, d, dstate)
        dx = window.write(dx, da[:, : self.fused.w_x.shape[1]] @ self.transposed.w_x)
        h = jnp.where(own, h, 0)  # of an empty sequence it may be NaN
        out = None if linear.out is None else jnp.where(own, linear.out, 0)
        return dstate, crossings.leave(trails, by_slot), dx, _add_gradients(dfused, x, h, out, da, d)

    def _pull_back(
        self, window: Window, crossings: Crossings, linear: Linear, gates: jax.Array, d: jax.Array, dstate: Carry
    ) -> tuple[Carry, jax.Array, jax.Array, Carry]:
        """The backward recurrence over a chunk, last step first.

        Returns:
          dstate before it; da [M, G] and d [M, P] of its cells, written over the coefficients and the output's
          cotangents that they are made of, and dstate at each cell for slots that are left.
        """
        rows, steps, width_h = window.stair.rows, window.stair.steps, self.transposed.w_h.shape[0]

        def step(j: Any, state: Any) -> Any:
            dstate, gates, d, trails = state
            j = steps - 1 - j
            at = j * rows
            dh, *dc = crossings.enter(j, dstate)
            total = dh + read(d, at, rows)
            here = jax.tree.map(lambda leaf: read(leaf, at, rows), linear._replace(gates=gates, out=None))
            da, earlier_dc = self.cell.pull_back(self.transposed, here, total, dc[0] if dc else None)
            dh = da[:, -width_h:] @ self.transposed.w_h + here.passes * total
            d = d if self.transposed.w_out is None else write(d, total, at)
            dstate = (dh,) if earlier_dc is None else (dh, earlier_dc)
            return dstate, write(gates, da, at), d, crossings.trace(j, dstate, trails)

        return loop(0, steps - window.skip, step, (dstate, gates, d, crossings.trails), self.schedule.unroll)


def _add_gradients(
    dfused: Fused, x: jax.Array, h: jax.Array, out: jax.Array | None, da: jax.Array, d: jax.Array
) -> Fused:
    """The weights' cotangents with a chunk's share: what a weight was multiplied with, times what came of it."""
    return Fused(
        dfused.w_x + _transpose(x) @ da[:, : dfused.w_x.shape[1]],
        dfused.w_h + _transpose(h) @ da[:, -dfused.w_h.shape[1] :],
        dfused.bias + da.sum(0),
        None if out is None or dfused.w_out is None else dfused.w_out + _transpose(out) @ d,
    )


def _recall(
    window: Window, crossings: Crossings, own: jax.Array, memory: Carry, schedule: Schedule
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The function that brings back the memory c before each step, from the one at the chunk's first own step."""
    rows, steps = window.stair.rows, window.stair.steps
    crossings = crossings.of_memory()

    def sequential(decay: jax.Array, inject: jax.Array) -> jax.Array:
        def step(j: Any, state: Any) -> Any:
            carry, before = state
            (c,) = crossings.enter(j, carry)
            live = read(own, j * rows, rows)
            after = read(decay, j * rows, rows) * c + read(inject, j * rows, rows)
            return (jnp.where(live, after, c),), write(before, c, j * rows)

        return loop(window.skip, steps, step, (memory, buffer(decay, decay.shape, 4)))[1]

    def parallel(decay: jax.Array, inject: jax.Array) -> jax.Array:
        decay, inject = jnp.where(own, decay, 1), jnp.where(own, inject, 0)
        decay, inject = crossings.restart(decay, inject)
        shape = (steps, rows, decay.shape[-1])

        def compose(early: Any, late: Any) -> Any:
            return late[0] * early[0], late[0] * early[1] + late[1]

        products, sums = lax.associative_scan(compose, (decay.reshape(shape), inject.reshape(shape)))
        after = products * memory[0][None] + sums
        return crossings.enter_all(jnp.concatenate([memory[0][None], after[:-1]]).reshape(decay.shape))

    return sequential if schedule.chunk_cells is not None else parallel


def _at_slack(real: jax.Array, linear: Linear) -> Linear:
    """With what holds at slack, where a step keeps its carry, in its place there."""
    slack = {"passes": 1, "reads": 0, "forget": 1}  # gates and out are zeroed where they are used
    given = {name: leaf for name, leaf in linear._asdict().items() if leaf is not None}
    return linear._replace(**{name: jnp.where(real, given[name], at) for name, at in slack.items() if name in given})


def _where(condition: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(condition, new, old)


def _masked(x: jax.Array, real: jax.Array) -> jax.Array:
    """A chunk's inputs, zero in slack: masked here, so that no masked copy of all inputs is made."""
    return jnp.where(real[:, None], x, 0)


def _transpose(matrix: jax.Array) -> jax.Array:
    """A transposed copy: a product that transposes on the fly is slower."""
    return lax.optimization_barrier(matrix.T)
