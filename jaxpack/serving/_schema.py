"""Schema: the common form of a server's requests, and the check of each against it."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from jaxpack._dtypes import cast, without_torch
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree

_ARRAY = jax.tree.structure(0)


class Request(NamedTuple):
    """A checked sequence: NumPy arrays [L, *F] with the schema's structure and dtypes, and its length L."""

    arrays: PyTree
    length: int


@dataclasses.dataclass(frozen=True)
class Schema:
    """The structure, features and dtypes of a sequence.

    Attributes:
      structure: the tree structure.
      names: the path to each leaf, such as "['x']"; "" if a sequence is one array.
      features: the shape of each leaf without its time axis.
      dtypes: the dtype in which JAX holds each leaf.
    """

    structure: Any
    names: tuple[str, ...]
    features: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]

    @classmethod
    def of(cls, example: PyTree) -> Schema:
        """Returns the schema of a sequence of arrays [L, *F], or of anything else with a shape and a dtype.

        Raises:
          ValueError: if there is no leaf, or a leaf has no time axis.
          TypeError: if a leaf is not an array.
        """
        paths, structure = jax.tree_util.tree_flatten_with_path(jax.tree.map(without_torch, example))
        if not paths:
            raise ValueError(f"example must hold at least one array [L, *features], got {example!r}.")
        for path, leaf in paths:
            if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
                raise TypeError(
                    f"example{keystr(path)} must be an array or a jax.ShapeDtypeStruct, got {type(leaf).__name__}. "
                    f"Pass lists of numbers through np.asarray."
                )
            if not leaf.shape:
                raise ValueError(f"example{keystr(path)} must have a leading time axis, got shape ().")
        return cls(
            structure,
            tuple(keystr(path) for path, _ in paths),
            tuple(tuple(leaf.shape[1:]) for _, leaf in paths),
            tuple(jax.dtypes.canonicalize_dtype(leaf.dtype) for _, leaf in paths),
        )

    def read(self, sequence: PyTree, name: str) -> Request:
        """Returns a request from a user's sequence; errors call it `name`.

        Raises:
          ValueError: if its structure, features or time axes are not those of the example, or the example's dtype
            cannot hold one of its values.
          TypeError: if it does not hold numbers, or holds numbers of a kind that the example's dtype cannot hold.
        """
        leaves = [self._array(leaf, k, name) for k, leaf in enumerate(self._leaves(sequence, name))]
        steps = [len(leaf) for leaf in leaves]
        if min(steps) < max(steps):
            raise ValueError(f"the arrays of {name} must have the same number of steps, got {steps}.")
        return Request(jax.tree.unflatten(self.structure, leaves), steps[0])

    def empty(self) -> Request:
        """Returns a sequence without steps."""
        leaves = [np.zeros((0, *shape), dtype) for shape, dtype in zip(self.features, self.dtypes, strict=True)]
        return Request(jax.tree.unflatten(self.structure, leaves), 0)

    def packed(self, plan: BucketPlan) -> PackedSequence:
        """Returns the shapes and dtypes of a batch under a plan."""
        leaves = [
            jax.ShapeDtypeStruct((plan.size, *shape), dtype)
            for shape, dtype in zip(self.features, self.dtypes, strict=True)
        ]
        indices: Any = jax.ShapeDtypeStruct((plan.num_sequences,), jnp.int32)
        return PackedSequence(jax.tree.unflatten(self.structure, leaves), indices, indices, indices, plan)

    def _leaves(self, sequence: PyTree, name: str) -> list[Any]:
        """Returns the leaves of a sequence; nested lists of numbers are one array where an array is expected."""
        if self.structure == _ARRAY and isinstance(sequence, (list, tuple)):
            return [sequence]
        leaves, found = jax.tree.flatten(sequence)
        if found != self.structure:
            raise ValueError(f"{name} has the structure {found}, the server's example has {self.structure}.")
        return leaves

    def _array(self, leaf: Any, k: int, name: str) -> np.ndarray:
        name, dtype = name + self.names[k], self.dtypes[k]
        try:
            array = np.asarray(without_torch(leaf))
        except ValueError as error:
            raise ValueError(f"{name} is a nested list whose rows have different lengths: {error}") from error
        if array.shape == (0,) and not hasattr(leaf, "dtype"):  # an empty list takes the expected shape
            return np.zeros((0, *self.features[k]), dtype)
        if not array.ndim or array.shape[1:] != self.features[k]:
            wanted = ", ".join(map(str, ("L", *self.features[k])))
            raise ValueError(f"{name} must have shape [{wanted}] for its L steps, got {list(array.shape)}.")
        return _held(array, dtype, name, rounds=not hasattr(leaf, "dtype"))  # Python's numbers have no dtype


def _held(array: np.ndarray, dtype: np.dtype, name: str, rounds: bool) -> np.ndarray:
    """Returns the array in the dtype that the programs were compiled for, which must hold its values.

    float64 is rounded to float32, as JAX does by default, and to any float if `rounds`. Other floats are not rounded,
    since their values would change.
    """
    if array.dtype == dtype or not array.size:
        return array.astype(dtype, copy=False)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.number, jnp.bool_)):
        raise TypeError(f"{name} must hold numbers, got dtype {array.dtype}, where the server's example has {dtype}.")
    if not any(all(jnp.issubdtype(each, kind) for each in (array.dtype, dtype)) for kind in _KINDS):
        return cast(array, dtype, name)
    with np.errstate(over="ignore"):
        held = array.astype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        limits = jnp.iinfo(dtype)
        wrong = (array < int(limits.min)) | (array > int(limits.max))
    elif rounds or _ROUNDED.get(array.dtype) == dtype:
        wrong = np.isfinite(array) & ~np.isfinite(held)
    else:
        wrong = (held.astype(array.dtype) != array) & ~np.isnan(array)
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"{name} has dtype {array.dtype} and holds {array[place]} at {list(place)}, which {dtype} cannot hold. "
            f"That is the dtype of the server's example: send other values, or make the server with an example of a "
            f"wider dtype."
        )
    return held


_KINDS = (jnp.integer, jnp.floating, jnp.complexfloating)
_ROUNDED = {np.dtype(np.float64): np.dtype(np.float32), np.dtype(np.complex128): np.dtype(np.complex64)}
