"""Stairs and windows: how the loops go over cells.

A loop goes over the cells of a stair in chunks of steps, and sees a chunk's cells through a window. The last chunk of a
stair may be short. Its window then starts earlier and skips the steps of the chunk before it, so that every chunk of a
stair runs the same code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._plans.bucket_plan import BucketPlan


class Stair(NamedTuple):
    """One loop: `number` chunks of `steps` steps, on the cells of a bucket.

    Attributes:
      rows: how many rows the bucket has.
      offset: the bucket's first cell.
      length: the bucket's steps.
      steps: the steps of a chunk, at most `length`.
      number: how many chunks there are, an int; or how many run, traced, where `steps` divides `length`.
      checkpoint: the row of the checkpoint at the start of the first chunk; each further chunk's is `rows` later.
    """

    rows: int
    offset: int
    length: int
    steps: int
    number: Any
    checkpoint: int

    @property
    def end(self) -> int:
        """The cell after the last one."""
        return self.offset + self.length * self.rows

    def window(self, index: Any) -> Window:
        """Returns the window of a chunk."""
        first = index * self.steps
        if self.length % self.steps == 0:
            return Window(self, first, 0)
        latest = self.length - self.steps
        start = min(first, latest) if isinstance(first, int) else jnp.minimum(first, latest)
        return Window(self, start, first - start)

    def checkpoint_row(self, index: Any) -> Any:
        """Returns the first row of the checkpoint at the start of a chunk."""
        return self.checkpoint + index * self.rows


class Window(NamedTuple):
    """A block of `stair.steps` steps from `start`, the first `skip` of which belong to an earlier chunk."""

    stair: Stair
    start: Any
    skip: Any

    @property
    def size(self) -> int:
        """How many cells M the window shows."""
        return self.stair.steps * self.stair.rows

    @property
    def own(self) -> Any:
        """bool [M, 1]: which cells belong to the chunk itself."""
        if isinstance(self.skip, int) and self.skip == 0:
            return True
        steps = jnp.repeat(jnp.arange(self.stair.steps), self.stair.rows)
        return (steps >= self.skip)[:, None]

    def cell(self, step: Any) -> Any:
        """Returns the cell of the first row at a step of the window; the cells of the other rows follow it."""
        return self.stair.offset + (self.start + step) * self.stair.rows

    def read(self, leaf: jax.Array) -> jax.Array:
        """Returns the window's cells [M, ...] out of all cells [S, ...]."""
        return lax.dynamic_slice_in_dim(leaf, self.cell(0), self.size)

    def write(self, leaf: jax.Array, cells: jax.Array) -> jax.Array:
        """Returns all cells [S, ...] with the window's cells [M, ...] replaced."""
        return lax.dynamic_update_slice_in_dim(leaf, cells, self.cell(0), 0)

    def before(self, leaf: jax.Array, first: jax.Array) -> jax.Array:
        """Returns the values one step before the window's cells [M, ...]; `first` [rows, ...] precedes the stair."""
        rows = self.stair.rows
        if self.stair.length > self.stair.steps:
            previous = lax.dynamic_slice_in_dim(leaf, jnp.maximum(self.cell(-1), 0), rows)
            first = jnp.where(self.start == 0, first, previous)
        return jnp.concatenate([first, self.read(leaf)[: self.size - rows]])

    def collect(self, cells: jax.Array, history: jax.Array, values: jax.Array) -> jax.Array:
        """Returns values [B, ...], replaced by those of the history [M, ...] at cells [B] of the chunk."""
        at = cells - self.cell(0)
        here = (at >= self.skip * self.stair.rows) & (at < self.size)
        found = history.at[jnp.clip(at, 0, self.size - 1)].get(mode="promise_in_bounds")
        return jnp.where(here[:, None], found, values)


def stairs_of(plan: BucketPlan, chunk_cells: int | None) -> tuple[Stair, ...]:
    """Returns the stairs of a plan: one a bucket.

    Args:
      plan: the plan.
      chunk_cells: about how many cells a chunk has, in chunks of nearly equal length; None for one chunk a bucket.
    """
    stairs, checkpoint = [], 0
    for bucket in plan.buckets:
        chunks = 1 if chunk_cells is None else min(bucket.steps, -(-bucket.size // chunk_cells))
        steps = -(-bucket.steps // chunks)
        count = -(-bucket.steps // steps)
        stairs.append(Stair(bucket.rows, bucket.offset, bucket.steps, steps, count, checkpoint))
        checkpoint += count * bucket.rows
    return tuple(stairs)


def checkpoint_rows(stairs: tuple[Stair, ...]) -> int:
    """Returns how many rows the checkpoints of all chunks have."""
    return sum(-(-stair.length // stair.steps) * stair.rows for stair in stairs)
