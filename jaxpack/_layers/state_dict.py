"""Conversion of parameters from and to PyTorch's state dicts: names joined, weights transposed, nothing rounded.

`params["l0_reverse"]["weight_ih"]` [in, gates*H] is PyTorch's `weight_ih_l0_reverse` [gates*H, in].
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpack._dtypes import without_torch
from jaxpack._layers.params import Shapes


def from_state_dict(shapes: Shapes, state_dict: Mapping[str, Any]) -> dict[str, dict[str, jax.Array]]:
    """Returns the parameters in tensors or NumPy arrays under PyTorch's names.

    Raises:
      KeyError: if keys are missing or not known.
      TypeError: if values are not floating numbers.
      ValueError: if a shape is wrong, or JAX would round a value.
    """
    names = {f"{name}_{group}": (group, name) for group, entries in shapes.items() for name in entries}
    if wrong := wrong_names(names, state_dict):
        raise KeyError(f"state_dict does not match the layer: {wrong}.{_hint(names, state_dict)}")
    params: dict[str, dict[str, jax.Array]] = {group: {} for group in shapes}
    for key, (group, name) in names.items():
        array = exact_array(state_dict[key], shapes[group][name][::-1], f"state_dict[{key!r}]")
        params[group][name] = jnp.asarray(array.T)
    return params


def wrong_names(expected: Collection[str], given: Collection[str]) -> str:
    """Returns which names are missing or not known, for an error; an empty string if none is."""
    missing, extra = [n for n in expected if n not in given], [n for n in given if n not in expected]
    return "; ".join([f"missing {missing}"] * bool(missing) + [f"not known {extra}"] * bool(extra))


def exact_array(value: Any, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Returns a tensor or an array as a NumPy array of this shape, if JAX holds its values exactly.

    Raises:
      TypeError: if its dtype is not floating.
      ValueError: if its shape is another, or JAX would round its values.
    """
    array = np.asarray(without_torch(value))
    if array.shape != shape:
        raise ValueError(f"{where} must have shape {shape}, got {array.shape}.")
    return exactly(array, where)


def exactly(array: np.ndarray, where: str) -> np.ndarray:
    """Returns the array, if JAX holds its values exactly.

    Raises:
      TypeError: if its dtype is not floating.
      ValueError: if JAX would round its values.
    """
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{where} must have a floating dtype, got {array.dtype}.")
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise ValueError(
            f"{where} has dtype {array.dtype}, which JAX would round. Convert under `with jax.enable_x64(True):`, and "
            f"round the parameters yourself if you want them so."
        )
    return array


def to_state_dict(params: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Returns the parameters as NumPy arrays under PyTorch's names."""
    return {
        f"{name}_{group}": np.array(np.asarray(array).T, order="C")
        for group, entries in params.items()
        for name, array in entries.items()
    }


def _hint(names: Collection[str], given: Collection[str]) -> str:
    """Returns what to do about keys of a module that holds the layer."""
    prefixed = {key[: -len(name)] for key in given for name in names if key.endswith("." + name)}
    if not prefixed:
        return ""
    prefix = sorted(prefixed)[0]
    return (
        f" Strip the prefix: {{k.removeprefix({prefix!r}): v for k, v in state_dict.items() "
        f"if k.startswith({prefix!r})}}."
    )
