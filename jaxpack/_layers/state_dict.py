"""Conversion of parameters from and to PyTorch's state dicts: names joined, weights transposed, nothing rounded.

`params["l0_reverse"]["weight_ih"]` [in, gates*H] is PyTorch's `weight_ih_l0_reverse` [gates*H, in].
"""

from __future__ import annotations

from collections.abc import Mapping
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
    missing, extra = [k for k in names if k not in state_dict], [k for k in state_dict if k not in names]
    if missing or extra:
        found = [f"missing {missing}"] * bool(missing) + [f"not known {extra}"] * bool(extra)
        raise KeyError(f"state_dict does not match the layer: {'; '.join(found)}.{_hint(names, extra)}")
    params: dict[str, dict[str, jax.Array]] = {group: {} for group in shapes}
    for key, (group, name) in names.items():
        array = np.asarray(without_torch(state_dict[key]))
        expected = shapes[group][name][::-1]
        if array.shape != expected:
            raise ValueError(f"state_dict[{key!r}] must have shape {expected}, got {array.shape}.")
        params[group][name] = jnp.asarray(exactly(array, f"state_dict[{key!r}]").T)
    return params


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


def _hint(names: Mapping[str, Any], extra: list[str]) -> str:
    """Returns what to do about keys of a module that holds the layer."""
    prefixed = {key[: -len(name)] for key in extra for name in names if key.endswith("." + name)}
    if not prefixed:
        return ""
    prefix = sorted(prefixed)[0]
    return (
        f" Strip the prefix: {{k.removeprefix({prefix!r}): v for k, v in state_dict.items() "
        f"if k.startswith({prefix!r})}}."
    )
