"""`jaxpack plan`: the plan that `jaxpack.plan_buckets` chooses for given lengths, counted and drawn."""

from __future__ import annotations

import pathlib
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import jaxpack
from jaxpack import plot
from jaxpack.cli.files import check_plot, read_or_parse_lengths
from jaxpack.cli.text import picture_of, plain_marks

_LINES = 16  # of the picture


def plan(
    lengths: Annotated[
        str, typer.Argument(metavar="LENGTHS", help="A file of whole numbers, or a list such as 4,6,8,5.")
    ],
    num_buckets: Annotated[
        int | None,
        typer.Option(min=1, help="The most buckets to use.", show_default="as many as are worth their cost"),
    ] = None,
    row_multiple: Annotated[
        int, typer.Option(min=1, help="Round rows up to a multiple: 8 fills the tiles of TPUs and GPUs.")
    ] = 1,
    plot_file: Annotated[
        pathlib.Path | None,
        typer.Option("--plot", metavar="FILE", callback=check_plot, help="Draw the plan (.png, .svg, .pdf, ...)."),
    ] = None,
) -> None:
    """Show the plan that jaxpack would choose for a batch of these lengths.

    A file holds whole numbers, one a line or separated by spaces or commas.
    Everything printed is counted, nothing is timed: `jaxpack bench` does that.
    """
    array = read_or_parse_lengths(lengths, "LENGTHS")
    try:
        chosen = jaxpack.plan_buckets(array, num_buckets, row_multiple=row_multiple)
        padded = jaxpack.plan_padded(len(array), max(int(array.max()), 1))
    except ValueError as error:  # more cells than can be indexed
        raise typer.BadParameter(str(error), param_hint="'LENGTHS'") from error
    print_plan(chosen, {"exact": jaxpack.plan_exact(array), "padded": padded}, array, Console())
    if plot_file is not None:
        plot.plot_plan(chosen, array).savefig(plot_file)


def print_plan(
    chosen: jaxpack.BucketPlan, others: dict[str, jaxpack.BucketPlan], lengths: np.ndarray, console: Console
) -> None:
    """Prints a plan: as Python writes it, in a picture with these lengths in it, and counted beside others."""
    sequences = "1 sequence" if len(lengths) == 1 else f"{len(lengths):,} sequences"
    title = f"{sequences} of {lengths.min():,} to {lengths.max():,} steps, {lengths.sum():,} in all"
    shown = "" if chosen.num_sequences <= _LINES else f" {_LINES} of {chosen.num_sequences:,} rows are drawn."
    caption = f"Time runs right, sequences run down, longest first. █ real, ░ slack: computed, then masked.{shown}"
    picture = Text(picture_of(chosen, lengths, _LINES), no_wrap=True)
    for part in (Text(title, style="bold"), Text(repr(chosen)), picture, Text(caption)):
        console.print()
        console.print(plain_marks(part, console))
    console.print()
    console.print(_counts({"chosen": chosen, **others}, lengths), highlight=False)
    console.print()
    console.print(Text("A bucket is a loop to compile. Exact is PyTorch's layout, padded one rectangle."))


def _counts(plans: dict[str, jaxpack.BucketPlan], lengths: np.ndarray) -> Table:
    """What is counted, a column a plan."""
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False)
    table.add_column("")
    for heading in plans:
        table.add_column(heading, justify="right")
    table.add_row("cells", *(f"{plan.size:,}" for plan in plans.values()))
    table.add_row("slack", *(f"{plan.slack(lengths):,}" for plan in plans.values()))
    table.add_row("cells that are real", *(f"{plan.efficiency(lengths):.0%}" for plan in plans.values()))
    table.add_row("cells / padded", *(f"{plan.size / plans['padded'].size:.2f}" for plan in plans.values()))
    table.add_row("steps, one after the other", *(f"{plan.num_steps:,}" for plan in plans.values()))
    table.add_row("buckets", *(f"{plan.num_buckets:,}" for plan in plans.values()))
    return table
