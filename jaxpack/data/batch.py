"""Batch: packed inputs, and which examples they are."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from jaxpack.data.packing import Form, Rows
from jaxpack.data.source import Piece
from jaxpack.plan import BucketPlan
from jaxpack.sequence import PyTree


@functools.partial(jax.tree_util.register_dataclass, data_fields=["inputs", "indices", "weights"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """A batch of examples under a plan: a pytree, to be handed to a jitted step as it is.

    Examples:
      >>> from jaxpack.data import SlotFilling
      >>> (batch,) = SlotFilling([[1, 2, 3], [4]], jaxpack.plan_padded(3, 3), seed=None)  # 2 examples for 3 rows
      >>> batch.inputs.lengths.tolist(), batch.indices.tolist(), batch.weights.tolist()
      ([3, 1, 0], [0, 1, -1], [1.0, 1.0, 0.0])

    Attributes:
      inputs: the example's pytree, with a PackedSequence in place of each leaf that varies in time, and an array
        [B, ...] in place of each that does not. Where an example is a bare array, a bare PackedSequence.
      indices: int32 [B], which example of the source sits in each row; -1 where a row is empty.
      weights: float32 [B], 1, or 0 where a row is empty.
    """

    inputs: PyTree
    indices: np.ndarray
    weights: np.ndarray


def lay_out(form: Form, pieces: Sequence[Piece], plan: BucketPlan) -> Batch:
    """The batch of these pieces, in the first rows, on the host."""
    rows = Rows.of([len(piece.leaves[form.time]) for piece in pieces], plan)
    indices = np.full(plan.num_sequences, -1, np.int32)
    indices[: len(pieces)] = [piece.example for piece in pieces]

    def leaf(k: int, varying: bool) -> PyTree:
        arrays = [piece.leaves[k] for piece in pieces]
        return rows.packed(rows.pack(arrays, form, k)) if varying else rows.stack(arrays, form, k)

    inputs = jax.tree.unflatten(form.structure, [leaf(k, varying) for k, varying in enumerate(form.varying)])
    return Batch(inputs, indices, (indices >= 0).astype(np.float32))
