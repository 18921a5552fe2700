"""Best-fit packing of sequences into rows, many sequences at a time.

The longest sequences go first, each into the fullest row that has room for it, or else into a new row. A row that takes
a sequence becomes the fullest, so it takes as many of that length as it has room for; and equally full rows are filled
alike. So each length is dealt to blocks of rows, and deals are few: a deal leaves less than half of the room of its
rows, or is the last of its length. U distinct lengths and rows of W steps take about U log W deals, however many
sequences there are.
"""

from __future__ import annotations

import heapq
import itertools
from typing import NamedTuple

import numpy as np

from jaxpack._plans.bucket_plan import longest_first


class Distinct(NamedTuple):
    """The distinct lengths of a batch, longest first, and the number of sequences of each."""

    lengths: list[int]
    counts: list[int]

    @classmethod
    def of(cls, lengths: np.ndarray) -> Distinct:
        """Counts lengths >= 1, [B]."""
        distinct, counts = np.unique(lengths, return_counts=True)
        return cls(distinct[::-1].tolist(), counts[::-1].tolist())

    @property
    def longest(self) -> int:
        """The largest length."""
        return self.lengths[0]

    @property
    def batch_size(self) -> int:
        """The number of sequences."""
        return sum(self.counts)

    @property
    def total(self) -> int:
        """The sum of all lengths."""
        return sum(length * count for length, count in zip(self.lengths, self.counts, strict=True))


class DealtRows(NamedTuple):
    """The rows of one width to which all sequences of a batch are dealt.

    Attributes:
      num_rows: the number of rows.
      deals: in order, for each deal: a length, the sequences of that length per row, the first row, and the number of
        rows.
      blocks: the room left at the ends of rows: the number of steps, and the number of rows that have it.
    """

    num_rows: int
    deals: list[tuple[int, int, int, int]]
    blocks: list[tuple[int, int]]


def best_fit(batch: Distinct, width: int) -> DealtRows:
    """Deals lengths to rows of a width, which must be at least the longest length.

    A stack holds the blocks of rows that have room for the current length, the fullest on top; a heap holds the other
    blocks. A smaller length moves the blocks that it fits from the heap to the stack.
    """
    num_rows, deals = 0, []
    roomy: list[tuple[int, int, int]] = []  # room, first row and number of rows of a block
    cramped: list[tuple[int, int, int]] = []  # -room, -first row and number of rows
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
    return DealtRows(num_rows, deals, blocks)


def slot_starts(dealt: DealtRows, *, sort_rows: bool) -> tuple[tuple[int, ...], ...]:
    """Returns the steps at which the sequences of each row start; with sort_rows, fuller rows come first."""
    lengths, copies, first, rows = np.array(dealt.deals).T
    deals = np.repeat(np.arange(len(rows)), rows)  # the deal of each row
    row = first[deals] + np.arange(len(deals)) - (np.cumsum(rows) - rows)[deals]
    row, room = (np.repeat(of, copies[deals]) for of in (row, lengths[deals]))  # row and length of each sequence
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
