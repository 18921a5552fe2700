"""Calls that `jaxpack bench` times: a library's forward pass and its gradients, with their compile costs."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PASSES = ("forward", "training")


class Missing(Exception):  # noqa: N818 - not an error
    """The reason why a library is not measured."""


class Calls(NamedTuple):
    """The calls that are timed, and their costs.

    Attributes:
      forward: computes the outputs.
      training: computes the loss and its gradients with respect to weights and inputs.
      cells: the steps of rows that are computed, in each direction of each layer.
      compile_seconds: by pass, the seconds to trace, lower and compile; None if nothing is compiled.
      temp_bytes: by pass, the peak of temporary memory that the compiler planned; None if nothing is compiled.
      same_weights: whether the weights are the workload's, so that the loss must equal jaxpack's.
      steps: the steps one after the other; None if they are not counted.
      in_place: puts what has the layout of the outputs, or of the inputs, in that of the workload, as a NumPy array;
        None if the outputs are not to be compared.
    """

    forward: Callable[[], Any]
    training: Callable[[], Any]
    cells: int
    compile_seconds: Mapping[str, float] | None = None
    temp_bytes: Mapping[str, int] | None = None
    same_weights: bool = False
    steps: int | None = None
    in_place: Callable[[Any], np.ndarray] | None = None


def of_cell(table: Mapping[str, Any], cell: str) -> Any:
    """Returns a library's entry for a cell. Raises Missing if it has none."""
    if cell not in table:
        raise Missing(f"it has no {cell}")
    return table[cell]


def num_threads() -> int:
    """Counts the CPUs that this process may use. XLA uses all of them, and torch is given as many threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def jax_calls(
    apply: Callable[[Any, Any, Any], jax.Array],
    params: Any,
    inputs: Any,
    rest: Any,
    cotangent: Any,
    cells: int,
    *,
    same_weights: bool = False,
) -> Calls:
    """Compiles the calls of a JAX function ahead of time.

    Args:
      apply: maps parameters, inputs and the rest to the outputs.
      params, inputs: the arrays with respect to which gradients are taken.
      rest: other arrays that are not known at compile time, such as lengths.
      cotangent: the factor of the outputs in the loss, in their layout.
      cells, same_weights: as in Calls.
    """

    def loss(params: Any, inputs: Any, rest: Any, cotangent: Any) -> jax.Array:
        return jnp.sum(apply(params, inputs, rest) * cotangent, dtype=jnp.float32)

    params, inputs, rest, cotangent = jax.device_put((params, inputs, rest, cotangent))
    training_arguments = params, inputs, rest, cotangent
    forward, forward_seconds = _compile(apply, params, inputs, rest)
    training, training_seconds = _compile(jax.value_and_grad(loss, argnums=(0, 1)), *training_arguments)
    return Calls(
        functools.partial(forward, params, inputs, rest),
        functools.partial(training, *training_arguments),
        cells,
        {"forward": forward_seconds, "training": training_seconds},
        {"forward": _temp_bytes(forward), "training": _temp_bytes(training)},
        same_weights,
    )


def _compile(function: Callable[..., Any], *arguments: Any) -> tuple[jax.stages.Compiled, float]:
    """Returns the compiled function, and the seconds from its first trace."""
    jax.clear_caches()  # drops traces of other functions of the same library
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled, time.perf_counter() - start


def _temp_bytes(compiled: jax.stages.Compiled) -> int:
    return int(getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0))
