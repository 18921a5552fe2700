"""Packing on the host: NumPy in, NumPy out, so that a batch is laid out without compiling or running any program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from jaxpack.inputs import without_torch
from jaxpack.plan import BucketPlan, longest_first
from jaxpack.sequence import PackedSequence, PyTree


def pack_on_host(sequences: Sequence[PyTree], plan: BucketPlan) -> PackedSequence:
    """Packs sequences as `jaxpack.pack_sequence` does, in NumPy.

    Examples:
      >>> pack_on_host([[1, 2, 3], [4]], jaxpack.plan_exact([3, 1])).data.tolist()
      [1, 4, 2, 3]

    Args:
      sequences: at least one and at most plan.num_sequences arrays [L_i, *F], or pytrees of such arrays; rows that are
        left are empty.
      plan: the static shape.

    Returns:
      A PackedSequence whose leaves are NumPy arrays, data [plan.size, *F] in the first sequence's dtypes.

    Raises:
      ValueError: if a sequence does not fit the plan, there is none, or they differ in structure or features.
      TypeError: if the dtype of one cannot be cast to that of the first without changing its kind.
    """
    if not len(sequences):
        raise ValueError("sequences is empty: at least one is needed.")
    form = Form.of(sequences[0], True)
    leaves = [form.leaves(sequence, i) for i, sequence in enumerate(sequences)]
    lengths = np.array([len(arrays[0]) for arrays in leaves])
    plan.check(lengths)
    rows = Rows.of(lengths, plan)
    data = [rows.pack([arrays[k] for arrays in leaves], form, k) for k in range(len(form.dtypes))]
    return rows.packed(jax.tree.unflatten(form.structure, data))


@dataclasses.dataclass(frozen=True)
class Form:
    """What all examples of a source share: their structure, and of each leaf whether it varies in time, and its type.

    Attributes:
      structure: the tree structure of an example.
      varying: for each leaf whether its leading axis is time.
      dtypes: the dtype of each leaf.
      features: the shape of each leaf, without the time axis where it has one.
    """

    structure: Any
    varying: tuple[bool, ...]
    dtypes: tuple[np.dtype, ...]
    features: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, example: PyTree, time_varying: PyTree) -> Form:
        """Reads it off an example.

        Args:
          example: an array [L, *F], a list of numbers, or a pytree of arrays.
          time_varying: a bool for each leaf, or a prefix of the example's structure; None: whatever has an axis.
        """
        leaves, structure = _flatten(example)
        if not leaves:
            raise ValueError(f"an example holds no array, got {example!r}.")
        for leaf in leaves:
            if leaf.dtype.kind in "OSUmM":
                raise TypeError(f"an example must hold numbers, which JAX can compute with, got dtype {leaf.dtype}.")
        varying = _broadcast(time_varying, structure, leaves)
        for leaf, is_varying in zip(leaves, varying, strict=True):
            if is_varying and not leaf.ndim:
                raise ValueError(
                    "a leaf that varies in time must have a leading time axis, but in the first example it is the "
                    f"number {leaf}. Say which leaves do with time_varying=."
                )
        if not any(varying):
            raise ValueError("no leaf of an example varies in time: at least one must have a leading time axis.")
        features = tuple(leaf.shape[is_varying:] for leaf, is_varying in zip(leaves, varying, strict=True))
        return cls(structure, varying, tuple(leaf.dtype for leaf in leaves), features)

    def leaves(self, example: PyTree, index: int) -> list[np.ndarray]:
        """The arrays of an example, checked against the form; the index names it in errors."""
        if self._bare and isinstance(example, np.ndarray) and example.ndim and example.shape[1:] == self.features[0]:
            return [example]  # nothing more to look at, at a million a few seconds
        leaves, structure = _flatten(example)
        if structure != self.structure:
            raise ValueError(f"example {index} has the structure {structure}, the first has {self.structure}.")
        length = None
        for leaf, varying, features in zip(leaves, self.varying, self.features, strict=True):
            found = leaf.shape[1:] if varying else leaf.shape
            if found != features or (varying and not leaf.ndim):
                what = "features of shape" if varying else "a fixed leaf of shape"
                hint = "" if varying else " If its leading axis is time, say so with time_varying=."
                raise ValueError(f"example {index} has {what} {found}, the first has {features}.{hint}")
            if varying and len(leaf) != (length := len(leaf) if length is None else length):
                raise ValueError(
                    f"the leaves of example {index} that vary in time have {length} and {len(leaf)} steps. If one of "
                    f"them is of fixed size, say so with time_varying=, a bool for each leaf."
                )
        return leaves

    @functools.cached_property
    def time(self) -> int:
        """The first leaf that varies in time."""
        return self.varying.index(True)

    @functools.cached_property
    def _bare(self) -> bool:
        """Whether an example is an array that varies in time."""
        return self.structure == _LEAF and self.varying[0]

    def length(self, example: PyTree, index: int) -> int:
        """How many steps an example has."""
        return len(self.leaves(example, index)[self.time])


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where the rows of a batch go under a plan; the host's half of `jaxpack.packed.lay_out`.

    Attributes:
      plan: the static shape.
      lengths, sorted_indices, unsorted_indices: as in PackedSequence.
      cells: int [sum(lengths)], the cell of each step, row by row.
    """

    plan: BucketPlan
    lengths: np.ndarray
    sorted_indices: np.ndarray
    unsorted_indices: np.ndarray
    cells: np.ndarray

    @classmethod
    def of(cls, lengths: npt.ArrayLike, plan: BucketPlan) -> Rows:
        """Places rows of these lengths, at most one a slot, which must fit; rows that are left have length 0."""
        given = np.asarray(lengths, np.int32)
        lengths = np.zeros(plan.num_sequences, np.int32)
        lengths[: len(given)] = given
        order = longest_first(lengths).astype(np.int32)
        slots = np.empty_like(order)
        slots[order] = np.arange(len(order), dtype=np.int32)
        ends = np.cumsum(lengths)
        steps = np.arange(ends[-1]) + np.repeat(plan.slot_starts[slots] - (ends - lengths), lengths)
        cells = plan.step_offsets[steps] + np.repeat(plan.slot_rows[slots], lengths)
        return cls(plan, lengths, order, slots, cells)

    def pack(self, arrays: Sequence[np.ndarray], form: Form, leaf: int) -> np.ndarray:
        """Data [plan.size, *F] of one leaf of the first rows."""
        data = np.zeros((self.plan.size, *form.features[leaf]), form.dtypes[leaf])
        if arrays:
            _assign(data, self.cells, np.concatenate(arrays), leaf)
        return data

    def stack(self, arrays: Sequence[np.ndarray], form: Form, leaf: int) -> np.ndarray:
        """[B, *F] of one leaf of fixed size, zeros in the rows that are left."""
        data = np.zeros((self.plan.num_sequences, *form.features[leaf]), form.dtypes[leaf])
        if arrays:
            _assign(data, slice(len(arrays)), np.stack(arrays), leaf)
        return data

    def packed(self, data: PyTree) -> PackedSequence:
        """A PackedSequence of these rows."""
        return PackedSequence(data, self.lengths, self.sorted_indices, self.unsorted_indices, self.plan)  # type: ignore[arg-type]


