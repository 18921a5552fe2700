"""What `jaxpack bench` times of a library: calls of a forward pass and of its gradients, and what they cost to make."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PASSES = ("forward", "training")


class Missing(Exception):  # noqa: N818 - it is no error
    """Why a library is not measured."""


class Calls(NamedTuple):
    """What is timed.

    Attributes:
      forward: computes the outputs.
      training: computes the loss and its gradients with respect to weights and inputs.
      cells: the steps of rows that are computed, in each direction of each layer.
      compile_seconds: by pass, what it took to trace, lower and compile; None if nothing is compiled.
      temp_bytes: by pass, the peak of temporary memory as the compiler planned it; None if nothing is compiled.
      same_weights: whether the weights are the workload's own, so that the loss must be jaxpack's.
    """

    forward: Callable[[], Any]
    training: Callable[[], Any]
    cells: int
    compile_seconds: Mapping[str, float] | None = None
    temp_bytes: Mapping[str, int] | None = None
    same_weights: bool = False


def num_threads() -> int:
    """The CPUs that this process may use, which is what XLA uses; torch is given as many threads."""
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
    """Calls of a function of JAX, compiled ahead of time.

    Args:
      apply: from parameters, inputs and the rest to the outputs.
      params, inputs: what gradients are taken with respect to.
      rest: other arrays that are not known at compile time, such as lengths.
      cotangent: laid out as the outputs are.
      cells, same_weights: as of Calls.
    """

    def loss(params: Any, inputs: Any, rest: Any, cotangent: Any) -> jax.Array:
        return jnp.sum(apply(params, inputs, rest) * cotangent)

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
    """The compiled function, and the seconds from its first trace on."""
    jax.clear_caches()  # what another function of the same library left traced
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled, time.perf_counter() - start


def _temp_bytes(compiled: jax.stages.Compiled) -> int:
    return int(getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0))
