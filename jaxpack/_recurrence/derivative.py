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
from jax import lax

from jaxpack._cells.cell import Carry, Cell, Params
from jaxpack._packed.broadcast import vary_like
from jaxpack._packed.scan import scan_of, scan_slots
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._recurrence.buffers import buffer
from jaxpack._recurrence.deals import Deal, best_deal, deals_of
from jaxpack._recurrence.loops import Kept, Loops, Operands, Residuals, Results, backward, forward
from jaxpack._recurrence.slots import RealCells
from jaxpack._recurrence.windows import Stair, checkpoint_rows, stairs_of

KEPT_BYTES = 16 * 2**20  # of the activations of one direction that the backward pass finds kept


class Schedule(NamedTuple):
    """How a platform runs the loops.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      chunk_cells: about how many cells a chunk has; None for a whole bucket.
      stack: 0 to write the outputs of steps in place, else the most steps in an iteration of a scan that stacks them.
      fuse_directions: whether both directions of a layer run in one loop, as a batch of two.
      deals: whether rows are dealt as the program runs, where there is no plan; else all padding is computed.
    """

    platform: str
    chunk_cells: int | None
    stack: int
    fuse_directions: bool
    deals: bool


CPU = Schedule("cpu", chunk_cells=512, stack=0, fuse_directions=False, deals=True)
GPU = Schedule("gpu", chunk_cells=None, stack=8, fuse_directions=True, deals=False)
# Under a plan, TPUs run as GPUs do.
TPU = Schedule("tpu", chunk_cells=4096, stack=8, fuse_directions=True, deals=True)


class Schedules(NamedTuple):
    """The schedule of each platform."""

    cpu: Schedule = CPU
    gpu: Schedule = GPU
    tpu: Schedule = TPU


class Recurrence(NamedTuple):
    """The static part of a recurrence.

    Attributes:
      cell: the cell that each direction runs.
      plan: the plan of the cells.
      planned: whether the plan is a choice; otherwise it only gives the shape of a padded batch.
      forward_mode: whether to run the plain scan, which JAX differentiates in forward mode too.
      schedules: how each platform runs the loops.
    """

    cell: Cell
    plan: BucketPlan
    planned: bool = True
    forward_mode: bool = False
    schedules: Schedules = Schedules()

    def deals(self, schedule: Schedule) -> tuple[Deal, ...]:
        """Returns the deals that a schedule runs in place of the plan."""
        if self.planned or not schedule.deals:
            return ()
        return deals_of(self.plan, schedule.chunk_cells or self.plan.size)

    def stairs(self, schedule: Schedule) -> tuple[Stair, ...]:
        """Returns the stairs of the plan on a schedule."""
        return stairs_of(self.plan, schedule.chunk_cells, whole=schedule.stack > 0)

    def empty_kept(self, like: Operands) -> Kept:
        """Returns arrays for what the forward pass keeps, the same on every platform.

        The activations are kept while they are at most `KEPT_BYTES`, and else computed again.

        Args:
          like: the operands of one direction.
        """
        layouts = [(deal.stair(0),) for schedule in self.schedules for deal in self.deals(schedule)]
        layouts += [self.stairs(schedule) for schedule in self.schedules if not self.deals(schedule)]
        cells = max(stairs[-1].end for stairs in layouts)
        x, sizes = like.x, jax.tree.leaves(self.cell.state_sizes)
        projected, h = (
            jax.ShapeDtypeStruct((cells, width), x.dtype) for width in (like.weights.w_x.shape[1], sizes[0])
        )
        activations = jax.eval_shape(self.cell.activate, like.weights, projected, h)
        if not self.cell.reads_activations or _bytes(activations) > KEPT_BYTES:
            activations = ()
        rows = max(map(checkpoint_rows, layouts))
        checkpoints = tuple(jax.ShapeDtypeStruct((rows, size), x.dtype) for size in sizes[1:])
        leaves, tree = jax.tree.flatten(Kept(activations, checkpoints))
        return jax.tree.unflatten(tree, [buffer(x, leaf.shape, 10 + i) for i, leaf in enumerate(leaves)])


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def recur(
    recurrence: Recurrence,
    params: Sequence[Params],
    inputs: Sequence[jax.Array],
    carries: Sequence[Carry],
    real: RealCells,
) -> tuple[Results, ...]:
    """Runs a cell in each direction.

    Args:
      recurrence: the static part.
      params: the parameters of each direction.
      inputs: the inputs of each direction, [S, F]; slack may hold anything.
      carries: the initial carry of each direction, leaves [B, ...] per slot; [B, 1] if it is not differentiated.
      real: the real cells.

    Returns:
      The results of each direction.
    """
    # Under shard_map all take on what any of them varies over, outside the derivative: autodiff sums it up again.
    inputs = vary_like(tuple(inputs), (params, carries))
    carries = vary_like(tuple(carries), inputs)
    weights = (vary_like(recurrence.cell.fuse(p), inputs) for p in params)
    directions = tuple(map(Operands, weights, inputs, carries))
    return (_plain if recurrence.forward_mode else _fast)(recurrence, directions, real)


Directions = tuple[Operands, ...]


