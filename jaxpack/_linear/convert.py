"""Conversion of parameters from the layouts of other libraries: exact, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpack._layers.state_dict import exact_array, wrong_names
from jaxpack._types import PyTree


class Arrays(NamedTuple):
    """Where a parameter comes from.

    Attributes:
      name: its name in the other library; of a nested dict, keys joined by dots.
      shape: its shape there.
      parts: the order in which equal parts of its first axis are taken; None to take it as it is.
      transpose: whether to exchange its two axes, after that.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[int, ...] | None = None
    transpose: bool = False


def converted(params: Mapping[str, Any], entries: PyTree) -> Any:
    """Returns parameters from those of another library.

    Args:
      params: arrays or tensors by name, or nested dicts of them.
      entries: a pytree of `Arrays` with the structure of the result.

    Raises:
      KeyError: if names are missing or not known.
      TypeError: if values are not floating numbers.
      ValueError: if a shape is wrong, or JAX would round a value.
    """
    given = dict(_flat(params, ""))
    expected = [entry.name for entry in jax.tree.leaves(entries, is_leaf=_is_entry)]
    if wrong := wrong_names(expected, given):
        raise KeyError(f"params do not match the layer: {wrong}. Pass those of one layer, by these names.")

    def convert(entry: Arrays) -> jax.Array:
        array = exact_array(given[entry.name], entry.shape, entry.name)
        if entry.parts is not None:
            pieces = np.split(array, len(entry.parts))
            array = np.concatenate([pieces[i] for i in entry.parts])
        return jnp.asarray(array.T if entry.transpose else array)

    return jax.tree.map(convert, entries, is_leaf=_is_entry)


def _is_entry(node: object) -> bool:
    return isinstance(node, Arrays)


def _flat(params: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    """Returns the leaves of nested dicts by their keys, joined by dots."""
    flat: list[tuple[str, Any]] = []
    for name, value in params.items():
        flat += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return flat
