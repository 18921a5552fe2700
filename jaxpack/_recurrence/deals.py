"""Rows laid out as the program runs: how a recurrence without a plan goes over a padded batch [B, T].

The sequences, longest first, are dealt to R rows to and fro, as cards are: the first R to rows 0, 1, ..., R - 1, the
next R to rows R - 1, ..., 0, and so on. The rows then have nearly equal sums of lengths. One loop goes over them until
the longest row ends; where a sequence begins, it begins anew.

R is static, and which R computes the fewest cells depends on the lengths: many rows where all are long, few where the
longest is much longer than the mean. A program holds a loop for each R, and takes the best as it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxpack._recurrence.slots import BatchCells, Borders, Places, RealCells
from jaxpack._recurrence.windows import Stair


class Deal(NamedTuple):
    """A static number of rows to which the sequences of a padded batch are dealt.

    Attributes:
      num_sequences, max_length: B and T.
      rows: the number R of rows.
      steps: the steps of a chunk.
    """

    num_sequences: int
    max_length: int
    rows: int
    steps: int

    @property
    def rounds(self) -> int:
        """How many sequences the fullest row has."""
        return -(-self.num_sequences // self.rows)

    @property
    def length(self) -> int:
        """The steps of a row if all sequences have T steps, in whole chunks."""
        return -(-self.rounds * self.max_length // self.steps) * self.steps

    def stair(self, chunks: jax.Array | int) -> Stair:
        """Returns the one loop, over so many chunks."""
        return Stair(self.rows, 0, self.length, self.steps, chunks, 0)

    def chunks(self, ranked: jax.Array) -> jax.Array | int:
        """Returns how many chunks the loop runs, for the real steps [B] of each sequence, longest first."""
        return 1 if self.length == self.steps else -(-self._by_row(ranked).sum(0).max() // self.steps)

    def cells(self, batch: BatchCells) -> RealCells:
        """Returns the cells of the rows from those of the batch."""
        if self.rows == self.num_sequences:
            return self._of_single_sequences(batch)
        number, rows, (_, spans, order, ranks) = self.num_sequences, self.rows, batch
        ranked = self._by_row(batch.ranked)
        ends = jnp.cumsum(ranked, axis=0)
        # Of the sequences, longest first: the step at which each begins, and its row.
        starts = self._by_rank(ends - ranked)
        columns = self._by_rank(jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[None], ranked.shape))
        steps = jnp.arange(self.length, dtype=jnp.int32)[:, None]
        turn = sum((steps >= end[None]).astype(jnp.int32) for end in ends)  # [length, R]: how many have ended before
        row = jnp.arange(rows, dtype=jnp.int32)[None]
        rank = jnp.minimum(turn * rows + jnp.where(turn % 2 == 1, rows - 1 - row, row), number - 1)
        slots, step = (leaf.reshape(-1) for leaf in (order[rank], steps - starts[rank]))
        real = (turn < self.rounds).reshape(-1) & (step < spans[slots])
        borders = Borders(real & (step == 0), real & (step == spans[slots] - 1), slots)
        size = number * self.max_length
        sources = jnp.where(real, slots * self.max_length + step, size)
        # Empty sequences may be past the last cell.
        first = jnp.minimum(starts * rows + columns, self.length * rows - 1)[ranks]
        last = first + jnp.maximum(spans - 1, 0) * rows
        time = jnp.arange(self.max_length, dtype=jnp.int32)[None]
        places = jnp.where(time < spans[:, None], first[:, None] + time * rows, self.length * rows)
        return RealCells(real, spans, first, last, borders, Places(sources, places.reshape(-1)))

    def _of_single_sequences(self, batch: BatchCells) -> RealCells:
        """Returns the cells of rows that hold one sequence each, in the batch's own order."""
        rows, size = self.rows, self.length * self.rows
        row, step = jnp.arange(rows, dtype=jnp.int32), jnp.arange(self.length, dtype=jnp.int32)
        time = step[None, : self.max_length]
        real = step[:, None] < batch.spans[None]
        sources = jnp.where(real, row[None] * self.max_length + step[:, None], rows * self.max_length)
        targets = jnp.where(time < batch.spans[:, None], row[:, None] + time * rows, size)
        last = row + jnp.maximum(batch.spans - 1, 0) * rows
        places = Places(sources.reshape(-1), targets.reshape(-1))
        return RealCells(real.reshape(-1), batch.spans, row, last, None, places)

    def _by_row(self, ranked: jax.Array) -> jax.Array:
        """Returns values of the sequences, longest first, in the rows to which they are dealt [rounds, R]."""
        return self._turned(jnp.pad(ranked, (0, self.rounds * self.rows - len(ranked))).reshape(self.rounds, self.rows))

    def _by_rank(self, by_row: jax.Array) -> jax.Array:
        """Does the inverse of `_by_row`."""
        return self._turned(by_row).reshape(-1)[: self.num_sequences]

    def _turned(self, rounds: jax.Array) -> jax.Array:
        """Returns every second round the other way round."""
        return jnp.where(np.arange(self.rounds)[:, None] % 2 == 1, rounds[:, ::-1], rounds)


def deals_of(
    num_sequences: int, max_length: int, divisors: tuple[int, ...], chunk_cells: int | None
) -> tuple[Deal, ...]:
    """Returns a deal for each number of rows, B / divisor, with about so many cells in a chunk; None for one chunk.

    A batch of no more cells than a chunk is one chunk, with all rows.
    """
    if num_sequences * max_length <= (chunk_cells or 0):
        divisors, chunk_cells = (1,), None
    deals = []
    for rows in sorted({-(-num_sequences // divisor) for divisor in divisors}, reverse=True):
        deal = Deal(num_sequences, max_length, rows, 1)
        steps = deal.length if chunk_cells is None else min(deal.length, max(1, chunk_cells // rows))
        deals.append(deal._replace(steps=steps))
    return tuple(deals)


def best_deal(deals: Sequence[Deal], ranked: jax.Array) -> jax.Array:
    """Returns the index of the deal that computes the fewest cells."""
    return jnp.argmin(jnp.stack([deal.chunks(ranked) * (deal.steps * deal.rows) for deal in deals]))


def dealt_cells(deals: Sequence[Deal], lengths: npt.ArrayLike) -> int:
    """Returns how many cells the best deal computes for concrete lengths."""
    ranked = jnp.sort(jnp.asarray(lengths), descending=True)
    return min(int(deal.chunks(ranked)) * deal.steps * deal.rows for deal in deals)
