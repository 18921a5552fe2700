"""Batch: packed inputs, with the numbers and weights of their examples."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.typing import ArrayLike

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


def stack_shards(shards: Iterable[PyTree]) -> PyTree:
    """Stacks the batches of several shards, which have one plan, to one batch with a leading axis of shards.

    Examples:
      >>> from jaxpack.data import pack_on_host
      >>> plan = jaxpack.plan_padded(1, 3)
      >>> stack_shards([pack_on_host([[1, 2, 3]], plan), pack_on_host([[4]], plan)]).data.tolist()
      [[1, 2, 3], [4, 0, 0]]

    Args:
      shards: pytrees of arrays with one structure, such as packed batches, or a batcher's batches.

    Returns:
      The same structure with arrays [D, ...]: NumPy arrays if all arrays of the shards are, else JAX arrays.

    Raises:
      ValueError: if there are no shards, or they differ in plan, structure or the shape of an array.
      TypeError: if they differ in the dtype of an array, which stacking would promote.
    """
    shards = list(shards)
    if not shards:
        raise ValueError("there are no shards: at least one is needed.")
    structures: list[Any] = [jax.tree.structure(shard) for shard in shards]
    leaves = [jax.tree_util.tree_leaves_with_path(shard) for shard in shards]
    for d, structure in enumerate(structures):
        if structure != structures[0]:
            raise ValueError(
                f"shard {d} has another plan or structure than shard 0. All shards run one program: pack them under "
                f"one plan, such as that of jaxpack.sharding.plan_shards(lengths, {len(shards)}). They have "
                f"{structure} and {structures[0]}."
            )
        for (path, leaf), (_, first) in zip(leaves[d], leaves[0], strict=True):
            name = jax.tree_util.keystr(path, simple=True, separator=".") or "the array"
            if np.shape(leaf) != np.shape(first):
                raise ValueError(f"{name} of shard {d} has shape {np.shape(leaf)}, but {np.shape(first)} in shard 0.")
            if np.dtype(leaf.dtype) != np.dtype(first.dtype):
                raise TypeError(
                    f"{name} of shard {d} has dtype {np.dtype(leaf.dtype)}, but {np.dtype(first.dtype)} in shard 0. "
                    f"Cast the shards to one dtype (PackedSequence.astype), or pack all of them at once with "
                    f"jaxpack.sharding.pack_shards, which promotes."
                )
    return jax.tree.map(_stacked, *shards)


def _stacked(*leaves: ArrayLike) -> np.ndarray | jax.Array:
    return jnp.stack(leaves) if any(isinstance(leaf, jax.Array) for leaf in leaves) else np.stack(leaves)
