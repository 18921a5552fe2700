"""The report of `jaxpack bench epoch`, in 80 columns, from a result of `jaxpack.cli.bench.epoch`."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack.cli._text import print_parts
from jaxpack.cli.bench.epoch import ON_DEVICES
from jaxpack.cli.bench.report import (
    Result,
    busy_warning,
    digits,
    machine_line,
    quartiles,
    start_table,
    title_of,
    turns,
)


def print_epoch(result: Result, console: Console) -> None:
    """Prints the report."""
    parts: list[Text | Table] = [
        Text(title_of(result["workload"]), style="bold"),
        Text(f"{_corpus(result)}\n{machine_line(result['machine'])}"),
        _times(result),
        _costs(result),
        Text(_legend(result)),
        *busy_warning(result["machine"]),
    ]
    print_parts(parts, console)


def _corpus(result: Result) -> str:
    workload, plan = result["workload"], BucketPlan(**result["plan"])
    sequences = "1 sequence" if workload["sequences"] == 1 else f"{workload['sequences']:,} sequences"
    return (
        f"{sequences} of {min(workload['lengths']):,} to {workload['longest']:,} steps, {workload['tokens']:,} tokens "
        f"in all, in batches of {workload['batch_size']}; slot-filled has a plan of {plan.summary}."
    )


def _times(result: Result) -> Table:
    """Returns the table of the times of epochs."""
    table = start_table("Epoch", "s", "25-75 %", "x padded", "tokens/s", "packing")
    for peer in result["peers"]:
        ratio = peer["times_padded"]
        _row(
            table,
            peer["name"],
            digits(peer["seconds"]["median"]),
            quartiles(peer["seconds"], 1),
            "-" if ratio is None else f"{ratio['median']:.2f}",
            f"{peer['tokens_per_second']:,.0f}",
            f"{peer['packing_share']:.1%}",
        )
    return table


def _costs(result: Result) -> Table:
    """Returns the table of counts, compile times and randomness."""
    table = start_table("Cost", "batches", "cells", "real", "programs", "compile s", "order")
    for peer in result["peers"]:
        _row(
            table,
            peer["name"],
            f"{peer['batches']:,.0f}",
            f"{peer['cells']:,.0f}",
            f"{peer['efficiency']:.1%}",
            f"{peer['programs']}",
            digits(peer["compile_seconds"]),
            f"{np.median([abs(epoch['rank_correlation']) for epoch in peer['epochs']]):.2f}",
        )
    return table


def _row(table: Table, name: str, *cells: str) -> None:
    table.add_row(name, *cells, style="bold" if name == "slot-filled" else "")


def _legend(result: Result) -> str:
    return (
        f"Median of {turns(result)} in one process, an epoch of each in every turn; ratios are taken turn by turn. "
        f"Each epoch trains on every sequence once, with the same layer, loss and optimiser. padded: random batches, "
        f"padded to the longest of all; padded-batch: to their own longest, rounded up; bucketed, sorted: batches of "
        f"similar lengths, padded; slot-filled: batches that fill one plan{_devices(result)}. Packing is the "
        f"share of the time in which "
        f"the host makes batches. Cells are steps of rows; real is the share of them that sequences fill. Order is the "
        f"size of the rank correlation between a sequence's length and the number of its batch, 0 in random order."
    )


def _devices(result: Result) -> str:
    named = any(peer["name"] == ON_DEVICES for peer in result["peers"])
    return f"; {ON_DEVICES}: such batches of a shard for each CPU device" if named else ""
