"""How the loops of a recurrence go over cells: stairs, cut in chunks of steps, seen through windows.

A stair is one loop: a fixed number of rows over a range of steps. A plan's buckets are stairs whose steps are static.
Without a plan, cells lie in one rectangle, sorted by length, and a ladder of stairs with ever fewer rows goes over it,
whose steps follow from the lengths while the program runs.

Loops take a stair a chunk at a time, and see a chunk's cells through a window of as many steps. The last chunk of a
block, where it is short, starts earlier instead and skips the steps that are not its own, so that every chunk of a
stair is the same code.
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
_LOWER = 1.3  # levels lie closer together for few rows, where most batches have their longest tail
_FEW_STEPS = 8  # of a chunk in the ladder: a level goes on to the end of a chunk, with more rows than are alive


class Stair(NamedTuple):
    """One loop: `number` chunks of `steps` steps, from step `first` on, on rows [0, rows) of a block of cells.

    Attributes:
      rows: how many rows it computes.
      stride: how many rows the block has at each step.
      offset: the block's first cell.
      length: the block's steps.
      steps: of a chunk, at most `length`.
      first, number: ints, or traced.
      kept: where the memory at the start of its first chunk is kept; each further chunk's is `stride` later.
    """

    rows: int
    stride: int
    offset: int
    length: int
    steps: int
    first: Any
    number: Any
    kept: Any

    def window(self, index: Any) -> Window:
        """The window of a chunk."""
        own = self.first + index * self.steps
        if isinstance(self.number, int) and self.number * self.steps == self.length:
            return Window(self, own, 0)
        start = _least(own, self.length - self.steps)
        return Window(self, start, own - start)


class Window(NamedTuple):
    """A block of `stair.steps` steps from `start`, the first `skip` of which belong to an earlier chunk."""

    stair: Stair
    start: Any
    skip: Any

    @property
    def size(self) -> int:
        """How many cells M it shows."""
        return self.stair.steps * self.stair.rows

    @property
    def own(self) -> Any:
        """bool [M, 1]: the cells of the chunk's own steps."""
        if isinstance(self.skip, int):
            return True
        steps = jnp.repeat(jnp.arange(self.stair.steps), self.stair.rows)
        return (steps >= self.skip)[:, None]

    def cell(self, step: Any) -> Any:
        """The cell of the first row at a step of the window; the other rows' follow."""
        return self.stair.offset + (self.start + step) * self.stair.stride

    def read(self, leaf: jax.Array) -> jax.Array:
        """Its cells [M, ...] out of all [S, ...]."""
        if self.stair.stride == self.stair.rows:
            return lax.dynamic_slice_in_dim(leaf, self.cell(0), self.size)
        block = leaf.reshape(-1, self.stair.stride, *leaf.shape[1:])
        block = lax.dynamic_slice(block, self._start(block.ndim), (self.stair.steps, self.stair.rows, *leaf.shape[1:]))
        return block.reshape(self.size, *leaf.shape[1:])

    def write(self, leaf: jax.Array, cells: jax.Array) -> jax.Array:
        """All cells [S, ...] with those of the window [M, ...] put in."""
        if self.stair.stride == self.stair.rows:
            return lax.dynamic_update_slice_in_dim(leaf, cells, self.cell(0), 0)
        block = leaf.reshape(-1, self.stair.stride, *leaf.shape[1:])
        cells = cells.reshape(self.stair.steps, self.stair.rows, *leaf.shape[1:])
        return lax.dynamic_update_slice(block, cells, self._start(block.ndim)).reshape(leaf.shape)

    def _start(self, ndim: int) -> tuple[Any, ...]:
        return (self.start, *[jnp.zeros_like(self.start)] * (ndim - 1))

    def before(self, leaf: jax.Array, first: jax.Array) -> jax.Array:
        """What lies one step earlier than its cells [M, ...], where `first` [rows, ...] lies before the block."""
        rows = self.stair.rows
        earlier = first
        if self.stair.length > self.stair.steps:
            previous = lax.dynamic_slice_in_dim(leaf, jnp.maximum(self.cell(-1), 0), rows)
            earlier = jnp.where(self.start == 0, first, previous)
        return jnp.concatenate([earlier, self.read(leaf)[: self.size - rows]])


def stairs_of(plan: BucketPlan, chunk_cells: int | None) -> tuple[Stair, ...]:
    """A stair for each bucket, in chunks of nearly equal length and about this many cells; None for one chunk each."""
    stairs, kept = [], 0
    for b in plan.buckets:
        steps = _chunk_steps(b, chunk_cells)
        stairs.append(Stair(b.rows, b.rows, b.offset, b.steps, steps, 0, -(-b.steps // steps), kept))
        kept += b.rows * -(-b.steps // _chunk_steps(b, CHUNK_CELLS))
    return tuple(stairs)


def levels_of(num_sequences: int) -> tuple[int, ...]:
    """The ladder's row counts for a batch of this size, from all rows down: 64, 54, 45, 35, 26, 18, 11, 5."""
    shares = (np.arange(_LEVELS, 0, -1) / _LEVELS) ** _LOWER
    return tuple(sorted({math.ceil(num_sequences * share) for share in shares}, reverse=True))


def ladder_ends(plan: BucketPlan, ends: jax.Array) -> jax.Array:
    """int32, one for each level: the step at which each level ends, from where sequences end [B], longest first."""
    latest = lax.cummax(ends, reverse=True)  # of this slot and all after it: one that does not fit may break the order
    return latest[np.array([*levels_of(plan.num_sequences)[1:], 0])]


def ladder_of(plan: BucketPlan, ends: jax.Array, chunk_cells: int | None) -> tuple[Stair, ...]:
    """A stair for each level, over the one bucket of a padded plan; each goes on to the end of a chunk."""
    (block,) = plan.buckets
    stairs: list[Stair] = []
    first = kept = jnp.zeros_like(ends[0])
    cells = chunk_cells or CHUNK_CELLS
    most = max(_FEW_STEPS, cells // block.rows)
    for k, rows in enumerate(levels_of(plan.num_sequences)):
        steps = min(block.steps, most, max(1, cells // rows))
        number = jnp.maximum(-((first - ends[k]) // steps), 0)
        stairs.append(Stair(rows, block.rows, 0, block.steps, steps, first, number, kept))
        first, kept = first + number * steps, kept + number * block.rows
    return tuple(stairs)


def ladder_cells(plan: BucketPlan, lengths: npt.ArrayLike) -> int:
    """How many cells the ladder computes on CPU for concrete lengths that fit the padded plan."""
    ends = ladder_ends(plan, jnp.sort(jnp.asarray(lengths), descending=True))
    stairs = ladder_of(plan, ends, CHUNK_CELLS)
    return sum(s.rows * min(int(s.number) * s.steps, plan.num_steps - int(s.first)) for s in stairs if s.number)


def kept_rows(plan: BucketPlan, ladder: bool) -> int:
    """How many rows the memories at all chunks' starts have."""
    if not ladder:
        return sum(stair.number * stair.rows for stair in stairs_of(plan, CHUNK_CELLS))
    (block,) = plan.buckets
    shortest = max(1, CHUNK_CELLS // block.rows)
    return (-(-block.steps // shortest) + len(levels_of(plan.num_sequences))) * block.rows


def _chunk_steps(bucket: Bucket, chunk_cells: int | None) -> int:
    count = 1 if chunk_cells is None else min(bucket.steps, -(-bucket.size // chunk_cells))
    return -(-bucket.steps // count)


def _least(a: Any, b: Any) -> Any:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)
