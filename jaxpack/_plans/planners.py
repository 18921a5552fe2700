"""Planners: functions that choose a plan for the lengths of a batch.

All planners give every sequence room for at least one step, so that a batch of B lengths yields a plan for B sequences.
A public planner validates its lengths; the private functions take the room that each sequence needs.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxpack._checks import at_least_one, concrete_lengths
from jaxpack._plans.best_fit import DealtRows, Distinct, best_fit, slot_starts
from jaxpack._plans.bucket_plan import INDEX_MAX, SPLIT, BucketPlan
from jaxpack._plans.cost import CostModel, cost_model_for

_WIDER = 32  # plan_rows tries rows wider by 1/32 each time,
_CLOSE = 0.99  # until no width could save more than 1 %.
_MANY = 512  # With more distinct lengths, whose packing takes long, only the best width is narrowed.


def plan_exact(lengths: npt.ArrayLike) -> BucketPlan:
    """Returns the tightest plan: PyTorch's packed layout, without slack, one bucket per distinct length.

    Examples:
      >>> jaxpack.plan_exact([4, 2, 1])
      BucketPlan(boundaries=(1, 2, 4), rows=(3, 2, 1))

    Args:
      lengths: [B] whole numbers >= 0, concrete.

    Raises:
      TypeError: if lengths are traced or not numbers.
      ValueError: if they are empty, negative or not whole, or have more steps in all than int32 can index.
    """
    return exact_plan(_needed_room(lengths))


def exact_plan(room: np.ndarray) -> BucketPlan:
    """Returns the plan of `plan_exact` for sequences that need this room, [B], each at least 1."""
    boundaries, rows = _stairs(room)
    return BucketPlan(tuple(boundaries.tolist()), tuple(rows.tolist()))


def plan_padded(batch_size: int, max_length: int) -> BucketPlan:
    """Returns the plan of a padded batch: one bucket.

    Examples:
      >>> jaxpack.plan_padded(3, 4)
      BucketPlan(boundaries=(4,), rows=(3,))

    Raises:
      TypeError: if an argument is not an int.
      ValueError: if an argument is below 1.
    """
    rows, steps = at_least_one("batch_size", batch_size), at_least_one("max_length", max_length)
    return BucketPlan((steps,), (rows,))


def plan_buckets(
    lengths: npt.ArrayLike,
    num_buckets: int | None = None,
    *,
    row_multiple: int = 1,
    platform: str | None = None,
    cost_model: CostModel | None = None,
) -> BucketPlan:
    """Returns the staircase with the fewest cells for at most `num_buckets` buckets, or for as many as pay off.

    An exact dynamic programme over the distinct lengths. With e_0 = 0 < e_1 < ... the places where a row may end, n_i
    the rows alive after e_i and p the price of a bucket in cells, the least cost of all steps before e_j is

        f(j) = min over i < j of  f(i) + (e_j - e_i) n_i + p

    Each i is a line in e_j, and slopes fall with i, so the lower envelope of the lines gives all f in U operations for
    U distinct lengths. The least number of cells in k buckets is convex in k, because (e_j - e_i) n_i is a Monge array:
    raising the price reduces the buckets to `num_buckets`.

    Examples:
      >>> jaxpack.plan_buckets([4, 2, 1], 2)
      BucketPlan(boundaries=(2, 4), rows=(3, 1))

    Args:
      lengths: [B] whole numbers >= 0, concrete.
      num_buckets: the most buckets to use. Default: as many as pay for themselves.
      row_multiple: the rows of each bucket are rounded up to a multiple of this (but not above B): 8 fills the tiles of
        TPUs and GPUs.
      platform: as in plan_best.
      cost_model: determines how many cells a further bucket must save, CostModel.bucket_cells. Default: 1 if
        num_buckets is given and platform is not, else as in plan_best.

    Raises:
      TypeError: if lengths are traced or not numbers.
      ValueError: if lengths are empty, negative or not whole, or have more steps in all than int32 can index; if an
        option is below its least value; or as in plan_best about platform and cost_model.
    """
    if num_buckets is not None:
        at_least_one("num_buckets", num_buckets)
    at_least_one("row_multiple", row_multiple)
    if num_buckets is None or platform is not None:
        cost_model = cost_model_for(platform, cost_model)
    return staircase_plan(_needed_room(lengths), num_buckets, row_multiple, cost_model)


def staircase_plan(
    room: np.ndarray, num_buckets: int | None, row_multiple: int, cost_model: CostModel | None
) -> BucketPlan:
    """Returns the plan of `plan_buckets` for sequences that need this room; without a cost model buckets are free."""
    bucket_cost = cost_model.bucket_cells if cost_model else 0
    ends, rows = _stairs(room)
    rows = np.minimum(-(-rows // row_multiple) * row_multiple, rows[0])
    last_of_its_rows = np.append(rows[1:] < rows[:-1], True)
    ends, rows = ends[last_of_its_rows], rows[last_of_its_rows]
    return BucketPlan(*_fewest_cells(ends, rows, num_buckets or len(rows), bucket_cost))


def plan_rows(
    lengths: npt.ArrayLike,
    num_rows: int | None = None,
    *,
    num_buckets: int = 1,
    platform: str | None = None,
    cost_model: CostModel | None = None,
) -> BucketPlan:
    """Returns a rectangle whose rows hold several sequences each, end to end: one loop, and hardly any slack.

    Sequences are packed by best fit: the longest first, each into the fullest row that has room for it. The rest of a
    row is room for its last, shortest sequence. Sequences of equal length are dealt to equally full rows at once, so
    the time grows with the number of distinct lengths: a million sequences take seconds.

    Examples:
      >>> jaxpack.plan_rows([4, 2, 1], 2)
      BucketPlan(boundaries=(4,), rows=(2,), starts=((0,), (0, 2)))

    Args:
      lengths: [B] whole numbers >= 0, concrete.
      num_rows: the most rows to use, made as short as possible. Default: the number that costs least.
      num_buckets: the most buckets to use. With more than one, rows may end before the longest row does, in a
        staircase: this pays off if a few sequences are much longer than the other rows, or if every slack cell counts.
      platform: as in plan_best.
      cost_model: weighs the cells that wider rows save against their further steps. Default: as in plan_best.

    Raises:
      TypeError: if lengths are traced or not numbers.
      ValueError: if lengths are empty, negative or not whole, or have more steps in all than int32 can index; if
        num_rows or num_buckets is below 1; or as in plan_best about platform and cost_model.
    """
    if num_rows is not None:
        at_least_one("num_rows", num_rows)
    at_least_one("num_buckets", num_buckets)
    return row_plan(_needed_room(lengths), num_rows, num_buckets, cost_model_for(platform, cost_model))


def row_plan(room: np.ndarray, num_rows: int | None, num_buckets: int, cost_model: CostModel) -> BucketPlan:
    """Returns the plan of `plan_rows` for sequences that need this room."""
    batch = Distinct.of(room)
    if num_rows is None:
        return _cheapest_rows(batch, num_buckets, cost_model).plan(sort_rows=num_buckets > 1)
    # Best fit opens a row only if all others are filled beyond total/num_rows, so this width suffices.
    width = batch.longest + -(-batch.total // num_rows)
    return _narrowest_rows(batch, num_rows, width, num_buckets, cost_model).plan(sort_rows=num_buckets > 1)


def plan_best(
    lengths: npt.ArrayLike, *, platform: str | None = None, cost_model: CostModel | None = None
) -> BucketPlan:
    """Returns the cheaper of `plan_buckets(lengths)` and `plan_rows(lengths)` on a platform.

    Examples:
      >>> jaxpack.plan_best([5, 5, 5])  # equal lengths: the padded plan
      BucketPlan(boundaries=(5,), rows=(3,))
      >>> lengths = [40] * 8 + [10] * 8
      >>> jaxpack.plan_best(lengths, platform="cpu").rows, jaxpack.plan_best(lengths, platform="gpu").rows
      ((10,), (16,))

    Args:
      lengths: [B] whole numbers >= 0, concrete.
      platform: "cpu", "gpu" (or "cuda", "rocm") or "tpu": where the plan will run, with the estimates of
        `CostModel.for_platform`. Default: that of `jax.default_backend()`.
      cost_model: other estimates, instead of a platform.

    Raises:
      TypeError: if lengths are traced or not numbers.
      ValueError: if they are empty, negative or not whole, or have more steps in all than int32 can index; if the
        platform is unknown, or both platform and cost_model are given.
    """
    room, cost_model = _needed_room(lengths), cost_model_for(platform, cost_model)
    return min(staircase_plan(room, None, 1, cost_model), row_plan(room, None, 1, cost_model), key=cost_model.total)


def _needed_room(lengths: npt.ArrayLike) -> np.ndarray:
    """Validates lengths and returns the room that each sequence needs, at least 1: int64 [B], B >= 1."""
    array = np.maximum(concrete_lengths(lengths), 1)
    if not array.size:
        raise ValueError("lengths is empty: a plan needs at least one sequence.")
    total = array.sum(dtype=float)  # a float does not overflow
    if total > INDEX_MAX:
        raise ValueError(f"lengths has {total:.0f} steps in all, more than int32 can index. {SPLIT}")
    return array


def _stairs(ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the exact staircase of rows with these ends: the distinct ends, and the rows alive before each."""
    ends, counts = np.unique(ends, return_counts=True)
    return ends, np.cumsum(counts[::-1])[::-1]


