"""LengthHistogram: the lengths of a corpus that is too large to list them, counted in one pass.

Bins are those of HdrHistogram (Tene): each length L up to 2^p has its own. Beyond, each octave 2^k < L <= 2^(k+1)
has 2^(p-1) of equal width, so that a bin is narrower than 2^(1-p) of each length in it. As in DDSketch (Masson et al.
2019, A Fast and Fully-Mergeable Quantile Sketch with Relative-Error Guarantees) this bounds the relative error of every
quantile. Each bin remembers the longest length that it was given, which stands for all lengths in it: no sequence is
longer than the histogram says, and the longest of all is exact.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Set
from typing import cast

import numpy as np
import numpy.typing as npt

from jaxpack._checks import as_int, at_least_one, concrete_lengths
from jaxpack.data._corpus import Corpus

_CHUNK = 2**18  # lengths of a stream that are counted at once
_POWERS = 2 ** np.arange(63)
_MOST_BITS = 62


@dataclasses.dataclass(frozen=True)
class LengthHistogram:
    """Counts of a corpus's lengths, rounded up by at most a stated relative error, in memory that does not grow.

    `plan_cover`, `plan_family` and `coverage` take it in place of all lengths. Lengths up to `exact_up_to` are counted
    exactly, so that for corpora without longer ones the plans are the same. Beyond it a length counts as the longest of
    its bin: a plan has room for every sequence, and at most the relative error more of it than needed.

    Histograms of parts of a corpus merge into that of the whole, in any order and grouping. `dataclasses.asdict` makes
    one a dict of numbers and tuples, which JSON takes, and `LengthHistogram(**fields)` reads it.

    Examples:
      >>> histogram = LengthHistogram.of([400, 200, 400, 200])
      >>> histogram.longest, histogram.counts
      ((200, 400), (2, 2))
      >>> jaxpack.data.plan_cover(histogram, batch_size=2)
      BucketPlan(boundaries=(200, 400), rows=(2, 1))
      >>> shards = [LengthHistogram.of(len(text) for text in shard) for shard in (["a", "bcd"], ["ef"])]
      >>> shards[0].merge(shards[1])  # of two hosts
      LengthHistogram(longest=(1, 2, 3), counts=(1, 1, 1), num_steps=6, relative_error=0.0009765625)
      >>> LengthHistogram(**dataclasses.asdict(histogram)) == histogram
      True

    Attributes:
      longest: the longest length in each bin that is not empty, in increasing order.
      counts: how many sequences each of these bins has.
      num_steps: the sum of all lengths, exactly.
      relative_error: a length L counts as L' with L <= L' <= (1 + relative_error) L.

    Raises:
      TypeError: if longest, counts or num_steps are not ints.
      ValueError: if relative_error is not between 0 and 1, or the other fields are not those of a histogram.
    """

    longest: tuple[int, ...]
    counts: tuple[int, ...]
    num_steps: int
    relative_error: float = 2**-10

    def __post_init__(self) -> None:
        if not 0 < self.relative_error < 1:
            raise ValueError(f"relative_error must be between 0 and 1, got {self.relative_error}.")
        for name in ("longest", "counts"):
            object.__setattr__(self, name, tuple(as_int(f"{name}[{i}]", n) for i, n in enumerate(getattr(self, name))))
        as_int("num_steps", self.num_steps)
        if len(self.longest) != len(self.counts) or any(count < 1 for count in self.counts):
            raise ValueError("longest and counts must have one entry for each bin, and each bin at least one sequence.")
        lengths = concrete_lengths(np.array(self.longest, np.int64), "longest")
        if (np.diff(_bins(lengths, self._bits)) <= 0).any():
            raise ValueError("longest must have one length from each bin, in increasing order.")
        most = sum(map(int.__mul__, self.longest, self.counts))
        if not most / (1 + self.relative_error) <= self.num_steps <= most:
            raise ValueError(f"num_steps = {self.num_steps} is not the sum of the lengths that were counted.")

    @classmethod
    def of(cls, lengths: npt.ArrayLike | Iterable[int], *, relative_error: float = 2**-10) -> LengthHistogram:
        """Counts lengths, in one pass.

        Examples:
          >>> LengthHistogram.of([len(word) for word in ("to", "be", "or", "not")]).counts
          (3, 1)
          >>> LengthHistogram.of([1001, 1004, 3000], relative_error=0.01).longest
          (1004, 3000)

        Args:
          lengths: [N] whole numbers >= 0, or any iterable of them, such as a generator over a stream of sequences
            (`(len(x) for x in dataset)`). It may be empty.
          relative_error: how much too long a length may count, at most. Half of it takes twice as many bins: the
            default, 1/1024, has 2,048 exact lengths, and 1,024 bins for each doubling beyond.

        Raises:
          TypeError: if lengths are not numbers.
          ValueError: if one is negative or not whole, or relative_error is not between 0 and 1.
        """
        total = cls((), (), 0, relative_error)
        if not _is_stream(lengths):
            return total._with(concrete_lengths(cast(npt.ArrayLike, lengths)))
        stream = iter(cast(Iterable[int], lengths))
        for start in itertools.count(step=_CHUNK):
            chunk = list(itertools.islice(stream, _CHUNK))
            if not chunk:
                return total
            if np.ndim(chunk[0]):
                raise TypeError(
                    "lengths must be numbers, got an iterable of arrays. For sequences pass (len(sequence) for "
                    "sequence in stream); for arrays of lengths, merge the histograms of each."
                )
            total = total._with(concrete_lengths(chunk, f"lengths[{start}:]" if start else "lengths"))
        raise AssertionError

    @property
    def num_sequences(self) -> int:
        """How many sequences were counted."""
        return sum(self.counts)

    @property
    def exact_up_to(self) -> int:
        """The largest length up to which each length is counted by itself."""
        return 2**self._bits

    def merge(self, *others: LengthHistogram) -> LengthHistogram:
        """Returns the histogram of the lengths of all parts.

        It is the same in whatever order and grouping parts are merged. Its relative error is the largest of theirs.

        Examples:
          >>> parts = [LengthHistogram.of([length, 7]) for length in (5, 6, 7)]
          >>> parts[0].merge(*parts[1:]).counts
          (1, 1, 4)
        """
        parts = (self, *others)
        lengths, counts = (
            np.concatenate([np.array(getattr(part, name), np.int64) for part in parts])
            for name in ("longest", "counts")
        )
        num_steps, error = sum(part.num_steps for part in parts), max(part.relative_error for part in parts)
        return _counted(lengths, counts, num_steps, error)

    def quantile(self, share: float) -> int:
        """Returns the least length that at least this share of the sequences do not exceed.

        It is `numpy.quantile(lengths, share, method="inverted_cdf")`, or more by at most the relative error.

        Examples:
          >>> LengthHistogram.of([1, 2, 3, 4]).quantile(0.5)
          2

        Raises:
          ValueError: if share is not between 0 and 1, or the histogram is empty.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share must be between 0 and 1, got {share}.")
        corpus = corpus_of(self)
        rank = corpus.size - max(1, math.ceil(share * corpus.size))
        return int(corpus.at(np.array(rank)))

    def rooms(self, batch_size: int) -> np.ndarray:
        """Returns the room [batch_size] that each slot needs under a plan for the whole corpus, longest first.

        All planners take it as the lengths of a batch; `plan_cover(histogram, batch_size, planner=planner)` does that.

        Examples:
          >>> jaxpack.plan_buckets(LengthHistogram.of([400, 200, 400, 200]).rooms(2))
          BucketPlan(boundaries=(200, 400), rows=(2, 1))

        Raises:
          TypeError: if batch_size is not an int.
          ValueError: if it is below 1, or the histogram is empty.
        """
        return corpus_of(self).rooms(at_least_one("batch_size", batch_size))

    @property
    def _bits(self) -> int:
        """The number p: bins are those of numbers that are rounded up to p bits."""
        return min(_MOST_BITS, 1 + math.ceil(-math.log2(self.relative_error)))

    def _with(self, lengths: np.ndarray) -> LengthHistogram:
        """Adds checked lengths [N]."""
        distinct, counts = np.unique(lengths, return_counts=True)
        num_steps = sum(map(int.__mul__, distinct.tolist(), counts.tolist()))  # of Python, which do not overflow
        return self.merge(_counted(distinct, counts, num_steps, self.relative_error))


