"""Batcher and BatchIterator: what all batchers share. Epochs, state, shards and statistics.

A batcher decides in *rounds* which pieces go together, from their lengths alone: one batch for every shard, all under
one plan, so that shards run the same program at the same time and have the same number of batches. Whatever it decides
follows from the seed and the epoch. So a state is two numbers, and an iterator comes back to it by deciding again.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import operator
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt

from jaxpack._checks import as_int, at_least_one
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree
from jaxpack.data._axes import axis_names
from jaxpack.data._batch import Batch, lay_out
from jaxpack.data._form import Form
from jaxpack.data._source import Epoch, Indexed, Length, Streamed, TooLong, positional, shuffled
from jaxpack.data._statistics import Statistics, Tally

State = dict[str, Any]
Piece = tuple[int, Length]  # its number and its length
Lengths = Iterator[Piece]


class Round(NamedTuple):
    """One batch for every shard.

    Attributes:
      plans: those of all of them, one for each time axis.
      shards: for each, the pieces of its batch, each its number and its length; fewer than the plan's slots, or none,
        where there are no more.
    """

    plans: tuple[BucketPlan, ...]
    shards: Sequence[Sequence[Piece]]


class Batcher(abc.ABC):
    """An iterable of batches, one epoch at a time: iterating again gives the next epoch's.

    Subclasses decide what goes together, in `_rounds`.

    Examples:
      >>> from jaxpack.data import SlotFilling
      >>> batches = SlotFilling([[1, 2, 3], [4], [5, 6], [7]], batch_size=2, seed=0)
      >>> for epoch in range(2):
      ...     print(sorted(int(index) for batch in batches for index in batch.indices))
      [0, 1, 2, 3]
      [0, 1, 2, 3]

    Args:
      source: examples, each an array [L, *F], a list of numbers, or a pytree of them. With a length and an index (a
        list, an array, a pandas Series, a grain.MapDataset) they are read by position; else the source is iterated
        over, anew each epoch.
      seed: of the shuffles; None leaves the source's order as far as the batcher can.
      time_varying: which leaves vary in time: a bool for each, or a prefix of the example's structure. Default: all
        that have an axis. Those of an example must agree in their number of steps. Or the name of each leaf's time
        axis, such as ("source", "target"), and False for a leaf of fixed size: those of one axis must agree.
      lengths: [N] those of the examples, if known, or a dict of them by time axis; without them every example is read
        once to find out.
      buffer_size: how many examples of a source without an index are held to draw from at random.
      too_long: what is done about an example that no plan has room for: "error", or by choice "truncate", "drop" or
        "split" (several rows then have its index; of one time axis). Statistics say how many there were.
      shard_index: which of the epoch's shards this is, from 0.
      shard_count: how many there are, one a host. All have the same number of batches.

    Batches have the dtypes that JAX holds examples in, int32 for int64 unless jax_enable_x64 is set. Where every
    example is read to find out its length they are promoted; else the first that has a dtype says which. An empty list
    has none.

    Raises:
      ValueError: if the source is empty, examples differ in structure or features, lengths are negative, not whole or
        not as many as examples, one is too long, a value does not fit its dtype, or an option is out of range.
      TypeError: if the source is not read by position, or an example has a dtype that the batches' cannot hold.
    """

    _several_axes = False  # whether examples may have time axes of their own

    def __init__(
        self,
        source: Sequence[PyTree] | Iterable[PyTree],
        *,
        seed: int | None,
        time_varying: PyTree,
        lengths: npt.ArrayLike | Mapping[str, npt.ArrayLike] | None,
        buffer_size: int | None,
        too_long: TooLong,
        shard_index: int,
        shard_count: int,
    ) -> None:
        if as_int("shard_count", shard_count) < 1 or not 0 <= as_int("shard_index", shard_index) < shard_count:
            raise ValueError(f"shard_index must lie in [0, shard_count), got {shard_index} of {shard_count}.")
        if buffer_size is not None:
            at_least_one("buffer_size", buffer_size)
        self.seed = None if seed is None else as_int("seed", seed)
        self.shard_index, self.shard_count = shard_index, shard_count
        self._too_long, self._buffer_size = too_long, buffer_size
        self._names = axis_names(time_varying)
        if len(self._names) > 1 and not self._several_axes:
            raise ValueError(
                f"{type(self).__name__} takes examples of one time axis, but time_varying names {self._names}. Use "
                f"jaxpack.data.SlotFilling, whose batches fit a plan for each."
            )
        self._indexed: Indexed | None = None
        examples = positional(source)
        if examples is not None:
            self._indexed = Indexed(examples, Form(time_varying), lengths)
        elif lengths is not None:
            raise ValueError("lengths are for sources that are read by number, but this one has no index.")
        self._examples, self._time_varying = source, time_varying
        self._x64 = jax.config.read("jax_enable_x64")  # of this thread; batches may be laid out in another
        self._next = (0, 0)

    @property
    @abc.abstractmethod
    def plans(self) -> tuple[BucketPlan, ...]:
        """The plans that batches come under: at most so many programs. Of several time axes one each."""

    @abc.abstractmethod
    def _rounds(self, pieces: Lengths, rng: np.random.Generator | None) -> Iterator[Round]:
        """Decides what goes together, in what order. Every piece is in one round."""

    def __iter__(self) -> BatchIterator:
        """The next epoch, or what is left of the one that `set_state` was given."""
        epoch, batch = self._next
        self._next = (epoch + 1, 0)
        return BatchIterator(self, epoch, batch)

    def set_state(self, state: State) -> None:
        """Makes the next iterator go on where another was when it gave this state.

        Raises:
          ValueError: if it is the state of another kind of batcher, seed, source, plan or option.
        """
        mine = self._identity()
        other = {name: state.get(name) for name in mine}
        if other != mine:
            raise ValueError(f"the state is that of {other}, but this is {mine}: batches would not be the same.")
        self._next = (operator.index(state["epoch"]), operator.index(state["batch"]))

    def statistics(self) -> Statistics:
        """What the next epoch will be like. Reads no example of a source with an index, and all of one without."""
        epoch, _ = self._next
        iterator = BatchIterator(self, epoch, 0)
        with contextlib.suppress(StopIteration):
            while True:
                iterator.skip()
        return iterator.statistics

    def __len__(self) -> int:
        """How many batches the next epoch has."""
        if self._indexed is None:
            raise TypeError("how many batches a source without an index gives is not known before it was read.")
        return self.statistics().batches

    def _corpus(self, what: str) -> np.ndarray:
        """The lengths of all examples, [N, A] on each time axis."""
        if self._indexed is None:
            raise ValueError(f"a source without an index has no lengths to make {what} from: give them.")
        return self._indexed.lengths

    def _limit(self, limits: Sequence[int], held: int) -> None:
        """Sets the longest piece on each time axis, and how many a buffer holds; to be called once plans are known."""
        if self._indexed is not None:
            self._indexed.limit(limits, self._too_long)
            self._source: Indexed | Streamed = self._indexed
        else:
            watched = None if self.seed is None and not self._several_axes else self._buffer_size or held
            self._source = Streamed(self._examples, self._time_varying, limits, self._too_long, watched)

    def _shuffled(self, pieces: Lengths, rng: np.random.Generator | None, default: int) -> Lengths:
        """The pieces of a source without an index, shuffled within a buffer; others were shuffled before."""
        if self._indexed is not None or rng is None:
            return pieces
        return shuffled(pieces, self._buffer_size or default, rng)

    def _open(self, epoch: int) -> tuple[Epoch, Iterator[Round]]:
        """A reading of the source, and the rounds of its pieces."""
        if self.seed is None:
            reading = self._source.epoch(None)
            return reading, self._rounds(reading.pieces, None)
        of_source, of_rounds = np.random.default_rng([abs(self.seed), self.seed < 0, epoch]).spawn(2)
        reading = self._source.epoch(of_source)
        return reading, self._rounds(reading.pieces, of_rounds)

    def _identity(self) -> State:
        """What must be the same for a state to mean the same batches."""
        examples = None if self._indexed is None else len(self._indexed.lengths)
        return {
            "batcher": type(self).__name__,
            "seed": self.seed,
            "examples": examples,
            "shard_count": self.shard_count,
            "fingerprint": self._fingerprint,
        }

    @functools.cached_property
    def _fingerprint(self) -> int:
        """A checksum of all else that batches follow from: plans, lengths and options."""
        lengths = b"" if self._indexed is None else self._indexed.lengths.tobytes()
        plans = [dataclasses.astuple(plan) for plan in self.plans]
        axes = self._names if len(self._names) > 1 else ()
        return zlib.crc32(repr((plans, self._options, *axes)).encode(), zlib.crc32(lengths))

    @property
    def _options(self) -> tuple[Any, ...]:
        """Options that batches follow from."""
        return self._buffer_size, self._too_long


def in_random_order(rounds: Sequence[Round], rng: np.random.Generator | None) -> Iterator[Round]:
    """The rounds shuffled, or as they are without a generator."""
    order = np.arange(len(rounds))
    if rng is not None:
        rng.shuffle(order)
    return (rounds[i] for i in order.tolist())


class BatchIterator:
    """An epoch's batches for one shard. Made by iterating over a batcher.

    Examples:
      >>> from jaxpack.data import SlotFilling
      >>> batches = SlotFilling([[1, 2, 3], [4], [5, 6], [7]], batch_size=2, seed=0)
      >>> iterator = iter(batches)
      >>> first = next(iterator)
      >>> batches.set_state(iterator.get_state())  # to go on with the second
      >>> sum(1 for batch in batches)
      1
    """

    def __init__(self, batcher: Batcher, epoch: int, batch: int) -> None:
        self._batcher, self._epoch, self._batch = batcher, epoch, batch
        self._rounds: Iterator[Round] | None = None

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        An exception of the source passes through. The state is then that before the batch, and asking again retries.
        """
        with self._retried(), jax.enable_x64(self._batcher._x64):
            plans, pieces = self._take(next(self._opened()))
            lengths = [length for _, length in pieces]
            batch = lay_out(self._reading.form, self._reading.read([number for number, _ in pieces]), lengths, plans)
        self._tally.add(plans, lengths)
        self._batch += 1
        return batch

    def skip(self) -> None:
        """Goes past a batch without laying it out; raises StopIteration if there is none."""
        with self._retried():
            self._pass(next(self._opened()))
        self._batch += 1

    def get_state(self) -> State:
        """Where it is: what a batcher's `set_state` takes. Small, and can be written as JSON."""
        return {"epoch": self._epoch, "batch": self._batch, **self._batcher._identity()}

    @property
    def statistics(self) -> Statistics:
        """Of the epoch's batches so far, those before a resumed state included."""
        self._opened()
        return self._tally.statistics(self._batcher._too_long, self._reading.cut)

    def _opened(self) -> Iterator[Round]:
        """The rounds that are left. Starts to decide if need be, and comes back to the state."""
        if self._rounds is None:
            self._reading, rounds = self._batcher._open(self._epoch)
            self._tally = Tally(self._batcher._names)
            for done in range(self._batch):
                try:
                    self._pass(next(rounds))
                except StopIteration as error:
                    raise ValueError(
                        f"the state was given after {self._batch} batches, but now there are {done}. Resume with the "
                        f"source that it was made with."
                    ) from error
            self._rounds = rounds
        return self._rounds

    @contextlib.contextmanager
    def _retried(self) -> Iterator[None]:
        """Lets the next call start anew after an exception, since generators that raised one have ended."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, StopIteration):
                self._rounds = None
            raise

    def _take(self, round_: Round) -> tuple[tuple[BucketPlan, ...], Sequence[Piece]]:
        """Takes this shard's part of a round, and lets the others' pieces go."""
        for shard, pieces in enumerate(round_.shards):
            if shard != self._batcher.shard_index:
                self._reading.drop([number for number, _ in pieces])
        return round_.plans, round_.shards[self._batcher.shard_index]

    def _pass(self, round_: Round) -> None:
        plans, pieces = self._take(round_)
        self._reading.drop([number for number, _ in pieces])
        self._tally.add(plans, [length for _, length in pieces])
