"""Runs a stack of layers over a packed batch: directions, dropout between layers, initial and final states."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._cells.cell import Cell, Params
from jaxpack._packed.gather import real_cells, rearrange, reversed_cells, slot_spans
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._packed.slack import checked_slot_fits, poison
from jaxpack._recurrence.derivative import recur


@functools.partial(jax.jit, static_argnames=("cell", "num_directions", "dropout", "planned", "forward_mode"))
def run_stack(
    cell: Cell,
    num_directions: int,
    dropout: float,
    params: Sequence[Params],
    packed: PackedSequence,
    state: Any,
    dropout_key: jax.Array | None,
    planned: bool,
    forward_mode: bool,
) -> tuple[jax.Array, Any]:
    """The outputs of the last layer [S, D*H], and the final states of all. Jitted, so one compilation a plan.

    Args:
      params: of every layer and direction, in PyTorch's order: l0, l0_reverse, l1, ...
      packed: data [S, F], in the dtype of the computation.
      state: the initial state, leaves [num_layers * D, B, size] in the caller's row order.
      dropout_key: None for no dropout.
      planned: whether the plan is a choice, or no more than the padded batch's shape.
      forward_mode: whether to run the plain scan.
    """
    if not packed.plan.size:  # a batch of no sequences
        return lax.full_like(packed.data, 0, shape=(0, num_directions * cell.output_size)), state
    plan, mask, reverse = packed.plan, real_cells(packed), reversed_cells(packed)
    spans = None if planned else slot_spans(packed)
    # A sequence that does not fit starts from NaN in every layer: all that comes of it is NaN, gradients included.
    fits = checked_slot_fits(packed)
    state = jax.tree.map(lambda leaf: jax.vmap(poison, (0, None))(leaf[:, packed.sorted_indices], fits), state)
    data: jax.Array = packed.data
    finals: list[tuple[jax.Array, ...]] = []
    for first in range(0, len(params), num_directions):
        if first and dropout_key is not None:
            data = drop(jax.random.fold_in(dropout_key, first), data, dropout)
        here = range(first, first + num_directions)
        outputs, final = recur(
            cell,
            [params[i] for i in here],
            [data, rearrange(data, reverse, reverse)][:num_directions],
            [tuple(leaf[i] for leaf in jax.tree.leaves(state)) for i in here],
            mask,
            plan,
            spans,
            forward_mode,
        )
        finals.extend(final)
        data = jnp.concatenate([outputs[0], *(rearrange(y, reverse, reverse) for y in outputs[1:])], axis=-1)
    leaves = [jnp.stack(each, 1) for each in zip(*finals, strict=True)]
    by_slot = jax.tree.unflatten(jax.tree.structure(state), leaves)
    final_state = jax.tree.map(lambda leaf: jnp.swapaxes(leaf[packed.unsorted_indices], 0, 1), by_slot)
    return data, final_state


@contextlib.contextmanager
def names_forward_mode(what: str, call: str) -> Iterator[None]:
    """Turns JAX's error about forward mode into one that names the keyword for it, of what is called as `call(...)`."""
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            f"{what} has its own derivative, which is for reverse mode. For jax.jvp, jax.jacfwd or jax.linearize of it "
            f"pass {call}(..., forward_mode=True)."
        ) from error


def drop(key: jax.Array, data: jax.Array, rate: float) -> jax.Array:
    """Zeroes values with probability `rate`, and scales the others so that the mean stays."""
    if rate == 1:
        return jnp.zeros_like(data)
    return jnp.where(jax.random.bernoulli(key, 1 - rate, data.shape), data / (1 - rate), 0)
