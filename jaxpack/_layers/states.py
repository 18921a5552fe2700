"""Initial and final states of a layer: their layout, and the check that a given one has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._types import PyTree

STATE_NAMES = ("h_0", "c_0")  # of initial states, in arguments and among parameters


def zero_state(sizes: Any, lead: tuple[int, ...], like: jax.Array, dtype: Any) -> Any:
    """Returns zeros, made from the inputs so that they have their sharding.

    Args:
      sizes: the cell's `state_sizes`.
      lead: the leading axes, (num_layers * D, B), or (num_layers * D,) for one sequence.
      like: the inputs.
      dtype: the dtype.
    """
    return jax.tree.map(lambda size: lax.full_like(like, 0, dtype, (*lead, size)), sizes)


def initial_shapes(sizes: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the learned initial state of one layer and direction, for a cell's `state_sizes`."""
    leaves = jax.tree.leaves(sizes)
    return {name: (size,) for name, size in zip(STATE_NAMES[: len(leaves)], leaves, strict=True)}


def learned_state(params: Mapping[str, Mapping[str, jax.Array]], sizes: Any, batch_size: int, dtype: Any) -> Any:
    """Returns the initial state that all sequences share, from the parameters of every layer and direction in order.

    Args:
      params: the parameters.
      sizes: the cell's `state_sizes`.
      batch_size: the number B of sequences.
      dtype: the dtype.
    """
    columns = [jnp.stack([group[name] for group in params.values()]) for name in initial_shapes(sizes)]
    shared = jax.tree.unflatten(jax.tree.structure(sizes), columns)
    return jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf.astype(dtype)[:, None], (len(leaf), batch_size, leaf.shape[1])), shared
    )


def checked_state(name: str, state: Any, sizes: Any, lead: tuple[int, ...], dtype: Any) -> Any:
    """Returns a given state in a dtype.

    Args:
      name: the argument.
      state: the state, as a user passed it.
      sizes, lead, dtype: as in `zero_state`.

    Raises:
      ValueError: if its structure or a shape is another.
    """
    given = jax.tree.map(jnp.asarray, tuple(state) if isinstance(state, list) else state)
    if not _has_layout(given, sizes, lead):
        shapes = [(*lead, size) for size in jax.tree.leaves(sizes)]
        names = STATE_NAMES[: len(shapes)]
        expected = ", ".join(f"{name} {list(shape)}" for name, shape in zip(names, shapes, strict=True))
        raise ValueError(
            f"{name} must be {f'({expected})' if len(shapes) > 1 else expected} "
            f"([num_layers * num_directions, B, size]), got {shapes_of(given)}."
        )
    return jax.tree.map(lambda leaf: leaf.astype(dtype), given)


def first_of_state(state: Any, sizes: Any, count: int, layer: str) -> jax.Array:
    """Returns h_n of a final state.

    Args:
      state: the state, as a user passed it.
      sizes: the cell's `state_sizes`.
      count: the number of layers and directions.
      layer: the layer, for the error.

    Raises:
      ValueError: if the state does not have the layer's layout.
    """
    state = tuple(state) if isinstance(state, list) else state
    leaves = jax.tree.leaves(state)
    rows = jnp.shape(leaves[0])[1:-1] if leaves else ()
    if not _has_layout(state, sizes, (count, *rows)) or len(rows) > 1:
        names = ", ".join(f"{'hc'[i]}_n [{count}, B, {width}]" for i, width in enumerate(jax.tree.leaves(sizes)))
        raise ValueError(
            f"state must be what {layer} returns beside the output, {names} (of one sequence, without B), got "
            f"{shapes_of(state)}. Under more axes, call it inside jax.vmap."
        )
    return jnp.asarray(leaves[0])


def _has_layout(state: Any, sizes: Any, lead: tuple[int, ...]) -> bool:
    """Returns whether a state has the structure of the sizes, and each array its size behind the leading axes."""
    given: Any = jax.tree.structure(state)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(state)]
    return given == jax.tree.structure(sizes) and shapes == [(*lead, size) for size in jax.tree.leaves(sizes)]


def shapes_of(tree: PyTree) -> str:
    """Returns the shapes in a pytree, for an error."""
    leaves = [tuple(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree)]
    return f"shape {leaves[0]}" if len(leaves) == 1 else f"shapes {leaves}"
