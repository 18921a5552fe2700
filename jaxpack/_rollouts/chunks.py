"""run_chunks: a layer over a long sequence, a chunk of steps at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxpack._checks import at_least_one
from jaxpack._packed.inputs import lengths_and_plan, padded_batch, padded_plan
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._types import PyTree


def run_chunks(
    apply: Callable[..., tuple[PyTree, PyTree]],
    params: PyTree,
    inputs: PyTree,
    initial_state: PyTree = None,
    *,
    steps: int,
    truncate: bool = False,
    lengths: ArrayLike | Sequence[int] | None = None,
) -> tuple[PyTree, PyTree]:
    """Runs a layer over chunks of a sequence, each of which continues from the state of the one before.

    Values are those of one run over the whole; so are gradients, unless they are truncated. All chunks are one loop, in
    a program of the size of one chunk. With `jax.checkpoint` around `apply`, the backward pass keeps one state a chunk
    and computes a chunk again when it comes to it:

        run_chunks(jax.checkpoint(lstm.apply), params, x, steps=256)

    Memory then no longer grows with what a layer saves for each step. To let it not grow with the outputs, either, put
    the loss of each step into `apply`, and return that.

    Examples:
      >>> lstm = jaxpack.LSTM(2, 4)
      >>> params, x = lstm.init(jax.random.key(0)), jnp.ones((3, 10, 2))
      >>> output, state = run_chunks(lstm.apply, params, x, steps=4)  # 4, 4 and 2 steps
      >>> bool(jnp.allclose(output, lstm.apply(params, x)[0], atol=1e-6))
      True

    Args:
      apply: the layer: apply(params, inputs, state) -> (outputs, state), with `lengths=` if lengths are given. Such as
        `lstm.apply`, for one direction: a backward direction begins at the end of the sequence.
      params: the first argument of apply.
      inputs: padded [B, T, *F] (batch first), or a pytree of such arrays.
      initial_state: as the layer takes it. Default: None for the first chunk, zeros in the layout of its final state.
      steps: the number of steps of a chunk; the last one may be shorter.
      truncate: whether no gradient passes from a chunk to the one before it (truncated backpropagation through time).
        The initial state has the gradient of the first chunk.
      lengths: int [B]; each chunk is given how many of its steps each sequence has. Default: all T.

    Returns:
      The outputs [B, T, *G], and the state after the last step.

    Raises:
      TypeError: if inputs are packed, or steps is not an int.
      ValueError: if steps is below 1, lengths do not fit the inputs, an output has no axes [B, steps], or the layer
        is bidirectional. Traced lengths that do not fit make their sequences NaN.
    Source: Williams & Peng 1990 (truncation); Chen et al. 2016 (https://arxiv.org/abs/1604.06174).
    """
    steps = at_least_one("steps", steps)
    if isinstance(inputs, PackedSequence):
        raise TypeError(
            "run_chunks takes padded inputs, whose chunks are of one shape. Pass a packed batch through "
            "jaxpack.pad_packed_sequence, and its lengths as lengths=."
        )
    refuse_both_directions(apply)
    batch, size, length = padded_batch(inputs, True, "inputs")
    given = checked_lengths(lengths, size, length)

    def run(state: PyTree, start: Any, chunk: PyTree) -> tuple[PyTree, PyTree]:
        if truncate:
            state = jax.tree.map(lambda leaf: jnp.where(start > 0, lax.stop_gradient(leaf), leaf), state)
        here = jax.tree.leaves(chunk)[0].shape[1]
        outputs, state = apply(params, chunk, state, **lengths_of_piece(given, start, here, length))
        _check_steps(outputs, here)
        return state, outputs

    count, rest = divmod(length, steps)
    if not count:
        state, outputs = run(initial_state, 0, batch)
        return outputs, state
    chunks = jax.tree.map(lambda leaf: _chunks_first(leaf, count, steps), batch)
    state = initial_state
    if state is None:
        first = jax.tree.map(lambda leaf: leaf[0], chunks)
        state = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(lambda: run(None, 0, first))[0]
        )
    starts = np.arange(count, dtype=np.int32) * steps
    state, outputs = lax.scan(lambda state, chunk: run(state, *chunk), state, (starts, chunks))
    parts = [jax.tree.map(_steps_joined, outputs)]
    if rest:
        state, outputs = run(state, count * steps, jax.tree.map(lambda leaf: leaf[:, count * steps :], batch))
        parts.append(outputs)
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, 1), *parts), state


def refuse_both_directions(apply: Callable[..., Any]) -> None:
    """Raises ValueError if a function is `apply` of a bidirectional layer, bound or wrapped."""
    while isinstance(apply, functools.partial) or hasattr(apply, "__wrapped__"):
        apply = apply.func if isinstance(apply, functools.partial) else apply.__wrapped__
    if getattr(getattr(apply, "__self__", None), "bidirectional", False):
        raise ValueError(
            "a backward direction begins at the end of a sequence, not of a part of it: run a bidirectional layer over "
            "whole sequences."
        )


def checked_lengths(lengths: ArrayLike | Sequence[int] | None, batch_size: int, length: int) -> Any:
    """Returns the lengths of a padded batch [B, T] as int32. Raises as `pack_padded_sequence`; None stays None."""
    if lengths is None:
        return None
    checked, _ = lengths_and_plan(lengths, padded_plan(batch_size, length), batch_size, length)
    return checked


def lengths_of_piece(lengths: Any, start: Any, size: int, length: int) -> dict[str, Any]:
    """Returns the option `lengths` of a call for a piece of a padded batch; none if there are no lengths.

    Args:
      lengths: int32 [B], checked. A traced one that does not fit the batch fits no piece either.
      start: the first step of the piece.
      size: the number of its steps.
      length: the number of steps of the batch.
    """
    if lengths is None:
        return {}
    inside = (lengths - start).clip(0, size)
    if isinstance(inside, jax.Array):
        inside = jnp.where((lengths < 0) | (lengths > length), -1, inside)
    return {"lengths": inside}


def _chunks_first(leaf: jax.Array, count: int, steps: int) -> jax.Array:
    """Returns the whole chunks of [B, T, ...] as [count, B, steps, ...]."""
    whole = leaf[:, : count * steps]
    return jnp.moveaxis(whole.reshape(len(leaf), count, steps, *leaf.shape[2:]), 1, 0)


def _steps_joined(leaf: jax.Array) -> jax.Array:
    """Returns [B, count * steps, ...] from [count, B, steps, ...]."""
    count, rows, steps = leaf.shape[:3]
    return jnp.moveaxis(leaf, 0, 1).reshape(rows, count * steps, *leaf.shape[3:])


def _check_steps(outputs: PyTree, steps: int) -> None:
    for leaf in jax.tree.leaves(outputs):
        if leaf.ndim < 2 or leaf.shape[1] != steps:
            raise ValueError(
                f"the outputs of a chunk of {steps} steps must be [B, {steps}, ...], got shape {list(leaf.shape)}. "
                f"Return a value for each step, such as its loss, and reduce them afterwards."
            )
