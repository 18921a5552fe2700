"""Steps one after the other, and the arrays that they read and write: in place, or stacked by lax.scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._recurrence.windows import Window
from jaxpack._types import PyTree

# body(carry, xs, own) runs one step, and returns the next carry and what replaces its cells of `whole` and of `own`.
Body = Callable[[Any, Any, Any], tuple[Any, PyTree, PyTree]]


class Outputs(NamedTuple):
    """The arrays that steps write.

    Attributes:
      whole: arrays of all cells [S, ...]. Steps do not see what they replace.
      own: arrays of the window [M, ...]. Each step is given what it replaces.
    """

    whole: PyTree
    own: PyTree


class StepLoop(NamedTuple):
    """How steps run.

    Attributes:
      stacked: whether lax.scan stacks the outputs of steps; else they are written in place.
      unroll: how many steps an iteration has; where outputs are stacked, at most.
    """

    stacked: bool
    unroll: int


def run_steps(
    window: Window, body: Body, carry: Any, xs: PyTree, outputs: Outputs, loop_of: StepLoop, reverse: bool = False
) -> tuple[Any, Outputs]:
    """Runs the steps of a window.

    Args:
      window: the window.
      body: one step.
      carry: the initial carry.
      xs: what the steps read, leaves [M, ...].
      outputs: what they replace.
      loop_of: how the steps run.
      reverse: whether to go from the last step to the first.

    Returns:
      The last carry, and the outputs.
    """
    if loop_of.stacked:
        return _stacked(window, body, carry, xs, outputs, loop_of.unroll, reverse)
    rows, steps = window.stair.rows, window.stair.steps

    def step(j: Any, state: tuple[Any, Outputs]) -> tuple[Any, Outputs]:
        carry, outputs = state
        j = steps - 1 - j if reverse else j
        at, cell = j * rows, window.cell(j)
        here = jax.tree.map(lambda leaf: read(leaf, at, rows), (xs, outputs.own))
        carry, whole, own = body(carry, *here)
        whole = jax.tree.map(lambda leaf, new: write(leaf, new, cell), outputs.whole, whole)
        return carry, Outputs(whole, jax.tree.map(lambda leaf, new: write(leaf, new, at), outputs.own, own))

    start, stop = (0, steps - window.skip) if reverse else (window.skip, steps)
    return loop(start, stop, step, (carry, outputs), loop_of.unroll)


def _stacked(
    window: Window, body: Body, carry: Any, xs: PyTree, outputs: Outputs, most: int, reverse: bool
) -> tuple[Any, Outputs]:
    rows, steps = window.stair.rows, window.stair.steps
    unroll, extra = _unrolled(steps, most)

    def tile(leaf: jax.Array) -> jax.Array:
        tiled = leaf.reshape(steps, rows, *leaf.shape[1:])
        return jnp.pad(tiled, [(0, extra), *[(0, 0)] * (tiled.ndim - 1)]) if extra else tiled

    def flat(leaf: jax.Array) -> jax.Array:
        return leaf[:steps].reshape(steps * rows, *leaf.shape[2 + reverse :])

    def step(carry: Any, xs: Any) -> Any:
        cells, within = xs
        after, *new = body(carry, *cells)
        # XLA merges the zeros that two scans of one shape start from, and so keeps those of the backward pass from the
        # forward pass on. An axis more tells them apart.
        new = jax.tree.map(lambda leaf: leaf[None], new) if reverse else new
        return (jax.tree.map(lambda a, b: jnp.where(within, a, b), after, carry) if extra else after), new

    cells = jax.tree.map(tile, (xs, outputs.own)), jnp.arange(steps + extra) < steps
    carry, (whole, own) = lax.scan(step, carry, cells, reverse=reverse, unroll=unroll)
    whole = jax.tree.map(lambda leaf, new: window.write(leaf, flat(new)), outputs.whole, whole)
    return carry, Outputs(whole, jax.tree.map(flat, own))


def _unrolled(steps: int, most: int) -> tuple[int, int]:
    """Returns how many steps an iteration takes, and how many are added to make the iterations whole.

    An added step costs about as much as the two kernels of an iteration.
    """
    extra = {unroll: -steps % unroll for unroll in range(1, max(1, min(most, steps - 1)) + 1)}
    best = min(extra, key=lambda unroll: (extra[unroll] + (steps + extra[unroll]) // unroll, -unroll))
    return best, extra[best]


def loop(start: Any, stop: Any, body: Callable[[Any, Any], Any], state: Any, unroll: int = 1) -> Any:
    """Runs fori_loop, or the body alone where the trip count is known to be 1."""
    if not (isinstance(start, int) and isinstance(stop, int)):
        return lax.fori_loop(start, stop, body, state)
    return body(start, state) if stop - start == 1 else lax.fori_loop(start, stop, body, state, unroll=unroll)


def buffer(like: jax.Array, shape: tuple[int, ...], fill: float, dtype: Any = None) -> jax.Array:
    """Returns an array that a loop overwrites, with the sharding and, unless another is given, the dtype of `like`.

    XLA merges buffers of the same shape and fill, and then copies them, so each buffer of a loop has its own fill.
    """
    return lax.full_like(like, fill, dtype, shape)


def read(leaf: jax.Array, start: Any, size: int) -> jax.Array:
    """Returns leaf[start : start + size]."""
    return lax.dynamic_slice_in_dim(leaf, start, size)


def write(leaf: jax.Array, value: jax.Array, start: Any) -> jax.Array:
    """Returns the leaf with leaf[start : start + len(value)] set."""
    return lax.dynamic_update_slice_in_dim(leaf, value, start, 0)
