"""Measurements of `jaxpack bench rollout`: for each case all ways to run it in turns, beside the products they need.

The result is a dict, which `--json` writes:

    machine         as in `jaxpack.cli.bench.measure`
    repeats         the number of turns
    cases           for each case: limit, peers and missing as there, and
      workload        name, cell, environments (N), steps (T), features, hidden_size, dtype, seed, reset_probability,
                      the numbers of resets and fragments, longest_fragment and mean_fragment
      plan            boundaries, rows and starts of the plan of the fragments
      cut_seconds     the host's time to cut the rollout into fragments under that plan: {median, low, high}
      peers           as there, steps (one after the other), and difference, the largest of all outputs from those of
                      the first way that is compared; null if they are not compared
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpack.cli._measure import seconds
from jaxpack.cli.bench.machine import compilation_cache_off, load, machine
from jaxpack.cli.bench.measure import Libraries
from jaxpack.cli.bench.rollout.cases import Rollout
from jaxpack.cli.bench.rollout.peers import PEERS
from jaxpack.cli.bench.turns import Tell, spread

_PACKAGES = ("jaxpack", "jax", "jaxlib", "flax", "numpy", "torch")
_TOLERANCE = 2e-3  # outputs are in [-1, 1]; a state that is not reset differs by tenths, tensor cores by 1e-4


def measure_rollout(cases: Sequence[Rollout], names: Sequence[str], repeats: int, tell: Tell) -> dict[str, Any]:
    """Measures ways to run rollouts.

    Args:
      cases: the rollouts, and a layer for each.
      names: keys of PEERS.
      repeats: how many turns are timed in each case.
      tell: is called with the progress.

    Raises:
      RuntimeError: if outputs of jaxpack differ from each other.
    """
    load_before, found = load(), []
    with compilation_cache_off():
        for i, case in enumerate(cases):

            def tell_of_case(doing: str, done: float, i: int = i, name: str = case.name) -> None:
                tell(f"{name}: {doing}", (i + done) / len(cases))

            found.append(_measure_case(case, names, repeats, tell_of_case))
    return {"machine": {**machine(_PACKAGES), "load_before": load_before}, "repeats": repeats, "cases": found}


def _measure_case(case: Rollout, names: Sequence[str], repeats: int, tell: Tell) -> dict[str, Any]:
    """Measures one case."""
    libraries = Libraries(case, PEERS)
    for i, name in enumerate(names):
        tell(f"compiling {name}", 0.4 * i / len(names))
        libraries.add(name)
    differences = _compare(libraries)
    found = libraries.time(repeats, lambda doing, done: tell(doing, 0.4 + 0.6 * done))
    plan = case.fragments.plan
    cut = [seconds(functools.partial(case.cut, plan=plan)) for _ in range(repeats)]
    peers = [
        {**peer, "steps": libraries.calls[peer["name"]].steps, "difference": differences[peer["name"]]}
        for peer in found["peers"]
    ]
    return {
        "workload": _describe(case),
        "plan": dataclasses.asdict(plan),
        "cut_seconds": spread(np.array(cut)),
        **found,
        "peers": peers,
        "missing": libraries.not_measured,
    }


def _compare(libraries: Libraries) -> dict[str, float | None]:
    """Returns the largest difference of each library's outputs from the first ones.

    A library whose outputs differ is entered as missing.

    Raises:
      RuntimeError: if those of jaxpack differ.
    """
    expected: np.ndarray | None = None
    differences: dict[str, float | None] = {}
    for name, calls in list(libraries.calls.items()):
        differences[name] = None
        if calls.in_place is None:
            continue
        outputs = calls.in_place(calls.forward())
        expected = outputs if expected is None else expected
        difference = float(np.abs(outputs - expected).max())
        differences[name] = difference
        if difference < _TOLERANCE:
            continue
        reason = f"its outputs differ from the others' by {difference:.2g}"
        if name.startswith("jaxpack"):
            raise RuntimeError(f"{name}: {reason}.")
        del libraries.calls[name]
        libraries.missing[name] = reason
    return differences


def _describe(case: Rollout) -> dict[str, Any]:
    """Describes a case, in types of JSON."""
    lengths = case.fragment_lengths
    return {
        "name": case.name,
        "cell": case.cell,
        "environments": case.batch_size,
        "steps": case.longest,
        "features": case.features,
        "hidden_size": case.hidden_size,
        "dtype": case.dtype,
        "seed": case.seed,
        "reset_probability": case.probability,
        "resets": int(case.resets.sum()),
        "fragments": len(lengths),
        "longest_fragment": int(lengths.max()),
        "mean_fragment": float(lengths.mean()),
    }
