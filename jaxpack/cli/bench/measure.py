"""Measurements of `jaxpack bench`: all libraries in one process, in turns, beside one big matmul.

The result is a dict, which `--json` writes and `jaxpack.plot.plot_bench` draws:

    workload        the workload: name, cell, sizes, seed, lengths, and their totals
    plan            boundaries, rows and starts of the plan that jaxpack chose
    machine         processor, threads, versions, backend, allocator settings, and how many processes were running or
                    waiting, on average over the minute before (load_before)
    repeats         the number of turns
    limit           the matmul: its side, its seconds in each turn, and flops_per_second {median, low, high};
                    useful_flops by pass
    peers           for each library: name, cells, loss, compile_seconds and temp_bytes by pass (or null),
                    forward and training: each {seconds, median, low, high, page_faults, times_limit, times_jaxpack}
    missing         for each library that was not measured: name, reason
    huge_pages      null, or the result of a second process with huge pages

`low` and `high` are the 25 and 75 % quantiles. Ratios are taken turn by turn, so that a change of the machine's speed
affects both sides; the same three numbers describe them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import os
import pathlib
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpack
from jaxpack.cli._measure import seconds
from jaxpack.cli.bench.calls import PASSES, Calls, Missing, num_threads
from jaxpack.cli.bench.peers import PEERS
from jaxpack.cli.bench.workloads import Workload

HUGE_PAGES = "glibc.malloc.hugetlb=1"  # in the variable GLIBC_TUNABLES
_PACKAGES = ("jaxpack", "jax", "jaxlib", "flax", "numpy", "torch", "dm-haiku", "keras")
_MATMUL_SIDE = {"cpu": 1024}  # 2 GFLOP, about a forward pass of the workloads
_ACCELERATOR_SIDE = 8192  # 1,100 GFLOP, long enough for a GPU
_LOSS_TOLERANCE = 2e-3  # losses are about 0.1: rounding moves them by 1e-6, tensor cores by 1e-4

Tell = Callable[[str, float], None]  # takes a description of the current work, and the share done, in [0, 1]


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
        matmul = _matmul()
        calls, losses, missing = _build(workload, names, tell)
        samples = _in_turns({"": {"matmul": matmul}, **_passes(calls)}, repeats, tell)
    rates = _matmul_flops() / samples["", "matmul"]["seconds"]
    return {
        "workload": describe(workload),
        "plan": dataclasses.asdict(workload.plan),
        "machine": {**machine(), "load_before": load_before},
        "repeats": repeats,
        "limit": {
            "matmul_side": _matmul_side(),
            "seconds": samples["", "matmul"]["seconds"].tolist(),
            "flops_per_second": spread(rates),
            "useful_flops": workload.useful_flops,
        },
        "peers": [_results(name, calls[name], losses[name], samples, rates, workload) for name in calls],
        "missing": [{"name": name, "reason": reason} for name, reason in missing.items()],
        "huge_pages": None,
    }


def load() -> float | None:
    """Returns how many processes ran or waited, on average over the last minute; None where that is unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def machine(packages: Sequence[str] = _PACKAGES) -> dict[str, Any]:
    """Describes the machine, with the versions of these packages."""
    device = jax.devices()[0]
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES"),
        "xla_flags": os.environ.get("XLA_FLAGS"),
    }


def _build(
    workload: Workload, names: Sequence[str], tell: Tell
) -> tuple[dict[str, Calls], dict[str, float], dict[str, str]]:
    """Compiles and runs each library once; returns calls and losses by name, and reasons of the missing ones."""
    calls: dict[str, Calls] = {}
    losses: dict[str, float] = {}
    missing: dict[str, str] = {}
    for i, name in enumerate(names):
        tell(f"compiling {name}", 0.4 * i / len(names))
        try:
            built = PEERS[name](workload)
            loss = _first_run(built)
            _check_loss(built, loss, {other: losses[other] for other in calls if calls[other].same_weights})
        except Missing as error:
            missing[name] = str(error)
        except ModuleNotFoundError as error:
            missing[name] = f"not installed ({error.name})"
        except Exception as error:  # another library, in a version that lacks what is used here
            if name.startswith("jaxpack"):
                raise
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            calls[name], losses[name] = built, loss
    return calls, losses, missing


def _first_run(calls: Calls) -> float:
    """Runs both passes once, and returns the loss."""
    jax.block_until_ready(calls.forward())
    loss, _ = jax.block_until_ready(calls.training())
    return loss.item()


