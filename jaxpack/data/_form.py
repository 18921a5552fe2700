"""Form: the structure, time axes, features and dtypes that the examples of a source share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxpack._dtypes import cast, common_dtype, jax_dtype, without_torch
from jaxpack._types import PyTree
from jaxpack.data._axes import axes_of, axis_names, leaf_names, suggestions

_LEAF = jax.tree.structure(0)
_BLANK = np.zeros(0, np.float32)  # an empty list, which determines no dtype and no features
_PLAIN = {int, float, bool, complex}


class Form:
    """The common form of examples, learned from them one by one; an empty list determines only its length.

    Attributes:
      names: the names of the time axes; none for a single axis without a name.
      structure: the tree structure of an example; None while all examples were empty lists.
      axes: for each leaf the number of its time axis, None for a leaf of fixed size.
      features: for each leaf its shape without the time axis, None while unknown.
      dtypes: for each leaf its dtype in batches, which is one of JAX's; None while unknown.

    Args:
      time_varying: a bool or the name of its time axis for each leaf, or for a prefix of the example's structure. None
        means that every leaf with an axis varies in time.
      way_out: the advice about leaves of different lengths, instead of advice about time_varying.
      dtypes: the `described` of an earlier form of these examples, if there was one.
    """

    def __init__(self, time_varying: PyTree, *, way_out: str | None = None, dtypes: str = "") -> None:
        self.names = axis_names(time_varying)
        self.structure: Any = None
        self.axes: tuple[int | None, ...] = ()
        self.features: list[tuple[int, ...] | None] = []
        self.dtypes: list[np.dtype | None] = []
        self._time_varying, self._way_out, self._said = time_varying, way_out, dtypes.split(",")
        self._seen: list[set[np.dtype]] = []
        self._first: tuple[int, ...] = ()  # the first leaf of each axis
        self._bare = False  # whether an example is one array that varies in time: read a million times, so fast

    @property
    def num_axes(self) -> int:
        """The number of time axes."""
        return max(1, len(self.names))

    @property
    def known(self) -> bool:
        """Whether the form is fully known."""
        return self.structure is not None and None not in self.dtypes

    @property
    def described(self) -> str:
        """The dtypes as a string, serialisable as JSON."""
        return ",".join(self._said if self.structure is None else ["" if d is None else str(d) for d in self.dtypes])

    def learn(self, example: PyTree, index: int, *, promote: bool) -> list[np.ndarray]:
        """Reads an example, and updates the dtypes.

        Args:
          example: an array [L, *F], a list of numbers, or a pytree of them.
          index: the example's number, for errors.
          promote: whether its dtypes are promoted with the known ones; otherwise they only fill in unknown ones.

        Returns:
          The example's leaves, as `leaves` does.
        """
        leaves = self.leaves(example, index)
        if self.structure is None or (self._bare and leaves[0].dtype in self._seen[0]):
            return leaves
        for k, leaf in enumerate(leaves):
            if leaf is _BLANK or leaf.dtype in self._seen[k]:
                continue
            self._seen[k].add(leaf.dtype)
            known, found = self.dtypes[k], jax_dtype(leaf.dtype, self._name(k, index))
            if known is None:
                self.dtypes[k] = found
            elif promote:
                self.dtypes[k] = common_dtype([known, found])
        return leaves

    def settle(self) -> None:
        """Ends learning: unknown dtypes become JAX's default, float32."""
        if self.structure is None:
            self._begin([_BLANK], _LEAF)
        self.dtypes = [np.dtype(np.float32) if dtype is None else dtype for dtype in self.dtypes]
        self.features = [() if features is None else features for features in self.features]

    def leaves(self, example: PyTree, index: int) -> list[np.ndarray]:
        """Returns the arrays of an example, without copies. Raises ValueError unless they have the common form."""
        if self._bare and isinstance(example, np.ndarray) and example.ndim and example.shape[1:] == self.features[0]:
            return [example]  # nothing more to check; matters for a million examples
        leaves, structure = _flatten(example, index)
        if self.structure is None or structure != self.structure:
            if structure == _LEAF and leaves[0] is _BLANK:
                return leaves if self.structure is None else self._blanks(index)
            if self.structure is not None:
                raise ValueError(f"example {index} has the structure {structure}, the first has {self.structure}.")
            self._begin(leaves, structure)
        self._check(leaves, index)
        return leaves

    def lengths(self, leaves: Sequence[np.ndarray]) -> tuple[int, ...]:
        """Returns how many steps an example with these leaves has on each time axis."""
        if self._bare:
            return (len(leaves[0]),)
        if self.structure is None:
            return (0,) * self.num_axes
        return tuple(len(leaves[k]) for k in self._first)

    def part(self, leaves: Sequence[np.ndarray], start: int, lengths: Sequence[int]) -> list[np.ndarray]:
        """Returns `lengths` steps of an example on each time axis, from `start`; leaves of fixed size are whole."""
        if self.structure is None:
            return list(leaves)
        return [
            leaf if axis is None or leaf is _BLANK else leaf[start : start + lengths[axis]]
            for leaf, axis in zip(leaves, self.axes, strict=True)
        ]

    def own(self, leaves: Sequence[np.ndarray], index: int) -> list[np.ndarray]:
        """Returns copies of an example's leaves in the batches' dtypes, since the source may reuse its memory."""
        return [self._owned(leaf, k, index) for k, leaf in enumerate(leaves)]

    def whole(self, leaves: Sequence[np.ndarray], index: int) -> Sequence[np.ndarray]:
        """Returns a leaf for each one of the structure, for an example that was read before that was known."""
        return leaves if len(leaves) == len(self.axes) else self._blanks(index)

    def cast(self, leaf: np.ndarray, k: int, index: int) -> np.ndarray:
        """Returns leaf k of an example in the dtype of batches; raises as `cast`, naming the example."""
        dtype = None if leaf is _BLANK else self.dtypes[k]
        return leaf if dtype is None or leaf.dtype == dtype else cast(leaf, dtype, self._name(k, index))

    def _owned(self, leaf: np.ndarray, k: int, index: int) -> np.ndarray:
        held = self.cast(leaf, k, index)
        return np.array(leaf) if held is leaf and leaf is not _BLANK else held

    def _begin(self, leaves: Sequence[np.ndarray], structure: Any) -> None:
        """Takes the structure from an example."""
        if not leaves:
            raise ValueError("an example holds no array: it must be an array, a list of numbers, or a pytree of them.")
        for leaf in leaves:
            jax_dtype(leaf.dtype, "an example")
        axes = axes_of(self._time_varying, structure, [leaf.ndim for leaf in leaves])
        for leaf, axis in zip(leaves, axes, strict=True):
            if axis is not None and not leaf.ndim:
                raise ValueError(
                    "a leaf that varies in time must have a leading time axis, but in the first example it is the "
                    f"number {leaf}. Declare the leaves that vary with time_varying=."
                )
        if set(range(self.num_axes)) - set(axes):
            missing = f" on the axis {self.names[0]!r}" if self.names else ""
            raise ValueError(
                f"no leaf of an example varies in time{missing}: at least one must have a leading time axis. (Numbers "
                f"in a list are one array, in a tuple one leaf each.)"
            )
        self.structure, self.axes = structure, axes
        said = self._said if len(self._said) == len(leaves) else [""] * len(leaves)
        self.features, self.dtypes = [None] * len(leaves), [np.dtype(name) if name else None for name in said]
        self._seen = [set() for _ in leaves]
        self._first = tuple(axes.index(axis) for axis in range(self.num_axes))
        self._bare = structure == _LEAF and axes[0] is not None

    def _check(self, leaves: Sequence[np.ndarray], index: int) -> None:
        """Raises ValueError unless leaves have the known features, and those of an axis the same number of steps."""
        steps: dict[int, int] = {}
        for k, (leaf, axis) in enumerate(zip(leaves, self.axes, strict=True)):
            known = self.features[k]
            found: tuple[int, ...] | None = leaf.shape if axis is None else leaf.shape[1:]
            if axis is not None and leaf is _BLANK:
                found = known
            elif axis is not None and not leaf.ndim:
                raise ValueError(f"{self._name(k, index)} must have a leading time axis, but it is the number {leaf}.")
            if known is None:
                self.features[k] = found
            elif found != known:
                what = "a fixed leaf of shape" if axis is None else "features of shape"
                raise ValueError(f"example {index} has {what} {found}, the first has {known}.{self._hint(leaves, k)}")
            if axis is not None and steps.setdefault(axis, len(leaf)) != len(leaf):
                raise ValueError(self._unequal(leaves, axis, index))

    def _unequal(self, leaves: Sequence[np.ndarray], axis: int, index: int) -> str:
        """Returns the error text about leaves of one axis with different lengths."""
        paths = leaf_names(self.structure)
        found = ", ".join(f"{paths[k]} {len(leaf)}" for k, leaf in enumerate(leaves) if self.axes[k] == axis)
        on = f" on the time axis {self.names[axis]!r}" if self.names else " that vary in time"
        return f"the leaves of example {index}{on} have different lengths: {found}. {self._ways_out(leaves)}"

    def _hint(self, leaves: Sequence[np.ndarray], k: int) -> str:
        if self.axes[k] is not None or not leaves[k].ndim or self._way_out is not None:
            return ""
        lengths = [len(leaf) if i == k or self.axes[i] is not None else None for i, leaf in enumerate(leaves)]
        return f" If its leading axis is time, declare it: {suggestions(self.structure, lengths)[0]}."

    def _ways_out(self, leaves: Sequence[np.ndarray]) -> str:
        if self._way_out is not None:
            return self._way_out
        lengths = [None if axis is None else len(leaf) for leaf, axis in zip(leaves, self.axes, strict=True)]
        named, fixed = suggestions(self.structure, lengths)
        return (
            f"If they have different time axes, such as source and target, name the axis of each leaf: {named}. If "
            f"only one of them varies in time and the others have a fixed size, pass False for those: {fixed}."
        )

    def _blanks(self, index: int) -> list[np.ndarray]:
        """Returns the leaves of an empty list, which is an example without steps."""
        if None in self.axes:
            raise ValueError(
                f"example {index} is an empty list, but examples have leaves of fixed size: the structure of the first "
                f"is {self.structure}."
            )
        return [_BLANK] * len(self.axes)

    def _name(self, k: int, index: int) -> str:
        if self.structure is None or self.structure == _LEAF:
            return f"example {index}"
        return f"leaf {leaf_names(self.structure)[k]} of example {index}"


