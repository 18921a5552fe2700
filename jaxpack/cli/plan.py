"""The command `jaxpack plan`: the best plans for given lengths, as one batch and as a corpus."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Annotated, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import jaxpack
from jaxpack import plot
from jaxpack._plans.bucket_plan import INDEX_MAX
from jaxpack._platforms import platform_kind
from jaxpack.cli._files import check_plot, read_or_parse_lengths, writing
from jaxpack.cli._text import picture_of, print_parts
from jaxpack.data import coverage, plan_cover
from jaxpack.plot._figures import Figure

_LINES = 16  # in each picture
_BATCH_SIZE = 64  # of a corpus
_MOST_DRAWN = 10_000  # the most sequences of a batch in a plot; beyond it the corpus is plotted
_ESTIMATE = (
    "* A training step, and its compilation, as jaxpack.CostModel.for_platform({!r}) estimates them for its reference "
    "layer: an LSTM with B=64, F=128, H=256 in float32. `jaxpack bench` measures yours."
)
_CAPTION = (
    "Time runs right, sequences run down, longest first. █ real, ▓ real (the next sequence in its row), ░ slack: "
    "computed, then masked."
)


def _check_platform(name: str | None) -> str | None:
    """Returns the option --platform, or raises BadParameter if its name is unknown."""
    try:
        return name and platform_kind(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def plan(
    lengths: Annotated[
        str,
        typer.Argument(metavar="LENGTHS", help="A file of whole numbers (- for standard input), or a list: 4,6,8,5."),
    ],
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences in a batch of a corpus.", show_default=f"{_BATCH_SIZE}, if there are more"),
    ] = None,
    num_buckets: Annotated[
        int | None,
        typer.Option(min=1, help="The most buckets to use.", show_default="as many as pay for themselves"),
    ] = None,
    row_multiple: Annotated[
        int, typer.Option(min=1, help="Round rows up to a multiple: 8 fills the tiles of TPUs and GPUs.")
    ] = 1,
    platform: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            callback=_check_platform,
            help="Where the plan will run: cpu, gpu or tpu.",
            show_default="JAX's default backend",
        ),
    ] = None,
    plot_file: Annotated[
        pathlib.Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            callback=check_plot,
            help=f"Draw the plan (.png, .svg, .pdf, ...); the corpus's for more than {_MOST_DRAWN:,} lengths.",
        ),
    ] = None,
) -> None:
    """Show the plans that jaxpack would choose for these lengths.

    A file holds whole numbers, one per line or separated by spaces or commas;
    the first line of a table names the column length. The lengths are planned
    as one batch and, if they are more than a batch, as a corpus whose batches
    share one plan. Cells are counted and times are estimated; `jaxpack bench`
    measures times.
    """
    array = read_or_parse_lengths(lengths, "LENGTHS")
    is_corpus = batch_size is not None or len(array) > _BATCH_SIZE
    batch_size = batch_size or _BATCH_SIZE
    target = _Target(platform, jaxpack.CostModel.for_platform(platform))
    try:
        batch = _plan_batch(array, num_buckets, row_multiple, target)
    except ValueError as error:  # more cells than can be indexed
        if not is_corpus:
            raise typer.BadParameter(str(error), param_hint="'LENGTHS'") from error
        batch = None
    try:
        corpus = plan_cover(array, batch_size, platform=platform) if is_corpus else None
    except ValueError as error:
        raise typer.BadParameter(f"as a corpus: {error}", param_hint="'LENGTHS'") from error
    print_parts(_report(array, batch, corpus, batch_size, target), Console())
    if plot_file is not None:
        with writing(plot_file):
            _draw(array, batch, corpus).savefig(plot_file)


class _Target(NamedTuple):
    """Where plans will run: the platform, None for the default one, and what plans cost there."""

    platform: str | None
    costs: jaxpack.CostModel

    @property
    def code(self) -> list[str]:
        """The arguments of a planner that say so."""
        return [f"platform={self.platform!r}"] if self.platform else []


class _Batch(NamedTuple):
    """The plans of one batch by name, the chosen name, its code, and whether plan_best picks it."""

    plans: Mapping[str, jaxpack.BucketPlan]
    chosen: str
    code: str
    is_best: bool


def _plan_batch(lengths: np.ndarray, num_buckets: int | None, row_multiple: int, target: _Target) -> _Batch:
    """Plans all lengths as one batch; raises ValueError if that has more cells than int32 can index."""
    platform, cost = target.platform, target.costs.total
    plans = {
        "padded": jaxpack.plan_padded(len(lengths), max(int(lengths.max()), 1)),
        "exact": jaxpack.plan_exact(lengths),
        "buckets": jaxpack.plan_buckets(lengths, num_buckets, row_multiple=row_multiple, platform=platform),
        "rows": jaxpack.plan_rows(lengths, platform=platform),
    }
    options = ([f"{num_buckets}"] if num_buckets else []) + ([f"{row_multiple=}"] if row_multiple > 1 else [])
    code = {
        "buckets": f"plan = jaxpack.plan_buckets({', '.join(['lengths', *options, *target.code])})",
        "rows": f"plan = jaxpack.plan_rows({', '.join(['lengths', *target.code])})",
    }
    chosen = min(code, key=lambda name: cost(plans[name]))
    without_options = jaxpack.plan_buckets(lengths, platform=platform) if options else plans["buckets"]
    best = min((without_options, plans["rows"]), key=cost)  # the choice of plan_best
    return _Batch(plans, chosen, code[chosen], plans[chosen] == best)


def _report(
    lengths: np.ndarray,
    batch: _Batch | None,
    corpus: jaxpack.BucketPlan | None,
    batch_size: int,
    target: _Target,
) -> list[Text | Table]:
    """Returns the parts of the report."""
    parts: list[Text | Table] = [Text(_title(lengths), style="bold")]
    if corpus is not None:
        parts.append(Text("As one batch", style="bold"))
    if batch is not None:
        parts += _describe_batch(batch, lengths, target)
    else:
        parts.append(Text("One batch would have more cells than int32 can index."))
    if corpus is not None:
        parts += _describe_corpus(corpus, lengths, batch_size, target)
    return [*parts, Text(_ESTIMATE.format(platform_kind(target.platform))), Text(_CAPTION)]


def _draw(lengths: np.ndarray, batch: _Batch | None, corpus: jaxpack.BucketPlan | None) -> Figure:
    """Draws the plan of the batch; that of the corpus, if there is one and the batch is too large."""
    if corpus is not None and (batch is None or len(lengths) > _MOST_DRAWN):
        return plot.plot_corpus(lengths, corpus)
    assert batch is not None
    return plot.plot_plan(batch.plans[batch.chosen], lengths)


def _title(lengths: np.ndarray) -> str:
    sequences = "1 sequence" if len(lengths) == 1 else f"{len(lengths):,} sequences"
    return f"{sequences} of {lengths.min():,} to {lengths.max():,} steps, {lengths.sum():,} in all"


def _describe_batch(batch: _Batch, lengths: np.ndarray, target: _Target) -> list[Text | Table]:
    """Describes the plans of one batch: their counts and estimates, the code of the chosen one, and pictures."""
    plans = batch.plans
    call = f"jaxpack.plan_best({', '.join(['lengths', *target.code])})"
    who = f"{call} picks" if batch.is_best else "With these options:"
    choice = f"{who} {batch.chosen}, the cheaper of the two if compiled once for {target.costs.runs:,} training steps."
    parts: list[Text | Table] = [
        _batch_table(plans, batch.chosen, int(lengths.sum()), target.costs),
        Text(f"{choice}\n\n  {batch.code}"),
    ]
    names: dict[jaxpack.BucketPlan, str] = {}
    for name in ("buckets", "rows"):
        names[plans[name]] = f"{names[plans[name]]} and {name}" if plans[name] in names else name
    for drawn, name in names.items():
        parts += _picture(name, drawn, lengths)
    return parts


def _describe_corpus(
    plan: jaxpack.BucketPlan, lengths: np.ndarray, batch_size: int, target: _Target
) -> list[Text | Table]:
    """Describes the plan that all batches of a corpus share, beside the padded plan, with its code and a picture."""
    real, batches = int(lengths.sum()), -(-len(lengths) // batch_size)
    longest, expected = max(int(lengths.max()), 1), coverage(lengths, plan)
    plans = {"corpus": plan}
    if batch_size * longest <= INDEX_MAX:
        plans = {"padded": jaxpack.plan_padded(batch_size, longest)} | plans
    lines: dict[str, Callable[[jaxpack.BucketPlan], str]] = {
        **_SHAPE,
        "cells / padded": lambda plan: f"{plan.size / (batch_size * longest):.2f}",
        "ms a step*": lambda plan: f"{1e3 * target.costs.run_time(plan):,.1f}",
        "batches an epoch": lambda plan: f"{batches:,}",
        "cells that are real": lambda plan: f"{real / (batches * plan.size):.1%}",
    }
    arguments = ", ".join(["lengths", f"{batch_size=}", *target.code])
    words = (
        f"jaxpack.data.SlotFilling makes batches that fill it. {expected.miss:.1%} of batches drawn at random would "
        f"not fit: plan_cover({arguments}, miss=0.1) makes a plan for those."
    )
    title = f"As a corpus: one plan for all batches of {batch_size:,} (--batch-size)"
    code = f"  corpus_plan = jaxpack.data.plan_cover({arguments})"
    fullest = np.sort(lengths)[::-1][::batches][:batch_size]  # the longest sequence of each slot
    return [
        Text(title, style="bold"),
        _table(plans, "corpus", lines),
        Text(f"{words}\n\n{code}"),
        *_picture("corpus, with the longest sequence of each slot", plan, fullest),
    ]


def _picture(name: str, plan: jaxpack.BucketPlan, lengths: np.ndarray) -> list[Text | Table]:
    """Draws a plan with a batch in it, under its name."""
    rows = plan.rows[0]
    shown = f", {_LINES} of {rows:,} rows drawn" if rows > _LINES else ""
    return [Text(f"{name}{shown}", style="bold"), Text(picture_of(plan, lengths, _LINES), no_wrap=True)]


_SHAPE: dict[str, Callable[[jaxpack.BucketPlan], str]] = {
    "loops, one per bucket": lambda plan: f"{plan.num_buckets:,}",
    "rows x steps": lambda plan: f"{plan.rows[0]:,} x {plan.num_steps:,}",
    "cells": lambda plan: f"{plan.size:,}",
}


def _batch_table(plans: Mapping[str, jaxpack.BucketPlan], chosen: str, real: int, costs: jaxpack.CostModel) -> Table:
    """Returns a table of the counts and estimates for one batch, with a column per plan."""
    padded = plans["padded"]
    lines: dict[str, Callable[[jaxpack.BucketPlan], str]] = {
        **_SHAPE,
        "cells / padded": lambda plan: f"{plan.size / padded.size:.2f}",
        "slack": lambda plan: f"{plan.size - real:,}",
        "ms a step*": lambda plan: f"{1e3 * costs.run_time(plan):,.1f}",
        "s to compile*": lambda plan: f"{costs.compile_time(plan):,.1f}",
        "saved: cells": lambda plan: f"{padded.size - plan.size:,}",
        "saved: ms a step*": lambda plan: f"{1e3 * (costs.run_time(padded) - costs.run_time(plan)):z,.1f}",
        "saved: s to compile*": lambda plan: f"{costs.compile_time(padded) - costs.compile_time(plan):z,.1f}",
    }
    return _table(plans, chosen, lines)


def _table(
    plans: Mapping[str, jaxpack.BucketPlan],
    chosen: str,
    lines: Mapping[str, Callable[[jaxpack.BucketPlan], str]],
) -> Table:
    """Returns a table with a column per plan, the chosen one in bold, and a line for each heading."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in plans:
        table.add_column(name, justify="right", style="bold" if name == chosen else "")
    for heading, write in lines.items():
        table.add_row(heading, *map(write, plans.values()))
    return table
