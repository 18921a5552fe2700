"""Sources of examples for batchers, which cut those that are longer than a plan.

A *piece* is the content of a row of a batch: a whole example, or the part of one that `too_long` keeps. Batchers decide
with the numbers and lengths of pieces alone; examples are read when a batch is laid out.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from jaxpack._types import PyTree
from jaxpack.data._form import Form
from jaxpack.data._lengths import lengths_by_axis
from jaxpack.data._trend import Trend

TooLong = Literal["error", "truncate", "drop", "split"]
Length = Any  # an int; with several time axes, a tuple with an int for each

LOOKAHEAD = 1000  # how many examples of a stream are read to find one that is not an empty list


class ByPosition(Protocol):
    """Examples with a length, which are read by their position."""

    def __len__(self) -> int:
        """The number of examples."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """The example at a position."""
        ...


Source = ByPosition | Iterable[PyTree]


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The pieces of examples, and how many examples were cut.

    Attributes:
      examples: int [P], the number of each piece's example in the source.
      start: int [P], the piece's first step in the example.
      lengths: int [P, A], how many steps the piece has on each time axis.
      cut: how many examples were truncated, dropped or split.
    """

    examples: np.ndarray
    start: np.ndarray
    lengths: np.ndarray
    cut: int


class Piece(NamedTuple):
    """A piece ready to be laid out: the number of its example, and its part of the example's leaves."""

    example: int
    leaves: list[np.ndarray]


class Epoch(Protocol):
    """One reading of a source."""

    form: Form
    """The common form of the examples; a streamed source learns it from the first ones."""
    pieces: Iterator[tuple[int, Length]]
    """The number and length of each piece, in the order of reading."""

    @property
    def cut(self) -> int:
        """How many examples were truncated, dropped or split so far."""
        ...

    def read(self, pieces: Sequence[int]) -> Iterator[Piece]:
        """Yields the pieces with these numbers, once each; each must be copied before the next is read."""
        ...

    def drop(self, pieces: Sequence[int]) -> None:
        """Releases pieces that will not be read."""
        ...


def cut(lengths: np.ndarray, limits: Sequence[int], too_long: TooLong, names: Sequence[str] = ()) -> Pieces:
    """Cuts examples with these lengths into pieces, none longer than the limit.

    Examples:
      >>> cut(np.array([[2], [7]]), [3], "split").lengths[:, 0].tolist()
      [2, 3, 3, 1]

    Args:
      lengths: int [N, A], on each time axis.
      limits: the most steps of a piece on each axis.
      too_long: how to treat longer examples.
      names: the names of the axes, for errors.

    Raises:
      ValueError: if an example is longer and too_long is "error", or too_long is none of the four.
    """
    _check_too_long(too_long, len(limits))
    over = lengths > limits
    longer = np.flatnonzero(over.any(axis=1))
    if longer.size and too_long == "error":
        others = f"; {longer.size - 1:,} more are longer too" if longer.size > 1 else ""
        raise ValueError(too_long_message(int(longer[0]), lengths[longer[0]], limits, names, _CHOICES, others))
    counts = np.ones(len(lengths), int)
    if too_long == "drop":
        counts[longer] = 0
    elif too_long == "split":
        counts[longer] = -(-lengths[longer, 0] // limits[0])
    index = np.repeat(np.arange(len(lengths)), counts)
    start = limits[0] * (np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts))
    return Pieces(index, start, np.minimum(lengths[index] - start[:, None], limits), longer.size)


class Indexed:
    """A source whose examples are read by position: a list, an array of arrays, a grain.MapDataset.

    Where all examples are read to learn their lengths, their dtypes are promoted. With given lengths, the first example
    with steps determines the dtypes.

    Args:
      examples: anything with a length that can be indexed by an int.
      form: the form of the examples, which is learned here.
      lengths: [N] whole numbers, or a mapping from the names of the time axes to such; None reads every example once.
    """

    def __init__(self, examples: ByPosition, form: Form, lengths: Any) -> None:
        if not len(examples):
            raise ValueError("the source is empty: at least one example is needed.")
        if len(examples) == sys.maxsize:
            raise ValueError("the source is endless, as a repeated grain.MapDataset is: batchers repeat it themselves.")
        self._examples, self.form = examples, form
        if lengths is None:
            found = [form.lengths(form.learn(self.example(i), i, promote=True)) for i in range(len(examples))]
            self.lengths = np.array(found, np.int64)
        else:
            self.lengths = lengths_by_axis(lengths, form.names)
            if len(self.lengths) != len(examples):
                raise ValueError(f"lengths has {len(self.lengths)} entries, but the source {len(examples)} examples.")
            for i in sorted({0, *(self.lengths > 0).argmax(axis=0).tolist()}):
                form.learn(self.example(i), i, promote=False)
        form.settle()
        self.parts: Pieces  # set by `limit`, once plans are known

    def example(self, index: int) -> PyTree:
        """Returns the example at a position."""
        try:
            return self._examples[index]
        except KeyError as error:
            if error.args[:1] != (index,):
                raise
            raise ValueError(
                f"the source has {len(self._examples)} examples, but no key {index}: batchers read it by position, "
                f"from 0. Pass a list of its examples (.tolist(), list(source.values()))."
            ) from error

    def limit(self, limits: Sequence[int], too_long: TooLong) -> None:
        """Cuts the examples to these lengths on each time axis."""
        self.parts = cut(self.lengths, limits, too_long, self.form.names)

    def epoch(self, rng: np.random.Generator | None) -> Epoch:
        """Starts a reading of all pieces in random order, or in the source's order without a generator."""
        return _IndexedEpoch(self, rng)


