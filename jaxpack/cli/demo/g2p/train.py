"""The training loop of `jaxpack demo g2p`: steps over slot-filled batches, validation and checkpoints."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TimeRemainingColumn

from jaxpack.cli._measure import CountedJit
from jaxpack.cli.demo.g2p.checkpoint import Checkpoints, History, Interrupt, Interrupted
from jaxpack.cli.demo.g2p.model import TrainState
from jaxpack.cli.demo.g2p.words import Alphabets
from jaxpack.data import Batch, Batcher, BatchIterator
from jaxpack.datasets import Pronunciations
from jaxpack.metrics import best_error_rate

SAVE_EVERY = 100  # steps; a killed run loses no more
_SHOWN = 50  # the bar shows the mean loss of this many steps


class Scores(NamedTuple):
    """The errors of transcribed words, each compared with its closest pronunciation."""

    edits: int
    phonemes: int
    wrong: int
    words: int

    @property
    def per(self) -> float:
        """The phoneme error rate."""
        return self.edits / self.phonemes

    @property
    def wer(self) -> float:
        """The word error rate: the share of words with an error."""
        return self.wrong / self.words

    def __str__(self) -> str:
        return f"PER {self.per:.2%}, WER {self.wer:.2%}"


class HeldOut(NamedTuple):
    """Words to transcribe, with batches of their letters."""

    split: Pronunciations
    batches: Batcher


@dataclasses.dataclass
class Run:
    """A training run: its parts and its progress.

    Attributes:
      epochs: how many passes over the training examples it takes.
      batches: the batches of the training examples.
      train_step, decode: the compiled functions.
      state, history: the progress.
      alphabets: the meaning of decoded numbers.
      interrupt: the signals that stop the run.
      checkpoints: the checkpoints of the run, if it is saved.
      compile_seconds: the time of this process's first step, after it.
    """

    epochs: int
    batches: Batcher
    train_step: CountedJit
    decode: CountedJit
    state: TrainState
    history: History
    alphabets: Alphabets
    interrupt: Interrupt
    checkpoints: Checkpoints | None
    compile_seconds: float | None = None

    @property
    def num_steps(self) -> int:
        """The number of steps taken."""
        return len(self.history.losses)

    def save(self) -> None:
        """Writes a checkpoint, if the run is saved and has taken a step."""
        if self.checkpoints is not None and self.num_steps:
            self.checkpoints.save(self.state, self.history)


def train(run: Run, valid: HeldOut, console: Console) -> None:
    """Trains to the end from the run's present state, and validates after every epoch.

    Raises:
      Interrupted: if a signal came; the run is saved.
    """
    per_epoch = len(run.batches)
    columns = "{task.description}", BarColumn(24), "loss {task.fields[loss]}", "{task.fields[speed]}"
    try:
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task("", total=run.epochs * per_epoch, loss="-", speed="")
            stream = _stream(run.batches)
            while True:
                _show(bar, task, run, per_epoch)
                if run.num_steps == per_epoch * (len(run.history.validation) + 1):
                    _validate(run, valid, per_epoch, console)
                    run.save()
                elif run.num_steps % SAVE_EVERY == 0:
                    run.save()
                if run.num_steps == run.epochs * per_epoch:
                    return
                run.interrupt.check()
                _take_step(run, stream)
    except Interrupted:
        run.save()
        raise


def transcribe(run: Run, held_out: HeldOut) -> list[tuple[str, ...]]:
    """Transcribes each word to phonemes.

    Raises:
      Interrupted: if a signal came.
    """
    written: list[tuple[str, ...]] = [()] * len(held_out.split.words)
    for batch in held_out.batches:
        labels, lengths = jax.device_get(run.decode(run.state.params, batch.inputs))
        for row in np.flatnonzero(batch.weights):
            written[batch.indices[row]] = run.alphabets.name(labels[row, : lengths[row]])
        run.interrupt.check()
    return written


def score(written: list[tuple[str, ...]], split: Pronunciations) -> Scores:
    """Scores the transcribed words of a split."""
    rate = best_error_rate(written, split.pronunciations)
    edits, phonemes = (int(np.asarray(part)) for part in (rate.total, rate.weight))
    wrong = sum(word not in ways for word, ways in zip(written, split.pronunciations, strict=True))
    return Scores(edits, phonemes, wrong, len(written))


def _stream(batches: Batcher) -> Iterator[tuple[Batch, BatchIterator]]:
    """Yields batches endlessly, each with its iterator, whose state is that after the batch."""
    while True:
        iterator = iter(batches)
        for batch in iterator:
            yield batch, iterator


def _take_step(run: Run, stream: Iterator[tuple[Batch, BatchIterator]]) -> None:
    """Takes one step, which is timed unless it is the process's first, which compiles."""
    history, start = run.history, time.perf_counter()
    batch, iterator = next(stream)
    waiting = time.perf_counter() - start
    run.state, loss = run.train_step(run.state, batch)
    history.losses.append(float(loss))  # waits for the step
    history.batches = iterator.get_state()
    seconds = time.perf_counter() - start
    if run.compile_seconds is None:
        run.compile_seconds = seconds
        return
    history.seconds += seconds
    history.waiting += waiting
    history.letters += int(batch.inputs["letters"].lengths.sum())


def _validate(run: Run, valid: HeldOut, per_epoch: int, console: Console) -> None:
    """Scores the epoch that has ended."""
    scores = score(transcribe(run, valid), valid.split)
    run.history.validation.append(list(scores))
    loss = np.mean(run.history.losses[-per_epoch:])
    console.print(f"epoch {len(run.history.validation)}: loss {loss:.4f}, validation {scores}")


def _show(bar: Progress, task: TaskID, run: Run, per_epoch: int) -> None:
    """Updates the bar."""
    history, epoch = run.history, min(run.num_steps // per_epoch + 1, run.epochs)
    fields: dict[str, Any] = {"description": f"epoch {epoch}/{run.epochs}"}
    if history.losses:
        fields["loss"] = f"{np.mean(history.losses[-_SHOWN:]):.4f}"
    if history.seconds:
        fields["speed"] = f"{history.letters / history.seconds:,.0f} letters/s"
    bar.update(task, completed=run.num_steps, **fields)
