"""JointBuffer: a buffer for pieces with several lengths, such as those of source and target.

`SlotBuffer` offers each slot of a plan its part of the sorted pieces. Pairs of two lengths have no order, so they are
halved again and again, each time by the length that saves most room, until there is a part for each slot. The pieces of
a part are then alike in both lengths. With as many slots as parts, and for each axis the largest lengths of all parts
as rooms, every batch of one piece per part fits by construction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack.data._buffer import Buffer
from jaxpack.data._corpus import Corpus
from jaxpack.data._cover import num_batches
from jaxpack.data._parts import cut_in_parts
from jaxpack.data._slot_buffer import SlotBuffer


class JointBuffer(Buffer):
    """A shuffle buffer from which each draw fills a plan for each time axis.

    A draw takes one piece at random from each part of the buffer. Those that do not fit the plans together are put
    back, the shorter ones first, and others that fit take their places.
    """

    def _choose(self) -> np.ndarray:
        parts = [part for part in cut_in_parts(self._lengths, self._slots) if len(part)]
        draws = 0.5 if self._rng is None else self._rng.random(len(parts))
        places = (np.array([len(part) for part in parts]) * draws).astype(int)
        drawn = np.array([part[place] for part, place in zip(parts, places.tolist(), strict=True)], int)
        return self._refill(self._fitting(drawn), np.arange(len(self._numbers)))

    def _deal(self) -> list[np.ndarray]:
        batches = self._dealt()
        if len(batches) % self._shard_count:  # a part of a batch fits too
            count = self._shard_count - len(batches) % self._shard_count + 1
            last = batches.pop()
            batches += [last[i::count] for i in range(count)]
        return batches

    def _dealt(self) -> list[np.ndarray]:
        """Deals all pieces to batches that fit, as few as it finds."""
        batches: list[np.ndarray] = []
        remaining = np.arange(len(self._numbers))
        while len(remaining):
            dealt, remaining = self._deal_once(remaining)
            batches += [batch for batch in dealt if len(batch)]
        if self._rng is not None:
            self._rng.shuffle(order := np.arange(len(batches)))
            batches = [batches[i] for i in order.tolist()]
        return batches

    def _deal_once(self, remaining: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Deals these pieces to the fewest batches that could hold them; returns the batches and the misfits."""
        lengths = self._lengths[remaining]
        count = max(num_batches(Corpus.of(lengths[:, a]), room) for a, room in enumerate(self._rooms))
        places = np.full((self._slots, count), -1)
        for slot, part in enumerate(cut_in_parts(lengths, self._slots, count)):
            places[slot, : len(part)] = remaining[part]
        if self._rng is not None:
            self._rng.permuted(places, axis=1, out=places)
        dealt = [batch[batch >= 0] for batch in places.T]
        if all(self._fit(places)):
            return dealt, remaining[:0]
        dealt = [self._fitting(batch) for batch in dealt]
        taken = np.zeros(len(self._numbers), bool)
        taken[np.concatenate(dealt)] = True
        for i, batch in enumerate(dealt):
            dealt[i] = self._refill(batch, remaining[~taken[remaining]])
            taken[dealt[i]] = True
        return dealt, remaining[~taken[remaining]]

    def _fit(self, places: np.ndarray) -> Iterator[bool]:
        """Yields for each axis whether all columns of pieces fit its plan."""
        for a, room in enumerate(self._rooms):
            found = np.where(places >= 0, self._lengths[places, a], 0)
            yield bool((-np.sort(-found, axis=0) <= room[:, None]).all())

    def _fitting(self, batch: np.ndarray) -> np.ndarray:
        """Returns the pieces of a batch that fit together, longest first; at least one."""
        for a, room in enumerate(self._rooms):
            kept: list[int] = []
            for piece in batch[np.argsort(-self._lengths[batch, a], kind="stable")].tolist():
                if self._lengths[piece, a] <= room[len(kept)]:
                    kept.append(piece)
            batch = np.array(kept, int)
        return batch

    def _refill(self, batch: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Fills the free slots of a batch with other pieces, each time with the longest that fits."""
        others = others[~np.isin(others, batch)]
        while len(batch) < self._slots and len(others):
            limits = [_longest_more(self._lengths[batch, a], room) for a, room in enumerate(self._rooms)]
            fitting = others[(self._lengths[others] <= limits).all(axis=1)]
            if not len(fitting):
                break
            more = fitting[np.argmax(self._lengths[fitting].sum(axis=1))]
            batch, others = np.append(batch, more), others[others != more]
        return batch


def make_buffer(
    plans: Sequence[BucketPlan], size: int | None, shard_count: int, rng: np.random.Generator | None
) -> Buffer:
    """Returns the buffer for one plan, or for one plan per time axis; arguments as in `Buffer`."""
    if len(plans) == 1:
        return SlotBuffer(plans[0], size, shard_count, rng)
    return JointBuffer(plans, size, shard_count, rng)


def _longest_more(lengths: np.ndarray, room: np.ndarray) -> int:
    """Returns the longest sequence that fits beside those of a batch, of which the shorter ones move on by a slot."""
    ordered = -np.sort(-lengths)
    stuck = np.flatnonzero(ordered > room[1 : len(ordered) + 1])
    return int(room[stuck[-1] + 1 if len(stuck) else 0])
