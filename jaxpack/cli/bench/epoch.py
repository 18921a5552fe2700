"""The workload `jaxpack bench epoch`: training on a whole corpus, in padded, bucketed and slot-filled batches.

All ways to make batches have the same layer, loss, optimiser and batch size, and use every sequence once per epoch.
They differ in the sequences and the plan of each batch. The time of an epoch includes the host's work. The result is a
dict, which `--json` writes:

    workload        as in `jaxpack.cli.bench.measure`, for the corpus; batch_size is the number of sequences in each
                    batch, and sequences that in the corpus
    plan            boundaries, rows and starts of the slot-filled plan
    machine         as there
    repeats         the number of turns: an epoch of each in every turn
    peers           for each way to make batches: name; programs; compile_seconds, to trace, lower and compile all of
                    them; epochs; batches, cells, efficiency, tokens_per_second and packing_share, the medians over
                    epochs; seconds {median, low, high}; and times_padded, turn by turn, in the same form, or null
      epochs        each {seconds, packing_seconds, loss, tokens, rows, batches, cells, rank_correlation};
                    packing_seconds are those in which the host decides on batches and lays them out
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpack._layers.recurrent_layer import RecurrentLayer
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._plans.planners import plan_padded
from jaxpack.cli._devices import AXIS
from jaxpack.cli.bench.machine import compilation_cache_off, load, machine
from jaxpack.cli.bench.measure import describe
from jaxpack.cli.bench.stepped_cells import arrays_beside
from jaxpack.cli.bench.turns import Tell, spread
from jaxpack.cli.bench.workloads import Workload
from jaxpack.data import Batch, Batcher, BucketByLength, SlotFilling, SortedChunks, plan_cover
from jaxpack.losses import Mean
from jaxpack.sharding import put, sum_shards

BATCH_SIZE = 64
ON_DEVICES = "slot-filled-devices"
_PROGRAMS = 6  # the most programs of bucketed and of sorted
_PARTS = 8  # padded-batch rounds up to multiples of longest / 8; a power of two would pad all above 128 steps to 200
_PACKAGES = ("jaxpack", "jax", "jaxlib", "numpy", "optax")

Source = Sequence[Any]  # sequences [L, F], or tuples of several arrays
State = tuple[Any, optax.OptState]  # parameters, and the optimiser's state
Step = Callable[[State, Batch], tuple[State, jax.Array]]


class Training(NamedTuple):
    """One way to make batches, ready to be timed.

    Attributes:
      batches: the batcher.
      programs: the compiled step under each plan of its batches.
      mesh: the devices over which the shards of a batch are spread; None for one device.
      compile_seconds: the seconds to trace, lower and compile all programs.
    """

    batches: Batcher
    programs: Mapping[BucketPlan, Step]
    compile_seconds: float
    mesh: Any


class Epoch(NamedTuple):
    """The time of one epoch, and its content.

    Attributes:
      seconds: from the request for the first batch to the end of the last step.
      packing_seconds: the part of `seconds` spent waiting for batches.
      loss: the mean over tokens.
      tokens, rows, batches, cells, rank_correlation: as in `jaxpack.data.Statistics`.
    """

    seconds: float
    packing_seconds: float
    loss: float
    tokens: int
    rows: int
    batches: int
    cells: int
    rank_correlation: float


def _padded(workload: Workload, source: Source) -> Batcher:
    """Makes random batches, padded to the longest sequence of the corpus: one program."""
    return _random_batches(workload, source, [workload.longest])


def _padded_batch(workload: Workload, source: Source) -> Batcher:
    """Makes random batches, padded to their own longest sequence, rounded up so that there are few programs."""
    rounded = {math.ceil(workload.longest * part / _PARTS) for part in range(1, _PARTS + 1)}
    return _random_batches(workload, source, sorted(rounded))


def _random_batches(workload: Workload, source: Source, boundaries: Sequence[int]) -> Batcher:
    """Makes random batches, each under the smallest padded plan that it fits."""
    plans = [plan_padded(BATCH_SIZE, boundary) for boundary in boundaries]
    return SortedChunks(source, plans, window=1, seed=workload.seed, lengths=workload.lengths)


def _bucketed(workload: Workload, source: Source) -> Batcher:
    """Makes batches of sequences of one bucket of lengths, padded to its boundary."""
    return BucketByLength(
        source,
        num_buckets=_PROGRAMS,
        batch_size=BATCH_SIZE,
        planner=lambda rooms: plan_padded(len(rooms), int(max(rooms))),
        seed=workload.seed,
        lengths=workload.lengths,
    )


def _sorted(workload: Workload, source: Source) -> Batcher:
    """Makes batches sorted by length within windows of several batches, and padded."""
    return SortedChunks(
        source, num_plans=_PROGRAMS, batch_size=BATCH_SIZE, seed=workload.seed, lengths=workload.lengths
    )


def _slot_filled(workload: Workload, source: Source) -> Batcher:
    """Makes batches that fill the slots of one plan: one program."""
    return SlotFilling(source, _cover(workload), seed=workload.seed, lengths=workload.lengths)


def _slot_filled_devices(workload: Workload, source: Source) -> Batcher:
    """Makes slot-filled batches of a shard for each device, all under one plan."""
    devices = workload.mesh.size
    plan = plan_cover(workload.lengths, BATCH_SIZE // devices)
    return SlotFilling(source, plan, seed=workload.seed, lengths=workload.lengths, local_shards=devices)


def _cover(workload: Workload) -> BucketPlan:
    return plan_cover(workload.lengths, BATCH_SIZE)


BATCHERS: Mapping[str, Callable[[Workload, Source], Batcher]] = MappingProxyType(
    {
        "padded": _padded,
        "padded-batch": _padded_batch,
        "bucketed": _bucketed,
        "sorted": _sorted,
        "slot-filled": _slot_filled,
        ON_DEVICES: _slot_filled_devices,
    }
)


def measure_epoch(workload: Workload, names: Sequence[str], repeats: int, tell: Tell) -> dict[str, Any]:
    """Measures epochs of a corpus in several kinds of batches.

    Args:
      workload: the corpus and the layer.
      names: keys of BATCHERS; slot-filled-devices is left out for one device.
      repeats: how many turns are timed.
      tell: is called with the progress.

    Raises:
      RuntimeError: if an epoch does not use every sequence once, or its loss is not finite.
    """
    load_before, source = load(), _sequences(workload)
    optimizer = optax.adam(1e-3)
    state = jax.device_put((workload.params, optimizer.init(workload.params)))
    names = [name for name in names if name != ON_DEVICES or workload.mesh is not None]
    trainings: dict[str, Training] = {}
    with compilation_cache_off():
        for i, name in enumerate(names):
            tell(f"compiling {name}", 0.2 * i / len(names))
            mesh = workload.mesh if name == ON_DEVICES else None
            step = _train_step(workload.layer, optimizer, mesh)
            make = functools.partial(BATCHERS[name], workload, source)
            trainings[name] = _prepare(make, step, _placed(state, mesh), repeats, mesh)
        epochs = _in_turns(trainings, state, repeats, tell)
    for name, found in epochs.items():
        _check(name, found, workload)
    padded = _seconds(epochs["padded"]) if "padded" in epochs else None
    return {
        "workload": {**describe(workload), "batch_size": BATCH_SIZE, "sequences": workload.batch_size},
        "plan": dataclasses.asdict(_cover(workload)),
        "machine": {**machine(_PACKAGES), "load_before": load_before},
        "repeats": repeats,
        "peers": [_results(name, trainings[name], epochs[name], padded) for name in names],
    }


def _sequences(workload: Workload) -> Source:
    """Draws the corpus's inputs, which are normal, and the arrays beside them."""
    generator = np.random.default_rng([workload.seed, 1])
    tokens = generator.standard_normal((workload.tokens, *workload.input_shape), np.float32)
    beside = arrays_beside(workload.cell, generator, (workload.tokens,), workload.features)
    ends = np.cumsum(workload.lengths)[:-1]
    sequences, *others = (np.split(array, ends) for array in (tokens, *beside))
    return list(zip(sequences, *others, strict=True)) if beside else sequences


