"""Checks of arguments that many public functions take: integers and lengths."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Set

import jax
import numpy as np
import numpy.typing as npt


def concrete_lengths(lengths: npt.ArrayLike, name: str = "lengths") -> np.ndarray:
    """Validates lengths and returns them as an int64 NumPy vector, read by position (of a pandas Series, too).

    Args:
      lengths: [B] whole numbers.
      name: the name of the argument in errors.

    Raises:
      TypeError: if they are traced, or not a vector of numbers: an iterator, for example, or a packed batch.
      ValueError: if they are a number or have more axes, or one is not whole, negative or above int64.
    """
    try:
        array = np.asarray(lengths)
    except TypeError as error:
        raise TypeError(
            f"{name} are traced, but their values are needed here. Compute the plan (or unpack) outside jit, from "
            f"concrete lengths."
        ) from error
    except ValueError as error:  # a nested list whose rows differ
        raise TypeError(
            f"{name} must be a vector [B] of integers, got a nested {type(lengths).__name__} whose rows "
            f"differ. Of a list of sequences they are [len(sequence) for sequence in sequences]."
        ) from error
    if not array.shape and array.dtype.kind not in "biufc":  # an object that NumPy wraps
        found = "None" if lengths is None else f"a {type(lengths).__name__}"
        way_out = ""
        if hasattr(lengths, "lengths"):
            way_out = " Pass its .lengths."
        elif hasattr(lengths, "rooms"):
            way_out = " Pass its .rooms(batch_size)."
        elif isinstance(lengths, Mapping):
            way_out = " Write list(lengths.values())."
        elif isinstance(lengths, Iterable) and not isinstance(lengths, (str, bytes, Set)):
            way_out = " Make it a list: list(lengths)."
        raise TypeError(f"{name} must be a vector [B] of integers, got {found}.{way_out}")
    check_lengths_type(array.shape, array.dtype, name)
    whole = np.isfinite(array) & (array == np.floor(array))
    if not whole.all():
        row = int(whole.argmin())
        raise ValueError(f"{name} must be whole numbers, got {name}[{row}] = {array[row]}.")
    check_not_negative(array, name)
    if array.size and array.max() >= 2**63:
        row = int(array.argmax())
        raise ValueError(f"{name}[{row}] = {array[row]} is more than int64 can hold. A length is a number of steps.")
    return array.astype(np.int64)


def check_not_negative(lengths: np.ndarray, name: str = "lengths") -> None:
    """Raises ValueError if a length is negative."""
    if lengths.size and lengths.min() < 0:
        row = int(lengths.argmin())
        raise ValueError(f"{name}[{row}] = {lengths[row]} is negative. A length is a number of steps, 0 or more.")


def check_lengths_type(shape: tuple[int, ...], dtype: npt.DTypeLike, lengths: str = "lengths") -> None:
    """Raises unless an array of this shape and dtype can hold lengths: a vector of real numbers."""
    kind, name = np.dtype(dtype).kind, np.dtype(dtype).name
    if kind == "b" and len(shape) > 1:
        raise TypeError(
            f"{lengths} must be a vector [B] of integers, got a mask {tuple(shape)}: pass mask.sum(axis=1). Layers "
            f"take mask=."
        )
    if len(shape) != 1:
        way_out = "For stacked batches use jax.vmap."
        if not shape:
            way_out = "Of one sequence they are [length]."
        elif sum(size != 1 for size in shape) <= 1:
            way_out = "Drop the axes of size 1: lengths.ravel()."
        raise ValueError(f"{lengths} must be a vector [B], got shape {tuple(shape)}. {way_out}")
    if kind not in "iuf" and 0 not in shape:
        raise TypeError(f"{lengths} must be integers, got dtype {name}.")


def as_int(name: str, value: object) -> int:
    """Returns an argument as an int, or raises a TypeError that names it."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(f"{name} must be an int, got {value!r}.") from error


def at_least_one(name: str, value: object) -> int:
    """Returns an argument as an int; raises TypeError if it is not one, ValueError if it is below 1."""
    number = as_int(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}.")
    return number


def is_traced(array: object) -> bool:
    """Returns whether an array is a tracer, whose values are not known yet."""
    return isinstance(array, jax.core.Tracer)
