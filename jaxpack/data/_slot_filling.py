"""SlotFilling: batches made to fit one plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Unpack

import numpy as np

from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack.data._axes import Plans, axis_names, by_axis, plans_of
from jaxpack.data._batcher import Batcher, Lengths, Options, Round
from jaxpack.data._buffer import rounds
from jaxpack.data._corpus import Axes
from jaxpack.data._cover import cover
from jaxpack.data._joint_buffer import make_buffer
from jaxpack.data._source import Source

BUFFERED_BATCHES = 64  # how many batches of examples are held by default


class SlotFilling(Batcher):
    """Fills the slots of one plan, so that all batches have the same shape and are nearly full.

    The source is sorted by length and cut into as many equal parts as the plan has slots. For every batch each slot
    takes an example at random from its own part. With the plan of the corpus's own quantiles each part fits its slot.
    Then there are as few batches as possible, efficiency is the slot bound less the plan's own slack, and an example's
    place in the epoch does not depend on its length. The price in randomness is that two sequences of one part hardly
    ever meet in a batch.

    A source without an index, or any source with `buffer_size`, is sorted one buffer at a time, and needs hardly more
    batches.

    Examples may have several time axes, such as source and target, each with its own plan:
    `SlotFilling(pairs, batch_size=64, time_varying=("source", "target"))`. The pairs of a part are then alike in both
    lengths, and every batch fits both plans.

    Every example is used once per epoch. If the examples do not fill the last batches, some rows are empty, with length
    0 and weight 0.

    `Batcher` documents `source` and the options: seed, time_varying, lengths, buffer_size, too_long, shard_index,
    shard_count and local_shards.

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
      plan: the plan of every batch; where time axes have names, a dict with a plan for each. Default:
        plan_cover(lengths, batch_size, max_cells=max_cells).
      batch_size: how many sequences a batch holds, instead of a plan.
      max_cells: the most cells of a batch, instead of a plan or a batch_size.
      options: as in `Batcher`. By default the buffer holds 64 batches of examples of a source without an index.
    """

    _several_axes = True

    def __init__(
        self,
        source: Source,
        plan: Plans | None = None,
        *,
        batch_size: int | None = None,
        max_cells: int | None = None,
        **options: Unpack[Options],
    ) -> None:
        if plan is not None:
            if batch_size is not None or max_cells is not None:
                raise ValueError("pass a plan, or batch_size or max_cells to make one from.")
            plans_of(plan, axis_names(options.get("time_varying")))  # checked before the source is read, which is slow
        super().__init__(source, **options)
        if plan is None:
            self._plans = cover(Axes.of(self._corpus("a plan")), batch_size, max_cells=max_cells)
        else:
            self._plans = plans_of(plan, self._names)
        self._held = BUFFERED_BATCHES * self._shards * self._plans[0].num_sequences
        self._limit([plan.max_length for plan in self._plans], self._held)

    @property
    def plan(self) -> Plans:
        """The plan of every batch; with several time axes, a dict with a plan for each."""
        return by_axis(self._plans, self._names)

    @property
    def plans(self) -> tuple[BucketPlan, ...]:
        """The one plan, or the plan of each time axis."""
        return self._plans

    def _rounds(self, pieces: Lengths, rng: np.random.Generator | None) -> Iterator[Round]:
        size = self._held if self._buffer_size is None and self._indexed is None else self._buffer_size
        for shards in rounds(pieces, make_buffer(self._plans, size, self._shards, rng)):
            yield Round(self._plans, shards)
