"""Statistics of a batcher's epoch: efficiency, programs and randomness."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._plans.pictures import html_counts
from jaxpack.data._ranks import rank_correlation
from jaxpack.data._source import Length


@dataclasses.dataclass(frozen=True)
class AxisStatistics:
    """The part of `Statistics` for one of several time axes.

    Examples:
      >>> AxisStatistics(tokens=6, cells=8).efficiency
      0.75

    Attributes:
      tokens: how many steps the rows have on this axis.
      cells: how many cells its plans have.
    """

    tokens: int
    cells: int

    @property
    def efficiency(self) -> float:
        """The share of cells that are tokens; 0 where there are none."""
        return _share(self.tokens, self.cells)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Counts of a batcher's epoch, or of a part of it. Notebooks show them as a table.

    Examples:
      >>> print(jaxpack.data.SlotFilling([np.ones(length) for length in (4, 2, 4, 2)], batch_size=2).statistics())
      4 rows in 2 batches; 1 program; efficiency 75.0%; rank correlation +0.000

    Attributes:
      batches: how many batches there were.
      programs: how many different plans they had.
      rows: how many rows held an example, or a part of one.
      tokens: how many steps those rows have.
      cells: how many cells the plans have.
      truncated: how many examples were cut at the longest room.
      dropped: how many examples were left out.
      split: how many examples became several rows.
      rank_correlation: Spearman's rank correlation of the length of a row's sequence and the number of its batch: about
        0 in random order, 1 in sorted order.
      axes: where there are several time axes, the tokens and cells of each by name; `tokens` and `cells` are their
        sums.
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
    axes: Mapping[str, AxisStatistics] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def efficiency(self) -> float:
        """The share of cells that are tokens; 0 where there are none."""
        return _share(self.tokens, self.cells)

    def __str__(self) -> str:
        programs = "1 program" if self.programs == 1 else f"{self.programs} programs"
        cut = "".join(
            f", {count:,} {what}"
            for what, count in (("truncated", self.truncated), ("dropped", self.dropped), ("split", self.split))
            if count
        )
        each = ", ".join(f"{name} {axis.efficiency:.1%}" for name, axis in self.axes.items())
        return (
            f"{self.rows:,} rows in {self.batches:,} batches{cut}; {programs}; efficiency {self.efficiency:.1%}"
            f"{f' ({each})' if each else ''}; rank correlation {self.rank_correlation:+.3f}"
        )

    def _repr_html_(self) -> str:
        """Returns a table of the counts and a bar of the efficiency, for notebooks."""
        counts = [field.name for field in dataclasses.fields(self) if field.name not in ("rank_correlation", "axes")]
        texts = {name: f"{getattr(self, name):,}" for name in counts}
        texts |= {"efficiency": f"{self.efficiency:.1%}", "rank correlation": f"{self.rank_correlation:+.3f}"}
        texts |= {f"efficiency, {name}": f"{axis.efficiency:.1%}" for name, axis in self.axes.items()}
        return html_counts(texts, self.tokens, self.cells)


class Tally:
    """A counter of batches.

    Args:
      names: the names of the time axes; none for a single axis without a name.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._plans: list[tuple[BucketPlan, ...]] = []
        self._shards: list[int] = []
        self._lengths: list[Sequence[Length]] = []

    def add(self, plans: tuple[BucketPlan, ...], lengths: Sequence[Length], shards: int = 1) -> None:
        """Counts a batch of sequences with these lengths, in shards under a plan for each time axis."""
        self._plans.append(plans)
        self._shards.append(shards)
        self._lengths.append(lengths)

    def statistics(self, too_long: str, cut: int) -> Statistics:
        """Returns the counts, of which `cut` examples were too long and were treated as `too_long` says."""
        num_axes = max(1, len(self._names))
        counts = [len(lengths) for lengths in self._lengths]
        lengths = np.array(list(itertools.chain.from_iterable(self._lengths)), int).reshape(-1, num_axes)
        sizes = {plans: np.array([plan.size for plan in plans]) for plans in set(self._plans)}
        tokens = lengths.sum(axis=0).tolist()
        each = (shards * sizes[plans] for plans, shards in zip(self._plans, self._shards, strict=True))
        cells = sum(each, np.zeros(num_axes, int)).tolist()
        axes = zip(self._names, map(AxisStatistics, tokens, cells), strict=False)
        return Statistics(
            batches=len(self._plans),
            programs=len(sizes),
            rows=len(lengths),
            tokens=sum(tokens),
            cells=sum(cells),
            truncated=cut if too_long == "truncate" else 0,
            dropped=cut if too_long == "drop" else 0,
            split=cut if too_long == "split" else 0,
            rank_correlation=rank_correlation(lengths.sum(axis=1), np.repeat(np.arange(len(counts)), counts)),
            axes=dict(axes) if num_axes > 1 else {},
        )


def _share(tokens: int, cells: int) -> float:
    return tokens / cells if cells else 0.0
