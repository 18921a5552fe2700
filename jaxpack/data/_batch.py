"""Batch: packed inputs, with the numbers and weights of their examples."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
import numpy.typing as npt

from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree
from jaxpack.data._form import Form
from jaxpack.data._packing import HostLayout, fill
from jaxpack.data._source import Piece


@functools.partial(jax.tree_util.register_dataclass, data_fields=["inputs", "indices", "weights"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """A batch of examples under a plan: a pytree that a jitted step takes.

    Examples:
      >>> from jaxpack.data import SlotFilling
      >>> (batch,) = SlotFilling([[1, 2, 3], [4]], jaxpack.plan_padded(3, 3), seed=None)  # 2 examples for 3 rows
      >>> batch.inputs.lengths.tolist(), batch.indices.tolist(), batch.weights.tolist()
      ([3, 1, 0], [0, 1, -1], [1.0, 1.0, 0.0])

    Attributes:
      inputs: the example's pytree, with a PackedSequence in place of each leaf that varies in time, under the plan of
        its time axis, and an array [B, ...] in place of each leaf of fixed size. For examples that are bare arrays, a
        bare PackedSequence.
      indices: int32 [B], the number of each row's example in the source; -1 for an empty row.
      weights: float32 [B], 1 for a row with an example, 0 for an empty row.

    Where a batch holds several shards (`local_shards=` of batchers, `jaxpack.sharding.pack_shards`), every array has a
    leading axis of shards, as jax.vmap takes it.
    """

    inputs: PyTree
    indices: np.ndarray
    weights: np.ndarray


def lay_out(form: Form, pieces: Iterable[Piece], lengths: npt.ArrayLike, plans: Sequence[BucketPlan]) -> Batch:
    """Lays pieces out in the first rows of a batch, on the host.

    Args:
      form: the form of the examples.
      pieces: each is copied before the next is read.
      lengths: [n, A] the lengths of the pieces on each time axis.
      plans: the plan of each time axis.
    """
    by_axis = np.asarray(lengths, np.int64).reshape(-1, len(plans)).T
    rows = [HostLayout.of(each, plan) for each, plan in zip(by_axis, plans, strict=True)]
    indices = np.full(plans[0].num_sequences, -1, np.int32)

    def numbered() -> Iterator[tuple[int, list[np.ndarray]]]:
        for row, piece in enumerate(pieces):
            indices[row] = piece.example
            yield piece

    data = fill(form, rows, numbered())
    leaves = [leaf if axis is None else rows[axis].packed(leaf) for leaf, axis in zip(data, form.axes, strict=True)]
    return Batch(jax.tree.unflatten(form.structure, leaves), indices, (indices >= 0).astype(np.float32))
