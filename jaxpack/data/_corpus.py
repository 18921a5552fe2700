"""Corpus: the lengths of a corpus as planners read them, counted by length."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxpack.data._parts import joint_rooms

EMPTY = "the corpus is empty: a plan needs at least one sequence."


class Corpus(NamedTuple):
    """The distinct lengths of a corpus, and how many sequences have each.

    Examples:
      >>> corpus = Corpus.of(np.array([2, 9, 2]))
      >>> corpus.size, corpus.longest, corpus.at([0, 1, 2]).tolist(), corpus.longer_than([8, 1]).tolist()
      (3, 9, [9, 2, 2], [1, 3])

    Attributes:
      lengths: int64 [U], distinct, longest first.
      ends: int64 [U], how many sequences have at least each length.
      num_steps: the sum of the lengths of all sequences.
    """

    lengths: np.ndarray
    ends: np.ndarray
    num_steps: int

    @classmethod
    def of(cls, lengths: np.ndarray) -> Corpus:
        """Counts checked lengths, [N]."""
        distinct, counts = np.unique(lengths, return_counts=True)
        return cls.counted(distinct, counts, int(lengths.sum()))

    @classmethod
    def counted(cls, lengths: np.ndarray, counts: np.ndarray, num_steps: int) -> Corpus:
        """Returns the corpus with these distinct lengths, shortest first, and their counts; at least one sequence.

        Raises:
          ValueError: if there is none.
        """
        if not len(lengths):
            raise ValueError(EMPTY)
        return cls(lengths[::-1], np.cumsum(counts[::-1]), num_steps)

    @property
    def size(self) -> int:
        """The number of sequences."""
        return int(self.ends[-1])

    @property
    def longest(self) -> int:
        """The largest length."""
        return int(self.lengths[0])

    @property
    def counts(self) -> np.ndarray:
        """The number of sequences of each length, [U]."""
        return np.diff(self.ends, prepend=0)

    def at(self, ranks: np.ndarray) -> np.ndarray:
        """Returns the lengths of the sequences with these ranks, of which 0 is the longest."""
        return self.lengths[np.searchsorted(self.ends, ranks, "right")]

    def longer_than(self, steps: np.ndarray) -> np.ndarray:
        """Counts the sequences that are longer than each number of steps."""
        return np.append(0, self.ends)[np.searchsorted(-self.lengths, -np.asarray(steps))]

    def rooms(self, slots: int) -> np.ndarray:
        """Returns the corpus's own quantiles [slots]: for slot i of n batches the (n i)-th longest, at least 1."""
        ranks = np.arange(slots) * -(-self.size // slots)
        return np.maximum(1, np.where(ranks < self.size, self.at(np.minimum(ranks, self.size - 1)), 1))


class Axes(NamedTuple):
    """A corpus on each of its time axes.

    Attributes:
      corpora: the lengths on each axis.
      lengths: int64 [N, A], the lengths of each example; None if they are not known together.
    """

    corpora: tuple[Corpus, ...]
    lengths: np.ndarray | None = None

    @classmethod
    def of(cls, lengths: np.ndarray) -> Axes:
        """Returns the corpus with checked lengths [N, A]."""
        if not lengths.size:
            raise ValueError(EMPTY)
        return cls(tuple(map(Corpus.of, lengths.T)), lengths)

    def rooms(self, slots: int) -> list[np.ndarray]:
        """Returns the rooms [slots] that batches need which are made to fit, on each axis.

        Raises:
          ValueError: if there are several axes, whose lengths are not known together.
        """
        if len(self.corpora) == 1:
            return [self.corpora[0].rooms(slots)]
        if self.lengths is None:
            raise ValueError(
                "a histogram of each axis does not say which lengths occur together, as plans for slot filling need "
                "it. Pass the lengths of a sample of the examples, or miss= for batches that are drawn at random."
            )
        return joint_rooms(self.lengths, slots)
