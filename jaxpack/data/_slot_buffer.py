"""SlotBuffer: pieces that wait for the slots of a plan, drawn at random and yet in their proportions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from jaxpack._plans.bucket_plan import BucketPlan, longest_first
from jaxpack.data._cover import num_batches

Piece = tuple[int, Any]  # a number and a length; where there are several time axes, a tuple of lengths


class SlotBuffer:
    """A shuffle buffer from which each draw fills a plan.

    Sorted by length and cut into as many equal parts as the plan has slots, the buffer offers each slot its own part,
    out of which it takes one at random; or, where that is too long for it, the longest that fits and is not taken. So
    each draw has the buffer's proportions of long and short, which therefore stay those of the source: no length waits
    longer than another.

    What is left at the end goes to as few batches as the plan can do with: each slot's part is then as long as there
    are batches, and is dealt to them in random order. A buffer that never was full has only this end, and is exact:
    under the plan of a corpus's own quantiles each part fits its slot.

    Args:
      plan: whose slots are filled.
      size: how many pieces are held before a round is drawn; None for all.
      shard_count: how many batches are drawn in a round, all before the buffer is filled up again.
      rng: draws; None takes the middle of each part, and deals in order.
    """

    def __init__(self, plan: BucketPlan, size: int | None, shard_count: int, rng: np.random.Generator | None) -> None:
        self._room, self._shard_count, self._rng = plan.room, shard_count, rng
        self._size = np.inf if size is None else max(size, plan.num_sequences * shard_count)
        self._numbers = self._lengths = np.zeros(0, np.int64)  # longest first
        self._fresh: list[Piece] = []

    def __len__(self) -> int:
        return len(self._numbers) + len(self._fresh)

    @property
    def full(self) -> bool:
        """Whether it is time to draw."""
        return len(self) >= self._size

    def add(self, piece: Piece) -> None:
        """Holds a piece, whose length must fit the plan."""
        self._fresh.append(piece)

    def draw(self) -> list[list[Piece]]:
        """A round: a batch for every shard, each longest first."""
        self._sort()
        return [self._draw() for _ in range(self._shard_count)]

    def rest(self) -> Iterator[list[list[Piece]]]:
        """Rounds of all that are left."""
        self._sort()
        slots, left = len(self._room), len(self._numbers)
        batches = num_batches(self._lengths, self._room) if left else 0
        batches = -(-batches // self._shard_count) * self._shard_count
        places = np.where(np.arange(slots * batches) < left, np.arange(slots * batches), -1).reshape(slots, batches)
        if self._rng is not None:
            self._rng.permuted(places, axis=1, out=places)
        dealt = (self._pieces(batch[batch >= 0]) for batch in places.T)
        while shards := list(itertools.islice(dealt, self._shard_count)):
            yield shards

    def _draw(self) -> list[Piece]:
        slots = np.arange(len(self._room))
        part = len(self._numbers) / len(slots)
        draws = self._rng.random(len(slots)) if self._rng is not None else np.full(len(slots), 0.5)
        places = (part * (slots + draws)).astype(int)
        places = np.maximum(places, np.searchsorted(-self._lengths, -self._room))  # where those that fit begin
        places = slots + np.maximum.accumulate(places - slots)  # each at least one after the one before
        places = places[places < len(self._numbers)]
        drawn = self._pieces(places)
        self._numbers, self._lengths = np.delete(self._numbers, places), np.delete(self._lengths, places)
        return drawn

    def _sort(self) -> None:
        """Merges what was added."""
        fresh = np.fromiter(itertools.chain.from_iterable(self._fresh), np.int64).reshape(-1, 2)
        numbers = np.concatenate([self._numbers, fresh[:, 0]])
        lengths = np.concatenate([self._lengths, fresh[:, 1]])
        order = longest_first(lengths)
        self._numbers, self._lengths, self._fresh = numbers[order], lengths[order], []

    def _pieces(self, places: np.ndarray) -> list[Piece]:
        return list(zip(self._numbers[places].tolist(), self._lengths[places].tolist(), strict=True))


class Buffer(Protocol):
    """What rounds are drawn from: a SlotBuffer or a JointBuffer."""

    @property
    def full(self) -> bool:
        """Whether it is time to draw."""
        ...

    def add(self, piece: Piece) -> None:
        """Holds a piece."""
        ...

    def draw(self) -> list[list[Piece]]:
        """A round."""
        ...

    def rest(self) -> Iterator[list[list[Piece]]]:
        """Rounds of all that are left."""
        ...


def rounds(pieces: Iterator[Piece], buffer: Buffer) -> Iterator[Sequence[list[Piece]]]:
    """Rounds of pieces as they come, and of those that are left."""
    for piece in pieces:
        buffer.add(piece)
        if buffer.full:
            yield buffer.draw()
    yield from buffer.rest()
