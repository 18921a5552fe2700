"""Padding values: numbers that the dtype of the data must be able to hold."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxpack._checks import is_traced


def padding_like(leaf: jax.Array | np.ndarray, padding_value: ArrayLike) -> ArrayLike:
    """Validates a padding value and returns it in the dtype of the data.

    Raises:
      ValueError: if it is not one number, or the dtype cannot hold it: NaN or a fraction among integers, for example.
    """
    if np.ndim(padding_value) != 0:
        raise ValueError(f"padding_value must be one number, got shape {np.shape(padding_value)}.")
    dtype = leaf.dtype
    if is_traced(padding_value):
        given = jnp.result_type(padding_value)
        if jnp.issubdtype(dtype, jnp.inexact) or jnp.promote_types(given, dtype) == dtype:
            return lax.convert_element_type(padding_value, dtype)
        held = f"of dtype {given}"
    else:
        value, held = np.asarray(padding_value), f"{padding_value}"
        if np.iscomplexobj(value) and not value.imag:
            value = value.real
        if jnp.issubdtype(dtype, jnp.complexfloating) or not np.iscomplexobj(value):
            with np.errstate(all="ignore"), contextlib.suppress(OverflowError):
                padding = value.astype(dtype)
                if _same_value(padding, value):
                    return padding
    raise ValueError(
        f"padding_value {held} cannot be held by data of dtype {dtype}. Choose a value of that dtype, or cast the data "
        f"(packed.astype)."
    )


def _same_value(held: np.ndarray, value: np.ndarray) -> bool:
    """Returns whether a number kept its value; a float may have been rounded, but not made infinite."""
    a, b = complex(held), complex(value)
    return bool(np.isfinite(a) == np.isfinite(b)) if jnp.issubdtype(held.dtype, jnp.inexact) else a == b
