"""Recurrences with a decay for each feature, a chunk of steps at a time, with a derivative of their own.

A chunk computes everything from its inputs: decays, what is injected, states and outputs. Each is as large as a chunk,
and stays in a CPU's cache. The forward pass saves the inputs and the state before each chunk. The backward pass goes
over the chunks in the other direction, computes each again, and differentiates it, so its memory does not grow with
the width of the gates or of the state. Accelerators take a bucket at once, in the parallel form.

Without a plan the batch is one padded block, sorted by length. A chunk then runs with as many rows as have steps in it,
rounded up to one of a few levels, each of which is compiled.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from jaxpack._linear.reading import Reading
from jaxpack._linear.solve import Block, Form, accumulator, blocks_of, solve, with_rows
from jaxpack._packed.broadcast import expand, vary_like
from jaxpack._packed.maps import by_cell
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree

CHUNK_CELLS = 512
_LEVELS = (1, 0.7, 0.45, 0.28, 0.14, 0)  # shares of the rows; at least one row


class Equations(Protocol):
    """The equations of a recurrence with a decay for each feature, on M cells; hashable."""

    def gates(self, params: PyTree, x: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the decay [M, *H], or [1, *H] for all cells, and what is injected [M, *H].

        Args:
          params: the parameters.
          x: [M, F].
          start: bool [M], where the state before is zero because a sequence begins.
        """

    def readout(self, params: PyTree, x: jax.Array, h: jax.Array) -> jax.Array:
        """Returns the outputs [M, O] from inputs and states."""


class Schedule(NamedTuple):
    """How a platform goes over the cells.

    Attributes:
      chunk_cells: about how many cells a chunk has; None for a whole bucket.
      parallel: whether steps run in the parallel form; None for the form that suits the platform.
      follow_lengths: whether chunks leave out rows without steps, where there is no plan.
    """

    chunk_cells: int | None
    parallel: bool | None
    follow_lengths: bool = False


CPU, ACCELERATOR = Schedule(CHUNK_CELLS, False, True), Schedule(None, True)
PLAIN = Schedule(None, None)


class Recurrence(NamedTuple):
    """The static part of a recurrence.

    Attributes:
      equations: the equations.
      plan: the plan of the cells.
      reverse: whether rows are read from their end.
      planned: whether the plan is a choice; otherwise it only gives the shape of a padded batch.
    """

    equations: Equations
    plan: BucketPlan
    reverse: bool
    planned: bool = True


class Operands(NamedTuple):
    """The arrays that a recurrence is differentiated by; the cotangents of them have the same form.

    Attributes:
      params: the parameters.
      x: [S, F], zero in slack.
      initial: the initial state of each slot [B, *H], finite for sequences without steps; None for zeros. [2 B, *H] if
        the states follow to which resets return.
    """

    params: PyTree
    x: jax.Array
    initial: jax.Array | None


class Results(NamedTuple):
    """The outputs [S, O], and the final state of each slot [B, *H], 0 for sequences without steps."""

    y: jax.Array
    final: jax.Array


def run_chunks(recurrence: Recurrence, operands: Operands, reading: Reading, forward_mode: bool) -> Results:
    """Runs a recurrence.

    Args:
      recurrence: the static part.
      operands: the arrays.
      reading: the cells as the recurrence reads them.
      forward_mode: whether to leave the derivative to JAX, which then has both modes.
    """
    # Under shard_map all take on what any of them varies over, outside the derivative: autodiff sums it up again.
    operands, reading = vary_like((operands, reading), (operands, reading))
    if forward_mode:
        return _forward(PLAIN, recurrence, operands, reading)[0]
    return _fast(recurrence, operands, reading)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fast(recurrence: Recurrence, operands: Operands, reading: Reading) -> Results:
    return _fast_fwd(recurrence, operands, reading)[0]


def _fast_fwd(recurrence: Recurrence, operands: Operands, reading: Reading) -> tuple[Results, Any]:
    results, carries = _on_each_platform(_forward, recurrence, operands, reading)
    return results, (operands, reading, carries)


def _fast_bwd(recurrence: Recurrence, saved: Any, cotangents: Results) -> tuple[Operands, None]:
    return _on_each_platform(_backward, recurrence, *saved, cotangents), None


_fast.defvjp(_fast_fwd, _fast_bwd)


