"""Parts that several layers of matrix states share: draws of parameters, norms, checks of sizes."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_STEPS = (1e-3, 1e-1)  # the least and the largest Δ that is drawn
_LEAST_STEP = 1e-4


def uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any, bound: float) -> jax.Array:
    """Draws uniformly within a bound of 0."""
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def conv_bound(kernel_size: int) -> float:
    """Returns the bound of torch.nn.Conv1d's draw, feature by feature."""
    return 1 / math.sqrt(kernel_size)


def inverse_softplus_steps(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Draws x such that softplus(x) is log-uniform from 0.001 to 0.1, as Mamba does for Δ."""
    low, high = map(math.log, _STEPS)
    step = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, dtype, low, high)), _LEAST_STEP)
    return step + jnp.log(-jnp.expm1(-step))


def rms_normalised(x: jax.Array, epsilon: float) -> jax.Array:
    """Divides by the root of the mean square over the last axis, plus epsilon."""
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + epsilon)


def divided(name: str, size: int, by: str, divisor: int) -> int:
    """Returns a size divided by another. Raises ValueError, which names both, if there is a remainder."""
    if size % divisor:
        raise ValueError(f"{by}={divisor} does not divide {name}={size}. Choose sizes with no remainder.")
    return size // divisor
