"""Arguments that users give at many doors, checked: whole numbers, and lengths."""

from __future__ import annotations

import operator

import numpy as np
import numpy.typing as npt


def concrete_lengths(lengths: npt.ArrayLike) -> np.ndarray:
    """Lengths as an int64 NumPy vector.

    Raises:
      TypeError: if they are traced or are no numbers.
      ValueError: if they are no vector, not whole, or negative.
    """
    if lengths is None:
        raise TypeError("lengths must be a vector [B] of integers, got None.")
    try:
        array = np.asarray(lengths)
    except TypeError as error:
        raise TypeError(
            "lengths are traced, but their values are needed here. Compute the plan (or unpack) outside jit, from "
            "concrete lengths."
        ) from error
    check_lengths_type(array.shape, array.dtype)
    whole = np.isfinite(array) & (array == np.floor(array))
    if not whole.all():
        row = int(whole.argmin())
        raise ValueError(f"lengths must be whole numbers, got lengths[{row}] = {array[row]}.")
    if array.size and array.min() < 0:
        row = int(array.argmin())
        raise ValueError(f"lengths[{row}] = {array[row]} is negative. A length is a number of steps, 0 or more.")
    return array.astype(np.int64)


def check_lengths_type(shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
    """Raises unless an array of this shape and dtype can hold lengths: a vector of numbers that may be whole."""
    if len(shape) != 1:
        raise ValueError(f"lengths must be a vector [B], got shape {tuple(shape)}. For stacked batches use jax.vmap.")
    if np.dtype(dtype).kind not in "iuf" and 0 not in shape:
        raise TypeError(f"lengths must be integers, got dtype {np.dtype(dtype).name}.")


def as_int(name: str, value: object) -> int:
    """An int from an argument, or a TypeError that names it."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(f"{name} must be an int, got {value!r}.") from error


def at_least_one(name: str, value: object) -> int:
    """An int from an argument; raises TypeError if it is none, ValueError if it is below 1."""
    number = as_int(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}.")
    return number
