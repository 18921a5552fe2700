"""What stands between the layers of a stack: residual and highway connections, and layer normalisation.

With x the input of a layer, y its output and σ the sigmoid,

    residual   x + y                                He et al. 2016, "Deep residual learning for image recognition"
    highway    t y + (1 - t) x,  t = σ(W x + b)     Srivastava et al. 2015, "Highway networks"
    norm       (x - mean(x)) / sqrt(var(x) + ε) scale + bias      Ba et al. 2016, "Layer normalization"

All of them act on the last axis: at each step, and in layers with axes of space at each place.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxpack._cells.norm import normalize
from jaxpack._layers.params import floating
from jaxpack._linear.solve import wide
from jaxpack._types import PyTree

HIGHWAY_BIAS = -1.0  # layers begin with t = 0.27, and hand most of their input on
CONNECTIONS = (None, "residual", "highway")  # of single layers


def gate_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the parameters of a highway connection."""
    return {"weight": (width, width), "bias": (width,)}


def init_gate(key: jax.Array, width: int, dtype: Any) -> dict[str, jax.Array]:
    """Draws the weight of a gate uniformly within 1/sqrt(width) of 0, as torch.nn.Linear does; its bias is -1."""
    dtype, bound = floating(float if dtype is None else dtype), 1 / math.sqrt(width)
    weight = jax.random.uniform(key, (width, width), dtype, -bound, bound)
    return {"weight": weight, "bias": jnp.full(width, HIGHWAY_BIAS, dtype)}


def norm_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the parameters of a norm."""
    return {"scale": (width,), "bias": (width,)}


def init_norm(width: int, dtype: Any) -> dict[str, jax.Array]:
    """Returns scales of 1 and biases of 0."""
    dtype = floating(float if dtype is None else dtype)
    return {"scale": jnp.ones(width, dtype), "bias": jnp.zeros(width, dtype)}


def connected(connection: str | None, params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns what a layer hands on.

    Args:
      connection: one of `CONNECTIONS`.
      params: of a highway connection.
      x: [..., F], the input of the layer.
      y: its output, of the same shape and dtype if there is a connection.
    """
    if connection is None:
        return y
    if connection == "residual":
        return x + y
    carried = wide(x)
    t = jax.nn.sigmoid(jnp.tensordot(carried, wide(params["weight"]), 1) + _along(wide(params["bias"]), x))
    return (t * wide(y) + (1 - t) * carried).astype(x.dtype)


def normalized(params: PyTree, x: jax.Array) -> jax.Array:
    """Returns the norm of x [..., F], computed in float32 or wider."""
    scale, bias = (_along(wide(params[name]), x) for name in ("scale", "bias"))
    return (normalize(wide(x)).values * scale + bias).astype(x.dtype)


def _along(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Returns a vector as it broadcasts to the last axis of x."""
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))
