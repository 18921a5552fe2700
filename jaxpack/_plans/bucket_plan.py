"""BucketPlan: the static shape of a packed batch.

A plan is made of plain ints. It hashes and compares by value, it can be saved beside a checkpoint, and it is part of a
jitted function's cache key: one plan is one compiled program. Lengths stay dynamic: every batch that fits the plan runs
through that program.

The vocabulary, for lengths [4, 2, 1] under boundaries (2, 4), rows (3, 1):

    step     0 1 | 2 3
    row 0    x x | x x      bucket 0: steps [0, 2), rows [0, 3)
    row 1    x x |          bucket 1: steps [2, 4), rows [0, 1)
    row 2    x . |          .  is slack: a cell of the plan past its sequence's end

The i-th longest sequence is in *slot* i: a row, a start step, and a room (the number of steps it may have). In a
staircase every row holds one slot, which starts at step 0; in a row plan several slots share a row, end to end. All
maps between sequences and cells are written in terms of slots, never in terms of rows. Lengths [4, 2, 1] in two rows,
boundaries (4,), rows (2,), starts ((0,), (0, 2)):

    row 0    x x x x        slot 0
    row 1    x x:x .        slot 1 starts at step 0, slot 2 at step 2; the room of both is 2
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxpack._checks import concrete_lengths
from jaxpack._plans.marks import Marks, sampled_cells
from jaxpack._plans.pictures import counted, html_picture, text_picture

INDEX_MAX = np.iinfo(np.int32).max  # the most cells of a plan
SPLIT = "Split the batch; jaxpack.data.plan_cover(lengths, batch_size) makes a plan for the batches of a corpus."
_WIDEST_REPR = 12  # entries that repr writes before it abbreviates


class Bucket(NamedTuple):
    """Steps [start, stop) on rows [0, rows). Its cells begin at `offset` in the packed data."""

    start: int
    stop: int
    rows: int
    offset: int

    @property
    def steps(self) -> int:
        """The number of steps."""
        return self.stop - self.start

    @property
    def size(self) -> int:
        """The number of cells."""
        return self.steps * self.rows


@dataclasses.dataclass(frozen=True, repr=False)
class BucketPlan:
    """The static shape of a packed batch: the rows alive at each step, and the steps of a row for each sequence.

    Bucket k spans steps [boundaries[k-1], boundaries[k]) for rows [0, rows[k]).

    Examples:
      >>> BucketPlan(boundaries=(2, 4), rows=(3, 1)).size  # 2 * 3 + 2 * 1
      8
      >>> BucketPlan(boundaries=(4,), rows=(2,), starts=((0,), (0, 2))).room.tolist()
      [4, 2, 2]

    Args:
      boundaries: the end step of each bucket, strictly increasing.
      rows: the number of rows alive in each bucket, non-increasing and at least 1; or (0,) for a batch of no sequences.
      starts: for each row the steps at which its slots start, from 0. A slot ends where the next one starts, or with
        its row. Default: one slot a row.

    Raises:
      TypeError: if an entry is not an int.
      ValueError: if boundaries and rows differ in length, are empty, or are not a staircase; or if starts does not have
        one entry per row, or the starts of a row do not increase from 0 or reach its end.
    """

    boundaries: tuple[int, ...]
    rows: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        boundaries, rows = _ints("boundaries", self.boundaries), _ints("rows", self.rows)
        if len(boundaries) != len(rows) or not rows:
            raise ValueError(
                f"boundaries and rows must have one entry per bucket and at least one bucket, "
                f"got {len(boundaries)} boundaries and {len(rows)} rows."
            )
        if any(stop <= start for start, stop in itertools.pairwise((0, *boundaries))):
            raise ValueError(f"boundaries must increase strictly from above 0, got {_brief(boundaries)}.")
        if any(later > earlier for earlier, later in itertools.pairwise(rows)) or (rows[-1] < 1 and rows != (0,)):
            raise ValueError(f"rows must not increase and must be at least 1, got {_brief(rows)}.")
        object.__setattr__(self, "boundaries", boundaries)
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "starts", self._checked_starts())
        if self.size > INDEX_MAX:
            raise ValueError(f"the plan has {self.size} cells, more than int32 can index. {SPLIT}")

    @property
    def num_buckets(self) -> int:
        """The number of buckets, which is the number of loops in the program."""
        return len(self.rows)

    @functools.cached_property
    def num_sequences(self) -> int:
        """The batch size B: the number of slots, each of which may hold a sequence of length 0."""
        return sum(map(len, self.starts)) if self.starts else self.rows[0]

    @property
    def max_length(self) -> int:
        """The largest room: the longest sequence that fits."""
        return int(self.room[0]) if self.num_sequences else self.num_steps

    @property
    def num_steps(self) -> int:
        """The number of sequential steps of a recurrence."""
        return self.boundaries[-1]

    @functools.cached_property
    def size(self) -> int:
        """The number of cells: the leading axis of packed data, and the cell steps that a recurrence computes."""
        return sum(bucket.size for bucket in self.buckets)

    @property
    def summary(self) -> str:
        """The shape in words: "8 buckets", or "21 rows of 200 steps" if slots share rows."""
        if self.starts:
            return f"{counted(self.rows[0], 'row')} of {counted(self.num_steps, 'step')}"
        return counted(self.num_buckets, "bucket")

    @functools.cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """The buckets in time order."""
        buckets, start, offset = [], 0, 0
        for stop, rows in zip(self.boundaries, self.rows, strict=True):
            buckets.append(Bucket(start, stop, rows, offset))
            start, offset = stop, offset + buckets[-1].size
        return tuple(buckets)

    @functools.cached_property
    def batch_sizes(self) -> np.ndarray:
        """Rows alive at each step, as in torch.nn.utils.rnn.PackedSequence.batch_sizes. int32 [num_steps]."""
        return _frozen(np.repeat(self.rows, np.diff(self.boundaries, prepend=0)))

    @functools.cached_property
    def step_offsets(self) -> np.ndarray:
        """The number of cells before each step, and at the end of all cells. int32 [num_steps + 1]."""
        return _frozen(np.concatenate([[0], np.cumsum(self.batch_sizes)]))

    @property
    def room(self) -> np.ndarray:
        """The room of each slot: the steps that the i-th longest sequence may have, non-increasing. int32 [B]."""
        return self._slots[2]

    @property
    def slot_rows(self) -> np.ndarray:
        """The row of each slot. int32 [B]."""
        return self._slots[0]

    @property
    def slot_starts(self) -> np.ndarray:
        """The step at which each slot starts. int32 [B]."""
        return self._slots[1]

    @functools.cached_property
    def slots_by_row(self) -> np.ndarray:
        """The slots row by row, each row from its first step on. int32 [B]."""
        return _frozen(np.lexsort((self.slot_starts, self.slot_rows)))

    @functools.cached_property
    def row_firsts(self) -> np.ndarray:
        """The place in `slots_by_row` of the first slot of each row. int32 [rows[0]]."""
        return _frozen(np.searchsorted(self.slot_rows[self.slots_by_row], np.arange(self.rows[0])))

    @functools.cached_property
    def slot_begins(self) -> np.ndarray:
        """The first cell of each slot. int32 [B]."""
        return _frozen(self.step_offsets[self.slot_starts] + self.slot_rows)

    @functools.cached_property
    def slot_ends(self) -> np.ndarray:
        """The last cell of each slot. int32 [B]."""
        return _frozen(self.step_offsets[self.slot_starts + self.room - 1] + self.slot_rows)

    @functools.cached_property
    def _slots(self) -> np.ndarray:
        """Row, start and room of each slot, [3, B], the largest room first."""
        if not self.starts:  # rows are already sorted, the longest first
            return _frozen(np.stack([np.arange(self.rows[0]), np.zeros(self.rows[0], int), self._row_ends]))
        counts = np.fromiter(map(len, self.starts), int, len(self.starts))
        steps = np.fromiter(itertools.chain.from_iterable(self.starts), int, self.num_sequences)
        rows = np.repeat(np.arange(len(counts)), counts)
        stops = np.append(steps[1:], 0)
        stops[np.cumsum(counts) - 1] = self._row_ends
        slots = np.stack([rows, steps, stops - steps])
        return _frozen(slots[:, longest_first(slots[2])])

    @property
    def _row_ends(self) -> np.ndarray:
        """The step at which each row ends. [rows[0]]."""
        alive = np.searchsorted(-np.asarray(self.rows), -np.arange(self.rows[0]))  # buckets with rows > i
        return np.asarray(self.boundaries)[alive - 1]

    @functools.cached_property
    def cell_slots(self) -> np.ndarray:
        """The slot that each cell belongs to. int32 [size]."""
        return _frozen(self._cells[0])

    @functools.cached_property
    def cell_steps(self) -> np.ndarray:
        """The step, within its sequence, of each cell. int32 [size]."""
        return _frozen(self._cells[1])

    @functools.cached_property
    def _cells(self) -> np.ndarray:
        """Slot and step of each cell, [2, size], written slot by slot."""
        slots = np.repeat(np.arange(self.num_sequences), self.room)
        first = np.repeat(np.cumsum(self.room) - self.room, self.room)
        steps = np.arange(len(slots)) - first
        cells = np.zeros((2, self.size), np.int32)
        cells[:, self.step_offsets[self.slot_starts[slots] + steps] + self.slot_rows[slots]] = slots, steps
        return cells

    def fits(self, lengths: npt.ArrayLike) -> bool:
        """Returns whether a batch of these lengths fits: the i-th longest has at most the i-th largest room.

        Examples:
          >>> plan = BucketPlan(boundaries=(2, 4), rows=(3, 1))  # rooms 4, 2, 2
          >>> plan.fits([2, 4, 1]), plan.fits([3, 3, 1])
          (True, False)

        Args:
          lengths: [N] concrete whole numbers, in any order; if N < num_sequences, lengths of 0 follow.
        """
        array = concrete_lengths(lengths)
        return len(array) <= self.num_sequences and not self._misfits(array).any()

    def check(self, lengths: npt.ArrayLike) -> None:
        """Raises ValueError unless `fits(lengths)`; it names a sequence, its length and its room."""
        self._check(concrete_lengths(lengths))

    def filled(self, lengths: npt.ArrayLike) -> np.ndarray:
        """Returns the steps of each slot that these lengths fill, [B]. Raises ValueError if they do not fit.

        Examples:
          >>> BucketPlan(boundaries=(2, 4), rows=(3, 1)).filled([1, 3]).tolist()
          [3, 1, 0]
        """
        return self._filled(concrete_lengths(lengths))

    def slack(self, lengths: npt.ArrayLike) -> int:
        """Returns the number of cells that these lengths leave empty. Raises ValueError if they do not fit.

        Examples:
          >>> BucketPlan(boundaries=(2, 4), rows=(3, 1)).slack([2, 4, 1])
          1
        """
        return self.size - int(self._filled(concrete_lengths(lengths)).sum())

    def efficiency(self, lengths: npt.ArrayLike) -> float:
        """Returns the share of cells that these lengths fill, in [0, 1]. Raises ValueError if they do not fit.

        Examples:
          >>> BucketPlan(boundaries=(2, 4), rows=(3, 1)).efficiency([2, 4, 1])
          0.875
        """
        return 1 - self.slack(lengths) / max(self.size, 1)

    def picture(self, lengths: npt.ArrayLike | None = None, *, columns: int = 64, lines: int = 16) -> str:
        """Draws the plan in text: time runs right, rows run down, longest first; slots of a row alternate in shade.

        Examples:
          >>> print(BucketPlan(boundaries=(2, 4), rows=(3, 1)).picture([1, 3, 2]))
          ███░
          ██
          █░

        Args:
          lengths: [N] lengths whose steps are drawn as real cells, the others as slack. Default: all cells are real.
          columns: the most characters of a line; a longer plan is sampled.
          lines: the most lines; a plan of more rows is sampled.

        Raises:
          ValueError: if lengths do not fit.
        """
        filled = None if lengths is None else self._filled(concrete_lengths(lengths))
        return text_picture(self._marks(filled, columns, lines))

    def _checked_starts(self) -> tuple[tuple[int, ...], ...]:
        """Returns `starts` as tuples of ints; empty if each row holds one slot, so that equal plans compare equal."""
        starts = tuple(row if _is_ints(row) else _ints(f"starts[{i}]", row) for i, row in enumerate(self.starts))
        if not any(map(any, starts)) and all(len(row) == 1 for row in starts) and len(starts) in (0, self.rows[0]):
            return ()
        if len(starts) != self.rows[0]:
            raise ValueError(f"starts must have one entry per row, got {len(starts)} for {self.rows[0]} rows.")
        for i, (row, end) in enumerate(zip(starts, self._row_ends.tolist(), strict=True)):
            # Sorted and without duplicates: both checks run in C.
            if not row or row[0] != 0 or row[-1] >= end or (len(row) > 1 and list(row) != sorted(set(row))):
                raise ValueError(
                    f"the starts of a row must increase from 0 and be below its end, got starts[{i}] = "
                    f"{_brief(row)} in a row of {end} steps."
                )
        return starts

    def _misfits(self, lengths: np.ndarray) -> np.ndarray:
        """Returns which sequences, in the caller's order, are longer than their room: bool [N]."""
        order = longest_first(lengths)
        misfits = np.empty(len(lengths), bool)
        misfits[order] = lengths[order] > self.room[: len(lengths)]
        return misfits

    def _check(self, lengths: np.ndarray) -> None:
        """Raises ValueError unless lengths, which are whole and not negative, fit."""
        if len(lengths) > self.num_sequences:
            raise ValueError(
                f"lengths has {len(lengths)} entries, but the plan is for {self.num_sequences} sequences. "
                f"Use a plan for that many (jaxpack.plan_buckets(lengths))."
            )
        misfits = np.flatnonzero(self._misfits(lengths))
        if misfits.size:
            row = misfits[0]
            slot = int(np.flatnonzero(longest_first(lengths) == row)[0])
            raise ValueError(
                f"lengths[{row}] = {lengths[row]} does not fit the plan: its row has room for {self.room[slot]} "
                f"steps. Use a plan that covers it (jaxpack.plan_buckets(lengths)) or truncate the sequence."
            )

    def _filled(self, lengths: np.ndarray) -> np.ndarray:
        """Computes `filled` of lengths that are whole and not negative."""
        self._check(lengths)
        return np.pad(-np.sort(-lengths), (0, self.num_sequences - len(lengths)))

    def _marks(self, filled: np.ndarray | None, columns: int, lines: int) -> Marks:
        """Computes the marks of a picture; `filled` is as in `sampled_cells`, or None to draw all cells as real."""
        slots = self.room if filled is None else filled
        cells = sampled_cells(self._slots, self.batch_sizes, slots, columns, lines)
        real, misfit = int(slots[slots > 0].sum()), int(self.room[slots < 0].sum())
        slack = None if filled is None else self.size - real - misfit
        stairs = [(bucket.start, bucket.stop, bucket.rows) for bucket in self.buckets]
        return Marks(cells, self.rows[0], self.num_steps, stairs, bool(self.starts), real, slack, misfit)

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """The hash, kept because every call of a jitted function needs it and a plan may have a million slots."""
        return hash((self.boundaries, self.rows, self.starts))

    def __getstate__(self) -> dict[str, Any]:
        """Returns the fields alone: values computed from them need no storage, and may change between versions."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __repr__(self) -> str:
        fields = {"boundaries": self.boundaries, "rows": self.rows} | ({"starts": self.starts} if self.starts else {})
        return f"BucketPlan({', '.join(f'{name}={_brief(values)}' for name, values in fields.items())})"

    def _repr_html_(self) -> str:
        """Draws the plan for notebooks."""
        padded = self.num_sequences * self.max_length
        caption = (
            f"BucketPlan: {self.summary}, {counted(self.num_sequences, 'sequence')} of at most "
            f"{counted(self.max_length, 'step')}, {counted(self.size, 'cell')} (padded: {padded:,})"
        )
        return html_picture(functools.partial(self._marks, None), [caption])


def _brief(values: tuple[Any, ...]) -> str:
    """Writes a tuple, abbreviated if it is long."""
    shown = values if len(values) <= _WIDEST_REPR else values[:4] + values[-2:]
    texts = [_brief(value) if isinstance(value, tuple) else str(value) for value in shown]
    if len(shown) < len(values):
        texts.insert(4, "...")
    return f"({', '.join(texts)}{',' * (len(values) == 1)})"


def longest_first(lengths: np.ndarray) -> np.ndarray:
    """Returns the stable order from longest to shortest."""
    return np.argsort(-lengths, kind="stable")


def _is_ints(values: object) -> bool:
    """Returns whether values are a tuple of plain ints already."""
    return type(values) is tuple and set(map(type, values)) <= {int}


def _ints(name: str, values: object) -> tuple[int, ...]:
    """Returns a tuple of plain ints, or raises a TypeError that names the argument."""
    try:
        return tuple(operator.index(value) for value in values)  # type: ignore[attr-defined]
    except TypeError as error:
        raise TypeError(f"{name} must be a tuple of ints, got {values!r}.") from error


def _frozen(array: np.ndarray) -> np.ndarray:
    """Returns a read-only int32 copy, the same in 32-bit and 64-bit JAX."""
    array = array.astype(np.int32)
    array.flags.writeable = False
    return array
