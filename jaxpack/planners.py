"""How to choose a plan for a batch of lengths: exactly, in few buckets, in rows of several sequences, or padded.

All planners give every sequence room for at least one step, so that a batch of B lengths yields a plan for B
sequences.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from jaxpack.arguments import at_least_one, concrete_lengths
from jaxpack.cost import CostModel
from jaxpack.plan import BucketPlan

_WIDER = 32  # plan_rows tries rows wider by 1/32 each time,
_CLOSE = 0.99  # until no width could save more than 1 %


def plan_exact(lengths: npt.ArrayLike) -> BucketPlan:
    """The tightest plan: PyTorch's packed layout, no slack, one bucket per distinct length.

    Examples:
      >>> jaxpack.plan_exact([4, 2, 1])
      BucketPlan(boundaries=(1, 2, 4), rows=(3, 2, 1))

    Args:
      lengths: [B] whole numbers >= 0, concrete.

    Raises:
      TypeError: if lengths are traced or no numbers.
      ValueError: if they are empty, negative or not whole.
    """
    boundaries, rows = _stairs(lengths)
    return BucketPlan(tuple(boundaries.tolist()), tuple(rows.tolist()))


def plan_padded(batch_size: int, max_length: int) -> BucketPlan:
    """The loosest plan: one bucket, the padded batch.

    Examples:
      >>> jaxpack.plan_padded(3, 4)
      BucketPlan(boundaries=(4,), rows=(3,))

    Raises:
      TypeError: if an argument is no int.
      ValueError: if an argument is below 1.
    """
    rows, steps = at_least_one("batch_size", batch_size), at_least_one("max_length", max_length)
    return BucketPlan((steps,), (rows,))


def plan_buckets(
    lengths: npt.ArrayLike,
    num_buckets: int | None = None,
    *,
    row_multiple: int = 1,
    cost_model: CostModel | None = None,
) -> BucketPlan:
    """The staircase of fewest cells with at most `num_buckets` buckets, or with as many as pay for themselves.

    An exact dynamic programme over the distinct lengths. With e_0 = 0 < e_1 < ... the places where a row may end and
    n_i the rows alive after e_i, the least number of cells before e_j in k buckets is

        f_k(j) = min over i < j of  f_{k-1}(i) + (e_j - e_i) n_i

    The cost (e_j - e_i) n_i is a Monge array, so the best i grows with j: each f_k takes U log U operations for U
    distinct lengths, all of a level at once in NumPy; and f_k is convex in k, so the search over k may stop early.

    Examples:
      >>> jaxpack.plan_buckets([4, 2, 1], 2)
      BucketPlan(boundaries=(2, 4), rows=(3, 1))

    Args:
      lengths: [B] whole numbers >= 0, concrete.
      num_buckets: the most buckets to use. Default: as many as pay for themselves.
      row_multiple: rows of every bucket are rounded up to a multiple of it (but never above B): 8 fills the tiles of
        TPUs and GPUs.
      cost_model: says how many cells a further bucket must save to be used. Default: any if num_buckets is given,
        else as many as CostModel() says.

    Raises:
      TypeError: if lengths are traced or no numbers.
      ValueError: if lengths are empty, negative or not whole, or an option is below its least value.
    """
    if num_buckets is not None:
        at_least_one("num_buckets", num_buckets)
    at_least_one("row_multiple", row_multiple)
    if cost_model is None and num_buckets is None:
        cost_model = CostModel()
    bucket_cost = cost_model.bucket_cells if cost_model else 0
    ends, rows = _stairs(lengths)
    rows = np.minimum(-(-rows // row_multiple) * row_multiple, rows[0])
    last_of_its_rows = np.append(rows[1:] < rows[:-1], True)
    ends, rows = ends[last_of_its_rows], rows[last_of_its_rows]
    return BucketPlan(*_fewest_cells(ends, rows, num_buckets or len(rows), bucket_cost))


def plan_rows(
    lengths: npt.ArrayLike,
    num_rows: int | None = None,
    *,
    num_buckets: int = 1,
    cost_model: CostModel | None = None,
) -> BucketPlan:
    """A rectangle whose rows hold several sequences each, end to end: one loop, and hardly any slack.

    Sequences are packed best fit first: the longest first, each into the fullest row that has room for it. What is left
    of a row is room for its last, shortest sequence.

    Examples:
      >>> jaxpack.plan_rows([4, 2, 1], 2)
      BucketPlan(boundaries=(4,), rows=(2,), starts=((0,), (0, 2)))

    Args:
      lengths: [B] whole numbers >= 0, concrete.
      num_rows: the most rows to use, which are then as short as was found. Default: as many as cost least.
      num_buckets: the most buckets to use. With more than one, rows may end before the longest does, in a staircase:
        worth it where a few sequences are much longer than a row need be, or the last slack counts.
      cost_model: weighs the cells that wider rows save against the steps that they take. Default: CostModel().

    Raises:
      TypeError: if lengths are traced or no numbers.
      ValueError: if lengths are empty, negative or not whole, or num_rows or num_buckets is below 1.
    """
    if num_rows is not None:
        at_least_one("num_rows", num_rows)
    at_least_one("num_buckets", num_buckets)
    cost_model = cost_model or CostModel()
    longest_first = np.sort(_at_least_one(lengths))[::-1].tolist()
    if num_rows is None:
        return _cheapest_rows(longest_first, num_buckets, cost_model)
    # Best fit opens a row only where all others are filled beyond total/num_rows, so this width suffices.
    width = longest_first[0] + -(-sum(longest_first) // num_rows)
    return _narrowest_rows(longest_first, num_rows, width, num_buckets, cost_model)


def plan_best(lengths: npt.ArrayLike, *, cost_model: CostModel | None = None) -> BucketPlan:
    """The cheaper of `plan_buckets(lengths)` and `plan_rows(lengths)`: for whoever would rather not choose.

    Examples:
      >>> jaxpack.plan_best([5, 5, 5])  # nothing to pack
      BucketPlan(boundaries=(5,), rows=(3,))

    Args:
      lengths: [B] whole numbers >= 0, concrete.
      cost_model: what costs how much. Default: CostModel().

    Raises:
      TypeError: if lengths are traced or no numbers.
      ValueError: if they are empty, negative or not whole.
    """
    cost_model = cost_model or CostModel()
    plans = [planner(lengths, cost_model=cost_model) for planner in (plan_buckets, plan_rows)]
    return min(plans, key=cost_model.total)


def _at_least_one(lengths: npt.ArrayLike) -> np.ndarray:
    """The room that each sequence needs. [B], B >= 1."""
    array = np.maximum(concrete_lengths(lengths), 1)
    if not array.size:
        raise ValueError("lengths is empty: a plan needs at least one sequence.")
    return array


def _stairs(lengths: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The exact staircase: its end steps and the rows alive before each of them."""
    ends, counts = np.unique(_at_least_one(lengths), return_counts=True)
    return ends, np.cumsum(counts[::-1])[::-1]


