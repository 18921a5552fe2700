"""Masks in the shape of arrays, and constants that vary over a mesh as arrays do."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._checks import is_traced
from jaxpack._types import PyTree


def expand(mask: Any, like: Any) -> Any:
    """A mask over leading axes, shaped to broadcast against an array with further ones."""
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


def mask_like(mask: jax.Array, tree: PyTree) -> PyTree:
    """The mask of rows or cells for each array of a tree, in its shape."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(expand(mask, leaf), leaf.shape), tree)


def vary_like(tree: PyTree, like: PyTree) -> PyTree:
    """The arrays of a tree, varying over the axes of a mesh that those of another vary over inside jax.shard_map.

    A loop's carry must vary as what the loop makes of it, which constants such as jnp.zeros do not.
    """
    sources = [leaf for leaf in jax.tree.leaves(like) if is_traced(leaf) and _is_number(leaf)]
    if not sources:
        return tree
    zero = functools.reduce(jnp.add, (lax.full_like(leaf, 0, jnp.int32, ()) for leaf in sources))

    def vary(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        moved = leaf + zero.astype(leaf.dtype) if _is_number(leaf) else leaf
        return leaf if jax.typeof(moved) == jax.typeof(leaf) else moved

    return jax.tree.map(vary, tree)


def _is_number(leaf: Any) -> bool:
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
