"""CostModel: what a plan costs, in seconds, so that planners can weigh cells, steps and compilation."""

from __future__ import annotations

import dataclasses
import math

from jaxpack._plans.bucket_plan import BucketPlan


@dataclasses.dataclass(frozen=True)
class CostModel:
    """The estimated cost of a plan: so much a cell, a step and a bucket, and the compilation of each bucket's loop.

    The defaults were measured when training an LSTM (B=64, F=128, H=256, float32) on 2 CPU cores. A planner needs their
    ratios, not their size. On an accelerator a step costs far more cells than here; for a model that is trained for
    long, raise `runs`.

    Examples:
      >>> model = jaxpack.CostModel(cell=1, step=10, bucket=0, compilation=0)
      >>> model.run_time(jaxpack.BucketPlan(boundaries=(2, 4), rows=(3, 1)))  # 8 cells, 4 steps
      48.0

    Args:
      cell: seconds per cell of the plan, above 0.
      step: seconds per step of the recurrence, however many rows are alive in it.
      crossing: further seconds per cell where sequences share rows, for entering and leaving them.
      bucket: seconds per bucket in every run.
      compilation: seconds that it takes to compile a bucket's loop.
      runs: how often a compiled program will run; compilation counts 1/runs of itself. At least 1.

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
            raise ValueError("cell must be above 0, got 0: a plan of no cost per cell may be as large as it likes.")
        if self.runs < 1:
            raise ValueError(f"runs must be at least 1, got {self.runs}.")

    @property
    def bucket_cells(self) -> float:
        """How many cells a further bucket must save to pay for itself."""
        return (self.bucket + self.compilation / self.runs) / self.cell

    def run_time(self, plan: BucketPlan) -> float:
        """Seconds that a run takes: a training step, with the defaults."""
        return self._run_time(plan.size, plan.num_steps, plan.num_buckets, bool(plan.starts))

    def compile_time(self, plan: BucketPlan) -> float:
        """Seconds that it takes to compile the program."""
        return self.compilation * plan.num_buckets

    def total(self, plan: BucketPlan) -> float:
        """Seconds of a run and of its share of the compilation: what planners minimise."""
        return self._total(plan.size, plan.num_steps, plan.num_buckets, bool(plan.starts))

    def _run_time(self, cells: int, steps: int, buckets: int, shared: bool) -> float:
        """As `run_time`, from the counts of a plan that is not made yet, and whether sequences share rows."""
        return (self.cell + self.crossing * shared) * cells + self.step * steps + self.bucket * buckets

    def _total(self, cells: int, steps: int, buckets: int = 1, shared: bool = False) -> float:
        """As `total`, from the counts of a plan."""
        return self._run_time(cells, steps, buckets, shared) + self.compilation * buckets / self.runs
