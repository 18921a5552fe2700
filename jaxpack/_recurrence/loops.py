"""The loops of the fast recurrence: one direction of one layer, forward and backward.

Both passes go through each stair in chunks of steps. Work that is not sequential is done for a whole chunk at once,
while the chunk is in cache: in the forward pass, the product of the inputs with their weights; in the backward pass,
the gates again, the coefficients of the sequential recurrence, and the gradients of inputs and weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._cells.cell import Carry, Cell, Fused, Linearization
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._recurrence.buffers import buffer, loop, read, write
from jaxpack._recurrence.slots import Slots, WindowSlots
from jaxpack._recurrence.windows import Stair


class Operands(NamedTuple):
    """The arrays of one direction that a recurrence is differentiated by; the cotangents of them have the same form.

    Attributes:
      weights: the fused weights.
      x: [S, F], the inputs; slack may hold anything.
      carry: the initial carry of each slot, leaves [B, ...].
    """

    weights: Fused
    x: jax.Array
    carry: Carry


class Results(NamedTuple):
    """The results of one direction.

    Attributes:
      y: [S, P], h after each cell's step, zero in slack.
      carry: the carry after the last step of each slot, leaves [B, ...].
    """

    y: jax.Array
    carry: Carry


class Residuals(NamedTuple):
    """The arrays of one direction that the backward pass needs.

    Attributes:
      operands: the operands of the forward pass.
      y: [S, P], its outputs.
      checkpoints: the memory c at the start of each chunk, leaves [checkpoint_rows, H].
    """

    operands: Operands
    y: jax.Array
    checkpoints: Carry


class Schedule(NamedTuple):
    """How a platform runs the loops.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      chunk_cells: about how many cells a chunk has; None for a whole bucket.
      unroll: how many steps one iteration of the compiled loop takes.
      fuse_directions: whether both directions of a layer run in one loop, as a batch of two.
      follow_lengths: whether trip counts follow the lengths as the program runs, where there is no plan.
    """

    platform: str
    chunk_cells: int | None
    unroll: int
    fuse_directions: bool
    follow_lengths: bool


class Loops(NamedTuple):
    """How one program goes over its cells: all that is not an array of one direction.

    Attributes:
      cell: the cell, as its platform runs it.
      plan: the plan.
      schedule: how the platform runs the loops.
      stairs: the loops, one after the other.
      checkpoint_rows: how many rows the checkpoints have.
      mask: bool [S], True at real cells.
    """

    cell: Cell
    plan: BucketPlan
    schedule: Schedule
    stairs: tuple[Stair, ...]
    checkpoint_rows: int
    mask: jax.Array


def forward(loops: Loops, operands: Operands) -> tuple[Results, Carry]:
    """Runs the recurrence.

    Returns:
      The results, and the checkpoints that `Residuals` holds.
    """
    weights, x, initial = operands
    slots = Slots.forward(loops.plan, initial)
    run = _Forward(loops, lax.optimization_barrier(weights), x, slots)
    y = buffer(x, (loops.plan.size, loops.cell.output_size), 0)
    checkpoints = tuple(buffer(x, (loops.checkpoint_rows, *c.shape[1:]), 2) for c in initial[1:])
    by_row, by_slot = slots.start
    for stair in loops.stairs:
        carry = tuple(leaf[: stair.rows] for leaf in by_row)
        state = _ForwardState(carry, by_slot, y, checkpoints)
        state = loop(0, stair.number, functools.partial(run.chunk, stair), state)
        carry, by_slot, y, checkpoints = state
        by_row = tuple(write(leaf, rows, 0) for leaf, rows in zip(by_row, carry, strict=True))
    return Results(y, slots.finish(by_row, by_slot)), checkpoints


class _ForwardState(NamedTuple):
    """The state of the loop over chunks.

    Attributes:
      carry: the carry of the stair's rows.
      by_slot: the final carry of each slot that has ended; () where rows are slots.
      y: the outputs.
      checkpoints: the memories at the start of each chunk.
    """

    carry: Carry
    by_slot: Carry
    y: jax.Array
    checkpoints: Carry


class _Forward(NamedTuple):
    """The arrays that the chunks of the forward pass read."""

    loops: Loops
    weights: Fused
    x: jax.Array
    slots: Slots

    def chunk(self, stair: Stair, index: Any, state: _ForwardState) -> _ForwardState:
        """Runs one chunk."""
        carry, by_slot, y, checkpoints = state
        cell, rows, unroll = self.loops.cell, stair.rows, self.loops.schedule.unroll
        window = stair.window(index)
        at = stair.checkpoint_row(index)
        checkpoints = tuple(write(k, c, at) for k, c in zip(checkpoints, carry[1:], strict=True))
        real = window.read(self.loops.mask)
        projected = cell.project(self.weights, _masked(window.read(self.x), real))
        slots = self.slots.within(window)

        def step(j: Any, state: Any) -> Any:
            carry, y, history = state
            carry = slots.reset(j, carry)
            live = read(real, j * rows, rows)[:, None]
            carry = cell.step(self.weights, carry, read(projected, j * rows, rows), functools.partial(_where, live))
            y = write(y, jnp.where(live, carry[0], 0), window.cell(j))
            return carry, y, slots.record(j, carry, history)

        carry, y, history = loop(window.skip, stair.steps, step, (carry, y, slots.history), unroll)
        return _ForwardState(carry, slots.collect(history, by_slot), y, checkpoints)


def backward(loops: Loops, residuals: Residuals, cotangents: Results) -> Operands:
    """Returns the cotangents of the operands.

    Args:
      loops: as in the forward pass, apart from the schedule.
      residuals: from the forward pass.
      cotangents: of the results; slack may hold anything.
    """
    weights, x, initial = residuals.operands
    dy, dfinal = cotangents
    weights = lax.optimization_barrier(weights)
    transposed = lax.optimization_barrier(jax.tree.map(lambda w: w.T, weights))  # once: the loops would copy it
    slots, dslots = Slots.forward(loops.plan, initial), Slots.backward(loops.plan, dfinal)
    run = _Backward(loops, weights, transposed, slots, dslots, residuals, dy)
    by_row, by_slot = dslots.start
    dx, dweights = buffer(x, x.shape, 0), jax.tree.map(lambda w: buffer(x, w.shape, 0), weights)
    for k in reversed(range(len(loops.stairs))):
        stair = loops.stairs[k]
        before = stair.offset - loops.stairs[k - 1].rows
        first_h = residuals.y[before : before + stair.rows] if stair.offset else slots.start[0][0][: stair.rows]
        # A count that the compiler cannot see: it would inline a single chunk, and keep all buckets' arrays at once.
        whole = loops.schedule.chunk_cells is None
        count = stair.number if whole else lax.optimization_barrier(jnp.int32(stair.number))
        dcarry = tuple(leaf[: stair.rows] for leaf in by_row)
        state = _BackwardState(dcarry, by_slot, dx, dweights)
        state = loop(0, count, functools.partial(run.chunk, stair, first_h), state)
        dcarry, by_slot, dx, dweights = state
        by_row = tuple(write(leaf, rows, 0) for leaf, rows in zip(by_row, dcarry, strict=True))
    return Operands(dweights, dx, dslots.finish(by_row, by_slot))


class _BackwardState(NamedTuple):
    """The state of the loop over chunks.

    Attributes:
      dcarry: the cotangent of the carry of the stair's rows.
      by_slot: the cotangent of each slot's initial carry, where the slot is done; () where rows are slots.
      dx: the cotangents of the inputs.
      dweights: the cotangents of the weights, as far as they are summed up.
    """

    dcarry: Carry
    by_slot: Carry
    dx: jax.Array
    dweights: Fused


class _Backward(NamedTuple):
    """The arrays that the chunks of the backward pass read."""

    loops: Loops
    weights: Fused
    transposed: Fused
    slots: Slots
    dslots: Slots
    residuals: Residuals
    dy: jax.Array

    def chunk(self, stair: Stair, first_h: jax.Array, index: Any, state: _BackwardState) -> _BackwardState:
        """Runs one chunk, counted from the last; first_h is h before the stair's block."""
        dcarry, by_slot, dx, dweights = state
        index = stair.number - 1 - index
        window = stair.window(index)
        # Tied to the loop's state, or the compiler would do all chunks' work, and keep it, before the loop.
        y, checkpoints, dcarry = lax.optimization_barrier((self.residuals.y, self.residuals.checkpoints, dcarry))
        real = window.read(self.loops.mask)
        x = _masked(window.read(self.residuals.operands.x), real)
        real = real[:, None]
        own = real & window.own
        slots = self.slots.within(window)
        h = slots.reset_all(window.before(y, first_h))
        memory = tuple(read(leaf, stair.checkpoint_row(index), stair.rows) for leaf in checkpoints)
        recall = _recall(slots, own, memory, in_parallel=self.loops.schedule.chunk_cells is None)
        linear = _keep_at_slack(real, self.loops.cell.linearize(self.weights, x, h, window.read(y), recall))
        da_gates = jnp.where(own, linear.da_gates, 0)
        d = jnp.where(own, window.read(self.dy), 0)
        da_gates, d, linear = lax.optimization_barrier((da_gates, d, linear))
        slots = self.dslots.within(window)
        dcarry, da, d, history = self._pull_back(slots, linear._replace(da_gates=da_gates), d, dcarry)
        dx = window.write(dx, da[:, : self.weights.w_x.shape[1]] @ self.transposed.w_x)
        h = jnp.where(own, h, 0)  # the initial h of an empty sequence may be NaN
        out = None if linear.out is None else jnp.where(own, linear.out, 0)
        return _BackwardState(dcarry, slots.collect(history, by_slot), dx, _add_gradients(dweights, x, h, out, da, d))

    def _pull_back(
        self, slots: WindowSlots, linear: Linearization, d: jax.Array, dcarry: Carry
    ) -> tuple[Carry, jax.Array, jax.Array, Carry]:
        """Runs the backward recurrence over a chunk, last step first.

        Returns:
          dcarry before the chunk; da [M, G] and d [M, P] of its cells, written over the coefficients and the outputs'
          cotangents from which they are computed; and the history of dcarry.
        """
        stair, width_h = slots.window.stair, self.transposed.w_h.shape[0]
        rows, steps = stair.rows, stair.steps

        def step(j: Any, state: Any) -> Any:
            dcarry, da, d, history = state
            j = steps - 1 - j
            at = j * rows
            dh, *dc = slots.reset(j, dcarry)
            total = dh + read(d, at, rows)
            here = jax.tree.map(lambda leaf: read(leaf, at, rows), linear._replace(da_gates=da, out=None))
            da_j, earlier_dc = self.loops.cell.pull_back(self.transposed, here, total, dc[0] if dc else None)
            dh = da_j[:, -width_h:] @ self.transposed.w_h + here.dh_dh * total
            d = d if self.transposed.w_out is None else write(d, total, at)
            dcarry = (dh,) if earlier_dc is None else (dh, earlier_dc)
            return dcarry, write(da, da_j, at), d, slots.record(j, dcarry, history)

        state = (dcarry, linear.da_gates, d, slots.history)
        return loop(0, steps - slots.window.skip, step, state, self.loops.schedule.unroll)


