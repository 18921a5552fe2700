"""A layer's parameters: how they are drawn, and the check that a pytree is a layer's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxpack.sequence import PyTree

Shapes = dict[str, dict[str, tuple[int, ...]]]


def draw(key: jax.Array, shapes: Shapes, bound: float, dtype: Any) -> dict[str, dict[str, jax.Array]]:
    """Parameters of these shapes, uniform within `bound` of 0; dtype None is JAX's float.

    Raises:
      TypeError: if key is no random key or dtype not floating.
    """
    dtype = jax.dtypes.canonicalize_dtype(float if dtype is None else dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating dtype, got {dtype}.")
    leaves, structure = jax.tree.flatten(shapes, is_leaf=_is_shape)
    try:
        keys = jax.random.split(key, len(leaves))
    except TypeError as error:
        raise TypeError(f"key must be a JAX random key, such as jax.random.key(0), got {key!r}.") from error
    drawn = [jax.random.uniform(k, shape, dtype, -bound, bound) for k, shape in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def check_params(params: PyTree, shapes: Shapes, layer: object) -> Any:
    """The parameters' common dtype.

    Raises:
      TypeError: if they have another structure than the layer's.
      ValueError: if one has another shape.
    """
    given = jax.tree.map(jnp.shape, params)
    if given != shapes:
        expected, found = dict(_flat(shapes)), dict(_flat(given))
        wrong = [f"{name} is missing" for name in expected if name not in found]
        wrong += [f"{name} is not known" for name in found if name not in expected]
        wrong += [
            f"{name} has shape {found[name]}, not {shape}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ]
        raise (TypeError if set(expected) != set(found) else ValueError)(
            f"params do not match {layer}: {'; '.join(wrong[:4])}. Make them with init(key) or from_torch(state_dict)."
        )
    return jnp.result_type(*jax.tree.leaves(params))


def _flat(shapes: PyTree) -> list[tuple[str, tuple[int, ...]]]:
    """The shapes in a nested dict, with their keys joined."""
    leaves = jax.tree_util.tree_leaves_with_path(shapes, is_leaf=_is_shape)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), shape) for path, shape in leaves]


def _is_shape(node: object) -> bool:
    return isinstance(node, tuple)
