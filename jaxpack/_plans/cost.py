"""CostModel: an estimate of the time that a plan takes, which planners minimise."""

from __future__ import annotations

import dataclasses
import math

from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._platforms import platform_kind


@dataclasses.dataclass(frozen=True)
class CostModel:
    """An estimate of the time that a plan takes: per cell, step and bucket, and for compiling each bucket's loop.

    `CostModel.for_platform` returns the estimates for CPUs, GPUs and TPUs. The defaults here are those for training on
    a CPU. Planners use only their ratios. For a long training raise `runs`.

    Examples:
      >>> model = jaxpack.CostModel(cell=1, step=10, bucket=0, compilation=0)
      >>> model.run_time(jaxpack.BucketPlan(boundaries=(2, 4), rows=(3, 1)))  # 8 cells, 4 steps
      48.0

    Args:
      cell: seconds per cell of the plan, above 0.
      step: seconds per step of the recurrence, whatever the number of rows.
      crossing: additional seconds per cell if sequences share rows, whose carries start and end inside a row.
      crossing_step: additional seconds per step if sequences share rows.
      bucket: seconds per bucket and run.
      compilation: seconds to compile the loop of a bucket.
      runs: the number of runs of a compiled program, at least 1; each run bears 1/runs of the compilation.

    Raises:
      ValueError: if a number is negative or not finite, `cell` is 0, or `runs` is below 1.
    """

    cell: float = 8.5e-6
    step: float = 25e-6
    crossing: float = 0.2e-6
    bucket: float = 40e-6
    compilation: float = 0.4
    runs: float = 500
    crossing_step: float = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{field.name} must be 0 or more and finite, got {value}.")
        if self.cell == 0:
            raise ValueError("cell must be above 0, got 0: without a cost per cell there is no smallest plan.")
        if self.runs < 1:
            raise ValueError(f"runs must be at least 1, got {self.runs}.")

    @classmethod
    def for_platform(cls, platform: str | None = None, *, training: bool = True) -> CostModel:
        """Returns the estimates for an LSTM with B=64, F=128, H=256 in float32 on a platform.

        Those for CPUs are from times on 2 cores of an AMD EPYC. A cell is fitted. A step was too short to measure
        beside its cells (0 to 10 microseconds in training), and a bucket took 20 to 500 microseconds: these are the
        estimates whose plans were the fastest.

        Those for GPUs and TPUs are computed, not measured. GPU: a step is 2.3 kernels forward and 3.3 backward (read
        from programs compiled for an H100), 0.5 more each way where sequences share rows, at 4 microseconds a kernel;
        a cell is its floating-point operations, at a fifth of the 156 TFLOP/s that an A100 reaches in TF32. TPU: a step
        and a cell are the cycles that the compiler estimates for a v5e at 1.5 GHz, of which cells take theirs at a
        fifth of its 197 TFLOP/s. What a bucket and its compilation take there is a rough guess.

        Examples:
          >>> gpu, cpu = jaxpack.CostModel.for_platform("gpu"), jaxpack.CostModel.for_platform("cpu")
          >>> gpu.step / gpu.cell > 50 * cpu.step / cpu.cell  # there, steps count
          True

        Args:
          platform: "cpu", "gpu" (or "cuda", "rocm") or "tpu". Default: that of `jax.default_backend()`. If the option
            JAX_PLATFORMS names platforms, this is the first, and no backend starts; otherwise JAX's backends start. So
            pass it in processes that must not use a GPU, such as workers that load data.
          training: whether runs are training steps, or else forward passes.

        Raises:
          ValueError: if the platform is unknown.
        """
        return _ESTIMATES[platform_kind(platform), training]

    @property
    def bucket_cells(self) -> float:
        """The number of cells that a further bucket must save to pay for itself."""
        return (self.bucket + self.compilation / self.runs) / self.cell

    def run_time(self, plan: BucketPlan) -> float:
        """Returns the seconds of a run: of a training step, or of a forward pass."""
        return self._run_time(plan.size, plan.num_steps, plan.num_buckets, bool(plan.starts))

    def compile_time(self, plan: BucketPlan) -> float:
        """Returns the seconds to compile the program."""
        return self.compilation * plan.num_buckets

    def total(self, plan: BucketPlan) -> float:
        """Returns the seconds of a run and its share of the compilation, which planners minimise."""
        return self._total(plan.size, plan.num_steps, plan.num_buckets, bool(plan.starts))

    def _run_time(self, cells: int, steps: int, buckets: int, shared: bool) -> float:
        """Computes `run_time` from the counts of a plan, and whether its sequences share rows."""
        cell, step = self.cell + self.crossing * shared, self.step + self.crossing_step * shared
        return cell * cells + step * steps + self.bucket * buckets

    def _total(self, cells: int, steps: int, buckets: int = 1, shared: bool = False) -> float:
        """Computes `total` from the counts of a plan."""
        return self._run_time(cells, steps, buckets, shared) + self.compilation * buckets / self.runs


def cost_model_for(platform: str | None, cost_model: CostModel | None) -> CostModel:
    """Returns the cost model, or else that of training on the platform; raises ValueError if both are given."""
    if cost_model is None:
        return CostModel.for_platform(platform)
    if platform is not None:
        raise ValueError(f"pass platform or cost_model, not both: cost_model=CostModel.for_platform({platform!r}).")
    return cost_model


_ESTIMATES = {
    ("cpu", True): CostModel(),
    ("cpu", False): CostModel(cell=2.4e-6, step=5e-6, crossing=0.1e-6, bucket=20e-6, compilation=0.12),
    ("gpu", True): CostModel(cell=75e-9, step=22e-6, crossing=0, crossing_step=4e-6, bucket=160e-6, compilation=2),
    ("gpu", False): CostModel(cell=25e-9, step=9e-6, crossing=0, crossing_step=2e-6, bucket=60e-6, compilation=1),
    ("tpu", True): CostModel(cell=60e-9, step=3.5e-6, crossing=5e-9, bucket=80e-6, compilation=2),
    ("tpu", False): CostModel(cell=20e-9, step=1.4e-6, crossing=2e-9, bucket=30e-6, compilation=1),
}
