"""Rows laid out as the program runs: how a recurrence without a plan goes over its cells.

The sequences of a padded batch, longest first, are dealt to R rows to and fro, as cards are: slot k goes to row k of the
first R, slot R + k to row R - 1 - k of the next, and so on. The rows then have nearly equal sums of lengths. One loop
goes over them until the longest row ends; where a sequence begins, it begins anew.

R is static, and which R computes the fewest cells depends on the lengths: many rows where all are long, few where the
longest is much longer than the mean. A program holds a loop for each of `DIVISORS`, and takes the best as it runs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._recurrence.slots import Borders, RealCells
from jaxpack._recurrence.windows import Stair

DIVISORS = (1, 2, 4, 8)


class Deal(NamedTuple):
    """A static number of rows to which the slots of a padded plan are dealt.

    Attributes:
      plan: the padded plan.
      rows: the number R of rows.
      steps: the steps of a chunk.
    """

    plan: BucketPlan
    rows: int
    steps: int

    @property
    def rounds(self) -> int:
        """How many slots the fullest row has."""
        return -(-self.plan.num_sequences // self.rows)

    @property
    def length(self) -> int:
        """The steps of a row if all sequences are as long as they can be, in whole chunks."""
        return -(-self.rounds * self.plan.num_steps // self.steps) * self.steps

    @property
    def size(self) -> int:
        """The number N of cells of all rows."""
        return self.length * self.rows

    def stair(self, number: jax.Array | int) -> Stair:
        """Returns the one loop, over so many chunks."""
        return Stair(self.rows, 0, self.length, self.steps, number, 0)

    def ends(self, spans: jax.Array) -> jax.Array:
        """Returns the step at which each slot ends in its row, int32 [rounds, R] in the order of the rows."""
        spans = jnp.pad(spans, (0, self.rounds * self.rows - len(spans))).reshape(self.rounds, self.rows)
        return jnp.cumsum(self._turned(spans), axis=0)

    def chunks(self, spans: jax.Array) -> jax.Array:
        """Returns how many chunks the loop has to run."""
        return -(-self.ends(spans)[-1].max() // self.steps)

    def cells(self, spans: jax.Array) -> DealtCells:
        """Returns the cells of the rows, from the real steps of each slot [B]."""
        number, rows = self.plan.num_sequences, self.rows
        ends = self.ends(spans)
        starts = ends - self._turned(jnp.pad(spans, (0, ends.size - number)).reshape(ends.shape))
        steps = jnp.arange(self.length, dtype=jnp.int32)[:, None]
        turn = sum((steps >= end[None]).astype(jnp.int32) for end in ends)  # [length, R]: which of its row's slots
        row = jnp.arange(rows, dtype=jnp.int32)
        slots = jnp.minimum(turn * rows + jnp.where(turn % 2 == 1, rows - 1 - row, row), number - 1)
        first_steps = self._turned(starts).reshape(-1)[:number]
        step = steps - first_steps[slots]
        real = (turn < self.rounds) & (step < spans[slots])
        slots, step, real = (leaf.reshape(-1) for leaf in (slots, step, real))
        rows_of_slots = self._turned(jnp.broadcast_to(row, ends.shape)).reshape(-1)[:number]
        first = first_steps * rows + rows_of_slots
        borders = Borders(real & (step == 0), real & (step == spans[slots] - 1), slots)
        size = self.plan.size
        sources = jnp.where(real, step * number + slots, size)
        last = jnp.maximum(first + (spans - 1) * rows, 0)
        cells = RealCells(real, spans, jnp.minimum(first, self.size - 1), last, borders, sources)
        time = jnp.arange(self.plan.num_steps, dtype=jnp.int32)[:, None]
        places = jnp.where(time < spans[None], first[None] + time * rows, self.size)
        return DealtCells(cells, places.reshape(-1))

    def _turned(self, by_slot: jax.Array) -> jax.Array:
        """Returns every second round [rounds, R] the other way round: from slots to rows, and from rows to slots."""
        odd = np.arange(self.rounds)[:, None] % 2 == 1
        return jnp.where(odd, by_slot[:, ::-1], by_slot)


class DealtCells(NamedTuple):
    """The cells of dealt rows.

    Attributes:
      real: the cells as the loops see them.
      places: int32 [S], where the cells of the padded plan are among those of the rows; N for slack.
    """

    real: RealCells
    places: jax.Array


def deals_of(plan: BucketPlan, chunk_cells: int) -> tuple[Deal, ...]:
    """Returns the deals of a padded plan, with about so many cells in a chunk."""
    numbers = sorted({-(-plan.num_sequences // divisor) for divisor in DIVISORS}, reverse=True)
    return tuple(Deal(plan, rows, min(plan.num_steps, max(1, chunk_cells // rows))) for rows in numbers)


def best_deal(deals: tuple[Deal, ...], spans: jax.Array) -> jax.Array:
    """Returns the index of the deal that computes the fewest cells."""
    return jnp.argmin(jnp.stack([deal.chunks(spans) * deal.steps * deal.rows for deal in deals]))


def dealt_cells(plan: BucketPlan, lengths: npt.ArrayLike, chunk_cells: int) -> int:
    """Returns how many cells are computed for concrete lengths that fit the padded plan."""
    spans = jnp.sort(jnp.asarray(lengths), descending=True)
    return min(int(deal.chunks(spans)) * deal.steps * deal.rows for deal in deals_of(plan, chunk_cells))
