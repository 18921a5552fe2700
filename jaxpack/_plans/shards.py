"""Shards: a batch dealt to devices, so that all run one plan with nearly equal real work."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from jaxpack._checks import at_least_one, concrete_lengths
from jaxpack._plans.bucket_plan import BucketPlan, longest_first
from jaxpack._plans.cost import CostModel
from jaxpack._plans.planners import plan_best

_EVEN = 1.001  # exchanges end when no shard has more steps than this times the mean,
_EXCHANGES = 8  # or after so many for each shard.


def deal(lengths: npt.ArrayLike, num_shards: int, plan: BucketPlan | None = None) -> np.ndarray:
    """Deals the sequences of a batch to shards, so that one tight plan fits all and their real work is nearly equal.

    The sequences are sorted, longest first, and cut into groups of D. Each shard gets one sequence of every group. The
    i-th longest sequence of a shard is then at most the longest of group i, and no other deal does better: however B
    sequences are dealt, some shard holds i + 1 of the longest i*D + 1. So the plan is the tightest there is. Within a
    group, the shard with the fewest steps so far gets the longest sequence. Then the shards with the most and the
    fewest steps exchange sequences, also of different groups, as far as the plan has room.

    Examples:
      >>> deal([9, 2, 7, 3, 5, 4], 2).tolist()  # 9 + 4 + 2 and 7 + 5 + 3 steps
      [[0, 5, 1], [2, 4, 3]]

    Args:
      lengths: [B] whole numbers >= 0, concrete.
      num_shards: the number D of shards, which divides B.
      plan: the plan of every shard, for B/D sequences. Default: the tightest.

    Returns:
      int32 [D, B/D], the rows of the batch that each shard holds.

    Raises:
      TypeError: if lengths are traced or not numbers, or num_shards is not an int.
      ValueError: if lengths are negative or not whole, num_shards is below 1, B is not a multiple of it, or the plan is
        for another number of sequences or has no room for a sequence.
    """
    array = _divided(lengths, num_shards)
    if plan is None:
        return deal_rows(array, num_shards)
    check_shared_plan(plan, array, num_shards)
    return deal_rows(array, num_shards, plan.room)


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


def deal_rows(lengths: np.ndarray, num_shards: int, room: np.ndarray | None = None) -> np.ndarray:
    """Returns the rows of `deal`, also of lengths that do not divide: -1 where a shard has one sequence less.

    Args:
      lengths: int [B].
      num_shards: the number D of shards.
      room: of the plan's slots, longest first, which the groups fit. Default: the longest of each group.
    """
    order = longest_first(lengths)
    count = -(-len(lengths) // num_shards)
    room = lengths[order[::num_shards]] if room is None else room[:count]
    rows, totals = np.full((num_shards, count), -1, np.int32), np.zeros(num_shards, np.int64)
    for place in range(count):
        group = order[place * num_shards : (place + 1) * num_shards]
        shards = np.argsort(totals, kind="stable")[: len(group)]
        rows[shards, place] = group
        totals[shards] += lengths[group]
    _exchange(np.where(rows < 0, 0, lengths[rows]) if count else rows, rows, room)
    return rows


def _exchange(steps: np.ndarray, rows: np.ndarray, room: np.ndarray) -> None:
    """Exchanges sequences between the shards with the most and the fewest steps, in place, while that evens them out.

    The longer one of two must fit the place of the shorter.

    Args:
      steps: [D, N], the length of the sequence at each place of each shard, 0 where there is none.
      rows: [D, N], their rows.
      room: [N], the room of each place.
    """
    totals = steps.sum(axis=1, dtype=np.int64)
    for _ in range(_EXCHANGES * len(rows)):
        most, least = int(totals.argmax()), int(totals.argmin())
        if totals[most] <= totals.mean() * _EVEN:
            return
        by_length = np.argsort(steps[most])
        wanted = np.minimum(steps[least] + (totals[most] - totals[least]) // 2, room)
        found = np.searchsorted(steps[most], wanted, side="right", sorter=by_length) - 1
        gains = np.where(found < 0, 0, steps[most, by_length[found]] - steps[least])
        place = int(gains.argmax())
        if gains[place] <= 0:
            return
        other = by_length[found[place]]
        for array in (steps, rows):
            array[most, other], array[least, place] = array[least, place], array[most, other]
        totals[most] -= gains[place]
        totals[least] += gains[place]


def check_shared_plan(plan: BucketPlan, lengths: np.ndarray, num_shards: int) -> None:
    """Raises ValueError unless the plan is for as many sequences as a shard has, and fits all of them in some deal."""
    count, way_out = -(-len(lengths) // num_shards), f"Use jaxpack.sharding.plan_shards(lengths, {num_shards})."
    if plan.num_sequences != count:
        raise ValueError(
            f"the plan is for {plan.num_sequences} sequences, but {len(lengths)} sequences on {num_shards} shards are "
            f"{count} each. {way_out}"
        )
    order = longest_first(lengths)
    misfits = np.flatnonzero(lengths[order[::num_shards]] > plan.room)
    if misfits.size:
        place = int(misfits[0])
        row = order[place * num_shards]
        raise ValueError(
            f"lengths[{row}] = {lengths[row]} does not fit the plan: of the {place * num_shards + 1} longest sequences "
            f"one of {num_shards} shards has {place + 1}, and the last of them has room for {plan.room[place]} steps. "
            f"{way_out}"
        )


def _divided(lengths: npt.ArrayLike, num_shards: int) -> np.ndarray:
    """Returns lengths as an array; raises ValueError unless their number is a multiple of the shards'."""
    array, shards = concrete_lengths(lengths), at_least_one("num_shards", num_shards)
    if missing := -len(array) % shards:
        raise ValueError(
            f"{len(array)} sequences do not divide among {shards} shards. Append {missing} sequences of length 0 (to "
            f"lengths, {missing} zeros), or leave {shards - missing} out."
        )
    return array
