"""What the commands measure: programs compiled, and time."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


class CountedJit:
    """jax.jit(function), which counts the programs that it compiles.

    JAX runs the Python function to trace it, once for each program that the shapes and dtypes of the arguments ask for,
    and never again: so each run of it is counted.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.programs = 0

        @functools.wraps(function)
        def traced(*args: Any) -> Any:
            self.programs += 1
            return function(*args)

        self._jitted = jax.jit(traced)

    def __call__(self, *args: Any) -> Any:
        """The function's result."""
        return self._jitted(*args)


def seconds(run: Callable[[], Any]) -> float:
    """How long a run takes, until its arrays are there."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def median_seconds(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """How long each of several runs takes, in the median.

    They take turns, so that whatever else the machine does falls on all of them alike. Each is run once before, so that
    none is timed while it compiles.
    """
    for run in runs.values():
        jax.block_until_ready(run())
    times = [{name: seconds(run) for name, run in runs.items()} for _ in range(repeats)]
    return {name: float(np.median([turn[name] for turn in times])) for name in runs}