def _plain(recurrence: Recurrence, directions: Directions, real: RealCells) -> tuple[Results, ...]:
    """Runs the masked scan, all directions in one, with JAX's derivatives: the reference of the fast one."""
    cell, mask = recurrence.cell, real.mask[:, None]
    weights, inputs, carries = zip(*directions, strict=True)
    sizes = jax.tree.leaves(cell.state_sizes)

    def step(carries: tuple[Carry, ...], projected: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        stepped = tuple(cell.step(*each) for each in zip(weights, carries, projected, strict=True))
        return stepped, tuple(carry[0] for carry in stepped)

    projected = tuple(cell.project(w, jnp.where(mask, x, 0)) for w, x in zip(weights, inputs, strict=True))
    carries = tuple(
        tuple(jnp.broadcast_to(leaf, (len(leaf), size)) for leaf, size in zip(carry, sizes, strict=True))
        for carry in carries
    )
    zeros = jax.tree.map(jnp.zeros_like, carries)
    carries, outputs = scan_slots(scan_of(step), carries, zeros, projected, real.mask, recurrence.plan)
    return tuple(Results(jnp.where(mask, y, 0), carry) for y, carry in zip(outputs, carries, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fast(recurrence: Recurrence, directions: Directions, real: RealCells) -> tuple[Results, ...]:
    return _forward(recurrence, False, directions, real)[0]


def _fast_fwd(recurrence: Recurrence, directions: Directions, real: RealCells) -> Any:
    results, kept = _forward(recurrence, True, directions, real)
    outputs = [result.y for result in results]
    return results, (tuple(map(Residuals, directions, outputs, kept)), real)


def _fast_bwd(recurrence: Recurrence, saved: Any, cotangents: tuple[Results, ...]) -> tuple[Directions, None]:
    return _backward(recurrence, *saved, cotangents), None


_fast.defvjp(_fast_fwd, _fast_bwd)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _forward(
    recurrence: Recurrence, keep: bool, directions: Directions, real: RealCells
) -> tuple[tuple[Results, ...], tuple[Kept, ...]]:
    pairs = _on_each_platform(functools.partial(_run_forward, keep), recurrence, real, directions)
    results, kept = zip(*pairs, strict=True)
    return results, kept


@_forward.defjvp
def _forward_jvp(recurrence: Recurrence, keep: bool, primals: Any, tangents: Any) -> Any:
    (directions, real), (ddirections, _) = primals, tangents
    results, kept = _forward(recurrence, keep, directions, real)
    _, dresults = jax.jvp(lambda directions: _plain(recurrence, directions, real), (directions,), (ddirections,))
    # Only the backward loops read what is kept, and their derivative does not.
    return (results, kept), (dresults, jax.tree.map(jnp.zeros_like, kept))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _backward(
    recurrence: Recurrence, residuals: tuple[Residuals, ...], real: RealCells, cotangents: tuple[Results, ...]
) -> Directions:
    return _on_each_platform(_run_backward, recurrence, real, residuals, cotangents)


@_backward.defjvp
def _backward_jvp(recurrence: Recurrence, primals: Any, tangents: Any) -> Any:
    (residuals, real, cotangents), (dresiduals, _, dcotangents) = primals, tangents

    def plain(directions: Directions, cotangents: tuple[Results, ...]) -> Directions:
        _, vjp = jax.vjp(lambda directions: _plain(recurrence, directions, real), directions)
        return vjp(cotangents)[0]

    directions, ddirections = (tuple(each.operands for each in some) for some in (residuals, dresiduals))
    _, derivative = jax.jvp(plain, (directions, cotangents), (ddirections, dcotangents))
    return _backward(recurrence, residuals, real, cotangents), derivative


def _on_each_platform(
    run: Callable[..., Any], recurrence: Recurrence, real: RealCells, *operands: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Returns run(recurrence, loops, places, *operands) for each direction, with the loops that suit the platform.

    Args:
      run: `_run_forward` or `_run_backward`.
      recurrence, real: what all directions share.
      operands: tuples, with one entry per direction.
    """
    cell, schedules = recurrence.cell, recurrence.schedules

    def on(schedule: Schedule, real: RealCells, *operands: Any) -> Any:
        each = list(zip(*operands, strict=True))
        loops_on = functools.partial(Loops, cell.on(schedule.platform), stack=schedule.stack)

        def run_all(loops: Loops, places: jax.Array | None = None) -> tuple[Any, ...]:
            one = functools.partial(run, recurrence, loops, places)
            if not schedule.fuse_directions or len(each) == 1:
                return tuple(itertools.starmap(one, each))
            results = jax.vmap(one)(*jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))
            return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], results) for i in range(len(each)))

        def run_dealt(deal: Deal) -> tuple[Any, ...]:
            cells, places = deal.cells(real.spans)
            return run_all(loops_on(stairs=(deal.stair(deal.chunks(real.spans)),), real=cells), places)

        deals = recurrence.deals(schedule)
        if not deals:
            return run_all(loops_on(stairs=recurrence.stairs(schedule), real=real))
        return lax.switch(best_deal(deals, real.spans), [functools.partial(run_dealt, deal) for deal in deals])

    branches = {"cpu": functools.partial(on, schedules.cpu), "default": functools.partial(on, schedules.gpu)}
    if not recurrence.planned:
        branches["tpu"] = functools.partial(on, schedules.tpu)
    return lax.platform_dependent(real, *operands, **branches)


def _run_forward(
    keep: bool, recurrence: Recurrence, loops: Loops, places: jax.Array | None, operands: Operands
) -> tuple[Results, Kept]:
    kept = recurrence.empty_kept(operands) if keep else Kept()
    results, kept = forward(loops, kept, operands)
    return results._replace(y=_placed(results.y, places)), kept


def _run_backward(
    recurrence: Recurrence, loops: Loops, places: jax.Array | None, residuals: Residuals, cotangents: Results
) -> Operands:
    operands = backward(loops, residuals, cotangents)
    return operands._replace(x=_placed(operands.x, places))


def _placed(leaf: jax.Array, places: jax.Array | None) -> jax.Array:
    """Returns the cells [S, ...] of the plan from those of dealt rows, zero in slack."""
    return leaf if places is None else leaf.at[places].get(mode="fill", fill_value=0)
