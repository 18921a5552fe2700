"""`jaxpack bench epoch`: training through a whole corpus, in batches that are padded, bucketed and slot-filled.

All have the same layer, loss, optimiser and batch size, and use every sequence once an epoch. What differs is which
sequences come together, and under what plans; the time is that of the epoch with all that the host does for it. The
result is a dict as `--json` writes it:

    workload        as in `jaxpack.cli.bench_measure`, of the corpus, but that batch_size is how many sequences each
                    batch has; and sequences, how many the corpus has
    plan            boundaries, rows and starts of the plan that is slot-filled
    machine         as there
    repeats         how many turns: an epoch of each in every turn
    peers           for each way to make batches: name, programs, compile_seconds, which trace, lower and compile all of
                    them, epochs, and in the median of these batches, cells, efficiency, tokens_per_second and
                    packing_share; seconds as {median, low, high}, and so times_padded, turn by turn, or null
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
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._plans.planners import plan_padded
from jaxpack.cli.bench.measure import Tell, compilation_cache_off, describe, load, machine, spread
from jaxpack.cli.bench.workloads import Workload
from jaxpack.data import Batch, Batcher, BatchIterator, BucketByLength, SlotFilling, SortedChunks, plan_cover

BATCH_SIZE = 64
_PROGRAMS = 6  # of bucketed and sorted, at most
_PARTS = 8  # of the longest, to which padded-batch rounds up; powers of two would make 200 of all above 128
_PACKAGES = ("jaxpack", "jax", "jaxlib", "numpy", "optax")

Source = Sequence[np.ndarray]  # sequences [L, F]
State = tuple[Any, optax.OptState]  # parameters, and the optimiser's state
Step = Callable[[State, Batch], tuple[State, jax.Array]]


class Training(NamedTuple):
    """One way to make batches, ready to be timed.

    Attributes:
      batches: makes them.
      programs: the compiled step under each plan that they come under.
      compile_seconds: what it took to trace, lower and compile all.
    """

    batches: Batcher
    programs: Mapping[BucketPlan, Step]
    compile_seconds: float


class Epoch(NamedTuple):
    """What one epoch took, and what was in it.

    Attributes:
      seconds: from the first batch asked for to the last step done.
      packing_seconds: those of them that went by until batches were there.
      loss: the mean over tokens.
      tokens, rows, batches, cells, rank_correlation: of its batches, as in `jaxpack.data.Statistics`.
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
    """Random batches, padded to the longest of the corpus: one program."""
    return _random_batches(workload, source, [workload.longest])


def _padded_batch(workload: Workload, source: Source) -> Batcher:
    """Random batches, padded to their own longest, rounded up so that there are few programs."""
    rounded = {math.ceil(workload.longest * part / _PARTS) for part in range(1, _PARTS + 1)}
    return _random_batches(workload, source, sorted(rounded))


def _random_batches(workload: Workload, source: Source, boundaries: Sequence[int]) -> Batcher:
    """Random batches, each under the smallest padded plan that it fits. Only inside of a batch are they sorted."""
    plans = [plan_padded(BATCH_SIZE, boundary) for boundary in boundaries]
    return SortedChunks(source, plans, window=1, seed=workload.seed, lengths=workload.lengths)


def _bucketed(workload: Workload, source: Source) -> Batcher:
    """Batches of sequences of one bucket of length, padded to its boundary."""
    return BucketByLength(
        source,
        num_buckets=_PROGRAMS,
        batch_size=BATCH_SIZE,
        planner=lambda rooms: plan_padded(len(rooms), int(max(rooms))),
        seed=workload.seed,
        lengths=workload.lengths,
    )


def _sorted(workload: Workload, source: Source) -> Batcher:
    """Sorted by length within windows of several batches, and padded."""
    return SortedChunks(
        source, num_plans=_PROGRAMS, batch_size=BATCH_SIZE, seed=workload.seed, lengths=workload.lengths
    )


def _slot_filled(workload: Workload, source: Source) -> Batcher:
    """Batches that fill the slots of one plan: one program."""
    return SlotFilling(source, _cover(workload), seed=workload.seed, lengths=workload.lengths)


def _cover(workload: Workload) -> BucketPlan:
    return plan_cover(workload.lengths, BATCH_SIZE)


BATCHERS: Mapping[str, Callable[[Workload, Source], Batcher]] = MappingProxyType(
    {
        "padded": _padded,
        "padded-batch": _padded_batch,
        "bucketed": _bucketed,
        "sorted": _sorted,
        "slot-filled": _slot_filled,
    }
)