def _assign(data: np.ndarray, places: Any, values: np.ndarray, leaf: int) -> None:
    """data[places] = values, unless that would change what the values are."""
    if not np.can_cast(values.dtype, data.dtype, "same_kind"):
        raise TypeError(
            f"leaf {leaf} of a batch has dtype {values.dtype}, the first example has {data.dtype}. Give all examples "
            f"one dtype."
        )
    data[places] = values


def _flatten(example: PyTree) -> tuple[list[np.ndarray], Any]:
    """NumPy leaves and the structure of an example; a list of numbers is one array."""
    if isinstance(example, np.ndarray):
        return [example], _LEAF
    if isinstance(example, (list, tuple)) and all(isinstance(entry, (int, float)) for entry in example):
        return [np.asarray(example)], _LEAF
    leaves, structure = jax.tree.flatten(example)
    return [np.asarray(without_torch(leaf)) for leaf in leaves], structure


_LEAF = jax.tree.structure(0)


def _broadcast(time_varying: PyTree, structure: Any, leaves: list[np.ndarray]) -> tuple[bool, ...]:
    """A bool for each leaf, from a prefix of the structure."""
    if time_varying is None:
        return tuple(leaf.ndim > 0 for leaf in leaves)
    if isinstance(time_varying, bool):
        return (time_varying,) * len(leaves)
    try:
        spread = jax.tree.map(
            lambda flag, part: [flag] * len(jax.tree.leaves(part)), time_varying, jax.tree.unflatten(structure, leaves)
        )
    except ValueError as error:
        raise ValueError(
            f"time_varying must be a bool for each leaf of an example, or a prefix of its structure {structure}, got "
            f"{time_varying!r}."
        ) from error
    flags = jax.tree.leaves(spread)
    if not all(isinstance(flag, bool) for flag in flags):
        raise TypeError(f"time_varying must hold bools, got {time_varying!r}.")
    return tuple(flags)
