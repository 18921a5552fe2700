"""Drives known cells over a plan, fast: own derivative, chosen loops, both directions.

Autodiff through a scan saves every gate of every step and adds up weight gradients step by step. This recurrence saves
x, h and, for an LSTM, c at the start of each chunk of about 512 cells; backwards it recomputes gates for a chunk with
one large product, and takes the gradients of weights and inputs a chunk at a time, so that only one small product a
step is left in the loop.

Measured on an LSTM of F=128, H=256 on 2 CPU cores, each beside the form that was kept. On 16 sequences of 10,000 steps
the plain scan took 1.9 times as long to train, and 4,753 MB of temporaries where this takes 181. On 64 log-normal
lengths chunks of 256 cells took 8 % longer, gates reshaped instead of concatenated backwards 35 %; [x, h] concatenated
in the loop, forward chunks of 1,024 cells and loops without masks were no faster; to save c of every step instead of
recomputing it would gain 3 %, for as much memory again as the outputs take.

Platforms want other loops, so the choice is made when a program is lowered (jax.lax.platform_dependent; an export for
several platforms holds all). CPUs want chunks that stay in cache and one direction after the other. Accelerators want
few, large operations: a bucket is one chunk, steps are unrolled, both directions share each step, and loops have
static trip counts.

Without a plan the cells lie under the padded one, and a ladder of loops goes over it, whose trip counts follow from the
lengths (jaxpack.stairs). On a GPU such a loop would ask the host at every step whether to go on, so it runs the padded
plan itself there.

Any further derivative (forward over reverse, reverse over reverse) is that of the plain scan, which `forward_mode`
selects from the start.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._cells.cell import Carry, Cell, Fused, Params
from jaxpack._packed.broadcast import vary_like
from jaxpack._packed.scan import scan_of, scan_slots
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._recurrence import loops
from jaxpack._recurrence.buffers import tanh_apart
from jaxpack._recurrence.loops import Schedule
from jaxpack._recurrence.windows import CHUNK_CELLS, Stair, kept_rows, ladder_ends, ladder_of, stairs_of

CPU = Schedule(chunk_cells=CHUNK_CELLS, unroll=1, together=False, tanh=tanh_apart)
ACCELERATOR = Schedule(chunk_cells=None, unroll=8, together=True)
TPU_LADDER = Schedule(chunk_cells=8 * CHUNK_CELLS, unroll=1, together=True)  # chunks are static, its stairs are not

Shared = tuple[jax.Array, jax.Array | None]  # what directions share: the mask, and without a plan the ladder's ends


def recur(
    cell: Cell,
    params: Sequence[Params],
    inputs: Sequence[jax.Array],
    carries: Sequence[Carry],
    mask: jax.Array,
    plan: BucketPlan,
    spans: jax.Array | None,
    forward_mode: bool,
) -> tuple[Sequence[jax.Array], Sequence[Carry]]:
    """Runs one cell per direction over a plan.

    Args:
      params: of each direction.
      inputs: of each direction, [S, F], anything in slack.
      carries: the initial one of each direction, leaves [B, ...] per slot.
      mask: bool [S], True at real cells.
      spans: int32 [B], the real steps of each slot, to run without a plan over the cells of a padded one; or None.
      forward_mode: whether to run the plain scan, which can be differentiated in forward mode too.

    Returns:
      Per direction the outputs [S, P], zero in slack, and the final carry per slot.
    """
    # Under shard_map all take on what any of them varies over, outside the derivative: autodiff sums it up again.
    inputs = vary_like(inputs, (params, carries))
    carries = vary_like(carries, inputs)
    fused = tuple(vary_like(cell.fuse(p), inputs) for p in params)
    ends = None if spans is None else ladder_ends(plan, spans)
    run = _plain if forward_mode else _fast
    return run(cell, plan, fused, tuple(inputs), (mask, ends), tuple(carries))


def _plain(
    cell: Cell,
    plan: BucketPlan,
    fused: tuple[Fused, ...],
    inputs: tuple[jax.Array, ...],
    shared: Shared,
    carries: tuple[Carry, ...],
) -> tuple[tuple[jax.Array, ...], tuple[Carry, ...]]:
    """The masked scan, both directions in one, with JAX's own derivatives: the reference of the fast one."""
    mask, _ = shared

    def step(carries: tuple[Carry, ...], projected: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        stepped = tuple(cell.step(*each) for each in zip(fused, carries, projected, strict=True))
        return stepped, tuple(carry[0] for carry in stepped)

    clean = (jnp.where(mask[:, None], x, 0) for x in inputs)
    projected = tuple(cell.project(f, x) for f, x in zip(fused, clean, strict=True))
    zeros = jax.tree.map(jnp.zeros_like, carries)
    carries, outputs = scan_slots(scan_of(step), carries, zeros, projected, mask, plan)
    return tuple(jnp.where(mask[:, None], y, 0) for y in outputs), carries


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fast(cell: Cell, plan: BucketPlan, fused: Any, inputs: Any, shared: Shared, carries: Any) -> Any:
    outputs, finals, _ = _forward(cell, plan, fused, inputs, shared, carries)
    return outputs, finals


def _fast_fwd(cell: Cell, plan: BucketPlan, fused: Any, inputs: Any, shared: Shared, carries: Any) -> Any:
    outputs, finals, kept = _forward(cell, plan, fused, inputs, shared, carries)
    return (outputs, finals), (fused, inputs, shared, carries, outputs, kept)


def _fast_bwd(cell: Cell, plan: BucketPlan, saved: Any, cotangents: Any) -> Any:
    dfused, dinputs, dcarries = _backward(cell, plan, *saved, *cotangents)
    return dfused, dinputs, None, dcarries


_fast.defvjp(_fast_fwd, _fast_bwd)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _forward(
    cell: Cell, plan: BucketPlan, fused: Any, inputs: Any, shared: Shared, carries: Any
) -> tuple[tuple[jax.Array, ...], tuple[Carry, ...], tuple[Carry, ...]]:
    kept = kept_rows(plan, shared[1] is not None)

    def run(schedule: Schedule, stairs: Sequence[Stair], mask: jax.Array, fused: Any, x: Any, carry: Any) -> Any:
        return loops.forward(cell, plan, stairs, kept, schedule, fused, x, mask, carry)

    return _on_each_platform(run, plan, shared, fused, inputs, carries)


@_forward.defjvp
def _forward_jvp(cell: Cell, plan: BucketPlan, primals: Any, tangents: Any) -> Any:
    fused, inputs, shared, carries = primals
    outputs, finals, kept = _forward(cell, plan, *primals)
    _, (doutputs, dfinals) = jax.jvp(
        lambda fused, inputs, carries: _plain(cell, plan, fused, inputs, shared, carries),
        (fused, inputs, carries),
        (tangents[0], tangents[1], tangents[3]),
    )
    # Only the backward loops read what is kept, and their derivative does not.
    return (outputs, finals, kept), (doutputs, dfinals, jax.tree.map(jnp.zeros_like, kept))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _backward(
    cell: Cell,
    plan: BucketPlan,
    fused: Any,
    inputs: Any,
    shared: Shared,
    carries: Any,
    outputs: Any,
    kept: Any,
    doutputs: Any,
    dfinals: Any,
) -> tuple[tuple[Fused, ...], tuple[jax.Array, ...], tuple[Carry, ...]]:
    def run(schedule: Schedule, stairs: Sequence[Stair], mask: jax.Array, fused: Any, x: Any, *rest: Any) -> Any:
        return loops.backward(cell, plan, stairs, schedule, fused, x, mask, *rest)

    return _on_each_platform(run, plan, shared, fused, inputs, carries, outputs, kept, doutputs, dfinals)


@_backward.defjvp
def _backward_jvp(cell: Cell, plan: BucketPlan, primals: Any, tangents: Any) -> Any:
    fused, inputs, shared, carries, _, _, *cotangents = primals

    def plain(fused: Any, inputs: Any, carries: Any, *cotangents: Any) -> Any:
        _, vjp = jax.vjp(lambda f, x, c: _plain(cell, plan, f, x, shared, c), fused, inputs, carries)
        return vjp(tuple(cotangents))

    _, derivative = jax.jvp(
        plain,
        (fused, inputs, carries, *cotangents),
        (tangents[0], tangents[1], tangents[3], *tangents[6:]),
    )
    return _backward(cell, plan, *primals), derivative


def _on_each_platform(
    run: Callable[..., tuple[Any, ...]], plan: BucketPlan, shared: Shared, *operands: tuple[Any, ...]
) -> Any:
    """run(schedule, stairs, mask, *operands) for each direction, as the program's platform wants it.

    Args:
      operands: tuples, one entry per direction.

    Returns:
      A tuple for each of run's results, with one entry per direction.
    """

    def go(schedule: Schedule, ladder: bool, mask: jax.Array, ends: jax.Array | None, *operands: Any) -> Any:
        if ladder and ends is not None:
            stairs = ladder_of(plan, ends, schedule.chunk_cells)
        else:
            stairs = stairs_of(plan, schedule.chunk_cells)
        each = list(zip(*operands, strict=True))
        one = functools.partial(run, schedule, stairs, mask)
        if not schedule.together or len(each) == 1:
            return tuple(zip(*(one(*direction) for direction in each), strict=True))
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        results = jax.vmap(one)(*stacked)
        return tuple(
            tuple(jax.tree.map(lambda leaf, i=i: leaf[i], result) for i in range(len(each))) for result in results
        )

    schedules = {"cpu": (CPU, True), "default": (ACCELERATOR, False)}
    if shared[1] is not None:
        schedules["tpu"] = (TPU_LADDER, True)
    branches = {name: functools.partial(go, *choice) for name, choice in schedules.items()}
    return lax.platform_dependent(*shared, *operands, **branches)