def _flatten(example: PyTree, index: int) -> tuple[list[np.ndarray], Any]:
    """Returns the NumPy leaves and the structure of an example, in which a list of numbers is one array."""
    if isinstance(example, np.ndarray):
        return [example], _LEAF
    if isinstance(example, tuple) and all(_is_number(entry) for entry in example):
        example = list(example)
    leaves, structure = jax.tree.flatten(example, is_leaf=_is_list_of_numbers)
    return [_as_array(leaf, index) for leaf in leaves], structure


def _as_array(leaf: Any, index: int) -> np.ndarray:
    if not isinstance(leaf, list):
        return np.asarray(without_torch(leaf))
    if not set(map(type, leaf)) <= _PLAIN:
        leaf = _without_torch(leaf)
    try:
        array = np.asarray(leaf)
    except ValueError as error:
        raise ValueError(
            f"example {index} has a list whose rows have different lengths. A list of lists of numbers is one array: "
            f"pass several sequences in a tuple or a dict."
        ) from error
    return array if array.size else _BLANK


def _without_torch(entries: list[Any]) -> list[Any]:
    return [_without_torch(entry) if isinstance(entry, list) else without_torch(entry) for entry in entries]


def _is_list_of_numbers(node: object) -> bool:
    if not isinstance(node, list):
        return False
    return set(map(type, node)) <= _PLAIN or all(_is_number(entry) or _is_list_of_numbers(entry) for entry in node)


def _is_number(entry: object) -> bool:
    return isinstance(entry, (int, float, complex, np.generic)) or getattr(entry, "ndim", None) == 0
