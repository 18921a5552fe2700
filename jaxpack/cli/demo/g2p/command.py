"""The command `jaxpack demo g2p`: a model of the pronunciation of words, trained on the CMU Pronouncing Dictionary.

It is a complete training script: a corpus under one plan, batches that fill it, a step that compiles once, validation,
and checkpoints from which an interrupted run resumes exactly.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from rich.console import Console

from jaxpack.cli._files import check_directory
from jaxpack.cli._measure import CountedJit
from jaxpack.cli.demo.g2p.checkpoint import Checkpoints, History, Interrupt, Interrupted, import_orbax
from jaxpack.cli.demo.g2p.model import TrainState, Transcriber, make_decode, make_train_step
from jaxpack.cli.demo.g2p.report import Report, Sample, print_report
from jaxpack.cli.demo.g2p.train import HeldOut, Run, Scores, score, train, transcribe
from jaxpack.cli.demo.g2p.words import TIME_VARYING, Alphabets, Example, training_examples
from jaxpack.data import SlotFilling, plan_cover
from jaxpack.datasets import Pronunciations, cmudict
from jaxpack.metrics import edit_distance

_SAMPLES = 12  # test words in the report


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings that determine a run's losses. Checkpoints of other settings are refused."""

    seed: int = 0
    epochs: int = 14
    batch_size: int = 256
    hidden_size: int = 256
    num_layers: int = 2
    embedding_size: int = 64
    layer: str = "LayerNormLSTM"
    dropout: float = 0.2
    learning_rate: float = 4e-3  # at the peak, after a tenth of the run; a cosine lowers it to 0
    weight_decay: float = 1e-2
    most_norm: float = 1.0  # clips the gradient of a step


_QUICK = Config(epochs=3, hidden_size=128, dropout=0.1, learning_rate=8e-3)


def g2p(
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of weights, shuffles and dropout.")] = 0,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the words.", show_default=f"{Config.epochs}")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pronunciations in a batch.")] = Config.batch_size,
    hidden_size: Annotated[
        int | None,
        typer.Option(min=1, help="Units of each layer and direction.", show_default=f"{Config.hidden_size}"),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help=f"About 4 minutes on 2 cores: {_QUICK.epochs} epochs, hidden size {_QUICK.hidden_size}.",
        ),
    ] = False,
    checkpoint: Annotated[
        pathlib.Path | None,
        typer.Option(
            metavar="DIR", callback=check_directory, help="Save the run in DIR, and resume a run saved there."
        ),
    ] = None,
) -> None:
    """Train an LSTM with CTC to pronounce English words, from a dictionary.

    The package contains the data: the CMU Pronouncing Dictionary. The report
    states the error rates on held-out phonemes and words, and the cells,
    compiled programs and times. Ctrl-C or SIGTERM stops a run: with
    --checkpoint DIR the same command resumes it, with the same losses as an
    uninterrupted run.
    """
    default = _QUICK if quick else Config()
    config = dataclasses.replace(
        default,
        seed=seed,
        epochs=epochs or default.epochs,
        batch_size=batch_size,
        hidden_size=hidden_size or default.hidden_size,
    )
    console = Console(stderr=True)
    _check_packages(checkpoint, console)
    with Interrupt() as interrupt:
        try:
            report = _run(config, checkpoint, interrupt, console)
        except Interrupted as stopped:
            way_on = f"Run the same command to resume from {checkpoint}."
            console.print(f"Stopped by {stopped}. {way_on if checkpoint else '--checkpoint DIR saves a run.'}")
            raise typer.Exit(128 + stopped.number) from stopped
    print_report(report, Console())


def _check_packages(checkpoint: pathlib.Path | None, console: Console) -> None:
    """Ends the command now, rather than after an epoch, if a package that the run needs is missing."""
    try:
        edit_distance("", "")
        if checkpoint is not None:
            import_orbax()
    except ModuleNotFoundError as missing:
        console.print(str(missing), markup=False)
        raise typer.Exit(1) from missing


