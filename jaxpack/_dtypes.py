"""Conversions of dtypes that keep values: every public function takes arrays by these rules.

Arrays that belong together are promoted as jax.numpy promotes them. A value that the common dtype cannot hold is an
error that names both dtypes. The only rounding is JAX's own: without jax_enable_x64, float64 becomes float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt


def state_dtype(dtype: npt.DTypeLike, params_dtype: npt.DTypeLike) -> np.dtype:
    """Returns the dtype of states and gates: float32 where parameters are wider than a dtype of half its size.

    Args:
      dtype: of products and outputs.
      params_dtype: of the parameters.
    """
    mixed = jnp.finfo(dtype).bits < 32 and jnp.promote_types(dtype, params_dtype) != dtype
    return np.dtype("float32") if mixed else np.dtype(dtype)


def common_dtype(dtypes: Iterable[npt.DTypeLike]) -> np.dtype:
    """Returns the dtype to which jax.numpy promotes arrays of these dtypes.

    Examples:
      >>> common_dtype([np.int16, np.uint16, bool])
      dtype('int32')

    Raises:
      TypeError: if one is not a dtype of numbers that JAX computes with.
    """
    return jax_dtype(functools.reduce(jnp.promote_types, (jax_dtype(dtype) for dtype in dtypes)))


def jax_dtype(dtype: npt.DTypeLike, name: str = "an array") -> np.dtype:
    """Returns the dtype that an array of this dtype has in JAX: int32 for int64, unless jax_enable_x64 is set.

    Examples:
      >>> jax_dtype(">i2")
      dtype('int16')
      >>> jax_dtype("U2", "labels")
      Traceback (most recent call last):
      TypeError: labels must hold numbers, which JAX can compute with, got dtype <U2.

    Args:
      dtype: a dtype of NumPy or JAX, in either byte order.
      name: the name of the array in errors.

    Raises:
      TypeError: if it is not a dtype of numbers that JAX computes with.
    """
    dtype = np.dtype(dtype)
    found = _jax_dtype(dtype, _x64())
    if found is None:
        raise TypeError(f"{name} must hold numbers, which JAX can compute with, got dtype {dtype}.")
    return found


def cast(array: np.ndarray, dtype: npt.DTypeLike, name: str) -> np.ndarray:
    """Returns the array in another dtype that holds its values.

    Examples:
      >>> cast(np.array([1, 2], np.int16), np.float32, "labels").tolist()
      [1.0, 2.0]
      >>> cast(np.array([40000]), np.int16, "labels")
      Traceback (most recent call last):
      TypeError: labels has dtype int64, which int16 cannot hold. Give all of one dtype (array.astype).

    Args:
      array: an array of numbers.
      dtype: the dtype of the result.
      name: the name of the array in errors.

    Raises:
      TypeError: if the dtype is narrower than the array's, or of another kind.
      ValueError: if the dtype holds most values of the array's (int32 for int64 without jax_enable_x64, a float for
        integers), but not one of these. The error names it.
    """
    dtype = np.dtype(dtype)
    if array.dtype == dtype:
        return array
    if not _holds(dtype, array.dtype, _x64()):
        jax_dtype(array.dtype, name)
        raise TypeError(
            f"{name} has dtype {array.dtype}, which {dtype} cannot hold. Give all of one dtype (array.astype)."
        )
    if _whole(dtype):
        held = array.astype(dtype)
        changed = None if np.can_cast(array.dtype, dtype, "safe") else held != array
    else:
        with np.errstate(over="ignore"):  # a double that is too large for a float is infinite in JAX
            held = array.astype(dtype)
        changed = _changed(array, held) if _whole(array.dtype) else None
    if changed is not None and changed.any():
        place = tuple(int(i) for i in np.argwhere(changed)[0])
        hint = " Set jax_enable_x64." if array.dtype.itemsize == 8 else ""
        raise ValueError(
            f"{name} holds {array[place]} at {list(place)}, which {dtype} cannot hold, the dtype that it has in JAX."
            f"{hint}"
        )
    return held


def canonical(array: np.ndarray, name: str) -> np.ndarray:
    """Returns the array in the dtype that it has in JAX. Raises as `cast`."""
    return cast(array, jax_dtype(array.dtype, name), name)


def _x64() -> bool:
    return jax.config.read("jax_enable_x64")


@functools.lru_cache(maxsize=256)
def _jax_dtype(dtype: np.dtype, x64: bool) -> np.dtype | None:
    """Returns `jax_dtype`, or None if there is none; `x64` is a key of the cache."""
    native = dtype.newbyteorder("=")
    if not (jnp.issubdtype(native, jnp.number) or native.kind == "b"):
        return None
    try:
        return jnp.promote_types(*2 * [jax.dtypes.canonicalize_dtype(native)])
    except (TypeError, ValueError):  # long double
        return None


@functools.lru_cache(maxsize=1024)
def _holds(dtype: np.dtype, other: np.dtype, x64: bool) -> bool:
    """Returns whether a dtype holds the values that another one has in JAX, ranges and rounding aside."""
    found = _jax_dtype(other, x64)
    return found is not None and common_dtype([dtype, found]) == jax_dtype(dtype)


@functools.lru_cache(maxsize=256)
def _whole(dtype: np.dtype) -> bool:
    """Returns whether a dtype is one of integers."""
    return bool(jnp.issubdtype(dtype, jnp.integer))


def _changed(array: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Returns which integers changed when they were converted to another dtype."""
    numbers = held.real.astype(np.float64)
    with np.errstate(invalid="ignore"):
        changed = numbers.astype(array.dtype) != array
    return changed | (numbers >= float(np.iinfo(array.dtype).max + 1))  # which would wrap on the way back


def as_jax(leaf: Any, name: str) -> jax.Array:
    """Returns a JAX array with the values of an array of any library. Raises as `cast`."""
    if isinstance(leaf, jax.Array):
        return leaf
    return jnp.asarray(canonical(np.asarray(without_torch(leaf)), name))


def without_torch(tensor: Any) -> Any:
    """Converts a PyTorch tensor to NumPy, without importing torch; returns anything else unchanged."""
    if not hasattr(tensor, "detach"):
        return tensor
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":  # which NumPy lacks; float32 holds it exactly
        return tensor.float().numpy().astype(jnp.bfloat16)
    return tensor.numpy()
