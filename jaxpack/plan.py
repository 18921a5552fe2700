"""BucketPlan: the static shape of a packed batch.

A plan is made of plain ints, so it hashes, compares by value, can be written beside a checkpoint, and can be
part of a jitted function's cache key: one plan is one compiled program. Lengths stay dynamic; whatever fits
under the plan runs through that program.

The vocabulary, for lengths [4, 2, 1] under boundaries (2, 4), rows (3, 1):

    step     0 1 | 2 3
    row 0    x x | x x      bucket 0: steps [0, 2), rows [0, 3)
    row 1    x x |          bucket 1: steps [2, 4), rows [0, 1)
    row 2    x . |          .  is slack: a cell of the plan past its sequence's end

Sequence i, counted from the longest, lives in *slot* i: a row, the step it starts at, and the room it has.
In a staircase every row holds one slot that starts at step 0. What maps sequences to cells is written in terms
of slots, never in terms of rows.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_INDEX_MAX = np.iinfo(np.int32).max
_WIDEST_REPR = 12  # buckets that repr writes out before it abbreviates


class Bucket(NamedTuple):
    """One stair: steps [start, stop) on rows [0, rows), whose cells begin at `offset` in the packed data."""

    start: int
    stop: int
    rows: int
    offset: int

    @property
    def steps(self) -> int:
        """How many steps the bucket spans."""
        return self.stop - self.start

    @property
    def size(self) -> int:
        """How many cells the bucket holds."""
        return self.steps * self.rows


@dataclasses.dataclass(frozen=True, repr=False)
class BucketPlan:
    """A static staircase: which rows are alive over which steps.

    Bucket k spans steps [boundaries[k-1], boundaries[k]) for rows [0, rows[k]).

    BucketPlan(boundaries=(2, 4), rows=(3, 1)).size = 2*3 + 2*1 = 8

    Args:
      boundaries: the end step of each bucket, strictly increasing.
      rows: how many rows are alive in each bucket, non-increasing and at least 1.

    Raises:
      TypeError: if an entry is no int.
      ValueError: if the two differ in length, are empty, or are not a staircase.
    """

    boundaries: tuple[int, ...]
    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        boundaries, rows = _ints("boundaries", self.boundaries), _ints("rows", self.rows)
        if len(boundaries) != len(rows) or not rows:
            raise ValueError(
                f"boundaries and rows must have one entry per bucket and at least one bucket, "
                f"got {len(boundaries)} boundaries and {len(rows)} rows."
            )
        if any(stop <= start for start, stop in itertools.pairwise((0, *boundaries))):
            raise ValueError(f"boundaries must increase strictly from above 0, got {boundaries}.")
        if any(later > earlier for earlier, later in itertools.pairwise(rows)) or rows[-1] < 1:
            raise ValueError(f"rows must not increase and must be at least 1, got {rows}.")
        object.__setattr__(self, "boundaries", boundaries)
        object.__setattr__(self, "rows", rows)
        if self.size > _INDEX_MAX:
            raise ValueError(f"the plan has {self.size} cells, more than int32 can index. Split the batch.")

    @property
    def num_buckets(self) -> int:
        """How many buckets, and so how many loops in the program."""
        return len(self.rows)

    @property
    def num_sequences(self) -> int:
        """The batch size B; counts sequences that may stay empty."""
        return self.rows[0]

    @property
    def max_length(self) -> int:
        """The largest room: no longer sequence fits."""
        return int(self.room[0])

    @property
    def num_steps(self) -> int:
        """How many steps the recurrence makes, one after the other."""
        return self.boundaries[-1]

    @property
    def size(self) -> int:
        """How many cells the plan has: the leading axis of the packed data, and the cell steps computed."""
        return sum(bucket.size for bucket in self.buckets)

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
        """Cells before each step, and at the end all of them. int32 [num_steps + 1]."""
        return _frozen(np.concatenate([[0], np.cumsum(self.batch_sizes)]))

    @functools.cached_property
    def room(self) -> np.ndarray:
        """Steps that the i-th longest sequence may have: the room of slot i, non-increasing. int32 [B]."""
        alive = np.searchsorted(-np.asarray(self.rows), -np.arange(self.num_sequences))  # buckets with rows > i
        return _frozen(np.asarray(self.boundaries)[alive - 1])

    @functools.cached_property
    def slot_rows(self) -> np.ndarray:
        """The row that each slot lies in. int32 [B]."""
        return _frozen(np.arange(self.num_sequences))

    @functools.cached_property
    def slot_starts(self) -> np.ndarray:
        """The step at which each slot starts. int32 [B]."""
        return _frozen(np.zeros(self.num_sequences, np.int64))

    @functools.cached_property
    def cell_slots(self) -> np.ndarray:
        """The slot that each cell belongs to. int32 [size]."""
        return _frozen(self._cells[0])

    @functools.cached_property
    def cell_steps(self) -> np.ndarray:
        """The step of its own sequence that each cell holds. int32 [size]."""
        return _frozen(self._cells[1])

    @functools.cached_property
    def _cells(self) -> np.ndarray:
        """Slot and step of every cell, [2, size], written slot by slot."""
        slots = np.repeat(np.arange(self.num_sequences), self.room)
        first = np.repeat(np.cumsum(self.room) - self.room, self.room)
        steps = np.arange(len(slots)) - first
        cells = np.zeros((2, self.size), np.int32)
        cells[:, self.step_offsets[self.slot_starts[slots] + steps] + self.slot_rows[slots]] = slots, steps
        return cells

    def fits(self, lengths: npt.ArrayLike) -> bool:
        """Whether a batch of these lengths, in any order, fits: the i-th longest into the i-th largest room.

        Args:
          lengths: [N] concrete whole numbers; a vector shorter than num_sequences counts as followed by zeros.
        """
        array = concrete_lengths(lengths)
        return len(array) <= self.num_sequences and not self._misfits(array).any()

    def check(self, lengths: npt.ArrayLike) -> None:
        """Raises ValueError, naming the sequence, its length and the room it had, unless `fits(lengths)`."""
        array = concrete_lengths(lengths)
        if len(array) > self.num_sequences:
            raise ValueError(
                f"lengths has {len(array)} entries, but the plan is for {self.num_sequences} sequences. "
                f"Use a plan for that many (jaxpack.plan_buckets(lengths))."
            )
        misfits = np.flatnonzero(self._misfits(array))
        if misfits.size:
            row = misfits[0]
            slot = int(np.flatnonzero(_longest_first(array) == row)[0])
            raise ValueError(
                f"lengths[{row}] = {array[row]} does not fit the plan: its row has room for {self.room[slot]} "
                f"steps. Use a plan that covers it (jaxpack.plan_buckets(lengths)) or truncate the sequence."
            )

    def slack(self, lengths: npt.ArrayLike) -> int:
        """Cells of the plan that these lengths leave empty; raises ValueError if they do not fit."""
        self.check(lengths)
        return self.size - int(concrete_lengths(lengths).sum())

    def efficiency(self, lengths: npt.ArrayLike) -> float:
        """The share of the plan's cells that these lengths fill, in [0, 1]; raises ValueError if they do not fit."""
        return 1 - self.slack(lengths) / self.size

    def picture(self, lengths: npt.ArrayLike | None = None, *, columns: int = 64, lines: int = 16) -> str:
        """The staircase in text: time runs right, sequences run down, longest first.

        Args:
          lengths: [N], if given real cells are drawn full and slack is drawn light.
          columns, lines: the largest picture in characters; a larger plan is sampled.
        """
        filled = self.room if lengths is None else -np.sort(-concrete_lengths(lengths))
        filled = np.pad(filled, (0, self.num_sequences - len(filled)))
        steps = _samples(self.num_steps, columns)
        rows = _samples(self.num_sequences, lines)
        lines_of_text = []
        for slot in rows:
            marks = np.where(steps < filled[slot], "█", np.where(steps < self.room[slot], "░", " "))
            lines_of_text.append("".join(marks).rstrip())
        return "\n".join(lines_of_text)

    def _misfits(self, lengths: np.ndarray) -> np.ndarray:
        """[N] which sequences, in the caller's order, are longer than the room they get."""
        order = _longest_first(lengths)
        misfits = np.empty(len(lengths), bool)
        misfits[order] = lengths[order] > self.room[: len(lengths)]
        return misfits

    def __repr__(self) -> str:
        boundaries, rows = (
            str(values)
            if len(values) <= _WIDEST_REPR
            else f"({', '.join(map(str, values[:4]))}, ..., {', '.join(map(str, values[-2:]))})"
            for values in (self.boundaries, self.rows)
        )
        return f"BucketPlan(boundaries={boundaries}, rows={rows})"

    def _repr_html_(self) -> str:
        """A small picture of the staircase for notebooks (inline SVG in the page's own text colour)."""
        width, height = 320, 120
        x, y = width / self.num_steps, height / self.num_sequences
        stairs = "".join(
            f'<rect x="{b.start * x:.2f}" width="{b.steps * x:.2f}" height="{b.rows * y:.2f}" '
            f'fill="currentColor" fill-opacity=".25" stroke="currentColor"/>'
            for b in self.buckets
        )
        padded = self.num_sequences * self.num_steps
        return (
            f"<figure><svg width='{width + 2}' height='{height + 2}' viewBox='-1 -1 {width + 2} {height + 2}'>{stairs}"
            f"</svg><figcaption>{self.num_buckets} buckets, {self.num_sequences} sequences of at most "
            f"{self.max_length} steps, {self.size:,} cells (padded: {padded:,})</figcaption></figure>"
        )