class _IndexedEpoch:
    """One reading of an Indexed source."""

    def __init__(self, source: Indexed, rng: np.random.Generator | None) -> None:
        self._source, self.form = source, source.form
        order = np.arange(len(source.parts.examples))
        if rng is not None:
            rng.shuffle(order)
        lengths = source.parts.lengths[order]
        self.pieces: Iterator[tuple[int, Length]] = zip(order.tolist(), as_lengths(lengths), strict=True)

    @property
    def cut(self) -> int:
        return self._source.parts.cut

    def read(self, pieces: Sequence[int]) -> Iterator[Piece]:
        source, parts, form = self._source, self._source.parts, self.form
        examples = parts.examples[pieces]
        given = map(tuple, source.lengths[examples].tolist())
        spans = zip(parts.start[pieces].tolist(), parts.lengths[pieces].tolist(), strict=True)
        for example, lengths, span in zip(examples.tolist(), given, spans, strict=True):
            leaves = form.leaves(source.example(example), example)
            if form.lengths(leaves) != lengths:
                raise ValueError(_other_length_message(example, form.lengths(leaves), lengths))
            yield Piece(example, form.part(leaves, *span) if parts.cut else leaves)

    def drop(self, pieces: Sequence[int]) -> None:
        pass


class Streamed:
    """A source that is read in its own order in each epoch; its pieces are held until their batch is laid out.

    The first example with a dtype determines that of the batches. Held pieces are copies, since the source may reuse
    its memory.

    Args:
      examples: an iterable.
      time_varying: as in `Batcher`.
      limits: the most steps of a piece on each time axis.
      too_long: how to treat longer examples.
      buffer_size: how many pieces the batcher's buffer holds, to warn of streams ordered by length; None for no
        warning.
    """

    def __init__(
        self,
        examples: Source,
        time_varying: PyTree,
        limits: Sequence[int],
        too_long: TooLong,
        buffer_size: int | None,
    ) -> None:
        _check_too_long(too_long, len(limits))
        self.examples, self.time_varying = examples, time_varying
        self.limits, self.too_long, self.buffer_size = limits, too_long, buffer_size
        self._spent = False

    def epoch(self, rng: np.random.Generator | None) -> Epoch:
        """Starts a reading of the pieces in the source's order."""
        once = iter(self.examples)
        if self._spent and once is self.examples:
            raise ValueError(
                "the source is an iterator, which can be read once. For more epochs, or to resume, pass an object "
                "whose iteration starts from the beginning each time, such as a list or a data set."
            )
        self._spent = True
        return _StreamedEpoch(self, once)


class _StreamedEpoch:
    """One reading of a Streamed source."""

    def __init__(self, source: Streamed, examples: Iterator[PyTree]) -> None:
        self._source, self.form = source, Form(source.time_varying)
        self._held: dict[int, Piece] = {}
        self.cut = 0
        self.pieces = self._read_all(examples)

    def read(self, pieces: Sequence[int]) -> Iterator[Piece]:
        return (self._held.pop(piece) for piece in pieces)

    def drop(self, pieces: Sequence[int]) -> None:
        for piece in pieces:
            del self._held[piece]

    def _read_all(self, examples: Iterator[PyTree]) -> Iterator[tuple[int, Length]]:
        numbered = enumerate(examples)
        early = []
        for index, example in itertools.islice(numbered, LOOKAHEAD):
            early.append(self._take(index, example))
            if self.form.known:
                break
        if not early:
            raise ValueError("the source is empty: at least one example is needed.")
        self.form.settle()
        trend = None if self._source.buffer_size is None else Trend(self._source.buffer_size)
        number = 0
        for index, pieces in itertools.chain(early, (self._take(*each) for each in numbered)):
            for lengths, leaves in pieces:
                self._held[number] = Piece(index, leaves)
                yield number, lengths[0] if len(lengths) == 1 else lengths
                number += 1
            if trend is not None and pieces:
                trend.add(np.sum([lengths for lengths, _ in pieces], axis=0) if len(pieces) > 1 else pieces[0][0])
        if trend is not None:
            trend.end()

    def _take(self, index: int, example: PyTree) -> tuple[int, list[tuple[tuple[int, ...], list[np.ndarray]]]]:
        """Returns an example's number, and the lengths and copied leaves of its pieces."""
        leaves = self.form.learn(example, index, promote=False)
        found = self.form.lengths(leaves)
        return index, [
            (lengths, self.form.own(self.form.part(leaves, start, lengths), index))
            for start, lengths in self._spans(index, found)
        ]

    def _spans(self, index: int, lengths: tuple[int, ...]) -> Iterable[tuple[int, tuple[int, ...]]]:
        limits, too_long = self._source.limits, self._source.too_long
        if all(length <= limit for length, limit in zip(lengths, limits, strict=True)):
            return ((0, lengths),)
        if too_long == "error":
            raise ValueError(too_long_message(index, lengths, limits, self.form.names, _CHOICES))
        self.cut += 1
        parts = cut(np.array([lengths]), limits, too_long)
        return zip(parts.start.tolist(), map(tuple, parts.lengths.tolist()), strict=True)


