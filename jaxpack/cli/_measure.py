"""Measurements of the commands: compiled programs and time."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


class CountedJit:
    """jax.jit(function) with a count of the programs that it compiles.

    JAX runs the Python function once for each program that the shapes and dtypes of the arguments need, to trace it.
    The count is of these runs. Further arguments are those of jax.jit.
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.programs = 0

        @functools.wraps(function)
        def traced(*args: Any) -> Any:
            self.programs += 1
            return function(*args)

        self._jitted = jax.jit(traced, **options)

    def __call__(self, *args: Any) -> Any:
        """Runs the compiled function."""
        return self._jitted(*args)


def seconds(run: Callable[[], Any]) -> float:
    """Times a run, until its arrays are ready."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def median_seconds(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Returns the median time of each of several runs.

    The runs take turns, so that other load on the machine affects all of them alike. Each runs once before, so that
    compilation is not timed.
    """
    for run in runs.values():
        jax.block_until_ready(run())
    times = [{name: seconds(run) for name, run in runs.items()} for _ in range(repeats)]
    return {name: float(np.median([turn[name] for turn in times])) for name in runs}
