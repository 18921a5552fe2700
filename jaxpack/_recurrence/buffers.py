"""Loops, and arrays that they read and write in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def loop(start: Any, stop: Any, body: Callable[[Any, Any], Any], state: Any, unroll: int = 1) -> Any:
    """Runs fori_loop, or the body alone where the trip count is known to be 1."""
    if isinstance(start, int) and isinstance(stop, int):
        return body(start, state) if stop - start == 1 else lax.fori_loop(start, stop, body, state, unroll=unroll)
    return lax.fori_loop(start, stop, body, state)


def buffer(like: jax.Array, shape: tuple[int, ...], fill: float) -> jax.Array:
    """Returns an array that a loop overwrites.

    XLA merges buffers of the same shape and fill, and then copies them, so each buffer of a loop has its own fill.
    """
    return lax.full_like(like, fill, shape=shape)


def read(leaf: jax.Array, start: Any, size: int) -> jax.Array:
    """Returns leaf[start : start + size]."""
    return lax.dynamic_slice_in_dim(leaf, start, size)


def write(leaf: jax.Array, value: jax.Array, start: Any) -> jax.Array:
    """Returns the leaf with leaf[start : start + len(value)] set."""
    return lax.dynamic_update_slice_in_dim(leaf, value, start, 0)
