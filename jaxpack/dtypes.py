"""One rule for dtypes at every door: the values that reach a batch are the values that were given.

Arrays that belong together are promoted as jax.numpy promotes them. What the common dtype cannot hold is an error that
names both dtypes. The one rounding is JAX's own: without jax_enable_x64 it has no float64, and computes in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt


def common_dtype(dtypes: Iterable[npt.DTypeLike]) -> np.dtype:
    """The dtype that arrays of these dtypes have in common: jax.numpy's promotion.

    Examples:
      >>> common_dtype([np.int16, np.uint16, bool])
      dtype('int32')
    """
    return jax.dtypes.canonicalize_dtype(functools.reduce(jnp.promote_types, dtypes))


def cast(array: np.ndarray, dtype: npt.DTypeLike, name: str) -> np.ndarray:
    """The array in a dtype that holds its values.

    Examples:
      >>> cast(np.array([1, 2], np.int16), np.float32, "labels").tolist()
      [1.0, 2.0]
      >>> cast(np.array([40000]), np.int16, "labels")
      Traceback (most recent call last):
      TypeError: labels has dtype int64, which int16 cannot hold. Give all of one dtype (array.astype).

    Args:
      array: of numbers.
      dtype: to be had.
      name: of the array, for errors.

    Raises:
      TypeError: if the dtype is narrower than the array's, or of another kind.
      ValueError: naming a value, if the dtype does as a rule (int64 without jax_enable_x64, integers as floats), but
        cannot hold this one.
    """
    dtype = np.dtype(dtype)
    if array.dtype == dtype:
        return array
    if jnp.promote_types(jax.dtypes.canonicalize_dtype(array.dtype), dtype) != dtype:
        raise TypeError(
            f"{name} has dtype {array.dtype}, which {dtype} cannot hold. Give all of one dtype (array.astype)."
        )
    with np.errstate(over="ignore"):
        held = array.astype(dtype)
    if jnp.issubdtype(array.dtype, jnp.integer) and not np.can_cast(array.dtype, dtype, "safe"):
        _check_values(array, held, name)
    return held


def canonical(array: np.ndarray, name: str) -> np.ndarray:
    """The array in the dtype that JAX holds it in: int64 as int32, unless jax_enable_x64 is set. Raises as `cast`."""
    return cast(array, jax.dtypes.canonicalize_dtype(array.dtype), name)


def _check_values(array: np.ndarray, held: np.ndarray, name: str) -> None:
    """Raises ValueError at the first integer that another dtype holds as another number."""
    with np.errstate(invalid="ignore"):
        changed = held.astype(array.dtype) != array
    if not jnp.issubdtype(held.dtype, jnp.integer):  # a float above the integer's largest wraps on its way back
        changed |= np.abs(held.astype(np.float64)) > np.iinfo(array.dtype).max
    if changed.any():
        place = tuple(int(i) for i in np.argwhere(changed)[0])
        hint = " Set jax_enable_x64." if np.dtype(array.dtype).itemsize == 8 else ""
        raise ValueError(
            f"{name} holds {array[place]} at {list(place)}, which {held.dtype} cannot hold, the dtype that it has in "
            f"JAX.{hint}"
        )
