"""Turns: every run is timed once in each, in an order that is drawn anew."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpack.cli._measure import seconds
from jaxpack.cli.bench.machine import page_faults

Tell = Callable[[str, float], None]  # takes a description of the current work, and the share done, in [0, 1]
Run = Callable[[], Any]
Key = tuple[str, str]  # a name, and a pass

# For so long, in seconds, a run is repeated before it is timed. torch's threads wait for more work by spinning, and so
# take a processor from what follows: for 8 ms after a call on 2 cores of an AMD EPYC (its CPU time while it sleeps).
SETTLE = 0.02


class Samples(NamedTuple):
    """The seconds and page faults of a run, [turns] each."""

    seconds: np.ndarray
    page_faults: np.ndarray


def take_turns(runs: Mapping[Key, Run], turns: int, tell: Tell) -> dict[Key, Samples]:
    """Times every run once per turn.

    The order is drawn anew for each turn, so that no run always follows the same other one. Each timed run follows
    runs of its own that are not timed, so that caches, threads and the allocator are in the state of a loop of this
    run, not in that which another library left.
    """
    keys, generator = list(runs), np.random.default_rng(0)
    times = np.zeros((len(keys), turns))
    faults = np.zeros((len(keys), turns), np.int64)
    for turn in range(turns):
        tell(f"turn {turn + 1} of {turns}", turn / turns)
        for i in generator.permutation(len(keys)):
            run = runs[keys[i]]
            _settle(run)
            before = page_faults()
            times[i, turn] = seconds(run)
            faults[i, turn] = page_faults() - before
    return {key: Samples(times[i], faults[i]) for i, key in enumerate(keys)}


def _settle(run: Run) -> None:
    """Runs at least once, and until SETTLE seconds have passed."""
    start = time.perf_counter()
    while True:
        jax.block_until_ready(run())
        if time.perf_counter() - start >= SETTLE:
            return


def spread(values: np.ndarray) -> dict[str, float]:
    """Returns the median, and the 25 and 75 % quantiles."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {"median": float(median), "low": float(low), "high": float(high)}