def _placed(state: State, mesh: Any) -> State:
    """Puts a state on all devices of a mesh."""
    return state if mesh is None else jax.device_put(state, jax.NamedSharding(mesh, jax.P()))


def _train_step(layer: RecurrentLayer, optimizer: optax.GradientTransformation, mesh: Any) -> Step:
    """Returns a step that trains the layer's mean output to be the first feature of its input."""

    def loss_of_shard(params: Any, batch: Batch) -> Mean:
        inputs = _inputs(batch)
        output, _ = layer.apply(params, inputs)
        x = jax.tree.leaves(inputs.data)[0]
        error = jnp.mean(output.data, axis=-1) - x[..., 0]  # 0 in slack
        return Mean(jnp.sum(error**2), jnp.sum(inputs.lengths))

    mean_loss = loss_of_shard if mesh is None else sum_shards(loss_of_shard, mesh, AXIS)

    def step(state: State, batch: Batch) -> tuple[State, jax.Array]:
        params, optimizer_state = state
        loss, gradient = jax.value_and_grad(lambda params: mean_loss(params, batch).value)(params)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), loss

    return step


def _prepare(make: Callable[[], Batcher], step: Step, state: State, repeats: int, mesh: Any) -> Training:
    """Compiles the step under each plan that the turns need, which a rehearsal finds, and runs each program once."""
    rehearsal = make()
    rehearsed = {_inputs(batch).plan: batch for _ in range(repeats) for batch in rehearsal}
    examples = {plan: _spread(batch, mesh) for plan, batch in rehearsed.items()}
    jax.clear_caches()  # drops the traces of other steps
    start = time.perf_counter()
    programs = {plan: jax.jit(step).lower(state, batch).compile() for plan, batch in examples.items()}
    compile_seconds = time.perf_counter() - start
    for plan, program in programs.items():
        jax.block_until_ready(program(state, examples[plan]))
    return Training(make(), programs, compile_seconds, mesh)


