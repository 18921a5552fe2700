"""SlotFilling: batches that are made to fit one plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree
from jaxpack.data._axes import Plans, axis_names, by_axis, plans_of
from jaxpack.data._batcher import Batcher, Lengths, Round
from jaxpack.data._cover import plan_cover
from jaxpack.data._joint_buffer import slot_buffer
from jaxpack.data._slot_buffer import rounds
from jaxpack.data._source import TooLong

BUFFERED_BATCHES = 64  # how many batches of examples are held by default


class SlotFilling(Batcher):
    """Fills the slots of one plan, so that every batch has one shape, nearly full, and none is left out.

    Sorted by length and cut into as many equal parts as the plan has slots, the source offers each slot its own part,
    out of which it takes one at random for every batch. With the plan of the corpus's own quantiles each part fits its
    slot, so there are as few batches as there can be, efficiency is the slot bound but for the plan's own slack, and
    where a sequence comes in the epoch does not depend on its length. What is lost of randomness: two sequences of one
    part hardly ever meet in a batch.

    A source without an index, or any with `buffer_size`, is sorted a buffer at a time, with hardly more batches.

    Examples may have several time axes, such as source and target, each under a plan of its own:
    `SlotFilling(pairs, batch_size=64, time_varying=("source", "target"))`. The parts are then of pairs that are alike
    in both lengths, and every batch fits both plans.

    Every example is used once an epoch. Where they do not fill the last batches some rows are empty, of length 0 and
    weight 0.

    source, seed, time_varying, lengths, too_long, shard_index and shard_count are as in `Batcher`.

    Examples:
      >>> words = [[0] * length for length in (8, 2, 8, 2)]
      >>> batches = SlotFilling(words, batch_size=2)
      >>> [sorted(batch.inputs.lengths.tolist()) for batch in batches]  # one program
      [[2, 8], [2, 8]]
      >>> pairs = [([1, 2, 3], [4]), ([5], [6, 7])]
      >>> (batch,) = SlotFilling(pairs, batch_size=2, time_varying=("source", "target"), seed=None)
      >>> source, target = batch.inputs
      >>> source.lengths.tolist(), target.lengths.tolist()
      ([3, 1], [1, 2])

    Args:
      plan: of every batch; where time axes have names, a dict of a plan for each. Default: plan_cover(lengths,
        batch_size, max_cells=max_cells).
      batch_size: how many sequences a batch holds, in place of a plan.
      max_cells: how many cells a batch has at most, in place of a plan or a batch_size.
      buffer_size: how many examples are held. Default: all of a source with an index, else 64 batches of them.
    """

    _several_axes = True

    def __init__(
        self,
        source: Sequence[PyTree] | Iterable[PyTree],
        plan: Plans | None = None,
        *,
        batch_size: int | None = None,
        max_cells: int | None = None,
        seed: int | None = 0,
        time_varying: PyTree = None,
        lengths: npt.ArrayLike | Mapping[str, npt.ArrayLike] | None = None,
        buffer_size: int | None = None,
        too_long: TooLong = "error",
        shard_index: int = 0,
        shard_count: int = 1,
    ) -> None:
        if plan is not None:
            if batch_size is not None or max_cells is not None:
                raise ValueError("give a plan, or batch_size or max_cells to make one from.")
            plans_of(plan, axis_names(time_varying))  # before the source is read, which may take long
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
            columns = [np.ascontiguousarray(column) for column in self._corpus("a plan").T]
            plan = plan_cover(by_axis(columns, self._names), batch_size, max_cells=max_cells)
        self._plans = plans_of(plan, self._names)
        self._held = BUFFERED_BATCHES * shard_count * self._plans[0].num_sequences
        self._limit([plan.max_length for plan in self._plans], self._held)

    @property
    def plan(self) -> Plans:
        """The plan of every batch; where there are several time axes, a dict of them."""
        return by_axis(self._plans, self._names)

    @property
    def plans(self) -> tuple[BucketPlan, ...]:
        """The one plan, or that of each time axis."""
        return self._plans

    def _rounds(self, pieces: Lengths, rng: np.random.Generator | None) -> Iterator[Round]:
        size = self._held if self._buffer_size is None and self._indexed is None else self._buffer_size
        for shards in rounds(pieces, slot_buffer(self._plans, size, self.shard_count, rng)):
            yield Round(self._plans, shards)
