"""Stairs and windows: how loops go over the cells of a plan.

A stair is one loop: a fixed number of rows over a range of steps. Each bucket of a plan is a stair whose steps are
static. Without a plan, the cells are one rectangle whose rows are sorted by length, and a ladder of stairs with ever
fewer rows covers it. The steps of those stairs follow from the lengths while the program runs.

A loop takes a stair a chunk of steps at a time, and sees a chunk's cells through a window. The last chunk of a block
may be short. Its window then starts earlier and skips the steps of the chunk before it, so that every chunk of a stair
runs the same code.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from jaxpack._plans.bucket_plan import Bucket, BucketPlan

CHUNK_CELLS = 512  # cells of a chunk on CPU: 256 made training 8 % slower
_LEVELS = 8  # 5 took a quarter less time to compile, and 6 % more to train
_LOWER = 1.3  # levels are denser at few rows, where most batches have their longest tail
_FEW_STEPS = 8  # at most in a chunk of the ladder: a level runs to the end of its chunk, with rows that have ended


class Stair(NamedTuple):
    """One loop: `number` chunks of `steps` steps, from step `first` on, on rows [0, rows) of a block of cells.

    Attributes:
      rows: how many rows it computes.
      stride: how many rows the block has at each step.
      offset: the block's first cell.
      length: the block's steps.
      steps: the steps of a chunk, at most `length`.
      first, number: ints, or traced.
      checkpoint: the row of the checkpoint at the start of its first chunk; each further chunk's is `stride` later.
    """

    rows: int
    stride: int
    offset: int
    length: int
    steps: int
    first: Any
    number: Any
    checkpoint: Any

    def window(self, index: Any) -> Window:
        """Returns the window of a chunk."""
        own = self.first + index * self.steps
        if isinstance(self.number, int) and self.number * self.steps == self.length:
            return Window(self, own, 0)
        start = _least(own, self.length - self.steps)
        return Window(self, start, own - start)

    def checkpoint_row(self, index: Any) -> Any:
        """Returns the first row of the checkpoint at the start of a chunk."""
        return self.checkpoint + index * self.stride


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
        if isinstance(self.skip, int):
            return True
        steps = jnp.repeat(jnp.arange(self.stair.steps), self.stair.rows)
        return (steps >= self.skip)[:, None]

    def cell(self, step: Any) -> Any:
        """Returns the cell of the first row at a step of the window; the cells of the other rows follow it."""
        return self.stair.offset + (self.start + step) * self.stair.stride

    def read(self, leaf: jax.Array) -> jax.Array:
        """Returns the window's cells [M, ...] out of all cells [S, ...]."""
        if self.stair.stride == self.stair.rows:
            return lax.dynamic_slice_in_dim(leaf, self.cell(0), self.size)
        block = leaf.reshape(-1, self.stair.stride, *leaf.shape[1:])
        block = lax.dynamic_slice(block, self._start(block.ndim), (self.stair.steps, self.stair.rows, *leaf.shape[1:]))
        return block.reshape(self.size, *leaf.shape[1:])

    def write(self, leaf: jax.Array, cells: jax.Array) -> jax.Array:
        """Returns all cells [S, ...] with the window's cells [M, ...] replaced."""
        if self.stair.stride == self.stair.rows:
            return lax.dynamic_update_slice_in_dim(leaf, cells, self.cell(0), 0)
        block = leaf.reshape(-1, self.stair.stride, *leaf.shape[1:])
        cells = cells.reshape(self.stair.steps, self.stair.rows, *leaf.shape[1:])
        return lax.dynamic_update_slice(block, cells, self._start(block.ndim)).reshape(leaf.shape)

    def _start(self, ndim: int) -> tuple[Any, ...]:
        return (self.start, *[jnp.zeros_like(self.start)] * (ndim - 1))

    def before(self, leaf: jax.Array, first: jax.Array) -> jax.Array:
        """Returns the values one step before the window's cells [M, ...]; `first` [rows, ...] precedes the block."""
        rows = self.stair.rows
        earlier = first
        if self.stair.length > self.stair.steps:
            previous = lax.dynamic_slice_in_dim(leaf, jnp.maximum(self.cell(-1), 0), rows)
            earlier = jnp.where(self.start == 0, first, previous)
        return jnp.concatenate([earlier, self.read(leaf)[: self.size - rows]])