def measure_epoch(workload: Workload, names: Sequence[str], repeats: int, tell: Tell) -> dict[str, Any]:
    """Measures epochs of a corpus in batches of these kinds.

    Args:
      workload: the corpus and the layer.
      names: keys of BATCHERS.
      repeats: turns to time.
      tell: called on the way.

    Raises:
      RuntimeError: if an epoch does not use every sequence once, or has a loss that is not finite.
    """
    load_before, source = load(), _sequences(workload)
    optimizer = optax.adam(1e-3)
    state = jax.device_put((workload.params, optimizer.init(workload.params)))
    step = _train_step(workload.layer, optimizer)
    trainings: dict[str, Training] = {}
    with compilation_cache_off():
        for i, name in enumerate(names):
            tell(f"compiling {name}", 0.2 * i / len(names))
            trainings[name] = _prepare(functools.partial(BATCHERS[name], workload, source), step, state, repeats)
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
    """A corpus of normal inputs."""
    generator = np.random.default_rng([workload.seed, 1])
    tokens = generator.standard_normal((workload.tokens, workload.features), np.float32)
    return np.split(tokens, np.cumsum(workload.lengths)[:-1])


def _train_step(layer: RecurrentLayer, optimizer: optax.GradientTransformation) -> Step:
    """A step that teaches the layer to make the mean of its outputs the first feature of its inputs."""

    def mean_loss(params: Any, batch: Batch) -> jax.Array:
        output, _ = layer.apply(params, batch.inputs)
        error = jnp.mean(output.data, axis=-1) - batch.inputs.data[:, 0]  # 0 where nothing is
        return jnp.sum(error**2) / jnp.maximum(jnp.sum(batch.inputs.lengths), 1)

    def step(state: State, batch: Batch) -> tuple[State, jax.Array]:
        params, optimizer_state = state
        loss, gradient = jax.value_and_grad(mean_loss)(params, batch)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), loss

    return step


def _prepare(make: Callable[[], Batcher], step: Step, state: State, repeats: int) -> Training:
    """Compiles the step under each plan that will be met, which a first batcher finds out, and runs each once."""
    rehearsal = make()
    examples = {batch.inputs.plan: batch for _ in range(repeats) for batch in rehearsal}
    jax.clear_caches()  # what others left traced
    start = time.perf_counter()
    programs = {plan: jax.jit(step).lower(state, batch).compile() for plan, batch in examples.items()}
    compile_seconds = time.perf_counter() - start
    for plan, program in programs.items():
        jax.block_until_ready(program(state, examples[plan]))
    return Training(make(), programs, compile_seconds)


def _in_turns(trainings: Mapping[str, Training], state: State, repeats: int, tell: Tell) -> dict[str, list[Epoch]]:
    """An epoch of each in every turn. All start from the same state, and go on from their own."""
    states = dict.fromkeys(trainings, state)
    epochs: dict[str, list[Epoch]] = {name: [] for name in trainings}
    for turn in range(repeats):
        for i, (name, training) in enumerate(trainings.items()):
            done = (turn + i / len(trainings)) / repeats
            tell(f"turn {turn + 1} of {repeats}, {name}", 0.2 + 0.8 * done)
            states[name], epoch = _train(training.programs, states[name], iter(training.batches))
            epochs[name].append(epoch)
    return epochs


def _train(programs: Mapping[BucketPlan, Step], state: State, batches: BatchIterator) -> tuple[State, Epoch]:
    """One epoch. Each step is waited for, so that the host's time and the device's can be told apart."""
    packing, loss, tokens = 0.0, 0.0, 0
    start = asked = time.perf_counter()
    for batch in batches:
        packing += time.perf_counter() - asked
        state, batch_loss = programs[batch.inputs.plan](state, batch)
        in_batch = int(batch.inputs.lengths.sum())
        loss, tokens = loss + float(batch_loss) * in_batch, tokens + in_batch
        asked = time.perf_counter()
    end = time.perf_counter()
    packing += end - asked
    found = batches.statistics
    of_batches = found.rows, found.batches, found.cells, found.rank_correlation
    return state, Epoch(end - start, packing, loss / tokens, tokens, *of_batches)


def _check(name: str, epochs: Iterable[Epoch], workload: Workload) -> None:
    """Raises RuntimeError unless each epoch was one, and was learnt from."""
    for epoch in epochs:
        if (epoch.rows, epoch.tokens) != (workload.batch_size, workload.tokens):
            raise RuntimeError(
                f"an epoch of {name} has {epoch.rows:,} sequences and {epoch.tokens:,} tokens, but the corpus has "
                f"{workload.batch_size:,} and {workload.tokens:,}."
            )
        if not math.isfinite(epoch.loss):
            raise RuntimeError(f"an epoch of {name} has a loss of {epoch.loss}.")


def _results(name: str, training: Training, epochs: Sequence[Epoch], padded: np.ndarray | None) -> dict[str, Any]:
    """All about one way to make batches."""
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
