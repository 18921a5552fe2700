"""Sources: what batchers read examples from, cut where they are longer than a plan.

A *piece* is what sits in a row of a batch: a whole example, or the part of one that `too_long` leaves of it. Batchers
decide with pieces' numbers and lengths alone; the examples are read when a batch is laid out.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from jaxpack.arguments import concrete_lengths
from jaxpack.data.packing import Form
from jaxpack.sequence import PyTree

TooLong = Literal["error", "truncate", "drop", "split"]


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Parts of examples, and how many examples were not left whole.

    Attributes:
      examples: int [P], the example in the source.
      start, length: int [P], the steps of it.
      cut: how many examples were truncated, dropped or split.
    """

    examples: np.ndarray
    start: np.ndarray
    length: np.ndarray
    cut: int


class Piece(NamedTuple):
    """A piece that is ready to be laid out: the number of its example, and its part of the example's leaves."""

    example: int
    leaves: list[np.ndarray]


class Epoch(Protocol):
    """One reading of a source."""

    form: Form
    """What examples have in common; of a streamed source known from its first."""
    pieces: Iterator[tuple[int, int]]
    """Each piece's number and its length, in the order in which they are read."""

    @property
    def cut(self) -> int:
        """How many examples were truncated, dropped or split so far."""
        ...

    def read(self, pieces: Sequence[int]) -> list[Piece]:
        """The pieces of these numbers, each of which can be read once."""
        ...

    def drop(self, pieces: Sequence[int]) -> None:
        """Forgets pieces that will not be read."""
        ...


def cut(lengths: np.ndarray, limit: int, too_long: TooLong) -> Pieces:
    """Pieces of examples of these lengths, none longer than the limit.

    Examples:
      >>> cut(np.array([2, 7]), 3, "split").length.tolist()
      [2, 3, 3, 1]

    Raises:
      ValueError: if one is longer and too_long is "error", or is none of the four.
    """
    if too_long not in ("error", "truncate", "drop", "split"):
        raise ValueError(f'too_long must be "error", "truncate", "drop" or "split", got {too_long!r}.')
    longer = np.flatnonzero(lengths > limit)
    if longer.size and too_long == "error":
        others = f"; {longer.size - 1:,} more are longer too" if longer.size > 1 else ""
        raise ValueError(_too_long_message(int(longer[0]), int(lengths[longer[0]]), limit, others))
    counts = np.ones(len(lengths), int)
    if too_long == "drop":
        counts[longer] = 0
    elif too_long == "split":
        counts[longer] = -(-lengths[longer] // limit)
    index = np.repeat(np.arange(len(lengths)), counts)
    start = limit * (np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts))
    return Pieces(index, start, np.minimum(lengths[index] - start, limit), longer.size)


class Indexed:
    """A source whose examples are read by number: a list, an array of arrays, a grain.MapDataset.

    Args:
      examples: anything with a length that can be indexed by an int.
      time_varying: as in the batchers.
      lengths: [N] whole numbers; without them every example is read once now.
    """

    def __init__(self, examples: Sequence[PyTree], time_varying: PyTree, lengths: npt.ArrayLike | None) -> None:
        if not len(examples):
            raise ValueError("the source is empty: at least one example is needed.")
        if len(examples) == sys.maxsize:
            raise ValueError("the source has no end, as a repeated grain.MapDataset: batchers repeat it themselves.")
        self.examples = examples
        self.form = Form.of(examples[0], time_varying)
        if lengths is None:
            self.lengths = np.fromiter((self.form.length(examples[i], i) for i in range(len(examples))), np.int64)
        else:
            self.lengths = concrete_lengths(lengths)
            if len(self.lengths) != len(examples):
                raise ValueError(f"lengths has {len(self.lengths)} entries, but the source {len(examples)} examples.")
        self.parts: Pieces  # set by `limit`, once plans are known

    def limit(self, limit: int, too_long: TooLong) -> None:
        """Cuts the examples to a length."""
        self.parts = cut(self.lengths, limit, too_long)

    def epoch(self, rng: np.random.Generator | None) -> Epoch:
        """All pieces in random order, or in the source's without a generator."""
        return _IndexedEpoch(self, rng)