def _on_each_platform(run: Callable[..., Any], recurrence: Recurrence, *arrays: Any) -> Any:
    cpu, default = (functools.partial(run, schedule, recurrence) for schedule in (CPU, ACCELERATOR))
    return lax.platform_dependent(*arrays, cpu=cpu, default=default)


class _Chunks(NamedTuple):
    """A block of cells in `number` chunks of `steps` steps; the last ones may reach past its end, as slack.

    Attributes:
      block: the block.
      steps, number: the chunks.
      levels: the numbers of rows that a chunk may run with, from all rows down.
    """

    block: Block
    steps: int
    number: int
    levels: tuple[int, ...]

    @classmethod
    def of(cls, block: Block, schedule: Schedule, planned: bool = True) -> _Chunks:
        """Returns the chunks of a block."""
        steps = chunk_steps(block, schedule.chunk_cells)
        shares = _LEVELS if schedule.follow_lengths and not planned else _LEVELS[:1]
        levels = sorted({max(1, math.ceil(block.rows * share)) for share in shares}, reverse=True)
        return cls(block, steps, -(-block.steps // steps), tuple(levels))

    def run(self, function: Callable[..., Any], real: jax.Array, *arguments: Any) -> Any:
        """Returns function(rows, *arguments) for the lowest level that has all rows with steps in a chunk.

        Args:
          function: it returns the same types for each level.
          real: bool [steps * rows], the chunk's cells that hold a step.
          arguments: further arguments.
        """
        if len(self.levels) == 1:
            return function(self.levels[0], *arguments)
        rows = self.block.rows
        alive = jnp.max(jnp.where(real.reshape(self.steps, rows).any(0), jnp.arange(1, rows + 1), 0))
        level = jnp.sum(alive <= jnp.array(self.levels[1:]))
        return lax.switch(level, [functools.partial(function, each) for each in self.levels], *arguments)

    def narrow(self, leaf: jax.Array, rows: int) -> jax.Array:
        """Returns the first rows of a chunk's cells [steps * rows, ...]."""
        if rows == self.block.rows:
            return leaf
        cells = leaf.reshape(self.steps, self.block.rows, *leaf.shape[1:])
        return cells[:, :rows].reshape(-1, *leaf.shape[1:])

    def widen(self, leaf: jax.Array, rows: int) -> jax.Array:
        """Returns a chunk's cells from those of its first rows, with zeros in the others."""
        missing = self.block.rows - rows
        if not missing:
            return leaf
        cells = leaf.reshape(self.steps, rows, *leaf.shape[1:])
        return jnp.pad(cells, ((0, 0), (0, missing)) + ((0, 0),) * (leaf.ndim - 1)).reshape(-1, *leaf.shape[1:])

    def places(self, last: jax.Array, cells: _Cells, rows: int) -> jax.Array:
        """Returns where each slot's last cell is among the first rows of a chunk, int32 [B]; -1 for elsewhere."""
        step, row = jnp.divmod(last - (cells.number[0] - 1), self.block.rows)
        here = (step >= 0) & (step < self.steps) & (row < rows)
        return jnp.where(here, step * rows + row, -1)

    def split(self, leaf: jax.Array) -> jax.Array:
        """Returns the block's cells of an array [S, ...] by chunk [number, steps * rows, ...]."""
        cells = self.block.of(leaf)
        past = self.number * self.steps - self.block.steps
        if past:
            cells = jnp.concatenate([cells, lax.full_like(cells, 0, shape=(past, *cells.shape[1:]))])
        return cells.reshape(self.number, -1, *leaf.shape[1:])

    def join(self, leaf: jax.Array) -> jax.Array:
        """Returns the cells of chunks as one array: the inverse of `split`."""
        return leaf.reshape(-1, *leaf.shape[2:])[: self.block.steps * self.block.rows]


def chunk_steps(block: Block, chunk_cells: int | None) -> int:
    """Returns the steps of a chunk: as near to the wish as they divide the block, or else leave little past its end."""
    if chunk_cells is None or block.steps * block.rows <= chunk_cells:
        return block.steps
    wish = max(1, round(chunk_cells / block.rows))
    near = [steps for steps in range(math.ceil(wish / 2), 2 * wish) if block.steps % steps == 0]
    if near:
        return min(near, key=lambda steps: abs(math.log(steps / wish)))
    return -(-block.steps // max(1, round(block.steps / wish)))


class _Cells(NamedTuple):
    """What a chunk is given for each of its cells.

    Attributes:
      x: the inputs.
      real, start: as in Reading.
      number: the number of the cell among all cells, from 1.
      entry: the row of `Operands.initial` that enters where the state starts.
    """

    x: jax.Array
    real: jax.Array
    start: jax.Array
    number: jax.Array
    entry: jax.Array

    @classmethod
    def of(cls, plan: BucketPlan, operands: Operands, reading: Reading) -> _Cells:
        """Returns all cells."""
        numbers, entry = jnp.arange(plan.size, dtype=jnp.int32) + 1, by_cell(plan).slots  # 0 is past the end of a block
        has_fresh = operands.initial is not None and len(operands.initial) > plan.num_sequences
        if has_fresh and reading.resets is not None:
            entry = entry + plan.num_sequences * reading.resets
        cells = cls(operands.x, reading.real, reading.start, numbers, entry)
        return vary_like(cells, cells)


def _chunk(
    form: Form, equations: Equations, places: jax.Array, operands: Operands, cells: _Cells, carry: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs one chunk.

    Args:
      form, equations: the static part.
      places: where the chunk has the cell of each slot that is read last; -1 for elsewhere.
      operands: the arrays, with the chunk's inputs.
      cells: the chunk's cells.
      carry: the state of each row before the chunk.

    Returns:
      The outputs; the state of each row after the chunk; and the final state of each slot that ends here, else 0.
    """
    params, x, initial = operands
    no_state = cells.start if initial is None else jnp.zeros_like(cells.start)
    decay, inputs = equations.gates(params, x, no_state)
    decay, inputs = (leaf.astype(carry.dtype) for leaf in (decay, inputs))
    if initial is not None:
        start = expand(cells.start, inputs)
        inputs = jnp.where(start, decay * initial.astype(carry.dtype)[cells.entry] + inputs, inputs)
    cut = cells.start | ~cells.real
    inputs = jnp.where(expand(cells.real, inputs), inputs, 0)
    if len(decay) == len(inputs):
        decay = jnp.where(expand(cut, decay), 0, decay)
    h = solve(form, decay, inputs, cut, carry)
    y = equations.readout(params, x, h)
    rows = len(carry)
    after = h[:rows] if form.reverse else h[-rows:]
    y = jnp.where(cells.real[:, None], y, 0)  # whose transpose drops the cotangents of slack
    ending = jnp.where(expand(places >= 0, h), h[jnp.maximum(places, 0)], 0)
    return y.astype(x.dtype), after, ending


def _forward(
    schedule: Schedule, recurrence: Recurrence, operands: Operands, reading: Reading
) -> tuple[Results, tuple[jax.Array, ...]]:
    """Runs all chunks. Returns the results, and the state before each chunk, by block as CPUs have them."""
    equations, plan, reverse, planned = recurrence
    params, x, initial = operands
    like = _state_like(equations, params, x)
    cells = _Cells.of(plan, operands, reading)
    outputs: list[Any] = [None] * plan.num_buckets
    carries: list[Any] = [None] * plan.num_buckets
    carry = lax.full_like(x, 0, like.dtype, (0, *like.shape))
    final = lax.full_like(x, 0, like.dtype, (plan.num_sequences, *like.shape))
    blocks = blocks_of(plan)
    for k in reversed(range(len(blocks))) if reverse else range(len(blocks)):
        block = blocks[k]
        chunks = _Chunks.of(block, schedule, planned)
        carry = with_rows(carry, lax.full_like(carry, 0, shape=(block.rows, *like.shape)))

        def run(rows: int, here: _Cells, carry: jax.Array, chunks: _Chunks = chunks) -> Any:
            form = Form((Block(0, chunks.steps, rows),), reverse, schedule.parallel)
            places = chunks.places(reading.last, here, rows)
            few = jax.tree.map(lambda leaf: chunks.narrow(leaf, rows), here)
            y, after, ending = _chunk(form, equations, places, Operands(params, few.x, initial), few, carry[:rows])
            return chunks.widen(y, rows), with_rows(after, jnp.zeros_like(carry)), ending

        def body(state: Any, here: _Cells, chunks: _Chunks = chunks, run: Any = run) -> Any:
            carry, final = state
            y, after, ending = chunks.run(run, here.real, here, carry)
            return (after, final + ending), (y, carry)

        (carry, final), (y, before) = lax.scan(body, (carry, final), jax.tree.map(chunks.split, cells), reverse=reverse)
        outputs[k] = chunks.join(y)
        number = _Chunks.of(block, CPU).number
        carries[k] = before if len(before) == number else jnp.broadcast_to(before[:1], (number, *before.shape[1:]))
    y = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs)
    return Results(y, final), tuple(carries)


def _backward(
    schedule: Schedule,
    recurrence: Recurrence,
    operands: Operands,
    reading: Reading,
    carries: tuple[jax.Array, ...],
    cotangents: Results,
) -> Operands:
    """Returns the cotangents of the operands."""
    equations, plan, reverse, planned = recurrence
    params, _, initial = operands
    cells = _Cells.of(plan, operands, reading)
    dx: list[Any] = [None] * plan.num_buckets
    dparams, dinitial = jax.tree.map(_wide_zeros, (params, initial))
    dcarry = carries[0][0, :0]
    blocks = blocks_of(plan)
    for k in range(len(blocks)) if reverse else reversed(range(len(blocks))):
        block = blocks[k]
        chunks = _Chunks.of(block, schedule, planned)
        before = carries[k] if len(carries[k]) == chunks.number else carries[k][: chunks.number]
        dcarry = with_rows(dcarry, jnp.zeros_like(before[0]))

        def run(rows: int, given: Any, dcarry: jax.Array, chunks: _Chunks = chunks) -> Any:
            here, before, dy = given
            form = Form((Block(0, chunks.steps, rows),), reverse, schedule.parallel)
            places = chunks.places(reading.last, here, rows)
            few = jax.tree.map(lambda leaf: chunks.narrow(leaf, rows), here)

            def forward(operands: Operands, before: jax.Array) -> Any:
                return _chunk(form, equations, places, operands, few, before)

            _, pull = jax.vjp(forward, Operands(params, few.x, initial), before[:rows])
            one, dbefore = pull((chunks.narrow(dy, rows), dcarry[:rows], cotangents.final))
            return one._replace(x=chunks.widen(one.x, rows)), with_rows(dbefore, jnp.zeros_like(dcarry))

        def body(state: Any, given: Any, chunks: _Chunks = chunks, run: Any = run) -> Any:
            dparams, dinitial, dcarry = state
            one, dcarry = chunks.run(run, given[0].real, given, dcarry)
            dparams, dinitial = jax.tree.map(jnp.add, (dparams, dinitial), (one.params, one.initial))
            return (dparams, dinitial, dcarry), one.x

        given = jax.tree.map(chunks.split, cells), before, chunks.split(cotangents.y)
        state = dparams, dinitial, dcarry
        (dparams, dinitial, dcarry), dx_chunks = lax.scan(body, state, given, reverse=not reverse)
        dx[k] = chunks.join(dx_chunks)
    dparams, dinitial = jax.tree.map(lambda new, old: new.astype(old.dtype), (dparams, dinitial), (params, initial))
    return Operands(dparams, dx[0] if len(dx) == 1 else jnp.concatenate(dx), dinitial)


def ladder_cells(plan: BucketPlan, lengths: npt.ArrayLike) -> int:
    """Returns how many cells CPUs compute without a plan, for concrete lengths that fit the padded plan."""
    (block,) = blocks_of(plan)
    chunks = _Chunks.of(block, CPU, planned=False)
    starts = np.arange(chunks.number)[:, None] * chunks.steps
    alive = (np.asarray(lengths)[None] > starts).sum(1)
    return sum(chunks.steps * min(level for level in chunks.levels if level >= count) for count in alive.tolist())


def _state_like(equations: Equations, params: PyTree, x: jax.Array) -> jax.ShapeDtypeStruct:
    """Returns the state of one cell, in the dtype in which it is kept from step to step."""
    _, inputs = jax.eval_shape(equations.gates, params, x[:1], jax.ShapeDtypeStruct((1,), bool))
    return jax.ShapeDtypeStruct(inputs.shape[1:], accumulator(inputs.dtype))


def _wide_zeros(leaf: jax.Array) -> jax.Array:
    return lax.full_like(leaf, 0, accumulator(leaf.dtype))
