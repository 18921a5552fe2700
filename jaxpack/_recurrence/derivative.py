"""The fast recurrence of known cells, with a derivative of its own: all directions of one layer over a plan.

README.md in this folder explains how it works, and which measurements chose it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from jaxpack._cells.cell import Carry, Cell, Fused, Params
from jaxpack._packed.broadcast import vary_like
from jaxpack._packed.scan import Starts, scan_of, scan_slots
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._recurrence.backward import backward
from jaxpack._recurrence.buffers import StepLoop, buffer
from jaxpack._recurrence.deals import Deal, best_deal, deals_of, dealt_cells
from jaxpack._recurrence.forward import forward
from jaxpack._recurrence.loops import Kept, Loops, Operands, Residuals, Results, factors, widened
from jaxpack._recurrence.slots import BatchCells, Masks, RealCells
from jaxpack._recurrence.windows import Stair, checkpoint_rows, stairs_of

KEPT_BYTES = 16 * 2**20  # of the activations of one direction that the backward pass finds kept


class Schedule(NamedTuple):
    """How a platform runs the loops.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      chunk_cells: about how many cells a chunk has; None for one chunk.
      whole_buckets: whether under a plan a chunk is a whole bucket all the same. Operations then are few and large.
      steps: how the steps of a chunk run, if there is one stair.
      bodies: how many steps the iterations of all stairs together have at most, if each has more than one.
      fuse_directions: whether both directions of a layer run in one loop, as a batch of two.
      divisors: without a plan, the numbers of rows to choose from as the program runs, as divisors of B; (1,) computes
        all padding.
    """

    platform: str
    chunk_cells: int | None
    whole_buckets: bool
    steps: StepLoop
    bodies: int
    fuse_directions: bool
    divisors: tuple[int, ...]

    def loops(self, recurrence: Recurrence, stairs: tuple[Stair, ...], real: RealCells) -> Loops:
        """Returns the loops of a program over these stairs."""
        unroll = max(1, min(self.steps.unroll, self.bodies // len(stairs)))
        steps = self.steps._replace(unroll=unroll)
        cell = recurrence.cell.on(self.platform)
        results = recurrence.all_states, recurrence.final_only
        return Loops(cell, stairs, steps, self.whole_buckets, real, *results, recurrence.zoneout)


CPU = Schedule(
    "cpu", 512, False, StepLoop(stacked=False, unroll=1), bodies=1, fuse_directions=False, divisors=(1, 3, 8)
)
# A loop whose trip count follows the lengths would ask the host at every step whether to go on.
# An iteration launches two or three kernels beside two or three a step, and each of its steps takes time to compile.
GPU = Schedule("gpu", None, True, StepLoop(stacked=True, unroll=16), bodies=24, fuse_directions=True, divisors=(1,))
# Stacked outputs took 1.3 times the cycles forward and 1.8 times backward (v5e, as the compiler estimates them).
TPU = Schedule(
    "tpu", 4096, True, StepLoop(stacked=False, unroll=8), bodies=24, fuse_directions=True, divisors=(1, 3, 8)
)


class Schedules(NamedTuple):
    """The schedule of each platform."""

    cpu: Schedule = CPU
    gpu: Schedule = GPU
    tpu: Schedule = TPU


class BatchShape(NamedTuple):
    """The shape of a padded batch that runs without a plan."""

    num_sequences: int
    max_length: int


class Recurrence(NamedTuple):
    """The static part of a recurrence.

    Attributes:
      cell: the cell that each direction runs.
      plan: the plan of the cells, or the shape of a padded batch, of which each row is followed by the next.
      forward_mode: whether to run the plain scan, which JAX differentiates in forward mode too.
      all_states: whether results have the memory after each step.
      final_only: whether results have no h after each step.
      schedules: how each platform runs the loops.
      zoneout: the rate with which each part of the carry keeps its value at a step; () for none.
    """

    cell: Cell
    plan: BucketPlan | BatchShape
    forward_mode: bool = False
    all_states: bool = False
    final_only: bool = False
    schedules: Schedules = Schedules()
    zoneout: tuple[float, ...] = ()

    def stairs(self, schedule: Schedule) -> tuple[Stair, ...]:
        """Returns the stairs of a plan on a schedule."""
        assert isinstance(self.plan, BucketPlan)
        return stairs_of(self.plan, None if schedule.whole_buckets else schedule.chunk_cells)

    def deals(self, schedule: Schedule) -> tuple[Deal, ...]:
        """Returns the deals of a batch without a plan on a schedule."""
        assert isinstance(self.plan, BatchShape)
        return deals_of(*self.plan, schedule.divisors, schedule.chunk_cells)

    def empty_kept(self, like: Operands) -> Kept:
        """Returns arrays for what the forward pass keeps, the same on every platform.

        The activations are kept while they are at most `KEPT_BYTES`, and else computed again. Those that depend on the
        memory are always kept: the memory is computed again from them.

        Args:
          like: the operands of one direction.
        """
        if isinstance(self.plan, BucketPlan):
            stairs = [self.stairs(schedule) for schedule in self.schedules]
        else:
            stairs = [(deal.stair(0),) for schedule in self.schedules for deal in self.deals(schedule)]
        cells = max(each[-1].end for each in stairs)
        x, sizes, dtype = like.x, jax.tree.leaves(self.cell.state_sizes), like.carry[0].dtype
        projected = jax.ShapeDtypeStruct((cells, like.weights.w_x.shape[1]), dtype)
        h, *memory = (jax.ShapeDtypeStruct((cells, size), dtype) for size in sizes)
        carry = h.update(dtype=x.dtype), *memory
        activations = jax.eval_shape(self.cell.activate_from, factors(like.weights, x.dtype), projected, carry)
        few = self.cell.gates_read_memory or _bytes(activations) <= KEPT_BYTES
        if not (self.cell.reads_activations and few):
            activations = ()
        rows = max(map(checkpoint_rows, stairs))
        checkpoints: Any = tuple(jax.ShapeDtypeStruct((rows, size), dtype) for size in sizes[1:])
        leaves, tree = jax.tree.flatten(Kept(activations, checkpoints))
        return jax.tree.unflatten(tree, [buffer(x, leaf.shape, 10 + i, leaf.dtype) for i, leaf in enumerate(leaves)])


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


Directions = tuple[Operands, ...]


class Cells(NamedTuple):
    """The cells that a recurrence goes over.

    Attributes:
      real: the real ones, under a plan or of a batch without one.
      resets: of each direction, bool [S], the real cells at which its carry is the initial one again; () for none.
      masks: of each direction; () for none.
    """

    real: RealCells | BatchCells
    resets: tuple[jax.Array, ...] = ()
    masks: tuple[Masks, ...] = ()


def unplanned_cells(lengths: npt.ArrayLike, max_length: int) -> int:
    """Returns how many cells a CPU computes for a padded batch [B, T] with concrete lengths and without a plan."""
    deals = deals_of(len(np.asarray(lengths)), max_length, CPU.divisors, CPU.chunk_cells)
    return dealt_cells(deals, lengths)


def recur(
    recurrence: Recurrence,
    params: Sequence[Params],
    inputs: Sequence[jax.Array],
    carries: Sequence[Carry],
    cells: Cells,
    fresh: Sequence[Carry] = (),
) -> tuple[Results, ...]:
    """Runs a cell in each direction.

    Args:
      recurrence: the static part.
      params: the parameters of each direction.
      inputs: the inputs of each direction, [S, F]; slack may hold anything.
      carries: the initial carry of each direction, leaves [B, ...] per slot; [B, 1] if it is not differentiated.
      cells: the cells.
      fresh: the carry of each direction to which resets return, leaves [B, ...]; () for the initial one.

    Returns:
      The results of each direction.
    """
    # Under shard_map all take on what any of them varies over, outside the derivative: autodiff sums it up again.
    inputs = vary_like(tuple(inputs), (params, carries, cells.resets, cells.masks, fresh))
    if fresh:
        carries = [widened(recurrence.cell, carry) for carry in carries]
    carries, fresh = vary_like((tuple(carries), tuple(fresh)), inputs)
    weights = (vary_like(recurrence.cell.fuse(p), inputs) for p in params)
    directions = tuple(map(Operands, weights, inputs, carries, fresh or [()] * len(carries)))
    cells = cells._replace(masks=vary_like(cells.masks, inputs))
    scaled = any(masks.scale is not None for masks in cells.masks)
    plain = recurrence.forward_mode or (scaled and not recurrence.cell.gates_apart)
    return (_plain if plain else _fast)(recurrence, directions, cells)


def _regularized(
    recurrence: Recurrence, weights: Fused, state: tuple[Carry, Any], projected: jax.Array, kept: tuple[Any, ...]
) -> Carry:
    """Runs one step, in which the gates see a scaled h, and some units keep their value.

    Args:
      recurrence: the static part.
      weights: of one direction.
      state: the carry [rows, ...], and the scale [rows, P] or None.
      projected: [rows, X].
      kept: as in `Masks`, [rows, size].
    """
    (h, *memory), scale = state
    before = (h, *memory)
    seen = (h if scale is None else h * scale, *memory)
    activations = recurrence.cell.activate_from(weights, projected, seen)
    after = list(recurrence.cell.advance(weights, activations, before))
    for i, rate in enumerate(recurrence.zoneout):
        if rate and kept:
            after[i] = jnp.where(kept[i], before[i], after[i])
        elif rate:
            after[i] = rate * before[i] + (1 - rate) * after[i]
    return tuple(after)


def _plain(recurrence: Recurrence, directions: Directions, cells: Cells) -> tuple[Results, ...]:
    """Runs the masked scan, all directions in one, with JAX's derivatives: the reference of the fast one."""
    cell, real_mask, resets = recurrence.cell, cells.real.mask, cells.resets or None
    mask = real_mask[:, None]
    weights, inputs, carries, fresh = zip(*directions, strict=True)
    scales, kept = zip(*(cells.masks or [Masks()] * len(directions)), strict=True)

    def step(states: tuple[tuple[Carry, Any], ...], xs: Any) -> tuple[Any, Any]:
        # In the step, so that the gradients of weights are summed in their own dtype.
        rounded = tuple(factors(w, x.dtype) for w, x in zip(weights, inputs, strict=True))
        stepped = tuple(_regularized(recurrence, *each) for each in zip(rounded, states, *xs, strict=True))
        first, end = 1 if recurrence.final_only else 0, None if recurrence.all_states else 1
        return tuple(zip(stepped, (scale for _, scale in states), strict=True)), tuple(
            carry[first:end] for carry in stepped
        )

    projected = tuple(
        cell.project(factors(w, x.dtype), jnp.where(mask, x, 0)).astype(carry[0].dtype)
        for w, x, carry in zip(weights, inputs, carries, strict=True)
    )
    initial = tuple(zip((widened(cell, carry) for carry in carries), scales, strict=True))
    begun = tuple(zip(fresh, scales, strict=True)) if any(fresh) else initial
    starts, xs = Starts(initial, jax.tree.map(jnp.zeros_like, initial), begun), (projected, kept)
    if isinstance(recurrence.plan, BucketPlan):
        states, outputs = scan_slots(scan_of(step), starts, xs, real_mask, recurrence.plan, resets)
    else:
        number, length = recurrence.plan
        xs, real_mask, resets = jax.tree.map(lambda leaf: _swapped(leaf, number), (xs, real_mask, resets))
        plan = BucketPlan((length,), (number,))
        states, outputs = scan_slots(scan_of(step), starts, xs, real_mask, plan, resets)
        outputs = jax.tree.map(lambda leaf: _swapped(leaf, length), outputs)
    outputs = jax.tree.map(lambda leaf: jnp.where(mask, leaf, 0), outputs)
    if recurrence.final_only:
        return tuple(Results((), carry) for carry, _ in states)
    return tuple(Results(y, carry, tuple(memory)) for (y, *memory), (carry, _) in zip(outputs, states, strict=True))


