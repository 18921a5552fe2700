"""Batcher and BatchIterator: the epochs, states, shards and statistics of all batchers.

A batcher decides in *rounds* which pieces go together, from their lengths alone. A round is one batch for every shard,
all under one plan, so shards run the same program at the same time and have the same number of batches. All decisions
follow from the seed and the epoch. So a state is two numbers, and an iterator returns to it by deciding again.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import operator
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import jax
import numpy as np
import numpy.typing as npt

from jaxpack._checks import as_int, at_least_one
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._plans.shards import deal_rows
from jaxpack._types import PyTree
from jaxpack.data._axes import axis_names
from jaxpack.data._batch import Batch, lay_out
from jaxpack.data._form import Form
from jaxpack.data._source import Epoch, Indexed, Length, Source, Streamed, TooLong, positional, shuffled
from jaxpack.data._stacked import stack_shards
from jaxpack.data._statistics import Statistics, Tally

State = dict[str, Any]
Piece = tuple[int, Length]  # a number and a length
Lengths = Iterator[Piece]


class Round(NamedTuple):
    """One batch for every shard.

    Attributes:
      plans: the plan of all its batches, one for each time axis.
      shards: the pieces of each shard's batch; fewer than the plan has slots, or none, at the end of an epoch.
    """

    plans: tuple[BucketPlan, ...]
    shards: Sequence[Sequence[Piece]]


class Options(TypedDict, total=False):
    """Keyword arguments that all batchers take; `Batcher` documents them."""

    seed: int | None
    time_varying: PyTree
    lengths: npt.ArrayLike | Mapping[str, npt.ArrayLike] | None
    buffer_size: int | None
    too_long: TooLong
    shard_index: int
    shard_count: int
    local_shards: int | None


class Batcher(abc.ABC):
    """An iterable of batches, one epoch at a time: each iteration gives the next epoch.

    `SlotFilling`, `BucketByLength` and `SortedChunks` are batchers. They take the arguments below, and add their own.

    Examples:
      >>> from jaxpack.data import SlotFilling
      >>> batches = SlotFilling([[1, 2, 3], [4], [5, 6], [7]], batch_size=2, seed=0)
      >>> for epoch in range(2):
      ...     print(sorted(int(index) for batch in batches for index in batch.indices))
      [0, 1, 2, 3]
      [0, 1, 2, 3]

    Args:
      source: examples, each an array [L, *F], a list of numbers, or a pytree of them. A source with a length and an
        index (a list, an array, a pandas Series, a grain.MapDataset) is read by position; any other is iterated over
        in each epoch.
      seed: the seed of the shuffles. None keeps the source's order as far as the batcher can.
      time_varying: which leaves vary in time: a bool for each leaf, or for a prefix of the example's structure; leaves
        that vary must have the same number of steps. Or the name of each leaf's time axis, such as
        ("source", "target"), and False for a leaf of fixed size; leaves with the same axis must have the same number of
        steps. Default: all leaves that have an axis vary in time.
      lengths: [N] the lengths of the examples, or a dict of them by time axis. Default: every example is read once to
        find its length.
      buffer_size: how many examples are held to draw from at random. Default: all of a source with an index; of any
        other, the class says.
      too_long: how to treat an example that no plan has room for: "error" raises, "truncate" cuts its end off, "drop"
        leaves it out, "split" makes several rows of it, all with its index (for one time axis only). Statistics count
        such examples.
      shard_index: the number of this shard, from 0.
      shard_count: how many shards an epoch has, one per host. All have the same number of batches.
      local_shards: how many shards each host has, one per device. The arrays of a batch then have a leading axis of the
        host's shards, which `jaxpack.sharding.put` spreads over its devices. There are shard_count times as many shards
        in all, and a state fits any number of hosts that divides them. Default: one shard, without such an axis.

    The shards of a round hold nearly equal numbers of steps: its pieces are dealt as by `jaxpack.sharding.deal`, unless
    they have several time axes.

    Batches have the dtypes in which JAX holds examples: int32 for int64, unless jax_enable_x64 is set. Where all
    examples are read to find their lengths, their dtypes are promoted; otherwise the first example with a dtype
    determines it. An empty list has none.

    Raises:
      ValueError: if the source is empty, examples differ in structure or features, lengths are negative or not whole,
        their number is not that of the examples, an example is too long, a value does not fit its dtype, or an option
        is out of range.
      TypeError: if the source cannot be read by position, an example has a dtype that the batches' dtype cannot hold,
        or a keyword is unknown.
    """

    _several_axes = False  # whether examples may have more than one time axis

    def __init__(
        self,
        source: Source,
        *,
        seed: int | None = 0,
        time_varying: PyTree = None,
        lengths: npt.ArrayLike | Mapping[str, npt.ArrayLike] | None = None,
        buffer_size: int | None = None,
        too_long: TooLong = "error",
        shard_index: int = 0,
        shard_count: int = 1,
        local_shards: int | None = None,
    ) -> None:
        if as_int("shard_count", shard_count) < 1 or not 0 <= as_int("shard_index", shard_index) < shard_count:
            raise ValueError(f"shard_index must be in [0, shard_count), got {shard_index} of {shard_count}.")
        if buffer_size is not None:
            at_least_one("buffer_size", buffer_size)
        self.seed = None if seed is None else as_int("seed", seed)
        self.shard_index, self.shard_count = shard_index, shard_count
        self.local_shards = None if local_shards is None else at_least_one("local_shards", local_shards)
        self._too_long, self._buffer_size = too_long, buffer_size
        self._names = axis_names(time_varying)
        if len(self._names) > 1 and not self._several_axes:
            raise ValueError(
                f"{type(self).__name__} takes examples of one time axis, but time_varying names {self._names}. Use "
                f"jaxpack.data.SlotFilling, whose batches fit a plan for each axis."
            )
        self._indexed: Indexed | None = None
        examples = positional(source)
        if examples is not None:
            self._indexed = Indexed(examples, Form(time_varying), lengths)
        elif lengths is not None:
            raise ValueError("lengths are for sources that are read by position, but this one has no index.")
        self._examples, self._time_varying = source, time_varying
        self._x64 = jax.config.read("jax_enable_x64")  # this thread's value; another thread may lay batches out
        self._next = (0, 0)

    @property
    @abc.abstractmethod
    def plans(self) -> tuple[BucketPlan, ...]:
        """The plans of the batches, each at most one program; with several time axes, one plan for each."""

    @abc.abstractmethod
    def _rounds(self, pieces: Lengths, rng: np.random.Generator | None) -> Iterator[Round]:
        """Yields rounds, which hold every piece once."""

    def __iter__(self) -> BatchIterator:
        """Returns the next epoch's batches, or those that follow the state which `set_state` was given."""
        epoch, batch = self._next
        self._next = (epoch + 1, 0)
        return BatchIterator(self, epoch, batch)

    def set_state(self, state: State) -> None:
        """Makes the next iterator continue from a state that `BatchIterator.get_state` returned.

        Raises:
          ValueError: if the state comes from another kind of batcher, seed, source, plan or option.
        """
        mine = self._identity()
        other = {name: state.get(name) for name in mine}
        if other != mine:
            raise ValueError(f"the state is that of {other}, but this is {mine}: batches would not be the same.")
        self._next = (operator.index(state["epoch"]), operator.index(state["batch"]))

    def statistics(self) -> Statistics:
        """Computes the statistics of the next epoch. Reads no example of a source with an index, else all of them."""
        epoch, _ = self._next
        iterator = BatchIterator(self, epoch, 0)
        with contextlib.suppress(StopIteration):
            while True:
                iterator.skip()
        return iterator.statistics

    def __len__(self) -> int:
        """Counts the batches of the next epoch."""
        if self._indexed is None:
            raise TypeError("the number of batches from a source without an index is not known before it is read.")
        return self.statistics().batches

    def _corpus(self, what: str) -> np.ndarray:
        """Returns the lengths of all examples on each time axis, [N, A]."""
        if self._indexed is None:
            raise ValueError(f"a source without an index has no lengths to make {what} from: pass {what}.")
        return self._indexed.lengths

    def _limit(self, limits: Sequence[int], held: int) -> None:
        """Sets the longest piece on each time axis, and how many pieces a buffer holds. Called once plans are known."""
        if self._indexed is not None:
            self._indexed.limit(limits, self._too_long)
            self._source: Indexed | Streamed = self._indexed
        else:
            watched = None if self.seed is None and not self._several_axes else self._buffer_size or held
            self._source = Streamed(self._examples, self._time_varying, limits, self._too_long, watched)

    def _shuffled(self, pieces: Lengths, rng: np.random.Generator | None, default: int) -> Lengths:
        """Shuffles the pieces of a source without an index within a buffer; others are shuffled already."""
        if self._indexed is not None or rng is None:
            return pieces
        return shuffled(pieces, self._buffer_size or default, rng)

    def _open(self, epoch: int) -> tuple[Epoch, Iterator[Round]]:
        """Starts a reading of the source; returns it with the rounds of its pieces."""
        of_source = of_rounds = None
        if self.seed is not None:
            of_source, of_rounds = np.random.default_rng([abs(self.seed), self.seed < 0, epoch]).spawn(2)
        reading = self._source.epoch(of_source)
        rounds = self._rounds(reading.pieces, of_rounds)
        return reading, rounds if self._shards == 1 or len(self._names) > 1 else map(balanced, rounds)

    def _identity(self) -> State:
        """Returns the settings under which a state means the same batches."""
        examples = None if self._indexed is None else len(self._indexed.lengths)
        return {
            "batcher": type(self).__name__,
            "seed": self.seed,
            "examples": examples,
            "shard_count": self._shards,
            "fingerprint": self._fingerprint,
        }

    @functools.cached_property
    def _fingerprint(self) -> int:
        """A checksum of the plans, lengths and options that determine the batches."""
        lengths = b"" if self._indexed is None else self._indexed.lengths.tobytes()
        plans = [dataclasses.astuple(plan) for plan in self.plans]
        axes = self._names if len(self._names) > 1 else ()
        return zlib.crc32(repr((plans, self._options, *axes)).encode(), zlib.crc32(lengths))

    @property
    def _shards(self) -> int:
        """The number of shards of a round, those of all hosts."""
        return self.shard_count * (self.local_shards or 1)

    @property
    def _options(self) -> tuple[Any, ...]:
        """The options that determine the batches."""
        return self._buffer_size, self._too_long


