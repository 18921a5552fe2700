"""How to choose a plan for a batch of lengths: exactly, in few buckets, or padded.

All planners give every sequence room for at least one step, so that a batch of B lengths yields a plan for B
sequences.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from jaxpack.plan import BucketPlan, as_int, concrete_lengths

# A bucket is worth its place if it saves this share of the batch's real cells. Measured on 2 CPU cores (LSTM, B=64,
# F=128, H=256, log-normal lengths, training): 16 us a cell, 60 us a step, 0.4 s of compilation a bucket. 2 % of the
# cells is then 1.5 ms of an 85 ms training step, which pays for its bucket after some 250 steps.
_WORTHWHILE = 1 / 50


def plan_exact(lengths: npt.ArrayLike) -> BucketPlan:
    """The tightest plan: PyTorch's packed layout, no slack, one bucket per distinct length.

    plan_exact([4, 2, 1]) = BucketPlan(boundaries=(1, 2, 4), rows=(3, 2, 1))

    Args:
      lengths: [B] whole numbers >= 0, concrete.

    Raises:
      TypeError: if lengths are traced or no numbers. ValueError: if they are empty, negative or not whole.
    """
    boundaries, rows = _stairs(lengths)
    return BucketPlan(tuple(boundaries.tolist()), tuple(rows.tolist()))


def plan_padded(batch_size: int, max_length: int) -> BucketPlan:
    """The loosest plan: one bucket, the padded batch.

    plan_padded(3, 4) = BucketPlan(boundaries=(4,), rows=(3,))

    Raises:
      TypeError: if an argument is no int. ValueError: if an argument is below 1.
    """
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        if as_int(name, value) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    return BucketPlan((max_length,), (batch_size,))


def plan_buckets(
    lengths: npt.ArrayLike,
    num_buckets: int | None = None,
    *,
    row_multiple: int = 1,
    bucket_cost: float | None = None,
) -> BucketPlan:
    """The staircase of fewest cells with at most `num_buckets` buckets.

    plan_buckets([4, 2, 1], 2) = BucketPlan(boundaries=(2, 4), rows=(3, 1))

    An exact dynamic programme over the distinct lengths. With e_0 = 0 < e_1 < ... the places where a row may end and
    n_i the rows alive after e_i, the least number of cells before e_j in k buckets is

        f_k(j) = min over i < j of  f_{k-1}(i) + (e_j - e_i) n_i

    The cost (e_j - e_i) n_i is a Monge array, so the best i grows with j: each f_k takes U log U operations for U
    distinct lengths, all of a level at once in NumPy; and f_k is convex in k, so the search over k may stop early.

    Args:
      lengths: [B] whole numbers >= 0, concrete.
      num_buckets: the most buckets to use. Default: as many as are worth their cost.
      row_multiple: rows of every bucket are rounded up to a multiple of it (but never above B): 8 fills the tiles of
        TPUs and GPUs.
      bucket_cost: how many cells a further bucket must save to be used. Default: 0 if num_buckets is given, else
        1/50 of the batch's real cells.

    Raises:
      TypeError: if lengths are traced or no numbers.
      ValueError: if lengths are empty, negative or not whole, or an option is below its least value.
    """
    if num_buckets is not None and as_int("num_buckets", num_buckets) < 1:
        raise ValueError(f"num_buckets must be at least 1, got {num_buckets}.")
    if as_int("row_multiple", row_multiple) < 1:
        raise ValueError(f"row_multiple must be at least 1, got {row_multiple}.")
    if bucket_cost is not None and not bucket_cost >= 0:
        raise ValueError(f"bucket_cost must be 0 or more cells, got {bucket_cost}.")
    ends, rows = _stairs(lengths)
    if bucket_cost is None:
        bucket_cost = 0 if num_buckets is not None else _WORTHWHILE * np.diff(ends, prepend=0) @ rows
    rows = np.minimum(-(-rows // row_multiple) * row_multiple, rows[0])
    last_of_its_rows = np.append(rows[1:] < rows[:-1], True)
    ends, rows = ends[last_of_its_rows], rows[last_of_its_rows]
    chosen = _fewest_cells(np.append(0, ends), rows, num_buckets or len(rows), bucket_cost)
    boundaries, starts = chosen[1:], chosen[:-1]
    return BucketPlan(tuple(ends[boundaries - 1].tolist()), tuple(rows[starts].tolist()))


def _stairs(lengths: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The exact staircase: its end steps and the rows alive before each of them."""
    array = np.maximum(concrete_lengths(lengths), 1)
    if not array.size:
        raise ValueError("lengths is empty: a plan needs at least one sequence.")
    ends, counts = np.unique(array, return_counts=True)
    return ends, np.cumsum(counts[::-1])[::-1]


def _fewest_cells(ends: np.ndarray, rows: np.ndarray, most: int, bucket_cost: float) -> np.ndarray:
    """Indices into `ends` [U + 1], from 0 to U, between which the buckets of the best plan lie."""
    last = len(rows)
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
    return np.array(places[::-1])


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