def _swapped(leaf: jax.Array, rows: int) -> jax.Array:
    """Returns [rows * n, ...] as [n * rows, ...]."""
    return jnp.swapaxes(leaf.reshape(rows, -1, *leaf.shape[1:]), 0, 1).reshape(leaf.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fast(recurrence: Recurrence, directions: Directions, cells: Cells) -> tuple[Results, ...]:
    return _forward(recurrence, False, directions, cells)[0]


def _fast_fwd(recurrence: Recurrence, directions: Directions, cells: Cells) -> Any:
    results, kept = _forward(recurrence._replace(final_only=False), True, directions, cells)
    outputs = [result.y for result in results]
    if recurrence.final_only:
        results = tuple(result._replace(y=()) for result in results)
    return results, (tuple(map(Residuals, directions, outputs, kept)), cells)


def _fast_bwd(recurrence: Recurrence, saved: Any, cotangents: tuple[Results, ...]) -> tuple[Directions, None]:
    return _backward(recurrence, *saved, cotangents), None


_fast.defvjp(_fast_fwd, _fast_bwd)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _forward(
    recurrence: Recurrence, keep: bool, directions: Directions, cells: Cells
) -> tuple[tuple[Results, ...], tuple[Kept, ...]]:
    def run(loops: Loops, operands: Operands) -> tuple[Results, Kept]:
        return forward(loops, recurrence.empty_kept(operands) if keep else Kept(), operands)

    pairs = _on_each_platform(run, recurrence, cells, directions)
    results, kept = zip(*pairs, strict=True)
    return results, kept


@_forward.defjvp
def _forward_jvp(recurrence: Recurrence, keep: bool, primals: Any, tangents: Any) -> Any:
    (directions, cells), (ddirections, _) = primals, tangents
    results, kept = _forward(recurrence, keep, directions, cells)
    _, dresults = jax.jvp(lambda directions: _plain(recurrence, directions, cells), (directions,), (ddirections,))
    # Only the backward loops read what is kept, and their derivative does not.
    return (results, kept), (dresults, jax.tree.map(jnp.zeros_like, kept))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _backward(
    recurrence: Recurrence,
    residuals: tuple[Residuals, ...],
    cells: Cells,
    cotangents: tuple[Results, ...],
) -> Directions:
    return _on_each_platform(backward, recurrence, cells, residuals, cotangents)


@_backward.defjvp
def _backward_jvp(recurrence: Recurrence, primals: Any, tangents: Any) -> Any:
    (residuals, cells, cotangents), (dresiduals, _, dcotangents) = primals, tangents

    def plain(directions: Directions, cotangents: tuple[Results, ...]) -> Directions:
        _, vjp = jax.vjp(lambda directions: _plain(recurrence, directions, cells), directions)
        return vjp(cotangents)[0]

    directions, ddirections = (tuple(each.operands for each in some) for some in (residuals, dresiduals))
    _, derivative = jax.jvp(plain, (directions, cotangents), (ddirections, dcotangents))
    return _backward(recurrence, residuals, cells, cotangents), derivative


def _on_each_platform(
    run: Callable[..., Any], recurrence: Recurrence, cells: Cells, *operands: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Returns run(loops, *operands) for each direction, with the loops that suit the program's platform.

    Args:
      run: runs one direction.
      recurrence: what all directions share.
      cells: the cells.
      operands: tuples, with one entry per direction.
    """

    def on(schedule: Schedule, cells: Cells, *operands: Any) -> Any:
        real, resets, masks = cells
        number = len(operands[0])
        each = list(zip(resets or [None] * number, masks or [Masks()] * number, *operands, strict=True))

        def run_all(stairs: tuple[Stair, ...], real: RealCells) -> tuple[Any, ...]:
            def one(resets: jax.Array | None, masks: Masks, *operands: Any) -> Any:
                seen = real.with_resets(resets).with_masks(masks)
                return run(schedule.loops(recurrence, stairs, seen), *operands)

            if not schedule.fuse_directions or len(each) == 1:
                return tuple(itertools.starmap(one, each))
            results = jax.vmap(one)(*jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))
            return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], results) for i in range(len(each)))

        if isinstance(real, RealCells):
            return run_all(recurrence.stairs(schedule), real)
        ranked, deals = real.ranked, recurrence.deals(schedule)

        def run_dealt(deal: Deal) -> tuple[Any, ...]:
            return run_all((deal.stair(deal.chunks(ranked)),), deal.cells(real))

        if len(deals) == 1:
            return run_dealt(deals[0])
        return lax.switch(best_deal(deals, ranked), [functools.partial(run_dealt, deal) for deal in deals])

    cpu, gpu, tpu = (functools.partial(on, schedule) for schedule in recurrence.schedules)
    return lax.platform_dependent(cells, *operands, cpu=cpu, tpu=tpu, default=gpu)
