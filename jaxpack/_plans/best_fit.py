"""Best fit: sequences dealt to rows of a width, many at a time, so that a million take no longer than a hundred.

The longest go first, each into the fullest row that has room for it, or else into a new one. A row that takes one
sequence is then the fullest, so it takes all of that length that it has room for; and rows that are equally full are
filled alike. So one length is dealt to a block of rows, and there are few such deals: each leaves less than half of the
room that the rows had, or is the last of its length. U distinct lengths and rows of W steps take some U log W deals.
"""

from __future__ import annotations

import heapq
import itertools
from typing import NamedTuple

import numpy as np

from jaxpack._plans.bucket_plan import longest_first


class Distinct(NamedTuple):
    """The distinct lengths of a batch, longest first, and how many sequences have each."""

    lengths: list[int]
    counts: list[int]

    @classmethod
    def of(cls, lengths: np.ndarray) -> Distinct:
        """Those of lengths >= 1, [B]."""
        distinct, counts = np.unique(lengths, return_counts=True)
        return cls(distinct[::-1].tolist(), counts[::-1].tolist())

    @property
    def longest(self) -> int:
        """The largest length."""
        return self.lengths[0]

    @property
    def batch_size(self) -> int:
        """How many sequences there are."""
        return sum(self.counts)

    @property
    def total(self) -> int:
        """The sum of all lengths."""
        return sum(length * count for length, count in zip(self.lengths, self.counts, strict=True))


class Rows(NamedTuple):
    """Rows that hold all sequences of a batch.

    Attributes:
      num_rows: how many there are.
      deals: what they hold, in the order in which it was dealt: a length, how many of it each row gets, the first of
        those rows, and how many they are.
      blocks: what is left of them: how many steps, and of how many rows.
    """

    num_rows: int
    deals: list[tuple[int, int, int, int]]
    blocks: list[tuple[int, int]]


def best_fit(batch: Distinct, width: int) -> Rows:
    """Deals lengths to rows of a width, which is at least the longest.

    Blocks of rows with room for the length in turn are on a stack, the fullest on top, the others in a heap: a smaller
    length moves to the stack what it fits.
    """
    num_rows, deals = 0, []
    roomy: list[tuple[int, int, int]] = []  # room, first row and rows of a block
    cramped: list[tuple[int, int, int]] = []  # the same, but for -room and -first row
    for length, left in zip(*batch, strict=True):
        while cramped and -cramped[0][0] >= length:
            room, first, rows = heapq.heappop(cramped)
            roomy.append((-room, -first, rows))
        while left:
            if roomy:
                room, first, rows = roomy.pop()
                copies = room // length
            else:
                room, first, copies = width, num_rows, width // length
                rows = -(-left // copies)
                num_rows += rows
            full, rest = (rows, 0) if rows * copies <= left else divmod(left, copies)
            used = full + (rest > 0)
            if used < rows:
                roomy.append((room, first + used, rows - used))
            if full:
                deals.append((length, copies, first, full))
                heapq.heappush(cramped, (copies * length - room, -first, full))
            if rest:
                deals.append((length, rest, first + full, 1))
                roomy.append((room - rest * length, first + full, 1))
            left -= full * copies + rest
    blocks = [(room, rows) for room, _, rows in roomy] + [(-room, rows) for room, _, rows in cramped]
    return Rows(num_rows, deals, blocks)


def slot_starts(dealt: Rows, *, sort_rows: bool) -> tuple[tuple[int, ...], ...]:
    """The step at which each sequence of each row starts; if asked, fuller rows come first."""
    lengths, copies, first, rows = np.array(dealt.deals).T
    deals = np.repeat(np.arange(len(rows)), rows)  # of each row, deal after deal
    row = first[deals] + np.arange(len(deals)) - (np.cumsum(rows) - rows)[deals]
    row, room = (np.repeat(of, copies[deals]) for of in (row, lengths[deals]))  # of each sequence
    if sort_rows:
        order = longest_first(np.bincount(row, room).astype(np.int64))
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        row = rank[row]
    along = np.argsort(row, kind="stable")
    room, counts = room[along], np.bincount(row)
    stops = np.cumsum(counts)
    before = np.cumsum(room) - room
    starts = (before - np.repeat(before[stops - counts], counts)).tolist()
    return tuple(tuple(starts[begin:stop]) for begin, stop in itertools.pairwise((0, *stops.tolist())))
