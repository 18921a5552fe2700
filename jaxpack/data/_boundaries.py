"""Length boundaries of buckets, and the plans of their batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from jaxpack._checks import as_int, at_least_one
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._plans.planners import plan_buckets, plan_padded
from jaxpack.data._corpus import Axes, Corpus
from jaxpack.data._cover import Planner, cover

_CAP = 4  # a batch of short sequences has at most this many times the sequences that fit at the mean boundary


def tightest_boundaries(lengths: npt.ArrayLike, count: int) -> tuple[int, ...]:
    """Returns at most `count` boundaries such that padding each sequence to the next one takes the fewest cells.

    The last boundary is the longest length. The number of cells is that of a staircase with as many buckets.

    Examples:
      >>> tightest_boundaries([2, 2, 3, 9], 2)
      (3, 9)
    """
    return plan_buckets(lengths, count).boundaries


def padded_plans(boundaries: Sequence[int], batch_size: int | None, max_cells: int | None) -> tuple[BucketPlan, ...]:
    """Returns a padded plan for each boundary, with as many sequences as batch_size and max_cells allow.

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
    """Returns a plan for each boundary's sequences, with as many as batch_size and max_cells allow.

    A boundary without sequences gets a padded plan.
    """
    most = _most_sequences(boundaries, batch_size, max_cells)
    bucket_of = np.searchsorted(boundaries, lengths)
    plans = []
    for bucket, boundary in enumerate(boundaries):
        found = lengths[bucket_of == bucket]
        held = Axes((Corpus.of(found if found.size else np.array([boundary])),))
        (plan,) = cover(held, most, planner=planner)
        if max_cells is not None and plan.size > max_cells:
            (plan,) = cover(held, None, max_cells=max_cells, planner=planner)
        plans.append(plan)
    return tuple(plans)


def check_boundaries(boundaries: Sequence[int]) -> tuple[int, ...]:
    """Returns boundaries as ints; raises ValueError unless they increase from at least 1."""
    checked = tuple(as_int(f"boundaries[{i}]", boundary) for i, boundary in enumerate(boundaries))
    if not checked or list(checked) != sorted(set(checked)) or checked[0] < 1:
        raise ValueError(f"boundaries must increase from at least 1, got {checked}.")
    return checked


def _most_sequences(boundaries: Sequence[int], batch_size: int | None, max_cells: int | None) -> int:
    """Returns the most sequences of a batch."""
    for name, value in (("batch_size", batch_size), ("max_cells", max_cells)):
        if value is not None:
            at_least_one(name, value)
    if max_cells is not None and boundaries[-1] > max_cells:
        raise ValueError(f"max_cells = {max_cells} does not hold one sequence of {boundaries[-1]} steps.")
    if batch_size is not None:
        return batch_size
    if max_cells is None:
        raise ValueError("pass batch_size, max_cells or both.")
    return max(1, int(_CAP * max_cells / np.mean(boundaries)))
