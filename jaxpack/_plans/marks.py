"""Marks: the contents of a plan's picture, which `BucketPlan` computes and `pictures` draws."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NOTHING, REAL, REAL_TOO, SLACK, MISFIT = range(5)  # kinds of cells; real ones have the two shades of slots in turn


class Marks(NamedTuple):
    """A sampled picture of a plan.

    Attributes:
      cells: int [lines, columns], the kind of each sampled cell.
      num_rows: the rows of the plan.
      num_steps: its steps.
      stairs: the first step, the end step and the rows of each bucket.
      shares_rows: whether several slots share a row.
      real: the number of real cells; without lengths the number of all cells.
      slack: the number of slack cells; None without lengths.
      misfit: the number of cells of sequences that do not fit.
    """

    cells: np.ndarray
    num_rows: int
    num_steps: int
    stairs: list[tuple[int, int, int]]
    shares_rows: bool
    real: int
    slack: int | None
    misfit: int


def sampled_cells(
    slots: np.ndarray, batch_sizes: np.ndarray, filled: np.ndarray, columns: int, lines: int
) -> np.ndarray:
    """Returns the kind of each cell of a plan, sampled evenly to at most [lines, columns].

    It looks cells up slot by slot, so its memory grows with the slots of the plan and the cells of the picture, not
    with the cells of the plan.

    Args:
      slots: [3, B], row, start and room of each slot.
      batch_sizes: [num_steps], the rows alive at each step.
      filled: [B], the real steps of each slot; a negative number for a sequence that does not fit.
      columns: the most columns of the result.
      lines: its most lines.
    """
    slot_rows, slot_starts, _ = slots
    num_steps = len(batch_sizes)
    steps, rows = _samples(num_steps, columns), _samples(batch_sizes[0], lines)[:, None]
    if not rows.size:
        return np.zeros((0, len(steps)), int)
    by_row = np.lexsort((slot_starts, slot_rows))
    first_of_row = slot_starts[by_row] == 0
    order = np.arange(len(by_row))
    place_in_row = order - np.maximum.accumulate(np.where(first_of_row, order, 0))
    begins = slot_rows[by_row].astype(np.int64) * num_steps + slot_starts[by_row]
    found = np.searchsorted(begins, rows.astype(np.int64) * num_steps + steps, side="right") - 1
    slot = by_row[found]
    kinds = np.where(steps - slot_starts[slot] < filled[slot], REAL + place_in_row[found] % 2, SLACK)
    kinds = np.where(filled[slot] < 0, MISFIT, kinds)
    return np.where(rows < batch_sizes[steps], kinds, NOTHING)


def _samples(size: int, most: int) -> np.ndarray:
    """Returns indices into range(size): all of them, or `most` spread evenly."""
    return np.arange(size) if size <= most else ((np.arange(most) + 0.5) * size / most).astype(int)
