"""Drives known cells over a plan, fast: own derivative, chosen loops, both directions.

Autodiff through a scan saves every gate of every step and adds up weight gradients step by step. This recurrence saves
x, h and, for an LSTM, c at the start of each chunk of about 512 cells; backwards it recomputes gates for a chunk with
one large product, and takes the gradients of weights and inputs a chunk at a time, so that only one small product a
step is left in the loop. (LSTM, B=64, F=128, H=256, log-normal lengths, 2 cores, one run: see the README's bench.)

Platforms want other loops, so the choice is made when a program is lowered (jax.lax.platform_dependent; an export for
several platforms holds both). CPUs want chunks that stay in cache and one direction after the other. Accelerators want
few, large operations: a bucket is one chunk, steps are unrolled, both directions share each step, and loops have
static trip counts.

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

from jaxpack import loops
from jaxpack.cells import Carry, Cell, Fused, Params
from jaxpack.loops import Memories, Schedule
from jaxpack.plan import BucketPlan
from jaxpack.scan import scan_slots

CPU = Schedule(chunk_cells=loops.CHUNK_CELLS, unroll=1, together=False)
ACCELERATOR = Schedule(chunk_cells=None, unroll=8, together=True)


def recur(
    cell: Cell,
    params: Sequence[Params],
    inputs: Sequence[jax.Array],
    carries: Sequence[Carry],
    mask: jax.Array,
    plan: BucketPlan,
    forward_mode: bool,
) -> tuple[Sequence[jax.Array], Sequence[Carry]]:
    """Runs one cell per direction over a plan.

    Args:
      params, inputs, carries: per direction its parameters, its inputs [S, F] (anything in slack) and its initial
        carry, leaves [B, ...] per slot.
      mask: bool [S], True at real cells.
      forward_mode: whether to run the plain scan, which can be differentiated in forward mode too.

    Returns:
      Per direction the outputs [S, P], arbitrary in slack, and the final carry per slot.
    """
    # Weights take on what the inputs vary over under shard_map, outside the derivative: autodiff sums it up again.
    zero = lax.full_like(inputs[0], 0, shape=())
    fused = tuple(jax.tree.map(lambda w: w + zero, cell.fuse(p)) for p in params)
    run = _plain if forward_mode else _fast
    return run(cell, plan, fused, tuple(inputs), mask, tuple(carries))


def _plain(
    cell: Cell,
    plan: BucketPlan,
    fused: tuple[Fused, ...],
    inputs: tuple[jax.Array, ...],
    mask: jax.Array,
    carries: tuple[Carry, ...],
) -> tuple[tuple[jax.Array, ...], tuple[Carry, ...]]:
    """The masked scan, both directions in one, with JAX's own derivatives: the reference of the fast one."""

    def step(carries: tuple[Carry, ...], projected: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        stepped = tuple(cell.step(*each) for each in zip(fused, carries, projected, strict=True))
        return stepped, tuple(carry[0] for carry in stepped)

    clean = (jnp.where(mask[:, None], x, 0) for x in inputs)
    projected = tuple(cell.project(f, x) for f, x in zip(fused, clean, strict=True))
    zeros = jax.tree.map(jnp.zeros_like, carries)
    carries, outputs = scan_slots(step, carries, zeros, projected, mask, plan)
    return tuple(jnp.where(mask[:, None], y, 0) for y in outputs), carries


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fast(cell: Cell, plan: BucketPlan, fused: Any, inputs: Any, mask: jax.Array, carries: Any) -> Any:
    outputs, finals, _ = _forward(cell, plan, fused, inputs, mask, carries)
    return outputs, finals


def _fast_fwd(cell: Cell, plan: BucketPlan, fused: Any, inputs: Any, mask: jax.Array, carries: Any) -> Any:
    outputs, finals, memories = _forward(cell, plan, fused, inputs, mask, carries)
    return (outputs, finals), (fused, inputs, mask, carries, outputs, memories)


def _fast_bwd(cell: Cell, plan: BucketPlan, saved: Any, cotangents: Any) -> Any:
    dfused, dinputs, dcarries = _backward(cell, plan, *saved, *cotangents)
    return dfused, dinputs, None, dcarries


_fast.defvjp(_fast_fwd, _fast_bwd)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _forward(
    cell: Cell, plan: BucketPlan, fused: Any, inputs: Any, mask: jax.Array, carries: Any
) -> tuple[tuple[jax.Array, ...], tuple[Carry, ...], tuple[Memories, ...]]:
    run = _on_each_platform(lambda schedule: functools.partial(loops.forward, cell, plan, schedule))
    return _transposed(run(fused, inputs, _shared(mask, inputs), carries))


@_forward.defjvp
def _forward_jvp(cell: Cell, plan: BucketPlan, primals: Any, tangents: Any) -> Any:
    fused, inputs, mask, carries = primals
    outputs, finals, memories = _forward(cell, plan, *primals)
    _, (doutputs, dfinals) = jax.jvp(
        lambda fused, inputs, carries: _plain(cell, plan, fused, inputs, mask, carries),
        (fused, inputs, carries),
        (tangents[0], tangents[1], tangents[3]),
    )
    # Only the backward loops read the memories, and their derivative does not.
    return (outputs, finals, memories), (doutputs, dfinals, jax.tree.map(jnp.zeros_like, memories))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _backward(
    cell: Cell,
    plan: BucketPlan,
    fused: Any,
    inputs: Any,
    mask: jax.Array,
    carries: Any,
    outputs: Any,
    memories: Any,
    doutputs: Any,
    dfinals: Any,
) -> tuple[tuple[Fused, ...], tuple[jax.Array, ...], tuple[Carry, ...]]:
    run = _on_each_platform(lambda schedule: functools.partial(loops.backward, cell, plan, schedule))
    masks = _shared(mask, inputs)
    return _transposed(run(fused, inputs, masks, carries, outputs, memories, doutputs, dfinals))


@_backward.defjvp
def _backward_jvp(cell: Cell, plan: BucketPlan, primals: Any, tangents: Any) -> Any:
    fused, inputs, mask, carries, _, _, *cotangents = primals

    def plain(fused: Any, inputs: Any, carries: Any, *cotangents: Any) -> Any:
        _, vjp = jax.vjp(lambda f, x, c: _plain(cell, plan, f, x, mask, c), fused, inputs, carries)
        return vjp(tuple(cotangents))

    _, derivative = jax.jvp(
        plain,
        (fused, inputs, carries, *cotangents),
        (tangents[0], tangents[1], tangents[3], *tangents[6:]),
    )
    return _backward(cell, plan, *primals), derivative


def _on_each_platform(make: Callable[[Schedule], Callable[..., Any]]) -> Callable[..., Any]:
    """A function of tuples, one entry per direction, which runs each direction as its platform wants."""

    def run(schedule: Schedule, *operands: tuple[Any, ...]) -> tuple[Any, ...]:
        each = list(zip(*operands, strict=True))
        if not schedule.together or len(each) == 1:
            return tuple(make(schedule)(*direction) for direction in each)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        results = jax.vmap(make(schedule))(*stacked)
        return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], results) for i in range(len(each)))

    def choose(*operands: Any) -> Any:
        cpu, other = (functools.partial(run, schedule) for schedule in (CPU, ACCELERATOR))
        return lax.platform_dependent(*operands, cpu=cpu, default=other)

    return choose


def _shared(mask: jax.Array, directions: Sequence[Any]) -> tuple[jax.Array, ...]:
    return (mask,) * len(directions)


def _transposed(results: Sequence[tuple[Any, ...]]) -> Any:
    """From a tuple per direction to a tuple of tuples over directions."""
    return tuple(zip(*results, strict=True))
