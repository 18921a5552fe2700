"""Masks and constants that follow arrays: in shape, and in the mesh axes over which they vary."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._checks import is_traced
from jaxpack._types import PyTree


def expand(mask: Any, like: Any) -> Any:
    """Reshapes a mask over leading axes so that it broadcasts against an array with further axes."""
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


def mask_like(mask: jax.Array, tree: PyTree) -> PyTree:
    """Returns a mask of rows or cells for each array of a tree, in that array's shape."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(expand(mask, leaf), leaf.shape), tree)


def tree_where(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """Selects rows of two trees: new ones where the condition holds, old ones elsewhere."""
    return jax.tree.map(lambda a, b: jnp.where(expand(condition, b), a, b), new, old)


def vary_like(tree: PyTree, like: PyTree) -> PyTree:
    """Makes arrays vary over the mesh axes that those of another tree vary over inside jax.shard_map.

    The carry of a loop must vary over the same axes when it comes out as when it goes in; constants vary over none.
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
