"""The loops of the fast recurrence: one direction of one layer over a plan's buckets, forward and backward.

Both go through a bucket in chunks of steps. What is not sequential is done for a whole chunk at once, while it is in
cache: forward, the input's product with its weights; backward, the gates again, all coefficients of the step by step
recurrence, and the gradients of inputs and weights. The last chunk of a bucket, where it is short, starts earlier
instead and skips the steps that are not its own, so that every chunk of a bucket is the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack.cells import Carry, Cell, Fused, Linear
from jaxpack.plan import Bucket, BucketPlan

CHUNK_CELLS = 512  # cells of a chunk on CPU: 256 made training 8 % slower

Memories = tuple[jax.Array, ...]  # for each bucket the memory c at the start of each chunk, [chunks, rows, H]


class Schedule(NamedTuple):
    """How a platform runs the loops.

    Attributes:
      chunk_cells: about how many cells a chunk has; None for the whole bucket.
      unroll: steps in an iteration of the compiled loop.
      together: whether both directions of a layer run in one loop, as a batch of two.
    """

    chunk_cells: int | None
    unroll: int
    together: bool


class Chunks(NamedTuple):
    """A bucket cut in `number` chunks of `steps` steps."""

    bucket: Bucket
    steps: int
    number: int

    @property
    def size(self) -> int:
        """Cells in a chunk."""
        return self.steps * self.bucket.rows

    def locate(self, index: Any) -> tuple[Any, Any, Any]:
        """A chunk's first cell, its first step in the bucket, and how many of its steps belong to the one before."""
        first = index * self.steps
        start = (
            first if self.number * self.steps == self.bucket.steps else _least(first, self.bucket.steps - self.steps)
        )
        return self.bucket.offset + start * self.bucket.rows, start, first - start


