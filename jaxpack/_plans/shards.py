"""Shards: a batch dealt to devices, so that all run one plan with nearly equal real work."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from jaxpack._checks import at_least_one, concrete_lengths
from jaxpack._plans.bucket_plan import BucketPlan, longest_first
from jaxpack._plans.cost import CostModel
from jaxpack._plans.planners import plan_best


def deal(lengths: npt.ArrayLike, num_shards: int) -> np.ndarray:
    """Deals the sequences of a batch to shards, so that one tight plan fits all and their real work is nearly equal.

    The sequences are sorted, longest first, and cut into groups of D. Each shard gets one sequence of every group. The
    i-th longest sequence of a shard is then at most the longest of group i, and no other deal does better: however B
    sequences are dealt, some shard holds i + 1 of the longest i*D + 1. So the plan is the tightest there is. Within a
    group, the shard with the fewest steps so far gets the longest sequence.

    Examples:
      >>> deal([9, 2, 7, 3, 5, 4], 2).tolist()  # 9 + 4 + 2 and 7 + 5 + 3 steps
      [[0, 5, 1], [2, 4, 3]]

    Args:
      lengths: [B] whole numbers >= 0, concrete.
      num_shards: the number D of shards, which divides B.

    Returns:
      int32 [D, B/D], the rows of the batch that each shard holds, longest first.

    Raises:
      TypeError: if lengths are traced or not numbers, or num_shards is not an int.
      ValueError: if lengths are negative or not whole, num_shards is below 1, or B is not a multiple of it.
    """
    return deal_groups(_divided(lengths, num_shards), num_shards)


def plan_shards(
    lengths: npt.ArrayLike, num_shards: int, *, platform: str | None = None, cost_model: CostModel | None = None
) -> BucketPlan:
    """Returns the plan of least cost that fits every shard of `deal(lengths, num_shards)`.

    It is planned from the longest sequence of each group of D. For another kind of plan pass those to its planner:
    `jaxpack.plan_buckets(np.sort(lengths)[::-1][::num_shards])`.

    Examples:
      >>> plan = plan_shards([9, 2, 7, 3, 5, 4], 2, platform="cpu")
      >>> plan.num_sequences, plan.fits([9, 4, 2]), plan.fits([7, 5, 3])
      (3, True, True)

    Args:
      lengths: [B] whole numbers >= 0, concrete.
      num_shards: the number D of shards, which divides B.
      platform, cost_model: as in `jaxpack.plan_best`.

    Returns:
      A plan for B/D sequences.

    Raises:
      TypeError: if lengths are traced or not numbers, or num_shards is not an int.
      ValueError: if lengths are empty, negative or not whole, num_shards is below 1, B is not a multiple of it, or as
        in plan_best about platform and cost_model.
    """
    longest = np.sort(_divided(lengths, num_shards))[::-1][::num_shards]
    return plan_best(longest, platform=platform, cost_model=cost_model)


def deal_groups(lengths: np.ndarray, num_shards: int) -> np.ndarray:
    """Returns the rows of `deal`, also of lengths that do not divide: -1 where a shard has one sequence less."""
    order = longest_first(lengths)
    count = -(-len(lengths) // num_shards)
    rows, totals = np.full((num_shards, count), -1, np.int32), np.zeros(num_shards, np.int64)
    for place in range(count):
        group = order[place * num_shards : (place + 1) * num_shards]
        shards = np.argsort(totals, kind="stable")[: len(group)]
        rows[shards, place] = group
        totals[shards] += lengths[group]
    return rows


def _divided(lengths: npt.ArrayLike, num_shards: int) -> np.ndarray:
    """Returns lengths as an array; raises ValueError unless their number is a multiple of the shards'."""
    array, shards = concrete_lengths(lengths), at_least_one("num_shards", num_shards)
    if missing := -len(array) % shards:
        raise ValueError(
            f"{len(array)} sequences do not divide among {shards} shards. Append {missing} sequences of length 0 (to "
            f"lengths, {missing} zeros), or leave {shards - missing} out."
        )
    return array