def stairs_of(plan: BucketPlan, chunk_cells: int | None, checkpoint_cells: int = CHUNK_CELLS) -> tuple[Stair, ...]:
    """Returns a stair for each bucket.

    Args:
      plan: the plan.
      chunk_cells: about how many cells a chunk has, in chunks of nearly equal length; None for one chunk a bucket.
      checkpoint_cells: the same, for the chunks that have a checkpoint.
    """
    stairs, checkpoint = [], 0
    for b in plan.buckets:
        steps = _chunk_steps(b, chunk_cells)
        stairs.append(Stair(b.rows, b.rows, b.offset, b.steps, steps, 0, -(-b.steps // steps), checkpoint))
        checkpoint += b.rows * -(-b.steps // _chunk_steps(b, checkpoint_cells))
    return tuple(stairs)


def levels_of(num_sequences: int) -> tuple[int, ...]:
    """Returns the ladder's row counts for a batch of this size, from all rows down: 64, 54, 45, 35, 26, 18, 11, 5."""
    shares = (np.arange(_LEVELS, 0, -1) / _LEVELS) ** _LOWER
    return tuple(sorted({math.ceil(num_sequences * share) for share in shares}, reverse=True))


def ladder_ends(plan: BucketPlan, ends: jax.Array) -> jax.Array:
    """Returns the step at which each level of the ladder ends, int32 [levels].

    Args:
      plan: a padded plan.
      ends: int32 [B], where each sequence ends, longest first.
    """
    latest = lax.cummax(ends, reverse=True)  # of this slot and all after it: a misfit may break the order
    return latest[np.array([*levels_of(plan.num_sequences)[1:], 0])]


def ladder_of(plan: BucketPlan, ends: jax.Array, chunk_cells: int | None) -> tuple[Stair, ...]:
    """Returns a stair for each level, over the one bucket of a padded plan. Each runs to the end of a chunk."""
    (block,) = plan.buckets
    stairs: list[Stair] = []
    first = checkpoint = jnp.zeros_like(ends[0])
    cells = chunk_cells or CHUNK_CELLS
    most = max(_FEW_STEPS, cells // block.rows)
    for k, rows in enumerate(levels_of(plan.num_sequences)):
        steps = min(block.steps, most, max(1, cells // rows))
        number = jnp.maximum(-((first - ends[k]) // steps), 0)
        stairs.append(Stair(rows, block.rows, 0, block.steps, steps, first, number, checkpoint))
        first, checkpoint = first + number * steps, checkpoint + number * block.rows
    return tuple(stairs)


def ladder_cells(plan: BucketPlan, lengths: npt.ArrayLike) -> int:
    """Returns how many cells the ladder computes on CPU for concrete lengths that fit the padded plan."""
    ends = ladder_ends(plan, jnp.sort(jnp.asarray(lengths), descending=True))
    stairs = ladder_of(plan, ends, CHUNK_CELLS)
    return sum(s.rows * min(int(s.number) * s.steps, plan.num_steps - int(s.first)) for s in stairs if s.number)


def checkpoint_rows(plan: BucketPlan, checkpoint_cells: int, ladder: bool) -> int:
    """Returns how many rows the checkpoints of all chunks have."""
    if not ladder:
        stairs = stairs_of(plan, checkpoint_cells, checkpoint_cells)
        return sum(stair.number * stair.rows for stair in stairs)
    (block,) = plan.buckets
    shortest = max(1, checkpoint_cells // block.rows)
    return (-(-block.steps // shortest) + len(levels_of(plan.num_sequences))) * block.rows


def _chunk_steps(bucket: Bucket, chunk_cells: int | None) -> int:
    count = 1 if chunk_cells is None else min(bucket.steps, -(-bucket.size // chunk_cells))
    return -(-bucket.steps // count)


def _least(a: Any, b: Any) -> Any:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)