def shuffled(
    pieces: Iterable[tuple[int, Length]], buffer_size: int, rng: np.random.Generator
) -> Iterator[tuple[int, Length]]:
    """Yields pieces drawn at random from a buffer, as tf.data.Dataset.shuffle does."""
    buffer: list[tuple[int, Length]] = []
    for piece in pieces:
        buffer.append(piece)
        if len(buffer) >= buffer_size:
            place = int(rng.integers(len(buffer)))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer


def positional(source: Any) -> ByPosition | None:
    """Returns the source if its examples can be read by position, None if it can only be iterated over.

    Examples:
      >>> positional([[1, 2], [3]])[1]
      [3]
      >>> positional(iter([[1, 2], [3]])) is None
      True

    Raises:
      TypeError: if the source's examples have no order, or iterating over it does not give them.
    """
    of_kind = type(source)  # the class is checked, since a data set may have an instance attribute of the same name
    kind = of_kind.__name__
    if isinstance(source, (str, bytes, bytearray)):
        raise TypeError(f"the source must hold examples, arrays of numbers, got a {kind}.")
    if isinstance(source, Set):
        raise TypeError(f"the source is a {kind}, whose order is not fixed. Pass a list of its examples.")
    if hasattr(of_kind, "columns") or (hasattr(source, "columns") and hasattr(source, "iloc")):  # a table or data frame
        raise TypeError(
            f"the source is a {kind}, which is read by column. Pass a list of its examples: of one column "
            f'(source["name"].tolist()), or of rows (pandas: source.to_dict("records")).'
        )
    if hasattr(source, "iloc"):  # a pandas Series, whose [] takes labels
        return _Series(source)
    if isinstance(source, Mapping) or hasattr(of_kind, "keys"):
        raise TypeError(
            f"the source is a {kind}, which is read by key, not by position. Pass a list of its examples, such as "
            f"list(source.values())."
        )
    if hasattr(of_kind, "loc"):
        raise TypeError(f"the source is a {kind}, which is read by label, not by position. Pass source.tolist().")
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        return source
    if not isinstance(source, Iterable) and not hasattr(source, "__getitem__"):
        raise TypeError(f"the source must be a list of examples, or an iterable of them, got a {kind}.")
    return None


class _Series:
    """The examples of a pandas Series by position."""

    def __init__(self, series: Any) -> None:
        self._series = series

    def __len__(self) -> int:
        return len(self._series)

    def __getitem__(self, index: Any) -> PyTree:
        return self._series.iloc[index]


def as_lengths(lengths: np.ndarray) -> list[Length]:
    """Returns [N, A] lengths as ints, or as tuples of ints if A > 1."""
    return lengths[:, 0].tolist() if lengths.shape[1] == 1 else list(map(tuple, lengths.tolist()))


def too_long_message(
    index: int, lengths: Sequence[int], limits: Sequence[int], names: Sequence[str], way_out: str, others: str = ""
) -> str:
    """Returns the error text about an example with more steps than its plan has room for, on the first such axis."""
    axis = next(a for a, limit in enumerate(limits) if lengths[a] > limit)
    on = f" on the time axis {names[axis]!r}" if len(limits) > 1 else ""
    return (
        f"example {index} has {lengths[axis]} steps{on}, but the longest that fits has {limits[axis]}{others}. Use a "
        f"plan with room for it (jaxpack.data.plan_cover(lengths, batch_size)), or {way_out}."
    )


def _other_length_message(index: int, *lengths: tuple[int, ...]) -> str:
    found, given = (each[0] if len(each) == 1 else each for each in lengths)
    return f"example {index} has {found} steps, but its length was given as {given}."


def _check_too_long(too_long: str, num_axes: int) -> None:
    if too_long not in ("error", "truncate", "drop", "split"):
        raise ValueError(f'too_long must be "error", "truncate", "drop" or "split", got {too_long!r}.')
    if too_long == "split" and num_axes > 1:
        raise ValueError(
            'too_long="split" is for examples of one time axis, since the steps of others do not split with it. Choose '
            '"error", "truncate" or "drop".'
        )


_CHOICES = 'choose too_long="truncate", "drop" or "split"'
