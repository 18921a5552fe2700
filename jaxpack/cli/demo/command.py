"""The command `jaxpack demo`: trains a classifier of utterances with different lengths, all its batches under one plan.

The first part is a usual training script in JAX: a model, batches, a step, a loop. jaxpack adds the plan. The seed
determines the shuffles, so one plan can be made that every batch of the run fits, and the step compiles once.

With several devices a batch has a leading axis of shards, and the loss is summed over them.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress

import jaxpack
from jaxpack.cli._devices import AXIS, CpuDevices, cpu_mesh
from jaxpack.cli._measure import CountedJit, median_seconds, seconds
from jaxpack.cli.demo.report import Column, Report, print_report
from jaxpack.datasets import LabelledSequences, japanese_vowels
from jaxpack.losses import Mean
from jaxpack.sharding import deal, sum_shards

LEARNING_RATE = 3e-3  # at the start; a cosine lowers it to 0 over the run
REPEATS = 15  # timed passes over an epoch under each plan


class Batch(NamedTuple):
    """Padded utterances, with their lengths, labels and weights."""

    inputs: np.ndarray  # float32 [B, T, F]
    lengths: np.ndarray  # int32 [B], 0 in empty rows
    labels: np.ndarray  # int32 [B]
    weights: np.ndarray  # float32 [B], 1, or 0 in empty rows


class TrainState(NamedTuple):
    """The state between training steps."""

    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A bidirectional LSTM, the mean over each sequence's own steps, and a linear head."""

    input_size: int
    hidden_size: int
    num_classes: int

    @property
    def lstm(self) -> jaxpack.LSTM:
        """The recurrent layer."""
        return jaxpack.LSTM(self.input_size, self.hidden_size, bidirectional=True)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Draws parameters: the layer's by its init, the head's uniform within 1/sqrt(fan-in) of 0."""
        lstm_key, head_key = jax.random.split(key)
        shape = (self.lstm.output_size, self.num_classes)
        bound = self.lstm.output_size**-0.5
        head = {"weight": jax.random.uniform(head_key, shape, minval=-bound, maxval=bound), "bias": jnp.zeros(shape[1])}
        return {"lstm": self.lstm.init(lstm_key), "head": head}

    def apply(self, params: dict[str, Any], packed: jaxpack.PackedSequence) -> jax.Array:
        """Computes logits [B, classes] of packed utterances [S, F]."""
        output, _ = self.lstm.apply(params["lstm"], packed)
        return jaxpack.segment_mean(output) @ params["head"]["weight"] + params["head"]["bias"]


def standardise(split: LabelledSequences, like: LabelledSequences) -> list[np.ndarray]:
    """Shifts and scales a split's sequences by the mean and the deviation of the frames of `like`."""
    frames = np.concatenate(like.sequences)
    mean, deviation = frames.mean(axis=0), frames.std(axis=0)
    return [(sequence - mean) / deviation for sequence in split.sequences]


def pad(sequences: list[np.ndarray], labels: np.ndarray, num_empty: int = 0) -> Batch:
    """Pads all examples to one batch, followed by `num_empty` rows of length 0 and weight 0."""
    num_rows = len(sequences) + num_empty
    lengths = np.zeros(num_rows, np.int32)
    lengths[: len(sequences)] = [len(sequence) for sequence in sequences]
    inputs = np.zeros((num_rows, lengths.max(), sequences[0].shape[1]), np.float32)
    for row, sequence in zip(inputs, sequences, strict=False):
        row[: len(sequence)] = sequence
    return Batch(inputs, lengths, np.pad(labels, (0, num_empty)), (lengths > 0).astype(np.float32))


def load() -> tuple[Batch, Batch]:
    """Loads all training utterances, followed by an empty row, and all test utterances."""
    train_split, test_split = japanese_vowels()
    examples = pad(standardise(train_split, like=train_split), train_split.labels, num_empty=1)
    return examples, pad(standardise(test_split, like=train_split), test_split.labels)


