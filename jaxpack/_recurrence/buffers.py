"""What loops do with arrays in place: read, write, loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def loop(start: Any, stop: Any, body: Callable[[Any, Any], Any], state: Any, unroll: int = 1) -> Any:
    """fori_loop, which a trip count of 1 known in advance leaves out."""
    if isinstance(start, int) and isinstance(stop, int):
        return body(start, state) if stop - start == 1 else lax.fori_loop(start, stop, body, state, unroll=unroll)
    return lax.fori_loop(start, stop, body, state)


def tanh_apart(x: jax.Array) -> jax.Array:
    """tanh in a loop of its own, of one turn that the compiler cannot see.

    XLA fuses a tanh with what its argument is made of and with what is made of it, and a CPU then computes it number by
    number; alone, over one contiguous array, many at once. (GRU, forward: 21 ms where the fused one took 34.)
    """
    once = lax.optimization_barrier(jnp.int32(1))
    return lax.fori_loop(0, once, lambda _, leaf: jnp.tanh(leaf), x)


def buffer(like: jax.Array, shape: tuple[int, ...], fill: float) -> jax.Array:
    """An array to be written over. Buffers of one shape with one fill would be merged, and then copied."""
    return lax.full_like(like, fill, shape=shape)


def read(leaf: jax.Array, start: Any, size: int) -> jax.Array:
    """leaf[start : start + size]."""
    return lax.dynamic_slice_in_dim(leaf, start, size)


def write(leaf: jax.Array, value: jax.Array, start: Any) -> jax.Array:
    """leaf with leaf[start : start + len(value)] set."""
    return lax.dynamic_update_slice_in_dim(leaf, value, start, 0)