def in_random_order(rounds: Sequence[Round], rng: np.random.Generator | None) -> Iterator[Round]:
    """Yields the rounds in random order, or in the given order without a generator."""
    order = np.arange(len(rounds))
    if rng is not None:
        rng.shuffle(order)
    return (rounds[i] for i in order.tolist())


def balanced(round_: Round) -> Round:
    """Deals the pieces of a round to its shards anew, so that their numbers of steps are nearly equal."""
    pieces = [piece for shard in round_.shards for piece in shard]
    lengths = np.array([length for _, length in pieces], np.int64)
    dealt = deal_rows(lengths, len(round_.shards), round_.plans[0].room)
    return Round(round_.plans, [[pieces[place] for place in rows if place >= 0] for rows in dealt.tolist()])


class BatchIterator:
    """An epoch's batches for the shards of one host, made by iterating over a batcher.

    Examples:
      >>> from jaxpack.data import SlotFilling
      >>> batches = SlotFilling([[1, 2, 3], [4], [5, 6], [7]], batch_size=2, seed=0)
      >>> iterator = iter(batches)
      >>> first = next(iterator)
      >>> batches.set_state(iterator.get_state())  # continue with the second
      >>> sum(1 for batch in batches)
      1
    """

    def __init__(self, batcher: Batcher, epoch: int, batch: int) -> None:
        self._batcher, self._epoch, self._batch = batcher, epoch, batch
        self._rounds: Iterator[Round] | None = None

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Batch:
        """Returns the next batch.

        An exception of the source passes through. The state is then that before the batch, and the next call retries.
        """
        with self._retried(), jax.enable_x64(self._batcher._x64):
            plans, shards = self._take(next(self._opened()))
            batches = [self._lay_out(plans, pieces) for pieces in shards]
            batch = batches[0] if self._batcher.local_shards is None else stack_shards(batches)
        self._tally.add(plans, _lengths(shards), len(shards))
        self._batch += 1
        return batch

    def skip(self) -> None:
        """Skips a batch without laying it out; raises StopIteration if there is none."""
        with self._retried():
            self._pass(next(self._opened()))
        self._batch += 1

    def get_state(self) -> State:
        """Returns the position in the epoch, for a batcher's `set_state`: small, and serialisable as JSON."""
        return {"epoch": self._epoch, "batch": self._batch, **self._batcher._identity()}

    @property
    def statistics(self) -> Statistics:
        """The statistics of the epoch's batches so far, including those before a resumed state."""
        self._opened()
        return self._tally.statistics(self._batcher._too_long, self._reading.cut)

    def _opened(self) -> Iterator[Round]:
        """Returns the remaining rounds; opens the source first, and repeats the rounds before the state."""
        if self._rounds is None:
            self._reading, rounds = self._batcher._open(self._epoch)
            self._tally = Tally(self._batcher._names)
            for done in range(self._batch):
                try:
                    self._pass(next(rounds))
                except StopIteration as error:
                    raise ValueError(
                        f"the state was taken after {self._batch} batches, but now there are {done}. Resume with the "
                        f"source that it was made with."
                    ) from error
            self._rounds = rounds
        return self._rounds

    @contextlib.contextmanager
    def _retried(self) -> Iterator[None]:
        """Lets the next call reopen the source after an exception, since a generator that raised has ended."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, StopIteration):
                self._rounds = None
            raise

    def _lay_out(self, plans: tuple[BucketPlan, ...], pieces: Sequence[Piece]) -> Batch:
        read = self._reading.read([number for number, _ in pieces])
        return lay_out(self._reading.form, read, [length for _, length in pieces], plans)

    def _take(self, round_: Round) -> tuple[tuple[BucketPlan, ...], Sequence[Sequence[Piece]]]:
        """Takes this host's shards of a round, and drops the pieces of the others."""
        count = self._batcher.local_shards or 1
        first = self._batcher.shard_index * count
        for shard, pieces in enumerate(round_.shards):
            if not first <= shard < first + count:
                self._reading.drop([number for number, _ in pieces])
        return round_.plans, round_.shards[first : first + count]

    def _pass(self, round_: Round) -> None:
        plans, shards = self._take(round_)
        self._reading.drop([number for pieces in shards for number, _ in pieces])
        self._tally.add(plans, _lengths(shards), len(shards))


def _lengths(shards: Sequence[Sequence[Piece]]) -> list[Length]:
    """Returns the lengths of all pieces of some shards."""
    return [length for pieces in shards for _, length in pieces]