def shuffle(seed: int, epochs: int, num_examples: int, batch_size: int) -> np.ndarray:
    """Draws the examples of each batch of the run: int [epochs, batches, B], -1 for an empty row."""
    generator = np.random.default_rng(seed)
    num_batches = -(-num_examples // batch_size)
    rows = np.full((epochs, num_batches * batch_size), -1)
    for epoch in rows:
        epoch[:num_examples] = generator.permutation(num_examples)
    return rows.reshape(epochs, num_batches, batch_size)


def deal_batches(lengths: np.ndarray, rows: np.ndarray, devices: int) -> np.ndarray:
    """Deals each batch to devices: int [epochs, batches, devices, B/devices]; as it is for one device."""
    if devices == 1:
        return rows
    dealt = [batch[deal(lengths[batch], devices)] for batch in rows.reshape(-1, rows.shape[-1])]
    return np.reshape(dealt, (*rows.shape[:2], devices, -1))


def take(examples: Batch, rows: np.ndarray) -> Batch:
    """Takes these rows as a batch; -1 takes the last one, which is empty."""
    return Batch(*(field[rows] for field in examples))


def plan_run(lengths: np.ndarray, rows: np.ndarray) -> jaxpack.BucketPlan:
    """Returns one plan that every batch fits: slot i has room for the longest of their i-th longest sequences.

    Batches of lengths [5, 2] and [3, 4] need room [5, 3].
    """
    longest_first = -np.sort(-lengths[rows], axis=-1)
    return jaxpack.plan_best(longest_first.reshape(-1, rows.shape[-1]).max(axis=0))


def make_plans(lengths: np.ndarray, rows: np.ndarray) -> dict[str, jaxpack.BucketPlan]:
    """Returns the plans that are compared: the run's, and the padded batch."""
    return {"packed": plan_run(lengths, rows), "padded": jaxpack.plan_padded(rows.shape[-1], int(lengths.max()))}


def make_logits(model: Classifier, plan: jaxpack.BucketPlan) -> Callable[[Any, Batch], jax.Array]:
    """Returns a function from parameters and a padded batch to logits, which computes packed under a plan."""

    def logits(params: Any, batch: Batch) -> jax.Array:
        packed = jaxpack.pack_padded_sequence(batch.inputs, batch.lengths, batch_first=True, plan=plan)
        return model.apply(params, packed)

    return logits


def make_train_step(
    model: Classifier, optimizer: optax.GradientTransformation, plan: jaxpack.BucketPlan, mesh: Any = None
) -> Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]:
    """Returns the training step under a plan: a jittable function from state and batch to the next state and loss.

    With a mesh, each of its devices runs a shard of the batch under the plan.
    """
    logits = make_logits(model, plan)

    def loss_of_shard(params: Any, batch: Batch) -> Mean:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, batch), batch.labels)
        return Mean(jnp.sum(losses * batch.weights), jnp.sum(batch.weights))

    loss = loss_of_shard if mesh is None else sum_shards(loss_of_shard, mesh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        value, gradients = jax.value_and_grad(lambda params: loss(params, batch).value)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), value

    return train_step


def jit_step(step: Callable[[TrainState, Batch], tuple[TrainState, jax.Array]], mesh: Any) -> CountedJit:
    """Compiles a training step. With a mesh, the state is on all devices, and the shards of a batch are spread."""
    if mesh is None:
        return CountedJit(step)
    return CountedJit(step, in_shardings=(jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P(AXIS))))


def initial_state(
    model: Classifier, optimizer: optax.GradientTransformation, seed: int, mesh: Any = None
) -> TrainState:
    """Returns the state from which training starts, on all devices of a mesh."""
    params = model.init(jax.random.key(seed))
    state = TrainState(params, optimizer.init(params))
    return state if mesh is None else jax.device_put(state, jax.NamedSharding(mesh, jax.P()))


def make_count_correct(model: Classifier, plan: jaxpack.BucketPlan) -> Callable[[Any, Batch], jax.Array]:
    """Returns a function from parameters and a batch to the number of examples that the model classifies correctly."""
    logits = make_logits(model, plan)

    def count_correct(params: Any, batch: Batch) -> jax.Array:
        return jnp.sum((logits(params, batch).argmax(axis=-1) == batch.labels) * batch.weights)

    return count_correct


def train(
    step: Callable[[TrainState, Batch], tuple[TrainState, jax.Array]],
    state: TrainState,
    examples: Batch,
    rows: np.ndarray,
    console: Console,
) -> TrainState:
    """Trains over epochs and batches, with a progress bar."""
    tokens = examples.lengths.sum()
    columns = "epoch", MofNCompleteColumn(), BarColumn(24), "loss {task.fields[loss]}", "{task.fields[speed]}"
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(rows), loss="-", speed="")
        for epoch in rows:
            start, losses = time.perf_counter(), []
            for batch_rows in epoch:
                state, loss = step(state, take(examples, batch_rows))
                losses.append(loss)
            mean_loss = float(np.mean(losses))  # waits for the steps, so the clock is read after them
            speed = tokens / (time.perf_counter() - start)
            progress.update(task, advance=1, loss=f"{mean_loss:.4f}", speed=f"{speed:,.0f} tokens/s")
    return state


