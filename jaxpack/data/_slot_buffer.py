"""SlotBuffer: a buffer whose draws keep the proportions of long and short pieces, for one time axis."""

from __future__ import annotations

import numpy as np

from jaxpack._plans.bucket_plan import BucketPlan, longest_first
from jaxpack.data._buffer import Buffer
from jaxpack.data._corpus import Corpus
from jaxpack.data._cover import num_batches


class SlotBuffer(Buffer):
    """A shuffle buffer from which each draw fills a plan.

    The buffer is sorted by length and cut into as many equal parts as the plan has slots. Each slot takes a piece at
    random from its own part, or, where that piece is too long for it, the longest one that fits and is not taken. So
    each draw has the buffer's proportions of long and short pieces. These proportions therefore stay those of the
    source: no length waits longer than another.

    The remaining pieces go to as few batches as the plan allows: each slot's part is then as long as there are batches,
    and is dealt to them in random order. A buffer that was never full has only this end, and is exact: under the plan
    of a corpus's own quantiles each part fits its slot.

    Args:
      plan: the plan whose slots are filled.
      size, shard_count, rng: as in `Buffer`.
    """

    def __init__(self, plan: BucketPlan, size: int | None, shard_count: int, rng: np.random.Generator | None) -> None:
        super().__init__((plan,), size, shard_count, rng)
        (self._room,) = self._rooms

    def _choose(self) -> np.ndarray:
        slots = np.arange(self._slots)
        part = len(self._numbers) / self._slots
        draws = np.full(self._slots, 0.5) if self._rng is None else self._rng.random(self._slots)
        places = (part * (slots + draws)).astype(int)
        places = np.maximum(places, np.searchsorted(-self._lengths[:, 0], -self._room))  # the first that fits
        places = slots + np.maximum.accumulate(places - slots)  # each at least one after the one before
        return places[places < len(self._numbers)]

    def _deal(self) -> list[np.ndarray]:
        count = num_batches(Corpus.of(self._lengths[:, 0]), self._room)
        count = -(-count // self._shard_count) * self._shard_count
        numbers = np.arange(self._slots * count)
        places = np.where(numbers < len(self._numbers), numbers, -1).reshape(self._slots, count)
        if self._rng is not None:
            self._rng.permuted(places, axis=1, out=places)
        return [batch[batch >= 0] for batch in places.T]

    def _merge(self) -> None:
        """Moves the pieces that were added to the arrays, longest first."""
        super()._merge()
        order = longest_first(self._lengths[:, 0])
        self._numbers, self._lengths = self._numbers[order], self._lengths[order]
