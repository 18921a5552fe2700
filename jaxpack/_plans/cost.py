"""CostModel: an estimate of the time that a plan takes, which planners minimise."""

from __future__ import annotations

import dataclasses
import math

from jaxpack._plans.bucket_plan import BucketPlan


@dataclasses.dataclass(frozen=True)
class CostModel:
    """An estimate of the time that a plan takes: per cell, step and bucket, and for compiling each bucket's loop.

    The defaults were measured when training an LSTM (B=64, F=128, H=256, float32) on 2 CPU cores. Planners use only
    their ratios. On an accelerator a step costs as much as far more cells; for a long training raise `runs`.

    Examples:
      >>> model = jaxpack.CostModel(cell=1, step=10, bucket=0, compilation=0)
      >>> model.run_time(jaxpack.BucketPlan(boundaries=(2, 4), rows=(3, 1)))  # 8 cells, 4 steps
      48.0

    Args:
      cell: seconds per cell of the plan, above 0.
      step: seconds per step of the recurrence, whatever the number of rows.
      crossing: additional seconds per cell if sequences share rows, whose carries start and end inside a row.
      bucket: seconds per bucket and run.
      compilation: seconds to compile the loop of a bucket.
      runs: the number of runs of a compiled program, at least 1; each run bears 1/runs of the compilation.

    Raises:
      ValueError: if a number is negative or not finite, `cell` is 0, or `runs` is below 1.
    """

    cell: float = 17e-6
    step: float = 50e-6
    crossing: float = 1e-6
    bucket: float = 50e-6
    compilation: float = 0.45
    runs: float = 250

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{field.name} must be 0 or more and finite, got {value}.")
        if self.cell == 0:
            raise ValueError("cell must be above 0, got 0: without a cost per cell there is no smallest plan.")
        if self.runs < 1:
            raise ValueError(f"runs must be at least 1, got {self.runs}.")

    @property
    def bucket_cells(self) -> float:
        """The number of cells that a further bucket must save to pay for itself."""
        return (self.bucket + self.compilation / self.runs) / self.cell

    def run_time(self, plan: BucketPlan) -> float:
        """Returns the seconds of a run: of a training step, with the defaults."""
        return self._run_time(plan.size, plan.num_steps, plan.num_buckets, bool(plan.starts))

    def compile_time(self, plan: BucketPlan) -> float:
        """Returns the seconds to compile the program."""
        return self.compilation * plan.num_buckets

    def total(self, plan: BucketPlan) -> float:
        """Returns the seconds of a run and its share of the compilation, which planners minimise."""
        return self._total(plan.size, plan.num_steps, plan.num_buckets, bool(plan.starts))

    def _run_time(self, cells: int, steps: int, buckets: int, shared: bool) -> float:
        """Computes `run_time` from the counts of a plan, and whether its sequences share rows."""
        return (self.cell + self.crossing * shared) * cells + self.step * steps + self.bucket * buckets

    def _total(self, cells: int, steps: int, buckets: int = 1, shared: bool = False) -> float:
        """Computes `total` from the counts of a plan."""
        return self._run_time(cells, steps, buckets, shared) + self.compilation * buckets / self.runs
