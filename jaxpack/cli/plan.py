"""`jaxpack plan`: the best staircase and the best row plan for given lengths, counted, estimated and drawn."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import jaxpack
from jaxpack import plot
from jaxpack.cli.files import check_plot, read_or_parse_lengths
from jaxpack.cli.text import picture_of, print_parts

_LINES = 16  # of each picture
_COST = jaxpack.CostModel()
_ESTIMATE = (
    "* A training step, and its compilation, as jaxpack.CostModel() estimates them for its reference layer: an LSTM of "
    "B=64, F=128, H=256 in float32 on 2 CPU cores. `jaxpack bench` measures yours."
)
_CAPTION = (
    "Time runs right, sequences run down, longest first. █ real, ▓ real, of the next sequence in its row, ░ slack: "
    "computed, then masked."
)


def plan(
    lengths: Annotated[
        str, typer.Argument(metavar="LENGTHS", help="A file of whole numbers, or a list such as 4,6,8,5.")
    ],
    num_buckets: Annotated[
        int | None,
        typer.Option(min=1, help="The most buckets to use.", show_default="as many as pay for themselves"),
    ] = None,
    row_multiple: Annotated[
        int, typer.Option(min=1, help="Round a bucket's rows up to a multiple: 8 fills the tiles of TPUs and GPUs.")
    ] = 1,
    plot_file: Annotated[
        pathlib.Path | None,
        typer.Option("--plot", metavar="FILE", callback=check_plot, help="Draw the plan (.png, .svg, .pdf, ...)."),
    ] = None,
) -> None:
    """Show the plans that jaxpack would choose for a batch of these lengths.

    A file holds whole numbers, one a line or separated by spaces or commas.
    Cells are counted and times estimated, nothing is timed: `jaxpack bench` does that.
    """
    array = read_or_parse_lengths(lengths, "LENGTHS")
    try:
        plans = {
            "padded": jaxpack.plan_padded(len(array), max(int(array.max()), 1)),
            "exact": jaxpack.plan_exact(array),
            "buckets": jaxpack.plan_buckets(array, num_buckets, row_multiple=row_multiple),
            "rows": jaxpack.plan_rows(array),
        }
    except ValueError as error:  # more cells than can be indexed
        raise typer.BadParameter(str(error), param_hint="'LENGTHS'") from error
    options = ([f"{num_buckets}"] if num_buckets else []) + ([f"{row_multiple=}"] if row_multiple > 1 else [])
    code = {
        "buckets": f"plan = jaxpack.plan_buckets({', '.join(['lengths', *options])})",
        "rows": "plan = jaxpack.plan_rows(lengths)",
    }
    chosen = min(code, key=lambda name: _COST.total(plans[name]))
    print_plans(plans, chosen, code[chosen], array, Console())
    if plot_file is not None:
        plot.plot_plan(plans[chosen], array).savefig(plot_file)


def print_plans(
    plans: Mapping[str, jaxpack.BucketPlan], chosen: str, code: str, lengths: np.ndarray, console: Console
) -> None:
    """Prints plans: counted and estimated side by side, the chosen one's code, and pictures of "buckets" and "rows"."""
    sequences = "1 sequence" if len(lengths) == 1 else f"{len(lengths):,} sequences"
    title = f"{sequences} of {lengths.min():,} to {lengths.max():,} steps, {lengths.sum():,} in all"
    who = "jaxpack.plan_best(lengths) picks" if plans[chosen] == jaxpack.plan_best(lengths) else "With these options:"
    choice = f"{who} {chosen}, the cheaper of the two if compiled once for {_COST.runs:,} training steps."
    parts: list[Text | Table] = [
        Text(title, style="bold"),
        _table(plans, chosen, lengths),
        Text(_ESTIMATE),
        Text(f"{choice}\n\n  {code}"),
    ]
    names: dict[jaxpack.BucketPlan, str] = {}
    for name in ("buckets", "rows"):
        names[plans[name]] = f"{names[plans[name]]} and {name}" if plans[name] in names else name
    for drawn, name in names.items():
        rows = drawn.rows[0]
        shown = f", {_LINES} of {rows:,} rows drawn" if rows > _LINES else ""
        parts += [Text(f"{name}{shown}", style="bold"), Text(picture_of(drawn, lengths, _LINES), no_wrap=True)]
    print_parts((*parts, Text(_CAPTION)), console)


def _table(plans: Mapping[str, jaxpack.BucketPlan], chosen: str, lengths: np.ndarray) -> Table:
    """What is counted and estimated, a column a plan."""
    padded = plans["padded"]
    lines: dict[str, Callable[[jaxpack.BucketPlan], str]] = {
        "loops, one a bucket": lambda plan: f"{plan.num_buckets:,}",
        "rows x steps": lambda plan: f"{plan.rows[0]:,} x {plan.num_steps:,}",
        "cells": lambda plan: f"{plan.size:,}",
        "cells / padded": lambda plan: f"{plan.size / padded.size:.2f}",
        "slack": lambda plan: f"{plan.slack(lengths):,}",
        "ms a step*": lambda plan: f"{1e3 * _COST.run_time(plan):,.1f}",
        "s to compile*": lambda plan: f"{_COST.compile_time(plan):,.1f}",
        "saved: cells": lambda plan: f"{padded.size - plan.size:,}",
        "saved: ms a step*": lambda plan: f"{1e3 * (_COST.run_time(padded) - _COST.run_time(plan)):z,.1f}",
        "saved: s to compile*": lambda plan: f"{_COST.compile_time(padded) - _COST.compile_time(plan):z,.1f}",
    }
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("")
    for name in plans:
        table.add_column(name, justify="right", style="bold" if name == chosen else "")
    for heading, write in lines.items():
        table.add_row(heading, *map(write, plans.values()))
    return table