def time_compiling(steps: dict[str, CountedJit], state: TrainState, batch: Batch) -> dict[str, float]:
    """Times the first call of each step, in seconds."""
    return {name: seconds(functools.partial(step, state, batch)) for name, step in steps.items()}


def time_epochs(steps: dict[str, CountedJit], state: TrainState, batches: list[Batch]) -> dict[str, float]:
    """Times each step on the same batches from the same state: the median, in seconds, of repeats taken in turns."""

    def epoch(step: CountedJit) -> TrainState:
        reached = state
        for batch in batches:
            reached, _ = step(reached, batch)
        return reached

    return median_seconds({name: functools.partial(epoch, step) for name, step in steps.items()}, REPEATS)


def demo(
    context: typer.Context,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the weights and the shuffles.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the 270 training utterances.")] = 30,
    batch_size: Annotated[int, typer.Option(min=1, max=270, help="Utterances in a batch.")] = 27,
    hidden_size: Annotated[int, typer.Option(min=1, help="Units of the LSTM in each direction.")] = 64,
    padded: Annotated[bool, typer.Option("--padded", help="Train under the padded plan.")] = False,
    cpu_devices: CpuDevices = 1,
) -> None:
    """Train an LSTM to tell nine speakers apart, packed, and compare with padded.

    The package contains the data: Japanese Vowels, utterances of 7 to 29
    frames. The report states the test accuracy, and the cells, compiled
    programs and times of this run.
    """
    if context.invoked_subcommand:
        _check_no_options(context)
        return
    mesh = cpu_mesh(cpu_devices, batch_size, "Pass a --batch-size that it divides.")
    examples, tests = load()
    shuffled = shuffle(seed, epochs, int(examples.weights.sum()), batch_size)
    rows = deal_batches(examples.lengths, shuffled, cpu_devices)
    num_steps = rows.shape[0] * rows.shape[1]
    trained = "padded" if padded else "packed"
    plans = make_plans(examples.lengths, rows)
    test_plan = jaxpack.plan_padded(*tests.inputs.shape[:2]) if padded else jaxpack.plan_buckets(tests.lengths)

    model = Classifier(examples.inputs.shape[-1], hidden_size, int(examples.labels.max()) + 1)
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, decay_steps=num_steps))
    steps = {name: jit_step(make_train_step(model, optimizer, plan, mesh), mesh) for name, plan in plans.items()}
    count_correct = CountedJit(make_count_correct(model, test_plan))
    untrained = initial_state(model, optimizer, seed, mesh)

    console = Console(stderr=True)
    with console.status("Compiling the training step, packed and padded"):
        compile_seconds = time_compiling(steps, untrained, take(examples, rows[0, 0]))
    state = train(steps[trained], untrained, examples, rows, console)
    with console.status("Testing, and timing packed against padded"):
        num_correct = int(count_correct(jax.device_get(state.params), tests))  # on one device
        epoch_seconds = time_epochs(steps, untrained, [take(examples, batch_rows) for batch_rows in rows[0]])

    on_devices = f", {cpu_devices} CPU devices" if mesh else ""
    report = Report(
        title=f"Japanese Vowels, bidirectional LSTM of hidden size {hidden_size}, {trained}{on_devices}, seed {seed}",
        num_correct=num_correct,
        num_tests=len(tests.labels),
        num_steps=num_steps,
        train_programs=steps[trained].programs,
        test_programs=count_correct.programs,
        tokens=int(examples.lengths.sum()),
        num_batches=rows.shape[1],
        columns={name: Column(plans[name], compile_seconds[name], epoch_seconds[name]) for name in plans},
        trained=trained,
        repeats=REPEATS,
        lengths=examples.lengths[rows[0, 0]].reshape(cpu_devices, -1)[0],
        devices=cpu_devices,
    )
    print_report(report, Console())


def _check_no_options(context: typer.Context) -> None:
    """Raises if options precede the name of another demo, which would not get them."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(
                f"is an option of `jaxpack demo` itself; options of {context.invoked_subcommand} come after its name.",
                param_hint=f"'--{name.replace('_', '-')}'",
            )
