"""The command `jaxpack serve-bench`: a load test of a served LSTM, which checks every answer."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import jaxpack
from jaxpack._layers.specification import LayerParams
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack.cli._files import JsonFile, write_json
from jaxpack.cli._text import print_parts
from jaxpack.data import plan_cover
from jaxpack.serving import LoadReport, Queue, Server, Tally, counted_compilations, measure_load

_LONGEST = 200  # the most steps of a request
_MISS = 0.1  # the share of random batches that fit no plan and are split
_PERCENTILES = (50, 90, 99, 100)
_FAULTS = {"lost": "lost", "reordered": "reordered", "misdelivered": "another's", "wrong": "wrong"}


class Load(NamedTuple):
    """The requests and the server of a load test; max_wait is in seconds."""

    requests: int
    threads: int
    burst: float
    max_wait: float
    batch_size: int
    features: int
    hidden_size: int
    seed: int


def serve_bench(
    requests: Annotated[int, typer.Option(min=1, help="Number of requests.")] = 2000,
    threads: Annotated[int, typer.Option(min=1, help="Number of clients that send them.")] = 16,
    burst: Annotated[float, typer.Option(min=1, help="Mean number of requests that a client sends at once.")] = 8,
    max_wait: Annotated[float, typer.Option(min=0, help="Milliseconds that a request waits for others, at most.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in the largest plan.")] = 32,
    features: Annotated[int, typer.Option(min=1, help="Input features.")] = 32,
    hidden_size: Annotated[int, typer.Option(min=1, help="Hidden size.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of lengths, inputs, weights and bursts.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Serve an LSTM to many threads that send requests of mixed lengths in bursts.

    Half of the requests are longer than 50 steps, none is longer than 200. Each
    carries a number that its answer must return, and every answer is compared
    with the one that the request gets alone. The exit status is 1 if an answer
    is lost or wrong, or if anything is compiled while requests come in.
    """
    load = Load(requests, threads, burst, max_wait / 1e3, batch_size, features, hidden_size, seed)
    result = measure(load)
    print_serve_bench(result, Console())
    write_json(json_file, result)
    if not result["passed"]:
        raise typer.Exit(1)


def measure(load: Load) -> dict[str, Any]:
    """Runs the load test; returns its results, serialisable as JSON."""
    generator = np.random.default_rng(load.seed)
    drawn = np.round(generator.lognormal(np.log(50), 0.7, load.requests))
    lengths = np.clip(drawn, 1, _LONGEST).astype(np.int64)
    sequences = [
        {"x": generator.standard_normal((length, load.features), np.float32), "number": np.full(length, i, np.int32)}
        for i, length in enumerate(lengths)
    ]
    lstm = jaxpack.LSTM(load.features, load.hidden_size)
    params, plans = lstm.init(jax.random.key(load.seed)), make_plans(lengths, load.batch_size)
    start = time.perf_counter()
    with counted_compilations() as compiled:
        server = make_server(lstm, params, plans)
    warm_up = time.perf_counter() - start
    alone = [server([sequence])[0] for sequence in sequences]
    with Queue(server, max_wait=load.max_wait) as queue:
        report = measure_load(queue.submit, sequences, alone, threads=load.threads, burst=load.burst, seed=load.seed)
    return _result(load, lengths, (len(compiled), warm_up), report, queue.tallies)