def _fewest_cells(
    ends: np.ndarray, rows: np.ndarray, most: int, bucket_cost: float
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Boundaries and rows of the best plan over an exact staircase: `ends` [U], and the rows alive before each."""
    last, ends = len(rows), np.append(0, ends)
    cells, choices = ends * rows[0], [np.zeros(last + 1, np.int64)]  # f_1: one bucket
    while len(choices) < min(most, last):
        fewer, choice = _one_more_bucket(cells, ends, rows, len(choices) + 1)
        if cells[last] - fewer[last] <= bucket_cost:
            break
        cells = fewer
        choices.append(choice)
    places = [last]
    for choice in reversed(choices):
        places.append(int(choice[places[-1]]))
    chosen = np.array(places[::-1])
    return tuple(ends[chosen[1:]].tolist()), tuple(rows[chosen[:-1]].tolist())


def _one_more_bucket(
    cells: np.ndarray, ends: np.ndarray, rows: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """f_k from f_{k-1} for k = count >= 2, with the minimising i, by divide and conquer on the monotone minimiser.

    Each pass halves the intervals of j whose minimiser is still unknown, and evaluates the middle of all of them at
    once: `low` and `high` bound j, `left` and `right` bound its minimiser.
    """
    last = len(rows)
    best, choice = np.full(last + 1, np.iinfo(np.int64).max), np.zeros(last + 1, np.int64)
    low, high = np.array([count]), np.array([last])
    left, right = np.array([count - 1]), np.array([last - 1])
    while low.size:
        middle = (low + high) // 2
        width = np.minimum(right, middle - 1) - left + 1
        first = np.cumsum(width) - width
        i = np.arange(width.sum()) + np.repeat(left - first, width)
        cost = cells[i] + (np.repeat(ends[middle], width) - ends[i]) * rows[i]
        best[middle] = np.minimum.reduceat(cost, first)
        at_best = cost == np.repeat(best[middle], width)
        choice[middle] = np.minimum.reduceat(np.where(at_best, i, last), first)
        low, high = np.concatenate([low, middle + 1]), np.concatenate([middle - 1, high])
        left, right = np.concatenate([left, choice[middle]]), np.concatenate([choice[middle], right])
        open_ = low <= high
        low, high, left, right = low[open_], high[open_], left[open_], right[open_]
    return best, choice


def _cheapest_rows(lengths: Sequence[int], num_buckets: int, cost_model: CostModel) -> BucketPlan:
    """The row plan of least cost among those that ever wider rows lead to; lengths are sorted, longest first."""
    total, width = sum(lengths), lengths[0]
    num_rows = len(_best_fit(lengths, width))
    best = _narrowest_rows(lengths, num_rows, width, num_buckets, cost_model)
    while width < total:
        width = min(total, width + -(-width // _WIDER))
        ideal = BucketPlan((width,), (total // width,))  # without slack: no wider rows cost less
        if cost_model.total(ideal) > _CLOSE * cost_model.total(best):
            break
        num_rows = len(_best_fit(lengths, width))
        if cost_model.total(BucketPlan((-(-total // num_rows),), (num_rows,))) < cost_model.total(best):
            rows = _narrowest_rows(lengths, num_rows, width, num_buckets, cost_model)
            best = min(best, rows, key=cost_model.total)
    return best


def _narrowest_rows(
    lengths: Sequence[int], num_rows: int, width: int, num_buckets: int, cost_model: CostModel
) -> BucketPlan:
    """The row plan of at most num_rows rows, enough at `width`, and of the fewest steps that bisection finds to do."""
    least = max(lengths[0], -(-sum(lengths) // num_rows))
    steps = range(least, width)
    width = least + bisect_left(steps, True, key=lambda width: len(_best_fit(lengths, width)) <= num_rows)
    rows = _best_fit(lengths, width)
    stairs: tuple[tuple[int, ...], tuple[int, ...]] = (width,), (len(rows),)
    if num_buckets > 1:
        rows.sort(key=sum, reverse=True)
        stairs = _fewest_cells(*_stairs([sum(row) for row in rows]), num_buckets, cost_model.bucket_cells)
    return BucketPlan(*stairs, tuple((0, *itertools.accumulate(row[:-1])) for row in rows))


def _best_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Lengths, longest first, dealt to rows of a width: each to the fullest row that has room, else to a new one.

    What is left of a row and its number are one int, left * B + row, so that a sorted list of ints finds the row.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for length in lengths:
        place = bisect_left(left, length * len(lengths))
        if place == len(left):
            left.append(width * len(lengths) + len(rows))
            rows.append([])
        row = left.pop(place)
        rows[row % len(lengths)].append(length)
        insort(left, row - length * len(lengths))
    return rows
