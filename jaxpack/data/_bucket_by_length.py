"""BucketByLength: batches of sequences with similar lengths, and one program for each of a few buckets."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Unpack

import numpy as np

from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack.data._batcher import Batcher, Lengths, Options, Round, in_random_order
from jaxpack.data._boundaries import check_boundaries, covering_plans, padded_plans, tightest_boundaries
from jaxpack.data._cover import Planner
from jaxpack.data._slot_buffer import SlotBuffer
from jaxpack.data._source import Source

_WAITING_BATCHES = 8  # of a bucket whose plan's rooms differ; where they are the same, it goes when it is full
_BUFFERED_EXAMPLES = 4096


class BucketByLength(Batcher):
    """Collects sequences in buckets by length, and makes a batch when a bucket has enough sequences for one.

    As in tf.data.Dataset.bucket_by_sequence_length, fairseq's max_tokens or lhotse's bucketing, each bucket has its own
    batch size, since it has its own plan. Those pad all sequences of a bucket to its boundary; here the default plan is
    made from the bucket's own lengths, and filled as `SlotFilling` does. A source with an index is assigned as a whole,
    and its batches come in random order. The batches of any other source come as soon as they are full, and the
    remaining sequences come at the end.

    Boundaries are inclusive upper bounds: a sequence of 4 steps goes to the bucket with boundary 4. In tf.data they are
    exclusive: its bucket_boundaries=[5, 9] are boundaries=(4, 8) here.

    `Batcher` documents `source` and the options: seed, time_varying, lengths, buffer_size, too_long, shard_index,
    shard_count and local_shards.

    Examples:
      >>> sentences = [[0] * length for length in (2, 8, 2, 8)]
      >>> batches = BucketByLength(sentences, num_buckets=2, batch_size=2)
      >>> sorted(batch.inputs.lengths.tolist() for batch in batches)  # one program per bucket
      [[2, 2], [8, 8]]

    Args:
      boundaries: the most steps of a sequence in each bucket, increasing; the last limits all sequences. Default: the
        boundaries that would take the fewest cells if sequences were padded to them.
      num_buckets: how many buckets the default boundaries make.
      batch_size: the most sequences of a batch. Without max_cells every bucket has this batch size. With max_cells, the
        default is four times the number of sequences of the mean boundary that max_cells holds: short sequences need
        memory for more than their steps.
      max_cells: the most cells of a batch: fairseq's max_tokens, which counts padding too.
      planner: makes a bucket's plan from the rooms that it needs. Default: as in `plan_cover`; without an index, every
        room is the boundary. `lambda rooms: jaxpack.plan_padded(len(rooms), max(rooms))` pads.
      options: as in `Batcher`. By default the buffer holds 4096 examples of a source without an index. With an index,
        a buffer_size makes batches come as soon as they are full.
    """

    def __init__(
        self,
        source: Source,
        boundaries: Sequence[int] | None = None,
        *,
        num_buckets: int = 6,
        batch_size: int | None = None,
        max_cells: int | None = None,
        planner: Planner | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(source, **options)
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
        """The plan of each bucket."""
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
            return SlotBuffer(plan, None, self._shards, rng)
        batches = _WAITING_BATCHES if plan.room[0] > plan.room[-1] else 1
        return SlotBuffer(plan, batches * plan.num_sequences * self._shards, self._shards, rng)
