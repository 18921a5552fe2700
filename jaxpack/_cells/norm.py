"""Normalisation of the last axis, as layers with norms inside the recurrence compute it and pull it back.

normalize(s) = (s - mean(s)) / sqrt(var(s) + epsilon)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
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


def normalize(s: jax.Array) -> Normalized:
    """Normalises the last axis."""
    centred = s - s.mean(-1, keepdims=True)
    inverse = lax.rsqrt((centred * centred).mean(-1, keepdims=True) + EPSILON)
    return Normalized(centred * inverse, inverse)
