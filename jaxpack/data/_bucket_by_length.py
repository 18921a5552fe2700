"""BucketByLength: the classic, batches of sequences of like lengths, a program for each of a few buckets."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree
from jaxpack.data._batcher import Batcher, Lengths, Round, in_random_order
from jaxpack.data._boundaries import check_boundaries, covering_plans, padded_plans, tightest_boundaries
from jaxpack.data._cover import Planner
from jaxpack.data._slot_buffer import SlotBuffer
from jaxpack.data._source import TooLong

_WAITING_BATCHES = 8  # of a bucket whose plan's rooms differ; where they are the same, it goes when it is full
_BUFFERED_EXAMPLES = 4096


class BucketByLength(Batcher):
    """Collects sequences by length, and makes a batch of a bucket when it has enough for one.

    As tf.data.Dataset.bucket_by_sequence_length, fairseq's max_tokens or lhotse's bucketing: each bucket has a plan,
    and so its own batch size. Where those pad all sequences of a bucket to its boundary, the default plan is made from
    the bucket's own lengths and filled as `SlotFilling` fills one. A source with an index is assigned as a whole, and
    its batches come in random order; another's come as they are full, and at the end those that are left.

    Boundaries are inclusive upper bounds: a sequence of 4 steps goes to the bucket of boundary 4. Those of tf.data are
    exclusive, and send it to the next: its bucket_boundaries=[5, 9] are boundaries=(4, 8) here.

    source, seed, time_varying, lengths, too_long, shard_index and shard_count are as in `Batcher`.

    Examples:
      >>> sentences = [[0] * length for length in (2, 8, 2, 8)]
      >>> batches = BucketByLength(sentences, num_buckets=2, batch_size=2)
      >>> sorted(batch.inputs.lengths.tolist() for batch in batches)  # a program a bucket
      [[2, 2], [8, 8]]

    Args:
      boundaries: the most steps in each bucket, increasing; the last is the most that a sequence may have. Default:
        those that would take the fewest cells if all were padded to them.
      num_buckets: how many, where boundaries are not given.
      batch_size: the most sequences in a batch. Without max_cells, as many in every bucket. With it, by default four
        times what max_cells holds of the mean boundary: short sequences need memory for more than their steps.
      max_cells: the most cells of a batch. fairseq's max_tokens, which counts padding too.
      planner: makes a bucket's plan from the rooms that are needed. Default: as in `plan_cover`; without an index, all
        rooms are the boundary's. `lambda rooms: jaxpack.plan_padded(len(rooms), max(rooms))` pads.
      buffer_size: how many examples of a source without an index are held to be shuffled. Default: 4096. With an
        index: if given, batches come as they are full.
    """

    def __init__(
        self,
        source: Sequence[PyTree] | Iterable[PyTree],
        boundaries: Sequence[int] | None = None,
        *,
        num_buckets: int = 6,
        batch_size: int | None = None,
        max_cells: int | None = None,
        planner: Planner | None = None,
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
        if boundaries is None:
            boundaries = tightest_boundaries(self._corpus("boundaries")[:, 0], num_buckets)
        self.boundaries = check_boundaries(boundaries)
        self._limit([self.boundaries[-1]], _BUFFERED_EXAMPLES)
        if self._indexed is None:
            self._plans = padded_plans(self.boundaries, batch_size, max_cells)
        else:
            self._plans = covering_plans(
                self._indexed.parts.lengths[:, 0], self.boundaries, batch_size, max_cells, planner
            )

    @property
    def plans(self) -> tuple[BucketPlan, ...]:
        """One for each bucket."""
        return self._plans

    def _rounds(self, pieces: Lengths, rng: np.random.Generator | None) -> Iterator[Round]:
        buckets = [self._bucket(plan, rng) for plan in self._plans]
        for piece in self._shuffled(pieces, rng, _BUFFERED_EXAMPLES):
            place = bisect_left(self.boundaries, piece[1])
            buckets[place].add(piece)
            if buckets[place].full:
                yield Round((self._plans[place],), buckets[place].draw())
        rest = [
            Round((plan,), shards)
            for plan, bucket in zip(self._plans, buckets, strict=True)
            for shards in bucket.rest()
        ]
        yield from in_random_order(rest, rng)

    def _bucket(self, plan: BucketPlan, rng: np.random.Generator | None) -> SlotBuffer:
        if self._indexed is not None and self._buffer_size is None:
            return SlotBuffer(plan, None, self.shard_count, rng)
        batches = _WAITING_BATCHES if plan.room[0] > plan.room[-1] else 1
        return SlotBuffer(plan, batches * plan.num_sequences * self.shard_count, self.shard_count, rng)