def concrete_lengths(lengths: npt.ArrayLike) -> np.ndarray:
    """Lengths as an int64 NumPy vector.

    Raises:
      TypeError: if they are traced or are no numbers.
      ValueError: if they are no vector, not whole, or negative.
    """
    if lengths is None:
        raise TypeError("lengths must be a vector [B] of integers, got None.")
    try:
        array = np.asarray(lengths)
    except TypeError as error:
        raise TypeError(
            "lengths are traced, but their values are needed here. Compute the plan (or unpack) outside jit, from "
            "concrete lengths."
        ) from error
    check_lengths_type(array.shape, array.dtype)
    whole = np.isfinite(array) & (array == np.floor(array))
    if not whole.all():
        row = int(whole.argmin())
        raise ValueError(f"lengths must be whole numbers, got lengths[{row}] = {array[row]}.")
    if array.size and array.min() < 0:
        row = int(array.argmin())
        raise ValueError(f"lengths[{row}] = {array[row]} is negative. A length is a number of steps, 0 or more.")
    return array.astype(np.int64)


def check_lengths_type(shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
    """Raises unless an array of this shape and dtype can hold lengths: a vector of numbers that may be whole."""
    if len(shape) != 1:
        raise ValueError(f"lengths must be a vector [B], got shape {tuple(shape)}. For stacked batches use jax.vmap.")
    if np.dtype(dtype).kind not in "iuf" and 0 not in shape:
        raise TypeError(f"lengths must be integers, got dtype {np.dtype(dtype).name}.")


def as_int(name: str, value: object) -> int:
    """An int from an argument, or a TypeError that names it."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(f"{name} must be an int, got {value!r}.") from error


def _longest_first(lengths: np.ndarray) -> np.ndarray:
    """The stable order from longest to shortest."""
    return np.argsort(-lengths, kind="stable")


def _samples(size: int, most: int) -> np.ndarray:
    """Indices into range(size), all of them or `most` spread evenly."""
    return np.arange(size) if size <= most else ((np.arange(most) + 0.5) * size / most).astype(int)


def _ints(name: str, values: object) -> tuple[int, ...]:
    try:
        return tuple(operator.index(value) for value in values)  # type: ignore[attr-defined]
    except TypeError as error:
        raise TypeError(f"{name} must be a tuple of ints, got {values!r}.") from error


def _frozen(array: np.ndarray) -> np.ndarray:
    """A constant of the plan: read-only, and int32 in 32-bit and in 64-bit JAX alike."""
    array = array.astype(np.int32)
    array.flags.writeable = False
    return array
