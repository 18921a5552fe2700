"""Packing on the host, in NumPy, without compiling or running a program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

import jax
import numpy as np

from jaxpack._packed.on_host import Rows
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree
from jaxpack.data._form import Form

_ALONE = "Here all of them share the steps of the sequence: pack leaves with other steps separately."


def pack_on_host(sequences: Iterable[PyTree], plan: BucketPlan) -> PackedSequence:
    """Packs sequences in NumPy, as `jaxpack.pack_sequence` does in JAX.

    Examples:
      >>> pack_on_host([[1, 2, 3], [4]], jaxpack.plan_exact([3, 1])).data.tolist()
      [1, 4, 2, 3]

    Args:
      sequences: at least one and at most plan.num_sequences arrays [L_i, *F], or pytrees of such arrays. Rows of the
        plan without a sequence are empty.
      plan: the static shape.

    Returns:
      A PackedSequence whose leaves are NumPy arrays, with data [plan.size, *F] in the dtype to which JAX promotes those
      of all sequences. An empty list takes the structure and features of the other sequences.

    Raises:
      ValueError: if sequences is empty, a sequence does not fit the plan, sequences differ in structure or features, or
        the dtype cannot hold a value (as int32 cannot hold 2**40).
      TypeError: if sequences is not a list of arrays of numbers.
    """
    if isinstance(sequences, (str, bytes, Mapping, Set, PackedSequence)) or not isinstance(sequences, Iterable):
        raise TypeError(f"sequences must be a list of arrays, got {type(sequences).__name__}.")
    form = Form(True, way_out=_ALONE)
    held = isinstance(sequences, (list, tuple))  # another iterable may reuse its memory
    leaves = []
    for i, sequence in enumerate(sequences):
        read = form.learn(sequence, i, promote=True)
        leaves.append(read if held else [np.array(leaf) if leaf.size else leaf for leaf in read])
    if not leaves:
        raise ValueError("sequences is empty: at least one is needed.")
    form.settle()
    lengths = np.array([form.lengths(form.whole(arrays, i))[0] for i, arrays in enumerate(leaves)])
    plan.check(lengths)
    rows = Rows.of(lengths, plan)
    return rows.packed(jax.tree.unflatten(form.structure, fill(form, [rows], enumerate(leaves))))


def fill(form: Form, rows: Sequence[Rows], examples: Iterable[tuple[int, Sequence[np.ndarray]]]) -> list[np.ndarray]:
    """Returns data for each leaf: [plan.size, *F] where it varies in time, [B, *F] where it does not.

    Each example is copied before the next is read, so a source may reuse its memory.

    Args:
      form: the form of the examples.
      rows: the rows of each time axis.
      examples: the number and the leaves of each row's example, in order. The remaining rows are empty.
    """
    types = [
        (() if features is None else features, np.dtype(np.float32) if dtype is None else dtype)
        for features, dtype in zip(form.features, form.dtypes, strict=True)
    ]
    num_rows = rows[0].plan.num_sequences
    joined = [
        np.zeros((num_rows, *features), dtype) if axis is None else np.empty((len(rows[axis].cells), *features), dtype)
        for axis, (features, dtype) in zip(form.axes, types, strict=True)
    ]
    ends = [np.cumsum(each.lengths).tolist() for each in rows]
    targets = [(k, axis, joined[k], joined[k].dtype) for k, axis in enumerate(form.axes)]
    for row, (index, leaves) in enumerate(examples):
        if len(leaves) != len(targets):
            leaves = form.whole(leaves, index)
        for k, axis, target, dtype in targets:
            values = leaves[k]
            if values.dtype != dtype:
                values = form.cast(values, k, index)
            if axis is None:
                target[row] = values
            elif len(values):
                end = ends[axis][row]
                target[end - len(values) : end] = values
    return [leaf if axis is None else rows[axis].spread(leaf) for leaf, axis in zip(joined, form.axes, strict=True)]
