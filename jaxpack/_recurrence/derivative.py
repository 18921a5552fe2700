"""The fast recurrence of known cells, with a derivative of its own: all directions of one layer over a plan.

README.md in this folder explains how it works, and which measurements chose it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._cells.cell import Carry, Cell, Params
from jaxpack._packed.broadcast import vary_like
from jaxpack._packed.scan import scan_of, scan_slots
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._recurrence import loops
from jaxpack._recurrence.loops import Loops, Operands, Residuals, Results, Schedule
from jaxpack._recurrence.windows import CHUNK_CELLS, checkpoint_rows, ladder_ends, ladder_of, stairs_of

CPU = Schedule("cpu", chunk_cells=CHUNK_CELLS, unroll=1, fuse_directions=False, follow_lengths=True)
GPU = Schedule("gpu", chunk_cells=None, unroll=8, fuse_directions=True, follow_lengths=False)
# Its chunks are static, its trip counts follow the lengths.
TPU_LADDER = Schedule("tpu", chunk_cells=8 * CHUNK_CELLS, unroll=1, fuse_directions=True, follow_lengths=True)


class Schedules(NamedTuple):
    """The schedule of each platform. The default is for GPUs, and for TPUs where there is a plan."""

    cpu: Schedule = CPU
    default: Schedule = GPU
    tpu_ladder: Schedule = TPU_LADDER


class Recurrence(NamedTuple):
    """The static part of a recurrence.

    Attributes:
      cell: the cell that each direction runs.
      plan: the plan of the cells.
      forward_mode: whether to run the plain scan, which JAX differentiates in forward mode too.
      schedules: how each platform runs the loops.
    """

    cell: Cell
    plan: BucketPlan
    forward_mode: bool = False
    schedules: Schedules = Schedules()

    @property
    def checkpoint_cells(self) -> int:
        """About how many cells a chunk with a checkpoint has, on every platform."""
        return self.schedules.cpu.chunk_cells or CHUNK_CELLS


class RealCells(NamedTuple):
    """The real cells of a batch, as all directions see them.

    Attributes:
      mask: bool [S].
      ends: int32 [levels], where each level of the ladder ends; None where the batch has a plan of its own.
    """

    mask: jax.Array
    ends: jax.Array | None

    @classmethod
    def of(cls, mask: jax.Array, spans: jax.Array | None, plan: BucketPlan) -> RealCells:
        """Returns them from the mask and, to run without a plan under a padded one, the real steps of each slot."""
        return cls(mask, None if spans is None else ladder_ends(plan, spans))


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
      carries: the initial carry of each direction, leaves [B, ...] per slot.
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

    def step(carries: tuple[Carry, ...], projected: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        stepped = tuple(cell.step(*each) for each in zip(weights, carries, projected, strict=True))
        return stepped, tuple(carry[0] for carry in stepped)

    projected = tuple(cell.project(w, jnp.where(mask, x, 0)) for w, x in zip(weights, inputs, strict=True))
    zeros = jax.tree.map(jnp.zeros_like, carries)
    carries, outputs = scan_slots(scan_of(step), carries, zeros, projected, real.mask, recurrence.plan)
    return tuple(Results(jnp.where(mask, y, 0), carry) for y, carry in zip(outputs, carries, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fast(recurrence: Recurrence, directions: Directions, real: RealCells) -> tuple[Results, ...]:
    results, _ = _forward(recurrence, directions, real)
    return results


def _fast_fwd(recurrence: Recurrence, directions: Directions, real: RealCells) -> Any:
    results, checkpoints = _forward(recurrence, directions, real)
    outputs = [result.y for result in results]
    return results, (tuple(map(Residuals, directions, outputs, checkpoints)), real)


def _fast_bwd(recurrence: Recurrence, saved: Any, cotangents: tuple[Results, ...]) -> tuple[Directions, None]:
    return _backward(recurrence, *saved, cotangents), None


_fast.defvjp(_fast_fwd, _fast_bwd)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _forward(
    recurrence: Recurrence, directions: Directions, real: RealCells
) -> tuple[tuple[Results, ...], tuple[Carry, ...]]:
    pairs = _on_each_platform(loops.forward, recurrence, real, directions)
    results, checkpoints = zip(*pairs, strict=True)
    return results, checkpoints


@_forward.defjvp
def _forward_jvp(recurrence: Recurrence, primals: Any, tangents: Any) -> Any:
    (directions, real), (ddirections, _) = primals, tangents
    results, checkpoints = _forward(recurrence, directions, real)
    _, dresults = jax.jvp(lambda directions: _plain(recurrence, directions, real), (directions,), (ddirections,))
    # Only the backward loops read the checkpoints, and their derivative does not.
    return (results, checkpoints), (dresults, jax.tree.map(jnp.zeros_like, checkpoints))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _backward(
    recurrence: Recurrence, residuals: tuple[Residuals, ...], real: RealCells, cotangents: tuple[Results, ...]
) -> Directions:
    return _on_each_platform(loops.backward, recurrence, real, residuals, cotangents)


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
    """Returns run(loops, *operands) for each direction, with the loops that suit the program's platform.

    Args:
      run: `loops.forward` or `loops.backward`.
      recurrence, real: what all directions share.
      operands: tuples, with one entry per direction.
    """
    cell, plan, _, schedules = recurrence

    def on(schedule: Schedule, real: RealCells, *operands: Any) -> Any:
        if schedule.follow_lengths and real.ends is not None:
            stairs = ladder_of(plan, real.ends, schedule.chunk_cells)
        else:
            stairs = stairs_of(plan, schedule.chunk_cells, recurrence.checkpoint_cells)
        rows = checkpoint_rows(plan, recurrence.checkpoint_cells, real.ends is not None)
        one = functools.partial(run, Loops(cell.on(schedule.platform), plan, schedule, stairs, rows, real.mask))
        each = list(zip(*operands, strict=True))
        if not schedule.fuse_directions or len(each) == 1:
            return tuple(itertools.starmap(one, each))
        results = jax.vmap(one)(*jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))
        return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], results) for i in range(len(each)))

    branches = {"cpu": functools.partial(on, schedules.cpu), "default": functools.partial(on, schedules.default)}
    if real.ends is not None:
        branches["tpu"] = functools.partial(on, schedules.tpu_ladder)
    return lax.platform_dependent(real, *operands, **branches)