class _IndexedEpoch:
    def __init__(self, source: Indexed, rng: np.random.Generator | None) -> None:
        self._source, self.form = source, source.form
        order = np.arange(len(source.parts.examples))
        if rng is not None:
            rng.shuffle(order)
        lengths = source.parts.length[order].tolist()
        self.pieces: Iterator[tuple[int, int]] = zip(order.tolist(), lengths, strict=True)

    @property
    def cut(self) -> int:
        return self._source.parts.cut

    def read(self, pieces: Sequence[int]) -> list[Piece]:
        source, parts = self._source, self._source.parts
        examples = parts.examples[pieces].tolist()
        read = [Piece(example, source.form.leaves(source.examples[example], example)) for example in examples]
        self._check(read)
        if parts.cut:
            spans = zip(parts.start[pieces].tolist(), parts.length[pieces].tolist(), strict=True)
            read = [
                Piece(piece.example, _part(source.form, piece.leaves, *span))
                for piece, span in zip(read, spans, strict=True)
            ]
        return read

    def drop(self, pieces: Sequence[int]) -> None:
        pass

    def _check(self, read: Sequence[Piece]) -> None:
        """Raises ValueError unless examples are as long as they were said to be."""
        given = self._source.lengths[[piece.example for piece in read]].tolist()
        for (example, leaves), length in zip(read, given, strict=True):
            if len(leaves[self.form.time]) != length:
                found = len(leaves[self.form.time])
                raise ValueError(f"example {example} has {found} steps, but its length was given as {length}.")


class Streamed:
    """A source that is read once, in its own order, every epoch; what was read waits until its batch is laid out.

    Args:
      examples: an iterable.
      time_varying: as in the batchers.
      limit: no piece is longer.
      too_long: what is done about examples that are.
    """

    def __init__(self, examples: Iterable[PyTree], time_varying: PyTree, limit: int, too_long: TooLong) -> None:
        cut(np.zeros(0, int), limit, too_long)
        self.examples, self.time_varying = examples, time_varying
        self.longest, self.too_long = limit, too_long
        self._spent = False

    def epoch(self, rng: np.random.Generator | None) -> Epoch:
        """The source's pieces in its order."""
        once = iter(self.examples)
        if self._spent and once is self.examples:
            raise ValueError(
                "the source is an iterator, which can be read once. For more epochs, or to resume, pass an object "
                "whose iteration starts anew each time, such as a list or a data set."
            )
        self._spent = True
        return _StreamedEpoch(self, once)


class _StreamedEpoch:
    def __init__(self, source: Streamed, examples: Iterator[PyTree]) -> None:
        self._source = source
        self.form: Form
        self._held: dict[int, Piece] = {}
        self.cut = 0
        self.pieces = self._read_all(examples)

    def read(self, pieces: Sequence[int]) -> list[Piece]:
        return [self._held.pop(piece) for piece in pieces]

    def drop(self, pieces: Sequence[int]) -> None:
        for piece in pieces:
            del self._held[piece]

    def _read_all(self, examples: Iterator[PyTree]) -> Iterator[tuple[int, int]]:
        number, index = 0, -1
        for index, example in enumerate(examples):
            if index == 0:
                self.form = Form.of(example, self._source.time_varying)
            leaves = self.form.leaves(example, index)
            for start, length in self._spans(index, len(leaves[self.form.time])):
                self._held[number] = Piece(index, _part(self.form, leaves, start, length))
                yield number, length
                number += 1
        if index < 0:
            raise ValueError("the source is empty: at least one example is needed.")

    def _spans(self, index: int, length: int) -> Iterable[tuple[int, int]]:
        limit, too_long = self._source.longest, self._source.too_long
        if length <= limit:
            return ((0, length),)
        if too_long == "error":
            raise ValueError(_too_long_message(index, length, limit))
        self.cut += 1
        parts = cut(np.array([length]), limit, too_long)
        return zip(parts.start.tolist(), parts.length.tolist(), strict=True)


def shuffled(
    pieces: Iterable[tuple[int, int]], buffer_size: int, rng: np.random.Generator
) -> Iterator[tuple[int, int]]:
    """Each time one at random out of a buffer, as tf.data.Dataset.shuffle."""
    buffer: list[tuple[int, int]] = []
    for piece in pieces:
        buffer.append(piece)
        if len(buffer) >= buffer_size:
            place = int(rng.integers(len(buffer)))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer


def is_indexed(source: Any) -> bool:
    """Whether examples can be read by number."""
    return hasattr(source, "__len__") and hasattr(source, "__getitem__")


def _part(form: Form, leaves: list[np.ndarray], start: int, length: int) -> list[np.ndarray]:
    """Some steps of an example; leaves of fixed size are whole."""
    return [
        leaf[start : start + length] if varying else leaf for leaf, varying in zip(leaves, form.varying, strict=True)
    ]


def _too_long_message(index: int, length: int, limit: int, others: str = "") -> str:
    return (
        f"example {index} has {length} steps, but the longest that fits has {limit}{others}. Use a plan with room for "
        f'it (jaxpack.data.plan_cover(lengths, batch_size)), or choose too_long="truncate", "drop" or "split".'
    )
