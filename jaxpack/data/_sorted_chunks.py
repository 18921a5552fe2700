"""SortedChunks: shuffle, sort within windows, batch, and shuffle the batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxpack._checks import at_least_one
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree
from jaxpack.data._batcher import Batcher, Lengths, Round, in_random_order
from jaxpack.data._boundaries import padded_plans, tightest_boundaries
from jaxpack.data._source import TooLong


class SortedChunks(Batcher):
    """Sorts windows of several batches by length, so that sequences of one batch have like lengths.

    Each batch comes under the plan of fewest cells for each of its sequences, of a few; the batches of a window come in
    random order. As the sorting of maxi-batches in Marian, or of torchtext's BucketIterator.

    source, seed, time_varying, lengths, too_long, shard_index and shard_count are as in `Batcher`.

    Examples:
      >>> sentences = [[0] * length for length in (2, 8, 2, 8)]
      >>> batches = SortedChunks(sentences, batch_size=2)
      >>> sorted(batch.inputs.lengths.tolist() for batch in batches)  # a program a plan
      [[2, 2], [8, 8]]

    Args:
      plans: what batches come under. One of them must have room for the longest sequence. Default: padded plans for
        those lengths that take the fewest cells.
      num_plans: how many, where they are not given.
      batch_size: of default plans, as in `BucketByLength`.
      max_cells: of default plans, as in `BucketByLength`.
      window: how many batches are sorted together.
      buffer_size: how many examples of a source without an index are held to be shuffled. Default: as many as a window
        sorts.
    """

    def __init__(
        self,
        source: Sequence[PyTree] | Iterable[PyTree],
        plans: Sequence[BucketPlan] | None = None,
        *,
        num_plans: int = 6,
        batch_size: int | None = None,
        max_cells: int | None = None,
        window: int = 32,
        seed: int | None = 0,
        time_varying: PyTree = None,
        lengths: npt.ArrayLike | None = None,
        buffer_size: int | None = None,
        too_long: TooLong = "error",
        shard_index: int = 0,
        shard_count: int = 1,
    ) -> None:
        super().__init__(
            source,
            seed=seed,
            time_varying=time_varying,
            lengths=lengths,
            buffer_size=buffer_size,
            too_long=too_long,
            shard_index=shard_index,
            shard_count=shard_count,
        )
        at_least_one("window", window)
        if plans is None:
            plans = padded_plans(tightest_boundaries(self._corpus("plans")[:, 0], num_plans), batch_size, max_cells)
        elif batch_size is not None or max_cells is not None:
            raise ValueError("give plans, or batch_size or max_cells to make them from.")
        self._plans = tuple(plans)
        if not self._plans:
            raise ValueError("plans is empty: at least one is needed.")
        self._window = window * max(plan.num_sequences for plan in self._plans) * shard_count
        self._limit([max(plan.max_length for plan in self._plans)], self._window)

    @property
    def plans(self) -> tuple[BucketPlan, ...]:
        """Those that batches may come under."""
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
        """Batches of sorted pieces, the longest first, each under the plan that costs them least."""
        lengths = np.array([length for _, length in window])
        place = 0
        while place < len(window):
            taken = {plan: self._taken(plan, lengths[place:]) for plan in self._plans}
            plan = min((plan for plan in self._plans if taken[plan]), key=lambda plan: plan.size / taken[plan])
            batch = window[place : place + taken[plan]]
            yield Round((plan,), [batch[shard :: self.shard_count] for shard in range(self.shard_count)])
            place += len(batch)

    def _taken(self, plan: BucketPlan, lengths: np.ndarray) -> int:
        """How many of the next pieces a round under a plan takes: as many as its slots have room for, in order."""
        first = lengths[: plan.num_sequences * self.shard_count : self.shard_count]  # the longest that a slot is dealt
        misfits = first > plan.room[: len(first)]
        fitting = int(misfits.argmax()) if misfits.any() else len(first)
        return min(fitting * self.shard_count, len(lengths))
