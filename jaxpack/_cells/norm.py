"""Normalisation of the last axis, as layers with norms inside the recurrence compute it and pull it back.

normalize(s) = (s - mean(s)) / sqrt(var(s) + epsilon)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

EPSILON = 1e-5  # PyTorch's and Keras's default


class Normalized(NamedTuple):
    """A normalised array, and what its derivative needs beside it.

    Attributes:
      values: [..., N], of mean 0 and variance 1.
      inverse: [..., 1], the inverse of the standard deviation before.
    """

    values: jax.Array
    inverse: jax.Array

    def pull_back(self, d: jax.Array) -> jax.Array:
        """Returns the cotangent of the array before, from that of the values."""
        along = (d * self.values).mean(-1, keepdims=True)
        return self.inverse * (d - d.mean(-1, keepdims=True) - self.values * along)


def product_for_norm(x: jax.Array, weight: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiplies, and returns the product in the dtype of the scale if that is wider.

    In mixed precision the factors are bfloat16 and the scale is float32. Means and variances of bfloat16 numbers would
    be bfloat16, and what the norm divides by a small deviation would have lost its digits.
    """
    product = x @ weight
    return product.astype(jnp.result_type(product, scale))


def normalize(s: jax.Array) -> Normalized:
    """Normalises the last axis."""
    centred = s - s.mean(-1, keepdims=True)
    inverse = lax.rsqrt((centred * centred).mean(-1, keepdims=True) + EPSILON)
    return Normalized(centred * inverse, inverse)
