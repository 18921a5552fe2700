"""Conversion of PyTorch's state dicts to flat parameters: names mapped, weights transposed, nothing rounded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpack._layers.state_dict import exact_array, wrong_names


def from_names(
    shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str], state_dict: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Returns parameters from tensors or NumPy arrays, whose axes are those of the parameters, reversed.

    Args:
      shapes: the shape of every parameter.
      names: the names in the state dict of parameters that have another one there.
      state_dict: the tensors by name. A kernel [K, F] of a convolution is its weight [F, 1, K].

    Raises:
      KeyError: if keys are missing or not known.
      TypeError: if values are not floating numbers.
      ValueError: if a shape is wrong, or JAX would round a value.
    """
    by_name = {names.get(name, name): name for name in shapes}
    if wrong := wrong_names(by_name, state_dict):
        raise KeyError(f"state_dict does not match the layer: {wrong}. Pass the tensors of one layer.")
    params = {}
    for key, name in by_name.items():
        expected = shapes[name][::-1]
        if "conv" in key and len(expected) == 2:
            expected = (expected[0], 1, expected[1])
        array = exact_array(state_dict[key], expected, f"state_dict[{key!r}]")
        params[name] = jnp.asarray(array.T.reshape(shapes[name]))
    return params