def _add_gradients(
    dweights: Fused, x: jax.Array, h: jax.Array, out: jax.Array | None, da: jax.Array, d: jax.Array
) -> Fused:
    """Adds a chunk's share to the cotangents of the weights: each weight's operand times the cotangent of its product.

    Args:
      dweights: the sums so far.
      x, h, out: what w_x, w_h and w_out multiply.
      da, d: the cotangents of the pre-activations and of h.
    """
    return Fused(
        dweights.w_x + _transpose(x) @ da[:, : dweights.w_x.shape[1]],
        dweights.w_h + _transpose(h) @ da[:, -dweights.w_h.shape[1] :],
        dweights.bias + da.sum(0),
        None if out is None or dweights.w_out is None else dweights.w_out + _transpose(out) @ d,
    )


def _recall(
    slots: WindowSlots, own: jax.Array, memory: Carry, in_parallel: bool
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns the function that computes the memory c before each step of a chunk, from c at its first own step."""
    window, slots = slots.window, slots.of_memory()
    rows, steps = window.stair.rows, window.stair.steps

    def sequential(decay: jax.Array, inject: jax.Array) -> jax.Array:
        def step(j: Any, state: Any) -> Any:
            carry, before = state
            (c,) = slots.reset(j, carry)
            live = read(own, j * rows, rows)
            after = read(decay, j * rows, rows) * c + read(inject, j * rows, rows)
            return (jnp.where(live, after, c),), write(before, c, j * rows)

        return loop(window.skip, steps, step, (memory, buffer(decay, decay.shape, 4)))[1]

    def parallel(decay: jax.Array, inject: jax.Array) -> jax.Array:
        decay, inject = jnp.where(own, decay, 1), jnp.where(own, inject, 0)
        decay, inject = slots.reset_linear(decay, inject)
        shape = (steps, rows, decay.shape[-1])

        def compose(early: Any, late: Any) -> Any:
            return late[0] * early[0], late[0] * early[1] + late[1]

        products, sums = lax.associative_scan(compose, (decay.reshape(shape), inject.reshape(shape)))
        after = products * memory[0][None] + sums
        return slots.reset_all(jnp.concatenate([memory[0][None], after[:-1]]).reshape(decay.shape))

    return parallel if in_parallel else sequential


def _keep_at_slack(real: jax.Array, linear: Linearization) -> Linearization:
    """Sets the derivatives at slack, where a step keeps its carry. da_gates and out are zeroed where they are used."""
    slack = {"dh_dh": 1, "dh_dc": 0, "dc_dc": 1}
    given = {name: leaf for name, leaf in linear._asdict().items() if leaf is not None}
    return linear._replace(**{name: jnp.where(real, given[name], at) for name, at in slack.items() if name in given})


def _where(condition: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(condition, new, old)


def _masked(x: jax.Array, real: jax.Array) -> jax.Array:
    """Returns a chunk's inputs with zeros in slack. Masking them here avoids a masked copy of all inputs."""
    return jnp.where(real[:, None], x, 0)


def _transpose(matrix: jax.Array) -> jax.Array:
    """Returns a transposed copy, since a product that transposes on the fly is slower."""
    return lax.optimization_barrier(matrix.T)
