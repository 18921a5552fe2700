"""SlotFilling: batches that are made to fit one plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from jaxpack.data.batcher import Batcher, Lengths, Round
from jaxpack.data.cover import plan_cover
from jaxpack.data.slot_buffer import SlotBuffer, rounds
from jaxpack.data.source import TooLong
from jaxpack.plan import BucketPlan
from jaxpack.sequence import PyTree

BUFFERED_BATCHES = 64  # how many batches of examples are held by default


class SlotFilling(Batcher):
    """Fills the slots of one plan, so that every batch has one shape, nearly full, and none is left out.

    Sorted by length and cut into as many equal parts as the plan has slots, the source offers each slot its own part,
    out of which it takes one at random for every batch. With the plan of the corpus's own quantiles each part fits its
    slot, so there are as few batches as there can be, efficiency is the slot bound but for the plan's own slack, and
    where a sequence comes in the epoch does not depend on its length. What is lost of randomness: two sequences of one
    part hardly ever meet in a batch.

    A source without an index, or any with `buffer_size`, is sorted a buffer at a time, with hardly more batches.

    Every example is used once an epoch. Where they do not fill the last batches some rows are empty, of length 0 and
    weight 0.

    source, seed, time_varying, lengths, too_long, shard_index and shard_count are as in `Batcher`.

    Examples:
      >>> words = [[0] * length for length in (8, 2, 8, 2)]
      >>> batches = SlotFilling(words, batch_size=2)
      >>> [sorted(batch.inputs.lengths.tolist()) for batch in batches]  # one program
      [[2, 8], [2, 8]]

    Args:
      plan: of every batch. Default: plan_cover(lengths, batch_size, max_cells=max_cells).
      batch_size: how many sequences a batch holds, in place of a plan.
      max_cells: how many cells a batch has at most, in place of a plan or a batch_size.
      buffer_size: how many examples are held. Default: all of a source with an index, else 64 batches of them.
    """

    def __init__(
        self,
        source: Sequence[PyTree] | Iterable[PyTree],
        plan: BucketPlan | None = None,
        *,
        batch_size: int | None = None,
        max_cells: int | None = None,
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
        if plan is None:
            plan = plan_cover(self._corpus("a plan"), batch_size, max_cells=max_cells)
        elif batch_size is not None or max_cells is not None:
            raise ValueError("give a plan, or batch_size or max_cells to make one from.")
        self.plan = plan
        self._limit(plan.max_length)

    @property
    def plans(self) -> tuple[BucketPlan, ...]:
        """The one plan."""
        return (self.plan,)

    def _rounds(self, pieces: Lengths, rng: np.random.Generator | None) -> Iterator[Round]:
        size = self._buffer_size
        if size is None and self._indexed is None:
            size = BUFFERED_BATCHES * self.shard_count * self.plan.num_sequences
        for shards in rounds(pieces, SlotBuffer(self.plan, size, self.shard_count, rng)):
            yield Round(self.plan, shards)
