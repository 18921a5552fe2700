"""The run of `jaxpack bench gpu`: case after case, each in a process, until the time is over.

The result is a dict, which `--json` writes:

    machine     as in `jaxpack.cli.bench.measure`; null if no case was measured
    budget      the seconds that the run was given
    seconds     those that it took
    cases       for each case: name, graphs, xla_flags, repeats, workload, plan, limit, peers and missing, as in
                `jaxpack.cli.bench.measure`; each pass also has us_per_step, its median by the steps of the longest
                sequence, and each library peak_bytes, the device memory of a training step beyond weights and batch
                (or null); failed, the names of plans of jaxpack that raised an error
    left_out    for each other case: name, reason
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxpack.cli.bench.gpu.cases import Case
from jaxpack.cli.bench.gpu.worker import Request
from jaxpack.cli.bench.turns import Tell

_WORKER = "jaxpack.cli.bench.gpu.worker"
_CASE_SECONDS = 40.0  # after these, a case compiles no further library; it is ended after twice as many
_LEAST_SECONDS = 15.0  # a process that imports, compiles and times less than this finds nothing
_NO_TIME = "no time was left"


class Options(NamedTuple):
    """Options of a run: its budget in seconds, the turns of each case, and the seed."""

    budget: float
    repeats: int
    seed: int


def measure_gpu(cases: Sequence[Case], options: Options, tell: Tell) -> dict[str, Any]:
    """Measures cases in order while the budget lasts. The first is measured whatever the budget."""
    start = time.monotonic()
    found: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for i, case in enumerate(cases):
        spent = time.monotonic() - start
        tell(case.name, max(i / len(cases), min(spent / options.budget, 1)))
        left = options.budget - spent
        if i and left < _LEAST_SECONDS:
            left_out |= {other.name: _NO_TIME for other in cases[i:]}
            break
        try:
            found.append(_run(case, left, options))
        except _NotMeasuredError as error:
            left_out[case.name] = str(error)
    return {
        "machine": found[0]["machine"] if found else None,
        "budget": options.budget,
        "seconds": time.monotonic() - start,
        "cases": [{key: value for key, value in case.items() if key != "machine"} for case in found],
        "left_out": [{"name": name, "reason": reason} for name, reason in left_out.items()],
    }


class _NotMeasuredError(Exception):
    """The reason why a case has no result."""


def _run(case: Case, left: float, options: Options) -> dict[str, Any]:
    """Measures a case in a process, in at most the seconds that are left."""
    request = Request(case, options.repeats, min(_CASE_SECONDS, left / 2), options.seed)
    limit = max(2 * request.seconds, _LEAST_SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "result.json"
        command = [sys.executable, "-m", _WORKER, request.to_json(), str(file)]
        try:
            ended = subprocess.run(command, env=case.environment(), capture_output=True, text=True, timeout=limit)
            reason = (ended.stderr.strip().splitlines() or [f"its process ended with status {ended.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            reason = f"it was ended after {limit:.0f} s"
        if not file.exists():
            raise _NotMeasuredError(reason)
        result = json.loads(file.read_text(encoding="utf-8"))
    named = {peer["name"] for peer in (*result["peers"], *result["missing"])}
    names = [name for group in case.groups for name in group if name not in named]
    result["missing"] += [{"name": name, "reason": reason} for name in names]
    return result
