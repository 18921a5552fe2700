"""JointBuffer: pieces of several lengths, such as of source and target, that wait for the slots of a plan for each.

One plan's slots are offered the parts of a sorted corpus. Pairs of two lengths have no order, so they are cut in two
again and again, each time by the length that gains most, until there is a part for each slot: like in both lengths, and
so little room is left over in either plan. With as many slots as parts, and for each axis the largest lengths of all
parts as rooms, every batch of one piece a part fits by construction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack.data._cover import num_batches
from jaxpack.data._parts import cut_in_parts
from jaxpack.data._slot_buffer import Piece, SlotBuffer


class JointBuffer:
    """A shuffle buffer from which each draw fills a plan for each time axis; as `SlotBuffer`, for several.

    A draw takes one piece at random from each part of the buffer. Those that do not fit the plans together are put
    back, the shorter ones first, and others that do take their places.

    Args:
      plans: for each time axis, of as many slots.
      size: how many pieces are held before a round is drawn; None for all.
      shard_count: how many batches are drawn in a round, all before the buffer is filled up again.
      rng: draws; None takes the middle of each part, and deals in order.
    """

    def __init__(
        self, plans: Sequence[BucketPlan], size: int | None, shard_count: int, rng: np.random.Generator | None
    ) -> None:
        self._rooms, self._slots = [plan.room for plan in plans], plans[0].num_sequences
        self._shard_count, self._rng = shard_count, rng
        self._size = np.inf if size is None else max(size, self._slots * shard_count)
        self._held: list[Piece] = []

    def __len__(self) -> int:
        return len(self._held)

    @property
    def full(self) -> bool:
        """Whether it is time to draw."""
        return len(self) >= self._size

    def add(self, piece: Piece) -> None:
        """Holds a piece, each of whose lengths must fit its plan."""
        self._held.append(piece)

    def draw(self) -> list[list[Piece]]:
        """A round: a batch for every shard."""
        return [self._draw() for _ in range(self._shard_count)]

    def rest(self) -> Iterator[list[list[Piece]]]:
        """Rounds of all that are left."""
        lengths = self._lengths()
        batches = self._dealt(lengths)
        if batches and len(batches) % self._shard_count:  # a part of a batch fits too
            count = self._shard_count - len(batches) % self._shard_count + 1
            last = batches.pop()
            batches += [last[i::count] for i in range(count)]
        for start in range(0, len(batches), self._shard_count):
            yield [[self._held[i] for i in batch.tolist()] for batch in batches[start : start + self._shard_count]]

    def _lengths(self) -> np.ndarray:
        return np.array([lengths for _, lengths in self._held], np.int64).reshape(len(self._held), len(self._rooms))

    def _draw(self) -> list[Piece]:
        lengths = self._lengths()
        parts = [part for part in cut_in_parts(lengths, self._slots) if len(part)]
        middle = 0.5 if self._rng is None else self._rng.random(len(parts))
        places = (np.array([len(part) for part in parts]) * middle).astype(int)
        drawn = np.array([part[place] for part, place in zip(parts, places.tolist(), strict=True)], int)
        drawn = self._filled_up(lengths, self._fitting(lengths, drawn), np.arange(len(lengths)))
        batch = [self._held[i] for i in drawn.tolist()]
        left = np.ones(len(lengths), bool)
        left[drawn] = False
        self._held = [self._held[i] for i in np.flatnonzero(left).tolist()]
        return batch

    def _dealt(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Batches that fit, of all pieces, as few as the plans let be found."""
        batches: list[np.ndarray] = []
        left = np.arange(len(lengths))
        while len(left):
            count = max(num_batches(-np.sort(-lengths[left, a]), room) for a, room in enumerate(self._rooms))
            places = np.full((self._slots, count), -1)
            for slot, part in enumerate(cut_in_parts(lengths[left], self._slots, count)):
                places[slot, : len(part)] = left[part]
            if self._rng is not None:
                self._rng.permuted(places, axis=1, out=places)
            dealt = [batch[batch >= 0] for batch in places.T]
            if not all(self._fit(lengths, places)):
                dealt = [self._fitting(lengths, batch) for batch in dealt]
                taken = np.zeros(len(lengths), bool)
                taken[np.concatenate(dealt)] = True
                for i, batch in enumerate(dealt):
                    dealt[i] = self._filled_up(lengths, batch, left[~taken[left]])
                    taken[dealt[i]] = True
                left = left[~taken[left]]
            else:
                left = left[:0]
            batches += [batch for batch in dealt if len(batch)]
        if self._rng is not None:
            self._rng.shuffle(order := np.arange(len(batches)))
            batches = [batches[i] for i in order.tolist()]
        return batches

    def _fit(self, lengths: np.ndarray, places: np.ndarray) -> Iterator[bool]:
        """For each axis whether all columns of pieces fit its plan."""
        for a, room in enumerate(self._rooms):
            found = np.where(places >= 0, lengths[places, a], 0)
            yield bool((-np.sort(-found, axis=0) <= room[:, None]).all())

    def _fitting(self, lengths: np.ndarray, batch: np.ndarray) -> np.ndarray:
        """Those of a batch that fit together, the longest first: at least one."""
        for a, room in enumerate(self._rooms):
            kept: list[int] = []
            for piece in batch[np.argsort(-lengths[batch, a], kind="stable")].tolist():
                if lengths[piece, a] <= room[len(kept)]:
                    kept.append(piece)
            batch = np.array(kept, int)
        return batch

    def _filled_up(self, lengths: np.ndarray, batch: np.ndarray, others: np.ndarray) -> np.ndarray:
        """A batch with other pieces in the slots that are free, each time the longest that fits."""
        others = others[~np.isin(others, batch)]
        while len(batch) < self._slots and len(others):
            limits = [_longest_more(lengths[batch, a], room) for a, room in enumerate(self._rooms)]
            fitting = others[(lengths[others] <= limits).all(axis=1)]
            if not len(fitting):
                break
            more = fitting[np.argmax(lengths[fitting].sum(axis=1))]
            batch, others = np.append(batch, more), others[others != more]
        return batch


def slot_buffer(
    plans: Sequence[BucketPlan], size: int | None, shard_count: int, rng: np.random.Generator | None
) -> SlotBuffer | JointBuffer:
    """Returns the buffer for one plan, or for one of each time axis."""
    if len(plans) == 1:
        return SlotBuffer(plans[0], size, shard_count, rng)
    return JointBuffer(plans, size, shard_count, rng)


def _longest_more(lengths: np.ndarray, room: np.ndarray) -> int:
    """The longest sequence that fits beside those of a batch that fits: those after it move on by a slot."""
    ordered = -np.sort(-lengths)
    stuck = np.flatnonzero(ordered > room[1 : len(ordered) + 1])
    return int(room[stuck[-1] + 1 if len(stuck) else 0])