def corpus_of(lengths: LengthHistogram | npt.ArrayLike) -> Corpus:
    """Returns the corpus that a histogram or a vector of lengths is of, checked: at least one sequence."""
    if not isinstance(lengths, LengthHistogram):
        return Corpus.of(concrete_lengths(lengths))
    longest, counts = (np.array(each, np.int64) for each in (lengths.longest, lengths.counts))
    return Corpus.counted(longest, counts, lengths.num_steps)


def _is_stream(lengths: object) -> bool:
    """Returns whether to read lengths one by one."""
    wrong = isinstance(lengths, (str, bytes, Mapping, Set)) or hasattr(lengths, "lengths")
    return isinstance(lengths, Iterable) and not wrong and not hasattr(lengths, "__array__")


def _bins(lengths: np.ndarray, bits: int) -> np.ndarray:
    """Returns a number for each length's bin: its lower end, which is outside, in the order of lengths; -1 for 0."""
    below = lengths - 1
    shift = np.maximum(0, np.searchsorted(_POWERS, below, "right") - bits)
    return (below >> shift) << shift


def _counted(lengths: np.ndarray, counts: np.ndarray, num_steps: int, relative_error: float) -> LengthHistogram:
    """Returns the histogram of lengths [M] that occur so many times; the same length may be there several times."""
    histogram = LengthHistogram((), (), 0, relative_error)
    if not len(lengths):
        return histogram
    order = np.argsort(lengths, kind="stable")
    lengths, counts = lengths[order], counts[order]
    first = np.flatnonzero(np.diff(_bins(lengths, histogram._bits), prepend=-2))
    longest, counts = lengths[np.append(first[1:], len(lengths)) - 1], np.add.reduceat(counts, first)
    return LengthHistogram(tuple(longest.tolist()), tuple(counts.tolist()), num_steps, relative_error)