def _fewest_cells(
    stair_ends: np.ndarray, stair_rows: np.ndarray, most: int, bucket_cost: float
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns boundaries and rows of the best plan with at most `most` buckets over an exact staircase.

    If there are more than `most` buckets at the price `bucket_cost`, the price is raised. The next price is the mean
    saving per bucket between a choice of too many buckets and one of few enough. If no choice is between them, both are
    best at that price, and so is a part of one followed by a part of the other.

    Args:
      stair_ends: [U], the steps at which rows of the exact staircase end.
      stair_rows: [U], the rows alive before each of them.
      most: the most buckets.
      bucket_cost: the price of a bucket in cells.
    """
    ends, rows = [0, *stair_ends.tolist()], stair_rows.tolist()
    many = _cheapest_buckets(ends, rows, math.floor(bucket_cost))
    few = [0, len(rows)]
    while len(many) - 1 > most > len(few) - 1:
        saved, buckets = _cells(few, ends, rows) - _cells(many, ends, rows), len(many) - len(few)
        between = _cheapest_buckets(ends, rows, saved // buckets)
        if len(between) <= len(few):
            many = _spliced(few, many, most)
        elif len(between) - 1 > most:
            many = between
        else:
            few = between
    places = few if len(many) - 1 > most else many
    return tuple(ends[place] for place in places[1:]), tuple(rows[place] for place in places[:-1])


def _cells(places: Sequence[int], ends: Sequence[int], rows: Sequence[int]) -> int:
    """Returns the number of cells of buckets that end at these places of a staircase."""
    return sum((ends[stop] - ends[start]) * rows[start] for start, stop in itertools.pairwise(places))


def _cheapest_buckets(ends: Sequence[int], rows: Sequence[int], price: int) -> list[int]:
    """Returns the places, from 0 to U, that bound the buckets of least cost; of equal choices the fewest buckets.

    Cells and buckets are one int, cells * (U + 1) + buckets, so that the fewest buckets win if cells are equal.
    """
    scale = len(rows) + 1
    best, choice = [0] * scale, [0] * scale
    lines: list[tuple[int, int, int]] = []  # slope, value at 0 and place of the lines on the lower envelope
    first = 0  # the first line that can be lowest here or later
    for stop in range(1, scale):
        start = stop - 1
        slope = rows[start] * scale
        line = slope, best[start] - ends[start] * slope, start
        while len(lines) - first > 1 and _is_hidden(lines[-1], lines[-2], line):
            lines.pop()
        lines.append(line)
        end = ends[stop]
        while first + 1 < len(lines):
            (slope, base, _), (next_slope, next_base, _) = lines[first : first + 2]
            if slope * end + base <= next_slope * end + next_base:
                break
            first += 1
        slope, base, choice[stop] = lines[first]
        best[stop] = slope * end + base + price * scale + 1
    places = [len(rows)]
    while places[-1]:
        places.append(choice[places[-1]])
    return places[::-1]


def _is_hidden(line: tuple[int, int, int], before: tuple[int, int, int], after: tuple[int, int, int]) -> bool:
    """Returns whether a line is nowhere below both of two others, one steeper and one flatter."""
    return (after[1] - before[1]) * (before[0] - line[0]) <= (line[1] - before[1]) * (before[0] - after[0])


def _spliced(few: Sequence[int], many: Sequence[int], count: int) -> list[int]:
    """Joins two choices that are best at one price, of fewer and of more buckets, to one of `count` that is best too.

    Some bucket of `few` spans the bucket of `many` that is as many places further on as buckets are to be saved. By the
    Monge property, the two choices that change over within that bucket cost together no more than the two given.
    """
    ahead = len(many) - 1 - count
    i = next(i for i in range(len(few)) if many[i + 1 + ahead] <= few[i + 1])
    return [*few[: i + 1], *many[i + 1 + ahead :]]


class _DealtPlan(NamedTuple):
    """A row plan before its slots are written out: its staircase, its cost, and the contents of its rows."""

    boundaries: tuple[int, ...]
    rows: tuple[int, ...]
    cost: float
    dealt: DealtRows

    def plan(self, *, sort_rows: bool) -> BucketPlan:
        """Returns the plan; with sort_rows, fuller rows come first, as in a staircase."""
        return BucketPlan(self.boundaries, self.rows, slot_starts(self.dealt, sort_rows=sort_rows))


def _cheapest_rows(batch: Distinct, num_buckets: int, cost_model: CostModel) -> _DealtPlan:
    """Returns the row plan of least cost among those of wider and wider rows.

    With many distinct lengths, whose packing takes long, only the best width is narrowed, and the search ends earlier,
    because it assumes the higher cost of cells in shared rows.
    """
    total, width, many = batch.total, batch.longest, len(batch.lengths) > _MANY
    best = _dealt_rows(batch, width, num_buckets, cost_model)
    while width < total:
        width = min(total, width + -(-width // _WIDER))
        # Without slack: no wider rows cost less.
        ideal = cost_model._total(width * (total // width), width, shared=many)
        if ideal > _CLOSE * best.cost:
            break
        if many:
            best = min(best, _dealt_rows(batch, width, num_buckets, cost_model), key=_cost)
            continue
        num_rows = best_fit(batch, width).num_rows
        if cost_model._total(-(-total // num_rows) * num_rows, -(-total // num_rows)) < best.cost:
            best = min(best, _narrowest_rows(batch, num_rows, width, num_buckets, cost_model), key=_cost)
    if many:
        num_rows, width = best.rows[0], best.boundaries[-1]
        best = min(best, _narrowest_rows(batch, num_rows, width, num_buckets, cost_model), key=_cost)
    return best


def _narrowest_rows(batch: Distinct, num_rows: int, width: int, num_buckets: int, cost_model: CostModel) -> _DealtPlan:
    """Returns the row plan with at most num_rows rows, which suffice at `width`, of the least width by bisection."""
    least = max(batch.longest, -(-batch.total // num_rows))
    steps = range(least, width)
    width = least + bisect_left(steps, True, key=lambda width: best_fit(batch, width).num_rows <= num_rows)
    return _dealt_rows(batch, width, num_buckets, cost_model)


def _dealt_rows(batch: Distinct, width: int, num_buckets: int, cost_model: CostModel) -> _DealtPlan:
    """Returns the row plan of one width; with several buckets its rows may end in a staircase."""
    dealt = best_fit(batch, width)
    boundaries: tuple[int, ...] = (width,)
    rows: tuple[int, ...] = (dealt.num_rows,)
    if num_buckets > 1:
        room, blocks = np.array(dealt.blocks).T
        boundaries, rows = _fewest_cells(
            *_stairs(np.repeat(width - room, blocks)), num_buckets, cost_model.bucket_cells
        )
    cells = _cells(range(len(rows) + 1), (0, *boundaries), rows)
    shared = dealt.num_rows < batch.batch_size
    return _DealtPlan(boundaries, rows, cost_model._total(cells, boundaries[-1], len(rows), shared), dealt)


def _cost(rows: _DealtPlan) -> float:
    return rows.cost
