"""Measurements of `jaxpack bench`: all libraries in one process, in turns, beside the products that they need.

The result is a dict, which `--json` writes and `jaxpack.plot.plot_bench` draws:

    workload        the workload: name, cell, sizes, dtype, seed, lengths, and their totals
    plan            boundaries, rows and starts of the plan that jaxpack chose
    machine         processor, threads, versions, backend, allocator settings, and how many processes were running or
                    waiting, on average over the minute before (load_before)
    repeats         the number of turns
    limit           the products of `jaxpack.cli.bench.products`: useful_flops by pass; forward and training, each
                    {seconds, median, low, high, times_jaxpack}; flops_per_second {median, low, high}, of the forward
                    products
    peers           for each library: name, cells, loss, compile_seconds and temp_bytes by pass (or null),
                    forward and training: each {seconds, median, low, high, page_faults, times_limit, times_jaxpack}
    missing         for each library that was not measured: name, reason
    huge_pages      null, or the result of a second process with huge pages

`low` and `high` are the 25 and 75 % quantiles. Ratios are taken turn by turn, so that a change of the machine's speed
affects both sides; the same three numbers describe them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxpack.cli.bench.calls import PASSES, Calls, Missing
from jaxpack.cli.bench.machine import compilation_cache_off, load, machine
from jaxpack.cli.bench.peers import PEERS
from jaxpack.cli.bench.products import product_runs, useful_flops
from jaxpack.cli.bench.turns import Key, Run, Samples, Tell, spread, take_turns
from jaxpack.cli.bench.workloads import Workload

HUGE_PAGES = "glibc.malloc.hugetlb=1"  # in the variable GLIBC_TUNABLES
_LIMIT = "limit"  # the name of the products among the runs
# Losses are about 1. Rounding in float32 moves them by 1e-6, tensor cores by 1e-4; bfloat16 keeps 8 bits.
_LOSS_TOLERANCE = {"float32": 2e-3, "bfloat16": 5e-2}


def measure(workload: Workload, names: Sequence[str], repeats: int, tell: Tell) -> dict[str, Any]:
    """Measures libraries on a workload.

    Args:
      workload: the batch and the layer.
      names: keys of PEERS.
      repeats: how many turns are timed.
      tell: is called with the progress.
    """
    load_before = load()
    with compilation_cache_off():
        libraries = Libraries(workload)
        for i, name in enumerate(names):
            tell(f"compiling {name}", 0.4 * i / len(names))
            libraries.add(name)
        found = libraries.time(repeats, lambda doing, done: tell(doing, 0.4 + 0.6 * done))
    return {
        "workload": describe(workload),
        "plan": dataclasses.asdict(workload.plan),
        "machine": {**machine(), "load_before": load_before},
        "repeats": repeats,
        **found,
        "missing": libraries.not_measured,
        "huge_pages": None,
    }


class Libraries:
    """The libraries that run a workload.

    Attributes:
      workload: the batch and the layer.
      peers: a function for each library that may run it.
      calls: the compiled calls of each library.
      losses: the loss of each library.
      missing: the reason of each library that does not run.
    """

    def __init__(self, workload: Workload, peers: Mapping[str, Callable[[Any], Calls]] | None = None) -> None:
        self.workload = workload
        self.peers = PEERS if peers is None else peers
        self.calls: dict[str, Calls] = {}
        self.losses: dict[str, float] = {}
        self.missing: dict[str, str] = {}

    def add(self, name: str) -> None:
        """Compiles and runs a library once, and enters it as a library that runs or as a missing one."""
        try:
            calls = self.peers[name](self.workload)
            loss = _first_run(calls)
            self._check_loss(calls, loss)
        except Missing as error:
            self.missing[name] = str(error)
        except ModuleNotFoundError as error:
            self.missing[name] = f"not installed ({error.name})"
        except Exception as error:  # another library, in a version that lacks what is used here
            if name.startswith("jaxpack"):
                raise
            self.missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            self.calls[name], self.losses[name] = calls, loss

    def time(self, turns: int, tell: Tell) -> dict[str, Any]:
        """Times all that run in turns; returns `limit` and `peers` of the result."""
        runs: dict[Key, Run] = {(_LIMIT, key): run for key, run in self._products.items()}
        runs |= {(name, key): getattr(calls, key) for name, calls in self.calls.items() for key in PASSES}
        samples = take_turns(runs, turns, tell)
        return {
            "limit": self._limit(samples),
            "peers": [self._peer(name, samples) for name in self.calls],
        }

    @property
    def not_measured(self) -> list[dict[str, str]]:
        """The libraries that do not run, as `missing` of the result."""
        return [{"name": name, "reason": reason} for name, reason in self.missing.items()]

    @functools.cached_property
    def _products(self) -> Mapping[str, Run]:
        return product_runs(self.workload)

    def _check_loss(self, calls: Calls, loss: float) -> None:
        """Raises Missing unless the loss is finite and, with the same weights as others, equals theirs."""
        if not math.isfinite(loss):
            raise Missing(f"its loss is {loss}")
        same = [name for name, other in self.calls.items() if other.same_weights and calls.same_weights]
        for other, expected in ((name, self.losses[name]) for name in same):
            if abs(loss - expected) > _LOSS_TOLERANCE[self.workload.dtype]:
                raise Missing(f"its loss is {loss:.6f}, but that of {other}, with the same weights, {expected:.6f}")

    def _limit(self, samples: Mapping[Key, Samples]) -> dict[str, Any]:
        """Returns the results of the products."""
        flops = useful_flops(self.workload)
        passes = {key: _with_spread(_LIMIT, key, samples) for key in PASSES}
        rates = flops["forward"] / samples[_LIMIT, "forward"].seconds
        return {"useful_flops": flops, **passes, "flops_per_second": spread(rates)}

    def _peer(self, name: str, samples: Mapping[Key, Samples]) -> dict[str, Any]:
        """Returns the results of one library."""
        calls = self.calls[name]
        passes = {
            key: {
                **_with_spread(name, key, samples),
                "page_faults": float(np.median(samples[name, key].page_faults)),
                "times_limit": spread(samples[name, key].seconds / samples[_LIMIT, key].seconds),
            }
            for key in PASSES
        }
        return {
            "name": name,
            "cells": calls.cells,
            "loss": self.losses[name],
            "compile_seconds": calls.compile_seconds,
            "temp_bytes": calls.temp_bytes,
            **passes,
        }


def _first_run(calls: Calls) -> float:
    """Runs both passes once, and returns the loss."""
    jax.block_until_ready(calls.forward())
    loss, _ = jax.block_until_ready(calls.training())
    return loss.item()


def _with_spread(name: str, key: str, samples: Mapping[Key, Samples]) -> dict[str, Any]:
    """Returns the times of a run, their spread, and that of their ratios to jaxpack's."""
    times, ours = samples[name, key].seconds, samples.get(("jaxpack", key))
    ratio = None if ours is None else spread(times / ours.seconds)
    return {"seconds": times.tolist(), **spread(times), "times_jaxpack": ratio}


def describe(workload: Workload) -> dict[str, Any]:
    """Describes a workload, in types of JSON."""
    return {
        "name": workload.name,
        "cell": workload.cell,
        "num_layers": workload.num_layers,
        "bidirectional": workload.bidirectional,
        "features": workload.features,
        "hidden_size": workload.hidden_size,
        "dtype": workload.dtype,
        "seed": workload.seed,
        "lengths": workload.lengths.tolist(),
        "batch_size": workload.batch_size,
        "longest": workload.longest,
        "tokens": workload.tokens,
    }