def make_plans(lengths: np.ndarray, batch_size: int) -> list[BucketPlan]:
    """Returns plans of three sizes that few random batches miss, and one for the longest request alone.

    A plan that every batch fits would take longer than the two smaller ones that it replaces.
    """
    sizes = sorted({max(1, batch_size // part) for part in (1, 4, 16)})
    return [plan_cover(lengths, size, miss=_MISS) for size in sizes] + [jaxpack.plan_padded(1, int(lengths.max()))]


def make_server(lstm: jaxpack.LSTM, params: LayerParams, plans: Sequence[BucketPlan]) -> Server:
    """Serves an LSTM that returns its outputs and final state, and the request's number, per step and once."""

    def function(params: LayerParams, packed: jaxpack.PackedSequence) -> dict[str, Any]:
        numbers = packed.replace(data=packed.data["number"])
        output, (h_n, _) = lstm.apply(params, packed.replace(data=packed.data["x"]))
        return {"output": output, "numbers": numbers, "state": h_n[-1], "number": jaxpack.last(numbers)}

    example = {"x": np.zeros((1, lstm.input_size), np.float32), "number": np.zeros(1, np.int32)}
    return Server(function, params, plans, example)


def _result(
    load: Load,
    lengths: np.ndarray,
    warm_up: tuple[int, float],
    report: LoadReport,
    tallies: Mapping[BucketPlan, Tally],
) -> dict[str, Any]:
    return {
        "load": load._asdict(),
        "backend": jax.default_backend(),
        "lengths": {"shortest": int(lengths.min()), "longest": int(lengths.max()), "steps": int(lengths.sum())},
        "warm_up": dict(zip(("compiled", "seconds"), warm_up, strict=True)),
        "latency": {str(percent): report.percentile(percent) for percent in _PERCENTILES},
        "seconds": report.seconds,
        **{name: getattr(report, name) for name in (*_FAULTS, "compiled", "passed")},
        "plans": [
            {
                "plan": plan.summary,
                "slots": plan.num_sequences,
                "longest": plan.max_length,
                "cells": plan.size,
                **tally._asdict(),
            }
            for plan, tally in tallies.items()
        ],
    }


def print_serve_bench(result: Mapping[str, Any], console: Console) -> None:
    """Prints the report of a result of `measure`, in 80 columns."""
    parts: list[Text | Table] = [
        Text(_title(result["load"]), style="bold"),
        Text(_sent(result)),
        _facts(result),
        _plans(result["plans"]),
        Text(
            "Latency: from submission to answer. Cells are the steps of rows that a batch computes; real is the share "
            "of them that requests filled. Batches that fit no plan are split."
        ),
    ]
    if not result["passed"]:
        parts.append(Text("The test failed: these numbers must all be 0.", style="bold red"))
    print_parts(parts, console)


def _title(load: Mapping[str, Any]) -> str:
    return f"A served LSTM: {load['features']} features, hidden size {load['hidden_size']}, float32"


def _sent(result: Mapping[str, Any]) -> str:
    load, lengths = result["load"], result["lengths"]
    requests = "1 request" if load["requests"] == 1 else f"{load['requests']:,} requests"
    threads = "1 thread" if load["threads"] == 1 else f"{load['threads']} threads"
    return (
        f"{requests} of {lengths['shortest']} to {lengths['longest']} steps, {lengths['steps']:,} in all, from "
        f"{threads} in bursts of {load['burst']:g} on average. A request waits at most {load['max_wait'] * 1e3:g} ms "
        f"for others. JAX on {result['backend']}."
    )


def _facts(result: Mapping[str, Any]) -> Table:
    """Returns the table of latency, throughput, answers and programs."""
    names = [f"p{percent}" for percent in _PERCENTILES[:-1]] + ["at most"]
    latencies = [f"{name} {1e3 * seconds:.1f}" for name, seconds in zip(names, result["latency"].values(), strict=True)]
    rates = [count / result["seconds"] for count in (result["load"]["requests"], result["lengths"]["steps"])]
    warm_up = result["warm_up"]
    table = Table.grid(padding=(0, 3))
    table.add_row("Latency, ms", ", ".join(latencies))
    table.add_row("Throughput", f"{rates[0]:,.0f} requests and {rates[1]:,.0f} steps per second")
    table.add_row("Answers", ", ".join(f"{result[key]:,} {word}" for key, word in _FAULTS.items()))
    table.add_row(
        "Programs compiled",
        f"{warm_up['compiled']} in a warm-up of {warm_up['seconds']:.1f} s, {result['compiled']} after it",
    )
    return table


def _plans(plans: list[Mapping[str, Any]]) -> Table:
    """Returns the table of the batches of each plan."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("Plan", no_wrap=True)
    for heading in ("slots", "cells", "batches", "requests", "real"):
        table.add_column(heading, justify="right", no_wrap=True)
    for plan in plans:
        table.add_row(
            plan["plan"], f"{plan['slots']:,}", f"{plan['cells']:,}", *_counts(plan, plan["runs"] * plan["cells"])
        )
    total = {key: sum(plan[key] for plan in plans) for key in ("runs", "sequences", "steps")}
    table.add_row("all", "", "", *_counts(total, sum(plan["runs"] * plan["cells"] for plan in plans)))
    return table


def _counts(tally: Mapping[str, int], cells: int) -> list[str]:
    return [f"{tally['runs']:,}", f"{tally['sequences']:,}", f"{tally['steps'] / cells:.0%}" if cells else "-"]
