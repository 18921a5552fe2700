"""The report of `jaxpack demo g2p`: error rates, cells, programs and times, in 80 columns."""

from __future__ import annotations

from typing import NamedTuple

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack.cli._text import print_parts
from jaxpack.cli.demo.g2p.train import Scores


class Sample(NamedTuple):
    """A word, the model's phonemes, and the closest pronunciation in the dictionary."""

    word: str
    written: tuple[str, ...]
    reference: tuple[str, ...]


class Report(NamedTuple):
    """The results of a run.

    Attributes:
      title: the data, model and options of the run.
      test: the scores on the test words.
      losses: the loss of each training step.
      validation: the scores after each epoch.
      num_examples, left_out: how many pronunciations the run trains on, and how many were left out since CTC cannot
        emit them.
      tokens: how many letters an epoch has.
      num_batches: how many batches an epoch has.
      longest: how many letters the longest training word has.
      plan: the plan of all training batches.
      resumed: the step at which this process began.
      train_programs, decode_programs: how many programs this process compiled.
      compile_seconds: the time of this process's first step; None if it took no step.
      seconds, waiting, letters: as in `History`.
      samples: some test words.
    """

    title: str
    test: Scores
    losses: list[float]
    validation: list[Scores]
    num_examples: int
    left_out: int
    tokens: int
    num_batches: int
    longest: int
    plan: BucketPlan
    resumed: int
    train_programs: int
    decode_programs: int
    compile_seconds: float | None
    seconds: float
    waiting: float
    letters: int
    samples: list[Sample]


def print_report(report: Report, console: Console) -> None:
    """Prints the report."""
    title = Text(report.title, style="bold")
    note = (
        "Phonemes are without stress; a word with several pronunciations is compared with the closest. PER: edits per "
        "phoneme of the dictionary. WER: share of words with an edit."
    )
    print_parts((title, _errors(report), _epochs(report), _work(report), _samples(report), note), console)


def _errors(report: Report) -> Table:
    """Returns the table of error rates."""
    test = report.test
    table = Table.grid(padding=(0, 3))
    table.add_row("Test phoneme error rate", f"{test.per:.2%}, {test.edits:,} edits for {test.phonemes:,} phonemes")
    table.add_row("Test word error rate", f"{test.wer:.2%}, {test.wrong:,} of {test.words:,} words")
    table.add_row("Trained on", f"{report.num_examples:,} pronunciations")
    table.add_row("Left out in training", f"{report.left_out:,} that have more phonemes than CTC has frames")
    return table


def _epochs(report: Report) -> Table:
    """Returns the table of losses and scores by epoch."""
    table = _headed("epoch", "mean loss", "validation PER", "validation WER")
    for number, scores in enumerate(report.validation):
        losses = report.losses[number * report.num_batches :][: report.num_batches]
        table.add_row(f"{number + 1}", f"{sum(losses) / len(losses):.4f}", f"{scores.per:.2%}", f"{scores.wer:.2%}")
    return table


def _work(report: Report) -> Table:
    """Returns the table of cells, programs and times."""
    plan, num_steps = report.plan, len(report.losses) - report.resumed
    padded = plan.num_sequences * report.longest
    resumed = f" (resumed at step {report.resumed:,})" if report.resumed else ""
    table = Table.grid(padding=(0, 3))
    table.add_row("Plan of all batches", plan.summary)
    table.add_row("Cells that are letters", f"{report.tokens / (plan.size * report.num_batches):.1%}")
    table.add_row("Cells / padded to the longest", f"{plan.size / padded:.2f}, {plan.size:,} of {padded:,} in a batch")
    steps = f"{report.train_programs} for {num_steps:,} training steps{resumed}"
    table.add_row("Compiled programs", f"{steps}, {report.decode_programs} for decoding")
    if report.compile_seconds is not None:
        table.add_row("First step, which compiles", f"{report.compile_seconds:.1f} s")
    if report.seconds:
        table.add_row("Time of all other steps", _duration(report.seconds))
        table.add_row("Share of it making batches", f"{report.waiting / report.seconds:.1%}")
        table.add_row("Training speed", f"{report.letters / report.seconds:,.0f} letters/s on {jax.default_backend()}")
    return table


def _samples(report: Report) -> Table:
    """Returns the table of test words."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("", "test word", "transcribed", "dictionary"):
        table.add_column(heading, overflow="fold")
    for word, written, reference in report.samples:
        verdict = "right" if written == reference else "wrong"
        table.add_row(verdict, word, " ".join(written), " ".join(reference) if written != reference else "same")
    return table


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} minutes"


def _headed(*headings: str) -> Table:
    """Returns a table of numbers."""
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
