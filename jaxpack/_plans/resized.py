"""Plans for sequences whose lengths change: derived from the plan of the old lengths alone, without planning anew."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxpack._plans.bucket_plan import BucketPlan


def resized(plan: BucketPlan, count: Callable[[np.ndarray], np.ndarray]) -> BucketPlan:
    """Returns the plan for sequences whose lengths a function changes.

    Slots keep their rows and their order. The room of each becomes count(room), at least 1; the last slot of a row may
    have more, because rows must still form a staircase. Buckets that end at the same step become one. Since the count
    does not decrease, lengths that fit the plan fit the new one after the change: the i-th longest stays in slot i.

    Args:
      plan: the plan of the old lengths.
      count: the new lengths of old ones, int arrays [N]; it must not decrease as lengths grow.
    """
    if not plan.num_sequences:
        return BucketPlan((max(int(count(np.array([plan.num_steps]))[0]), 1),), (0,))
    widths = np.maximum(count(plan.room.astype(np.int64)), 1)[plan.slots_by_row]
    totals = np.add.reduceat(widths, plan.row_firsts)
    ends = np.maximum.accumulate(totals[::-1])[::-1]  # a row ends no earlier than those below it
    boundaries: list[int] = []
    rows: list[int] = []
    for alive, next_alive in zip(plan.rows, (*plan.rows[1:], 0), strict=True):
        # Rows from next_alive on end with this bucket.
        if next_alive < alive and (not boundaries or ends[next_alive] > boundaries[-1]):
            boundaries.append(int(ends[next_alive]))
            rows.append(alive)
    return BucketPlan(tuple(boundaries), tuple(rows), _starts(plan, widths) if plan.starts else ())


def _starts(plan: BucketPlan, widths: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Returns the starts of slots that are laid end to end in each row, given their widths, row by row."""
    parts = np.split(widths, plan.row_firsts[1:])
    return tuple((0, *np.cumsum(part)[:-1].tolist()) for part in parts)