def _check_loss(calls: Calls, loss: float, others: dict[str, float]) -> None:
    """Raises Missing unless the loss is finite and, with the same weights as others, equals theirs."""
    if not math.isfinite(loss):
        raise Missing(f"its loss is {loss}")
    for other, expected in others.items():
        if calls.same_weights and abs(loss - expected) > _LOSS_TOLERANCE:
            raise Missing(f"its loss is {loss:.6f}, but that of {other}, with the same weights, {expected:.6f}")


def _passes(calls: dict[str, Calls]) -> dict[str, dict[str, Callable[[], Any]]]:
    return {name: {key: getattr(built, key) for key in PASSES} for name, built in calls.items()}


def _in_turns(
    runs: Mapping[str, Mapping[str, Callable[[], Any]]], repeats: int, tell: Tell
) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """Times every run once per turn; returns seconds and page faults, [repeats] each.

    Each timed run follows one that is not timed, so that caches, threads and the allocator are in the state of a loop
    of the same run, not in that which another library left.
    """
    flat = {(name, key): run for name, passes in runs.items() for key, run in passes.items()}
    times = np.zeros((len(flat), repeats))
    faults = np.zeros((len(flat), repeats), np.int64)
    for turn in range(repeats):
        tell(f"turn {turn + 1} of {repeats}", 0.4 + 0.6 * turn / repeats)
        for i, run in enumerate(flat.values()):
            jax.block_until_ready(run())
            before = _page_faults()
            times[i, turn] = seconds(run)
            faults[i, turn] = _page_faults() - before
    return {key: {"seconds": times[i], "page_faults": faults[i]} for i, key in enumerate(flat)}


def _results(
    name: str,
    calls: Calls,
    loss: float,
    samples: dict[tuple[str, str], dict[str, np.ndarray]],
    rates: np.ndarray,
    workload: Workload,
) -> dict[str, Any]:
    """Returns the results of one library."""
    found: dict[str, Any] = {
        "name": name,
        "cells": calls.cells,
        "loss": loss,
        "compile_seconds": calls.compile_seconds,
        "temp_bytes": calls.temp_bytes,
    }
    for key in PASSES:
        times = samples[name, key]["seconds"]
        ours = samples.get(("jaxpack", key))
        found[key] = {
            "seconds": times.tolist(),
            **spread(times),
            "page_faults": float(np.median(samples[name, key]["page_faults"])),
            "times_limit": spread(times / (workload.useful_flops[key] / rates)),
            "times_jaxpack": None if ours is None else spread(times / ours["seconds"]),
        }
    return found


def spread(values: np.ndarray) -> dict[str, float]:
    """Returns the median, and the 25 and 75 % quantiles."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {"median": float(median), "low": float(low), "high": float(high)}


def describe(workload: Workload) -> dict[str, Any]:
    """Describes a workload, in types of JSON."""
    return {
        "name": workload.name,
        "cell": workload.cell,
        "num_layers": workload.num_layers,
        "bidirectional": workload.bidirectional,
        "features": workload.features,
        "hidden_size": workload.hidden_size,
        "dtype": "float32",
        "seed": workload.seed,
        "lengths": workload.lengths.tolist(),
        "batch_size": workload.batch_size,
        "longest": workload.longest,
        "tokens": workload.tokens,
    }


def _matmul() -> Callable[[], Any]:
    """Compiles a product of two square matrices."""
    generator = np.random.default_rng(0)
    matrices = [jnp.asarray(generator.standard_normal((_matmul_side(),) * 2, np.float32)) for _ in range(2)]
    return functools.partial(jax.jit(jnp.matmul).lower(*matrices).compile(), *matrices)


def _matmul_side() -> int:
    return _MATMUL_SIDE.get(jax.default_backend(), _ACCELERATOR_SIDE)


def _matmul_flops() -> int:
    return 2 * _matmul_side() ** 3


@contextlib.contextmanager
def compilation_cache_off() -> Iterator[None]:
    """A context without programs that an earlier process compiled, so that compilation is measured."""
    name = "jax_enable_compilation_cache"
    before = getattr(jax.config, name)
    jax.config.update(name, False)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _page_faults() -> int:
    """Counts the page faults of this process so far; 0 where the system does not report them."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _cpu_model() -> str:
    """Returns the processor's name, as far as the system reports it."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    if package == "jaxpack":
        return jaxpack.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
