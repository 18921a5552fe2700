"""The process that measures one case of `jaxpack bench gpu`: it takes a request and the name of a file for its result.

XLA reads its flags once, device memory that a library keeps would be missing for the next, and a library that crashes
ends its process: so each case has one.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxpack.cli.bench.calls import PASSES
from jaxpack.cli.bench.gpu.cases import Case
from jaxpack.cli.bench.gpu.memory import peak_bytes
from jaxpack.cli.bench.machine import compilation_cache_off, machine
from jaxpack.cli.bench.measure import Libraries, describe


class Request(NamedTuple):
    """What a process is asked to do.

    Attributes:
      case: the case.
      repeats: how many turns are timed.
      seconds: the time after which no further library is compiled.
      seed: the seed of lengths, inputs and weights.
    """

    case: Case
    repeats: int
    seconds: float
    seed: int

    def to_json(self) -> str:
        """Returns the request as an argument of a process."""
        return json.dumps({**self._asdict(), "case": dataclasses.asdict(self.case)})

    @classmethod
    def from_json(cls, text: str) -> Request:
        """Reads an argument that `to_json` wrote."""
        fields = json.loads(text)
        case = fields.pop("case")
        groups = tuple(tuple(group) for group in case.pop("groups"))
        return cls(Case(groups=groups, **case), **fields)


def measure_case(request: Request, keep: Callable[[dict[str, Any]], None]) -> None:
    """Measures a case; calls `keep` with the result after each group of libraries, each time with more of them."""
    end = time.monotonic() + request.seconds
    libraries = Libraries(request.case.workload(request.seed))
    peaks: dict[str, int | None] = {}
    failed: list[str] = []
    timed, found = -1, {}
    with compilation_cache_off():
        for group in request.case.groups:
            for name in group:
                if time.monotonic() < end:
                    _add(libraries, name, peaks, failed)
                else:
                    libraries.missing[name] = "the time of the case was over"
            if len(libraries.calls) > timed:
                found = _with_memory(libraries, libraries.time(request.repeats, lambda doing, done: None), peaks)
                timed = len(libraries.calls)
            keep({**_describe(request), **found, "missing": libraries.not_measured, "failed": failed})


def _add(libraries: Libraries, name: str, peaks: dict[str, int | None], failed: list[str]) -> None:
    """Compiles a library, and measures its memory. A failure of jaxpack does not lose the results of the others."""
    try:
        libraries.add(name)
        if name in libraries.calls:
            peaks[name] = peak_bytes(libraries.calls[name].training)
    except Exception as error:
        libraries.calls.pop(name, None)
        libraries.missing[name] = f"failed: {type(error).__name__}: {error}".splitlines()[0]
        failed.append(name)


def _describe(request: Request) -> dict[str, Any]:
    """Describes a case and where it ran."""
    case = request.case
    workload = case.workload(request.seed)
    return {
        "name": case.name,
        "graphs": case.graphs,
        "xla_flags": os.environ.get("XLA_FLAGS"),
        "repeats": request.repeats,
        "workload": describe(workload),
        "plan": dataclasses.asdict(workload.plan),
        "machine": machine(),
    }


def _with_memory(libraries: Libraries, found: dict[str, Any], peaks: dict[str, int | None]) -> dict[str, Any]:
    """Adds to each library its peak memory, and the microseconds of a step of the longest sequence."""
    steps = libraries.workload.longest

    def per_step(times: dict[str, Any]) -> dict[str, Any]:
        return {**times, "us_per_step": 1e6 * times["median"] / steps}

    peers = [
        {**peer, "peak_bytes": peaks[peer["name"]], **{key: per_step(peer[key]) for key in PASSES}}
        for peer in found["peers"]
    ]
    limit = {**found["limit"], **{key: per_step(found["limit"][key]) for key in PASSES}}
    return {**found, "limit": limit, "peers": peers}


def _write(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Replaces a file in one step, so that whoever ends this process finds a whole one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result), encoding="utf-8")
    os.replace(part, path)


if __name__ == "__main__":
    measure_case(Request.from_json(sys.argv[1]), functools.partial(_write, pathlib.Path(sys.argv[2])))
