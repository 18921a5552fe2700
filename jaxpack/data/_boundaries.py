"""Boundaries of length, and the plans of the batches between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from jaxpack._checks import as_int, at_least_one
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._plans.planners import plan_buckets, plan_padded
from jaxpack.data._cover import Planner, plan_cover

_CAP = 4  # a batch of short sequences holds at most so many times what the budget holds of the mean boundary


def tightest_boundaries(lengths: npt.ArrayLike, count: int) -> tuple[int, ...]:
    """At most `count` lengths to pad to, the last the longest, that take the fewest cells.

    Padding each sequence to the next boundary takes as many cells as the staircase of as many buckets has.

    Examples:
      >>> tightest_boundaries([2, 2, 3, 9], 2)
      (3, 9)
    """
    return plan_buckets(lengths, count).boundaries


def padded_plans(boundaries: Sequence[int], batch_size: int | None, max_cells: int | None) -> tuple[BucketPlan, ...]:
    """A padded plan for each boundary, of as many sequences as the budget holds.

    Examples:
      >>> padded_plans([4, 8], 5, 24)
      (BucketPlan(boundaries=(4,), rows=(5,)), BucketPlan(boundaries=(8,), rows=(3,)))
    """
    most = _most_sequences(boundaries, batch_size, max_cells)
    return tuple(
        plan_padded(most if max_cells is None else min(most, max_cells // boundary), boundary)
        for boundary in boundaries
    )


def covering_plans(
    lengths: np.ndarray,
    boundaries: Sequence[int],
    batch_size: int | None,
    max_cells: int | None,
    planner: Planner | None,
) -> tuple[BucketPlan, ...]:
    """A plan for the sequences up to each boundary, of as many as the budget holds; padded where there are none."""
    most = _most_sequences(boundaries, batch_size, max_cells)
    bucket_of = np.searchsorted(boundaries, lengths)
    plans = []
    for bucket, boundary in enumerate(boundaries):
        held = lengths[bucket_of == bucket]
        if not held.size:
            held = np.array([boundary])
        plan = plan_cover(held, most, planner=planner)
        if max_cells is not None and plan.size > max_cells:
            plan = plan_cover(held, max_cells=max_cells, planner=planner)
        plans.append(plan)
    return tuple(plans)


def check_boundaries(boundaries: Sequence[int]) -> tuple[int, ...]:
    """Boundaries as ints; raises ValueError unless they increase from at least 1."""
    checked = tuple(as_int(f"boundaries[{i}]", boundary) for i, boundary in enumerate(boundaries))
    if not checked or list(checked) != sorted(set(checked)) or checked[0] < 1:
        raise ValueError(f"boundaries must increase from at least 1, got {checked}.")
    return checked


def _most_sequences(boundaries: Sequence[int], batch_size: int | None, max_cells: int | None) -> int:
    """The cap on a batch's sequences."""
    for name, value in (("batch_size", batch_size), ("max_cells", max_cells)):
        if value is not None:
            at_least_one(name, value)
    if max_cells is not None and boundaries[-1] > max_cells:
        raise ValueError(f"max_cells = {max_cells} does not hold one sequence of {boundaries[-1]} steps.")
    if batch_size is not None:
        return batch_size
    if max_cells is None:
        raise ValueError("give batch_size, max_cells or both.")
    return max(1, int(_CAP * max_cells / np.mean(boundaries)))
