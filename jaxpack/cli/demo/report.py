"""The report of `jaxpack demo`: accuracy, cells, programs and times, in 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack.cli._text import picture_of, print_parts

_LINES = 14  # of the picture


class Column(NamedTuple):
    """The costs of training under one plan."""

    plan: BucketPlan
    compile_seconds: float
    epoch_seconds: float


class Report(NamedTuple):
    """The results of a run of the demo.

    Attributes:
      title: the data, model and options of the run.
      num_correct, num_tests: how many test utterances the trained model classifies correctly, and how many there are.
      num_steps: how many training steps the run had.
      train_programs, test_programs: how many programs were compiled for training, and for the test.
      tokens: how many real frames an epoch has.
      num_batches: how many batches an epoch has.
      columns: the costs of "packed" and "padded".
      trained: which of the two trained the model.
      repeats: how many times an epoch was timed under each plan.
      lengths: int [B], the lengths in the first batch, or in its first shard.
      devices: how many devices share a batch, each under the plan.
    """

    title: str
    num_correct: int
    num_tests: int
    num_steps: int
    train_programs: int
    test_programs: int
    tokens: int
    num_batches: int
    columns: Mapping[str, Column]
    trained: str
    repeats: int
    lengths: np.ndarray
    devices: int = 1


def print_report(report: Report, console: Console) -> None:
    """Prints the report."""
    drawn = picture_of(report.columns[report.trained].plan, report.lengths, _LINES)
    speed = f"Speed: median of {report.repeats} epochs under each plan, taken in turns, on {jax.default_backend()}."
    title = Text(report.title, style="bold")
    picture, caption = Text(drawn, no_wrap=True), Text(_caption(report))
    print_parts((title, _facts(report), _comparison(report), speed, picture, caption), console)


def _facts(report: Report) -> Table:
    """Returns the table of accuracy and programs."""
    accuracy = report.num_correct / report.num_tests
    programs = f"{report.train_programs} for {report.num_steps:,} training steps, {report.test_programs} for the test"
    table = Table.grid(padding=(0, 3))
    table.add_row("Test accuracy", f"{accuracy:.1%}, {report.num_correct} of {report.num_tests} utterances")
    table.add_row("Compiled programs", programs)
    return table


def _comparison(report: Report) -> Table:
    """Returns the table of packed beside padded."""
    columns = report.columns["packed"], report.columns["padded"]
    cells = [column.plan.size * report.num_batches * report.devices for column in columns]
    speeds = [report.tokens / column.epoch_seconds for column in columns]
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False)
    table.add_column("")
    for heading in ("packed", "padded", "packed/padded"):
        table.add_column(heading, justify="right")
    table.add_row("real tokens in an epoch", *[f"{report.tokens:,}"] * 2)
    table.add_row("cells computed in an epoch", *(f"{count:,}" for count in cells), f"{cells[0] / cells[1]:.2f}")
    table.add_row("cells that are real", *(f"{report.tokens / count:.0%}" for count in cells))
    table.add_row("tokens per second in training", *(f"{s:,.0f}" for s in speeds), f"{speeds[0] / speeds[1]:.2f}")
    table.add_row("seconds to compile the step", *(f"{column.compile_seconds:.1f}" for column in columns))
    return table


def _caption(report: Report) -> str:
    """Returns the caption of the picture."""
    plan = report.columns[report.trained].plan
    shown = f"{_LINES} of its {plan.rows[0]} rows" if plan.rows[0] > _LINES else "all its rows"
    laid_out = "rows run down, with utterances end to end in two shades" if plan.starts else "utterances run down"
    blank = " Padding would also compute the blank part at the right." if plan.num_buckets > 1 else ""
    marks = "█ ▓ real" if plan.starts else "█ real"
    drawn = "batch" if report.devices == 1 else "shard"
    return (
        f"The first {drawn} under the run's plan ({plan.summary}; {shown}). Time runs right, {laid_out}, longest "
        f"first. {marks}, ░ slack: computed, then masked.{blank}"
    )
