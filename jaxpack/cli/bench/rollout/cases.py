"""The cases of `jaxpack bench rollout`: a layer over a rollout, with resets that are drawn from a fixed seed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpack.cli.bench.workloads import Workload
from jaxpack.rollouts import Fragments, cut_rollout

CELLS = ("gru", "lstm")
PROBABILITIES = (0.0, 0.01, 0.1)


@dataclasses.dataclass(frozen=True, eq=False)
class Rollout(Workload):
    """A layer and a rollout [N, T]: N sequences of T steps, in which episodes begin.

    Attributes:
      probability: the probability that a step begins an episode.
    """

    probability: float = 0.0

    @functools.cached_property
    def resets(self) -> np.ndarray:
        """bool [N, T]: True where a step begins an episode."""
        return np.random.default_rng([self.seed, 3]).random((self.batch_size, self.longest)) < self.probability

    @functools.cached_property
    def fragments(self) -> Fragments:
        """The rollout in fragments, under the plan that `jaxpack.plan_best` chooses for them."""
        return self.cut()

    @property
    def fragment_lengths(self) -> np.ndarray:
        """The length of each fragment, row by row and in time."""
        lengths = np.asarray(self.fragments.lengths)
        return lengths[lengths > 0]  # the plan may have more sequences

    def cut(self, **options: Any) -> Fragments:
        """Cuts the rollout into fragments on the host."""
        return cut_rollout(self.resets.T, axis=0, **options)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of all cases: N environments, T steps, and those of the layer."""

    environments: int = 128
    steps: int = 128
    features: int = 64
    hidden_size: int = 128


def rollouts(cells: Sequence[str], probabilities: Sequence[float], sizes: Sizes, seed: int) -> list[Rollout]:
    """Returns a case for each cell and probability."""
    lengths = np.full(sizes.environments, sizes.steps)
    layer: dict[str, Any] = {"features": sizes.features, "hidden_size": sizes.hidden_size, "seed": seed}
    return [
        Rollout(f"{cell}-{probability:g}", lengths, cell, **layer, probability=probability)
        for cell in cells
        for probability in probabilities
    ]