def cut(bucket: Bucket, chunk_cells: int | None) -> Chunks:
    """Chunks of nearly equal length and about this many cells."""
    count = 1 if chunk_cells is None else min(bucket.steps, -(-bucket.size // chunk_cells))
    steps = -(-bucket.steps // count)
    return Chunks(bucket, steps, -(-bucket.steps // steps))


def forward(
    cell: Cell, plan: BucketPlan, schedule: Schedule, fused: Fused, x: jax.Array, mask: jax.Array, carry: Carry
) -> tuple[jax.Array, Carry, Memories]:
    """The recurrence.

    Args:
      x: [S, F], anything in slack.
      mask: bool [S], True at real cells.
      carry: per slot, leaves [B, ...].

    Returns:
      h after each cell's step [S, P] (in slack the last one), the carry after each slot's last step, and the memories.
    """
    fused = lax.optimization_barrier(fused)
    y = _buffer(x, (plan.size, cell.output_size), 1)
    finished, memories = [], []
    for bucket in plan.buckets:
        chunks = cut(bucket, schedule.chunk_cells)
        finished.append([leaf[bucket.rows :] for leaf in carry])
        carry = tuple(leaf[: bucket.rows] for leaf in carry)
        kept = tuple(_buffer(x, (cut(bucket, CHUNK_CELLS).number, *c.shape), 2) for c in carry[1:])

        def chunk(index: Any, state: Any, chunks: Chunks = chunks) -> Any:
            carry, y, kept = state
            base, _, skip = chunks.locate(index)
            kept = tuple(lax.dynamic_update_index_in_dim(k, c, index, 0) for k, c in zip(kept, carry[1:], strict=True))
            real = _read(mask, base, chunks.size)
            projected = cell.project(fused, _read_inputs(x, real, base))

            def step(j: Any, state: Any) -> Any:
                carry, y = state
                rows = chunks.bucket.rows
                stepped = cell.step(fused, carry, _read(projected, j * rows, rows))
                live = _read(real, j * rows, rows)[:, None]
                carry = tuple(jnp.where(live, new, old) for new, old in zip(stepped, carry, strict=True))
                return carry, _write(y, carry[0], base + j * rows)

            carry, y = _loop(skip, chunks.steps, step, (carry, y), schedule.unroll)
            return carry, y, kept

        carry, y, kept = _loop(0, chunks.number, chunk, (carry, y, kept))
        memories.extend(kept)
    carry = tuple(jnp.concatenate(parts) for parts in zip(carry, *reversed(finished), strict=True))
    return y, carry, tuple(memories)


def backward(
    cell: Cell,
    plan: BucketPlan,
    schedule: Schedule,
    fused: Fused,
    x: jax.Array,
    mask: jax.Array,
    carry: Carry,
    y: jax.Array,
    memories: Memories,
    dy: jax.Array,
    dcarry: Carry,
) -> tuple[Fused, jax.Array, Carry]:
    """The cotangents of the weights, the inputs and the initial carry.

    Args:
      fused, x, mask, carry: as given to `forward`; y, memories: as it returned them.
      dy: [S, P], anything in slack.
      dcarry: of the final carry.
    """
    fused = lax.optimization_barrier(fused)
    transposed = lax.optimization_barrier(jax.tree.map(lambda w: w.T, fused))  # once: in the loops it would be copied
    dx, dfused = _buffer(x, x.shape, 3), jax.tree.map(lambda w: _buffer(x, w.shape, 0), fused)
    grads: Any = ([leaf[: plan.rows[-1]] for leaf in dcarry], dx, dfused)
    for k in reversed(range(plan.num_buckets)):
        bucket = plan.buckets[k]
        chunks = cut(bucket, schedule.chunk_cells)
        before = bucket.offset - plan.buckets[k - 1].rows
        first_h = y[before : before + bucket.rows] if k else carry[0]
        dstate = [jnp.concatenate([d, full[len(d) : bucket.rows]]) for d, full in zip(grads[0], dcarry, strict=True)]

        def chunk(index: Any, state: Any, chunks: Chunks = chunks, first_h: Any = first_h, k: int = k) -> Any:
            index = chunks.number - 1 - index
            dstate, dx, dfused = state
            base, start, skip = chunks.locate(index)
            # Tied to the loop's state, or the compiler would do all chunks' work, and keep it, before the loop.
            y_, memories_, dstate = lax.optimization_barrier((y, memories, dstate))
            window = _Window(chunks, base, start, skip, schedule)
            h = window.before(y_, first_h)
            memory = memories_[k][index] if memories_ else None
            real = _read(mask, base, chunks.size)
            xs = _read_inputs(x, real, base)
            real = real[:, None]
            recall = window.recall(real, memory)
            linear = _at_slack(real, cell.linearise(fused, xs, h, _read(y_, base, chunks.size), recall))
            own = real & window.own
            gates = jnp.where(own, linear.gates, 0)
            d = jnp.where(own, _read(dy, base, chunks.size), 0)
            gates, d, linear = lax.optimization_barrier((gates, d, linear))
            dstate, da, d = _pull_back_chunk(cell, transposed, window, linear, gates, d, dstate)
            dx = _write(dx, da[:, : fused.w_x.shape[1]] @ transposed.w_x, base)
            h = jnp.where(own, h, 0)  # of an empty sequence it may be NaN
            out = None if linear.out is None else jnp.where(own, linear.out, 0)
            return dstate, dx, _add_gradients(dfused, xs, h, out, da, d)

        # A count that the compiler cannot see: it would inline a single chunk, and keep all buckets' arrays at once.
        count = chunks.number if schedule.chunk_cells is None else lax.optimization_barrier(jnp.int32(chunks.number))
        grads = _loop(0, count, chunk, (dstate, *grads[1:]))
    dstate, dx, dfused = grads
    return dfused, dx, tuple(dstate)


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


class _Window(NamedTuple):
    """Where a chunk lies: its first cell, its first step in its bucket, and how many steps are not its own."""

    chunks: Chunks
    base: Any
    start: Any
    skip: Any
    schedule: Schedule

    @property
    def own(self) -> Any:
        """bool [M, 1]: the cells of the chunk's own steps."""
        if isinstance(self.skip, int):
            return True
        steps = jnp.repeat(jnp.arange(self.chunks.steps), self.chunks.bucket.rows)
        return (steps >= self.skip)[:, None]

    def before(self, y: jax.Array, first: jax.Array) -> jax.Array:
        """h before each step of the chunk [M, P], from h after each step of the plan and h before the bucket."""
        rows, size = self.chunks.bucket.rows, self.chunks.size
        earlier = first
        if self.chunks.number > 1:
            earlier = jnp.where(self.start == 0, first, _read(y, jnp.maximum(self.base - rows, 0), rows))
        return jnp.concatenate([earlier, _read(y, self.base, size - rows)])

    def recall(self, real: jax.Array, memory: jax.Array | None) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """The function that brings back the memory c before each step, from the one at the chunk's first own step."""
        rows, steps = self.chunks.bucket.rows, self.chunks.steps

        def sequential(decay: jax.Array, inject: jax.Array) -> jax.Array:
            def step(j: Any, state: Any) -> Any:
                c, before = state
                live = _read(real, j * rows, rows)
                after = _read(decay, j * rows, rows) * c + _read(inject, j * rows, rows)
                return jnp.where(live, after, c), _write(before, c, j * rows)

            assert memory is not None
            return _loop(self.skip, steps, step, (memory, _buffer(decay, decay.shape, 4)))[1]

        def parallel(decay: jax.Array, inject: jax.Array) -> jax.Array:
            decay, inject = jnp.where(real, decay, 1), jnp.where(real, inject, 0)
            shape = (steps, rows, decay.shape[-1])

            def compose(early: Any, late: Any) -> Any:
                return late[0] * early[0], late[0] * early[1] + late[1]

            products, sums = lax.associative_scan(compose, (decay.reshape(shape), inject.reshape(shape)))
            assert memory is not None
            after = products * memory + sums
            return jnp.concatenate([memory[None], after[:-1]]).reshape(decay.shape)

        return sequential if self.schedule.chunk_cells is not None else parallel


def _pull_back_chunk(
    cell: Cell, transposed: Fused, window: _Window, linear: Linear, gates: jax.Array, d: jax.Array, dstate: Any
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """The backward recurrence over a chunk, last step first: dstate before it, and da [M, G] and d [M, P] of its cells.

    da and d are written over the coefficients and the output's cotangents that they are made of.
    """
    rows, steps, width_h = window.chunks.bucket.rows, window.chunks.steps, transposed.w_h.shape[0]

    def step(j: Any, state: Any) -> Any:
        (dh, *dc), gates, d = state
        at = (steps - 1 - j) * rows
        total = dh + _read(d, at, rows)
        here = jax.tree.map(lambda leaf: _read(leaf, at, rows), linear._replace(gates=gates, out=None))
        da, *dc = cell.pull_back(transposed, here, total, dc[0] if dc else None)
        dh = da[:, -width_h:] @ transposed.w_h + here.passes * total
        d = d if transposed.w_out is None else _write(d, total, at)
        return [dh, *(c for c in dc if c is not None)], _write(gates, da, at), d

    return _loop(0, steps - window.skip, step, (list(dstate), gates, d), window.schedule.unroll)


def _at_slack(real: jax.Array, linear: Linear) -> Linear:
    """With what holds at slack, where a step keeps its carry, in its place there."""
    slack = {"passes": 1, "reads": 0, "forget": 1}  # gates and out are zeroed where they are used
    given = {name: leaf for name, leaf in linear._asdict().items() if leaf is not None}
    return linear._replace(**{name: jnp.where(real, given[name], at) for name, at in slack.items() if name in given})


def _loop(start: Any, stop: Any, body: Callable[[Any, Any], Any], state: Any, unroll: int = 1) -> Any:
    """fori_loop, which a trip count of 1 known in advance leaves out."""
    if isinstance(start, int) and isinstance(stop, int):
        return body(start, state) if stop - start == 1 else lax.fori_loop(start, stop, body, state, unroll=unroll)
    return lax.fori_loop(start, stop, body, state)


def _buffer(like: jax.Array, shape: tuple[int, ...], fill: float) -> jax.Array:
    """An array to be written over. Buffers of one shape with one fill would be merged, and then copied."""
    return lax.full_like(like, fill, shape=shape)


def _read(leaf: jax.Array, start: Any, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(leaf, start, size)


def _read_inputs(x: jax.Array, real: jax.Array, start: Any) -> jax.Array:
    """A chunk's inputs, zero in slack: masked here, so that no masked copy of all inputs is made."""
    return jnp.where(real[:, None], _read(x, start, len(real)), 0)


def _write(leaf: jax.Array, value: jax.Array, start: Any) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(leaf, value, start, 0)


def _transpose(matrix: jax.Array) -> jax.Array:
    """A transposed copy: a product that transposes on the fly is slower."""
    return lax.optimization_barrier(matrix.T)


def _least(a: Any, b: int) -> Any:
    return min(a, b) if isinstance(a, int) else jnp.minimum(a, b)
