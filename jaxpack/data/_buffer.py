"""Buffer: pieces that wait for the slots of a batch, and the rounds of batches that are drawn from them."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence

import numpy as np

from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack.data._source import Length, as_lengths

Piece = tuple[int, Length]  # a number and a length
Batches = list[list[Piece]]  # a round: a batch for every shard


class Buffer(abc.ABC):
    """A shuffle buffer from which each draw fills a plan.

    Subclasses choose the pieces of a batch. Pieces are held as arrays: `_numbers` [N], and `_lengths` [N, A] on each
    time axis.

    Args:
      plans: one for each time axis, all with the same number of slots.
      size: how many pieces are held before a round is drawn; None holds all.
      shard_count: how many batches a round has; all are drawn before the buffer is filled again.
      rng: the generator of the draws; None takes the middle of each part, and deals in order.
    """

    def __init__(
        self, plans: Sequence[BucketPlan], size: int | None, shard_count: int, rng: np.random.Generator | None
    ) -> None:
        self._rooms, self._slots = [plan.room for plan in plans], plans[0].num_sequences
        self._shard_count, self._rng = shard_count, rng
        self._size = np.inf if size is None else max(size, self._slots * shard_count)
        self._numbers, self._lengths = np.zeros(0, np.int64), np.zeros((0, len(plans)), np.int64)
        self._fresh: list[Piece] = []

    def __len__(self) -> int:
        return len(self._numbers) + len(self._fresh)

    @property
    def full(self) -> bool:
        """Whether it is time to draw."""
        return len(self) >= self._size

    def add(self, piece: Piece) -> None:
        """Holds a piece, whose lengths must fit the plans."""
        self._fresh.append(piece)

    def draw(self) -> Batches:
        """Draws a round."""
        self._merge()
        return [self._draw() for _ in range(self._shard_count)]

    def rest(self) -> Iterator[Batches]:
        """Yields rounds of all remaining pieces, which stay in the buffer."""
        self._merge()
        batches = self._deal() if len(self._numbers) else []
        for start in range(0, len(batches), self._shard_count):
            yield [self._pieces(batch) for batch in batches[start : start + self._shard_count]]

    @abc.abstractmethod
    def _choose(self) -> np.ndarray:
        """Chooses a batch: the places of its pieces in the buffer."""

    @abc.abstractmethod
    def _deal(self) -> list[np.ndarray]:
        """Deals the places of all pieces to few batches, whose number is a multiple of the shards'."""

    def _merge(self) -> None:
        """Moves the pieces that were added to the arrays."""
        numbers = np.array([number for number, _ in self._fresh], np.int64)
        lengths = np.array([length for _, length in self._fresh], np.int64).reshape(len(numbers), len(self._rooms))
        self._numbers = np.concatenate([self._numbers, numbers])
        self._lengths = np.concatenate([self._lengths, lengths])
        self._fresh = []

    def _draw(self) -> list[Piece]:
        places = self._choose()
        drawn = self._pieces(places)
        self._numbers, self._lengths = np.delete(self._numbers, places), np.delete(self._lengths, places, axis=0)
        return drawn

    def _pieces(self, places: np.ndarray) -> list[Piece]:
        return list(zip(self._numbers[places].tolist(), as_lengths(self._lengths[places]), strict=True))


def rounds(pieces: Iterator[Piece], buffer: Buffer) -> Iterator[Batches]:
    """Yields rounds while pieces come, and then rounds of the remaining ones."""
    for piece in pieces:
        buffer.add(piece)
        if buffer.full:
            yield buffer.draw()
    yield from buffer.rest()
