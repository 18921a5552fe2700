"""Schema: what the requests of a server have in common, and the door that each of them passes."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from jaxpack.inputs import without_torch
from jaxpack.plan import BucketPlan
from jaxpack.sequence import PackedSequence, PyTree

_ARRAY = jax.tree.structure(0)


class Request(NamedTuple):
    """A sequence that passed the door: NumPy arrays [L, *F] of the schema's structure and dtypes, and its length L."""

    arrays: PyTree
    length: int


@dataclasses.dataclass(frozen=True)
class Schema:
    """The structure, features and dtypes of a sequence.

    Attributes:
      structure: the tree structure.
      names: where each leaf stands, such as "['x']"; "" if a sequence is one array.
      features: the shape of each leaf without its time axis.
      dtypes: the dtype of each leaf, as JAX keeps it.
    """

    structure: Any
    names: tuple[str, ...]
    features: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]

    @classmethod
    def of(cls, example: PyTree) -> Schema:
        """Reads it off a sequence: arrays [L, *F], or anything else with a shape and a dtype.

        Raises:
          ValueError: if there is no leaf, or one has no time axis.
          TypeError: if a leaf is no array.
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
        """A request from what a user passed; `name` is what errors call it.

        Raises:
          ValueError: if its structure, features or time axes are others than the example's.
          TypeError: if a dtype cannot be cast to the example's without changing its kind.
        """
        leaves = [self._array(leaf, k, name) for k, leaf in enumerate(self._leaves(sequence, name))]
        steps = [len(leaf) for leaf in leaves]
        if min(steps) < max(steps):
            raise ValueError(f"the arrays of {name} must have one number of steps, got {steps}.")
        return Request(jax.tree.unflatten(self.structure, leaves), steps[0])

    def empty(self) -> Request:
        """A sequence of no steps."""
        leaves = [np.zeros((0, *shape), dtype) for shape, dtype in zip(self.features, self.dtypes, strict=True)]
        return Request(jax.tree.unflatten(self.structure, leaves), 0)

    def packed(self, plan: BucketPlan) -> PackedSequence:
        """A batch under a plan, in shapes and dtypes."""
        leaves = [
            jax.ShapeDtypeStruct((plan.size, *shape), dtype)
            for shape, dtype in zip(self.features, self.dtypes, strict=True)
        ]
        indices: Any = jax.ShapeDtypeStruct((plan.num_sequences,), jnp.int32)
        return PackedSequence(jax.tree.unflatten(self.structure, leaves), indices, indices, indices, plan)

    def _leaves(self, sequence: PyTree, name: str) -> list[Any]:
        """The leaves of a sequence; nested lists of numbers are an array where one is expected."""
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
        if not array.ndim or array.shape[1:] != self.features[k]:
            wanted = ", ".join(map(str, ("L", *self.features[k])))
            raise ValueError(f"{name} must have shape [{wanted}] for its L steps, got {list(array.shape)}.")
        if not np.can_cast(array.dtype, dtype, "same_kind"):
            raise TypeError(
                f"{name} has dtype {array.dtype}, which is not cast to the example's {dtype}: cast it first."
            )
        return array.astype(dtype, copy=False)