def _run(config: Config, directory: pathlib.Path | None, interrupt: Interrupt, console: Console) -> Report:
    """Trains and tests.

    Raises:
      Interrupted: if a signal came.
    """
    with console.status("Reading the dictionary"):
        splits = tuple(split.without_stress() for split in cmudict())
        alphabets = Alphabets.of(splits)
        examples, left_out = training_examples(splits[0], alphabets)
        checkpoints = _open(directory, dataclasses.asdict(config) | {"examples": len(examples)})
        valid, test = _held_out(splits[1:], alphabets, config.batch_size)
        run = _start(config, examples, alphabets, interrupt, checkpoints)
        resumed = len(run.history.losses)
        statistics = run.batches.statistics()
    train(run, valid, console)
    with console.status("Testing"):
        written = transcribe(run, test)
    history, (plan,) = run.history, run.batches.plans
    return Report(
        title=f"CMU Pronouncing Dictionary, {config.layer} of {config.num_layers} layers, both directions, hidden "
        f"size {config.hidden_size}, CTC, seed {config.seed}",
        test=score(written, test.split),
        losses=history.losses,
        validation=[Scores(*scores) for scores in history.validation],
        num_examples=len(examples),
        left_out=left_out,
        tokens=statistics.tokens,
        num_batches=statistics.batches,
        longest=max(len(example["letters"]) for example in examples),
        plan=plan,
        resumed=resumed,
        train_programs=run.train_step.programs,
        decode_programs=run.decode.programs,
        compile_seconds=run.compile_seconds,
        seconds=history.seconds,
        waiting=history.waiting,
        letters=history.letters,
        samples=_samples(written, test.split),
    )


def _open(directory: pathlib.Path | None, config: dict[str, object]) -> Checkpoints | None:
    """Opens the checkpoints in a directory, if one is given."""
    if directory is None:
        return None
    try:
        return Checkpoints(directory, config)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="'--checkpoint'") from error


def _held_out(splits: Iterable[Pronunciations], alphabets: Alphabets, batch_size: int) -> list[HeldOut]:
    """Returns the splits with batches of their letters, all under one plan."""
    letters = [alphabets.spell(split.words) for split in splits]
    plan = plan_cover([len(word) for words in letters for word in words], batch_size)
    return [HeldOut(split, SlotFilling(words, plan, seed=None)) for split, words in zip(splits, letters, strict=True)]


def _start(
    config: Config,
    examples: list[Example],
    alphabets: Alphabets,
    interrupt: Interrupt,
    checkpoints: Checkpoints | None,
) -> Run:
    """Returns a run at its beginning, or at its last checkpoint."""
    batches = SlotFilling(examples, batch_size=config.batch_size, seed=config.seed, time_varying=TIME_VARYING)
    model = Transcriber(
        num_letters=len(alphabets.letters),
        num_classes=alphabets.num_classes,
        embedding_size=config.embedding_size,
        layer=config.layer,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        dropout=config.dropout,
    )
    optimizer = make_optimizer(config, config.epochs * len(batches))
    params = model.init(jax.random.key(config.seed))
    state, history = TrainState(params, optimizer.init(params), jnp.int32(0)), History()
    restored = checkpoints.restore(state) if checkpoints else None
    if restored:
        state, history = restored
        batches.set_state(history.batches)
    return Run(
        epochs=config.epochs,
        batches=batches,
        train_step=CountedJit(make_train_step(model, optimizer, config.seed)),
        decode=CountedJit(make_decode(model)),
        state=state,
        history=history,
        alphabets=alphabets,
        interrupt=interrupt,
        checkpoints=checkpoints,
    )


def make_optimizer(config: Config, num_steps: int) -> optax.GradientTransformation:
    """Returns AdamW with clipped gradients and a learning rate that rises for a tenth of the run, then falls to 0."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, num_steps // 10, num_steps)
    return optax.chain(
        optax.clip_by_global_norm(config.most_norm), optax.adamw(schedule, weight_decay=config.weight_decay)
    )


def _samples(written: list[tuple[str, ...]], split: Pronunciations) -> list[Sample]:
    """Returns words evenly spaced over the split, each with its closest pronunciation."""
    places = np.linspace(0, len(written) - 1, min(_SAMPLES, len(written)), dtype=int)
    return [
        Sample(split.words[i], written[i], min(split.pronunciations[i], key=lambda way: edit_distance(written[i], way)))
        for i in places
    ]
