"""Initial and final states of a layer: their layout, and the check that a given one has it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._types import PyTree


def zero_state(sizes: Any, lead: tuple[int, ...], like: jax.Array, dtype: Any) -> Any:
    """Returns zeros, made from the inputs so that they have their sharding.

    Args:
      sizes: the cell's `state_sizes`.
      lead: the leading axes, (num_layers * D, B), or (num_layers * D,) for one sequence.
      like: the inputs.
      dtype: the dtype.
    """
    return jax.tree.map(lambda size: lax.full_like(like, 0, dtype, (*lead, size)), sizes)


def checked_state(state: Any, sizes: Any, lead: tuple[int, ...], dtype: Any) -> Any:
    """Returns a given initial state in a dtype.

    Args:
      state: the state, as a user passed it.
      sizes, lead, dtype: as in `zero_state`.

    Raises:
      ValueError: if its structure or a shape is another.
    """
    structure: Any = jax.tree.structure(sizes)
    shapes = [(*lead, size) for size in jax.tree.leaves(sizes)]
    given = jax.tree.map(jnp.asarray, tuple(state) if isinstance(state, list) else state)
    if jax.tree.structure(given) != structure or [leaf.shape for leaf in jax.tree.leaves(given)] != shapes:
        names = ("h_0", "c_0")[: len(shapes)]
        expected = ", ".join(f"{name} {list(shape)}" for name, shape in zip(names, shapes, strict=True))
        raise ValueError(
            f"initial_state must be {f'({expected})' if len(shapes) > 1 else expected} "
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
    structure: Any = jax.tree.structure(sizes)
    widths = jax.tree.leaves(sizes)
    state = tuple(state) if isinstance(state, list) else state
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(state)]
    rows = shapes[0][1:-1] if shapes else ()
    expected = [(count, *rows, width) for width in widths]
    if jax.tree.structure(state) != structure or shapes != expected or len(rows) > 1:
        names = ", ".join(f"{'hc'[i]}_n [{count}, B, {width}]" for i, width in enumerate(widths))
        raise ValueError(
            f"state must be what {layer} returns beside the output, {names} (of one sequence, without B), got "
            f"{shapes_of(state)}. Under more axes, call it inside jax.vmap."
        )
    return jnp.asarray(jax.tree.leaves(state)[0])


def shapes_of(tree: PyTree) -> str:
    """Returns the shapes in a pytree, for an error."""
    leaves = [tuple(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree)]
    return f"shape {leaves[0]}" if len(leaves) == 1 else f"shapes {leaves}"