def _inputs(batch: Batch) -> PackedSequence:
    """Returns the inputs of a batch; where they are several arrays, those of one packed batch."""
    if isinstance(batch.inputs, PackedSequence):
        return batch.inputs
    first, *others = batch.inputs
    return first.replace(data=(first.data, *(each.data for each in others)))


def _spread(batch: Batch, mesh: Any) -> Batch:
    """Puts the shards of a batch on the devices of a mesh."""
    return batch if mesh is None else put(batch, mesh, AXIS)


def _in_turns(trainings: Mapping[str, Training], state: State, repeats: int, tell: Tell) -> dict[str, list[Epoch]]:
    """Times an epoch of each in every turn, in an order that is drawn anew for each turn.

    All start from the same state, and continue from their own.
    """
    states, names = {name: _placed(state, each.mesh) for name, each in trainings.items()}, list(trainings)
    epochs: dict[str, list[Epoch]] = {name: [] for name in names}
    generator = np.random.default_rng(0)
    for turn in range(repeats):
        for i, place in enumerate(generator.permutation(len(names))):
            name = names[place]
            tell(f"turn {turn + 1} of {repeats}, {name}", 0.2 + 0.8 * (turn + i / len(names)) / repeats)
            training = trainings[name]
            states[name], epoch = _train(training, states[name])
            epochs[name].append(epoch)
    return epochs


def _train(training: Training, state: State) -> tuple[State, Epoch]:
    """Trains one epoch. It waits for each step, so that the host's time and the device's are separate."""
    packing, loss, tokens = 0.0, 0.0, 0
    start = asked = time.perf_counter()
    batches = iter(training.batches)
    for batch in batches:
        packing += time.perf_counter() - asked
        state, batch_loss = training.programs[_inputs(batch).plan](state, _spread(batch, training.mesh))
        in_batch = int(_inputs(batch).lengths.sum())
        loss, tokens = loss + float(batch_loss) * in_batch, tokens + in_batch
        asked = time.perf_counter()
    end = time.perf_counter()
    packing += end - asked
    found = batches.statistics
    of_batches = found.rows, found.batches, found.cells, found.rank_correlation
    return state, Epoch(end - start, packing, loss / tokens, tokens, *of_batches)


def _check(name: str, epochs: Iterable[Epoch], workload: Workload) -> None:
    """Raises RuntimeError unless each epoch uses all sequences and has a finite loss."""
    for epoch in epochs:
        if (epoch.rows, epoch.tokens) != (workload.batch_size, workload.tokens):
            raise RuntimeError(
                f"an epoch of {name} has {epoch.rows:,} sequences and {epoch.tokens:,} tokens, but the corpus has "
                f"{workload.batch_size:,} and {workload.tokens:,}."
            )
        if not math.isfinite(epoch.loss):
            raise RuntimeError(f"an epoch of {name} has a loss of {epoch.loss}.")


def _results(name: str, training: Training, epochs: Sequence[Epoch], padded: np.ndarray | None) -> dict[str, Any]:
    """Returns the results of one way to make batches."""
    seconds, tokens = _seconds(epochs), epochs[0].tokens
    cells = float(np.median([epoch.cells for epoch in epochs]))
    return {
        "name": name,
        "programs": len(training.programs),
        "compile_seconds": training.compile_seconds,
        "epochs": [epoch._asdict() for epoch in epochs],
        "batches": float(np.median([epoch.batches for epoch in epochs])),
        "cells": cells,
        "efficiency": tokens / cells,
        "tokens_per_second": float(np.median(tokens / seconds)),
        "packing_share": float(np.median([epoch.packing_seconds for epoch in epochs] / seconds)),
        "seconds": spread(seconds),
        "times_padded": None if padded is None else spread(seconds / padded),
    }


def _seconds(epochs: Iterable[Epoch]) -> np.ndarray:
    return np.array([epoch.seconds for epoch in epochs])
