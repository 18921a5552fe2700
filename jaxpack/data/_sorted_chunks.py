"""SortedChunks: shuffle, sort within windows, batch, and shuffle the batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Unpack

import numpy as np

from jaxpack._checks import at_least_one
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack.data._batcher import Batcher, Lengths, Options, Round, in_random_order
from jaxpack.data._boundaries import padded_plans, tightest_boundaries
from jaxpack.data._source import Source


class SortedChunks(Batcher):
    """Sorts windows of several batches by length, so that the sequences of a batch have similar lengths.

    Each batch comes under that one of a few plans which takes the fewest cells per sequence. The batches of a window
    come in random order. Marian's maxi-batches and torchtext's BucketIterator sort in the same way.

    `Batcher` documents `source` and the options: seed, time_varying, lengths, buffer_size, too_long, shard_index,
    shard_count and local_shards.

    Examples:
      >>> sentences = [[0] * length for length in (2, 8, 2, 8)]
      >>> batches = SortedChunks(sentences, batch_size=2)
      >>> sorted(batch.inputs.lengths.tolist() for batch in batches)  # one program per plan
      [[2, 2], [8, 8]]

    Args:
      plans: the plans of the batches, one of which must have room for the longest sequence. Default: padded plans for
        the lengths that take the fewest cells.
      num_plans: how many default plans there are.
      batch_size: the batch size of default plans, as in `BucketByLength`.
      max_cells: the most cells of default plans, as in `BucketByLength`.
      window: how many batches are sorted together.
      options: as in `Batcher`. By default the buffer holds a window of examples of a source without an index.
    """

    def __init__(
        self,
        source: Source,
        plans: Sequence[BucketPlan] | None = None,
        *,
        num_plans: int = 6,
        batch_size: int | None = None,
        max_cells: int | None = None,
        window: int = 32,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(source, **options)
        at_least_one("window", window)
        if plans is None:
            plans = padded_plans(tightest_boundaries(self._corpus("plans")[:, 0], num_plans), batch_size, max_cells)
        elif batch_size is not None or max_cells is not None:
            raise ValueError("pass plans, or batch_size or max_cells to make them from.")
        self._plans = tuple(plans)
        if not self._plans:
            raise ValueError("plans is empty: at least one is needed.")
        self._window = window * max(plan.num_sequences for plan in self._plans) * self._shards
        self._limit([max(plan.max_length for plan in self._plans)], self._window)

    @property
    def plans(self) -> tuple[BucketPlan, ...]:
        """The plans that batches may have."""
        return self._plans

    @property
    def _options(self) -> tuple[Any, ...]:
        return *super()._options, self._window

    def _rounds(self, pieces: Lengths, rng: np.random.Generator | None) -> Iterator[Round]:
        pieces = self._shuffled(pieces, rng, self._window)
        while window := list(itertools.islice(pieces, self._window)):
            window.sort(key=lambda piece: -piece[1])
            yield from in_random_order(list(self._cut(window)), rng)

    def _cut(self, window: list[tuple[int, int]]) -> Iterator[Round]:
        """Yields batches of pieces, which are sorted longest first, each under the plan of least cost."""
        lengths = np.array([length for _, length in window])
        place = 0
        while place < len(window):
            taken = {plan: self._taken(plan, lengths[place:]) for plan in self._plans}
            plan = min((plan for plan in self._plans if taken[plan]), key=lambda plan: plan.size / taken[plan])
            batch = window[place : place + taken[plan]]
            yield Round((plan,), [batch[shard :: self._shards] for shard in range(self._shards)])
            place += len(batch)

    def _taken(self, plan: BucketPlan, lengths: np.ndarray) -> int:
        """Counts how many of the next pieces a round under a plan takes, in order."""
        first = lengths[: plan.num_sequences * self._shards : self._shards]  # the longest of each slot
        misfits = first > plan.room[: len(first)]
        fitting = int(misfits.argmax()) if misfits.any() else len(first)
        return min(fitting * self._shards, len(lengths))
