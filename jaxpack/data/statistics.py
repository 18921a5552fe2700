"""Statistics: what a batcher's epoch was like. How full, how many programs, how random."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxpack.pictures import html_counts
from jaxpack.plan import BucketPlan


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a batcher made of an epoch, or of a part of it. Notebooks show it as a table.

    Examples:
      >>> print(jaxpack.data.SlotFilling([np.ones(length) for length in (4, 2, 4, 2)], batch_size=2).statistics())
      4 rows in 2 batches; 1 program; efficiency 75.0%; rank correlation +0.000

    Attributes:
      batches: how many.
      programs: how many different plans they came under.
      rows: how many rows held an example, or a part of one.
      tokens: how many steps those have.
      cells: how many the plans have.
      truncated: how many examples were cut at the longest room.
      dropped: how many were left out.
      split: how many became several rows.
      rank_correlation: Spearman's, between how long a row's sequence is and in which batch it came: about 0 if the
        order is random, 1 if it is sorted.
    """

    batches: int
    programs: int
    rows: int
    tokens: int
    cells: int
    truncated: int
    dropped: int
    split: int
    rank_correlation: float

    @property
    def efficiency(self) -> float:
        """The share of cells that are tokens; 0 where there are none."""
        return self.tokens / self.cells if self.cells else 0.0

    def __str__(self) -> str:
        programs = "1 program" if self.programs == 1 else f"{self.programs} programs"
        cut = "".join(
            f", {count:,} {what}"
            for what, count in (("truncated", self.truncated), ("dropped", self.dropped), ("split", self.split))
            if count
        )
        return (
            f"{self.rows:,} rows in {self.batches:,} batches{cut}; {programs}; efficiency {self.efficiency:.1%}; "
            f"rank correlation {self.rank_correlation:+.3f}"
        )

    def _repr_html_(self) -> str:
        """A table of the counts and a bar of the efficiency, for notebooks."""
        counts = {name: value for name, value in dataclasses.asdict(self).items() if name != "rank_correlation"}
        texts = {name: f"{count:,}" for name, count in counts.items()}
        texts |= {"efficiency": f"{self.efficiency:.1%}", "rank correlation": f"{self.rank_correlation:+.3f}"}
        return html_counts(texts, self.tokens, self.cells)


class Tally:
    """Counts batches as they come."""

    def __init__(self) -> None:
        self._plans: list[BucketPlan] = []
        self._lengths: list[Sequence[int]] = []

    def add(self, plan: BucketPlan, lengths: Sequence[int]) -> None:
        """Counts a batch of sequences of these lengths."""
        self._plans.append(plan)
        self._lengths.append(lengths)

    def statistics(self, too_long: str, cut: int) -> Statistics:
        """What was counted; `cut` examples were too long, and that was done about them."""
        counts = [len(lengths) for lengths in self._lengths]
        lengths = np.concatenate([np.asarray(lengths, int) for lengths in self._lengths] or [np.zeros(0, int)])
        sizes = {plan: plan.size for plan in set(self._plans)}
        return Statistics(
            batches=len(self._plans),
            programs=len(sizes),
            rows=len(lengths),
            tokens=int(lengths.sum()),
            cells=sum(sizes[plan] for plan in self._plans),
            truncated=cut if too_long == "truncate" else 0,
            dropped=cut if too_long == "drop" else 0,
            split=cut if too_long == "split" else 0,
            rank_correlation=_rank_correlation(lengths, np.repeat(np.arange(len(counts)), counts)),
        )


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation, ties given the mean of their ranks; 0 where all are tied."""
    if len(x) < 2:
        return 0.0
    x, y = _ranks(x), _ranks(y)
    spread = x.std() * y.std()
    return float(np.mean((x - x.mean()) * (y - y.mean())) / spread) if spread else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]
