"""pack_shards and in_caller_order: a batch dealt to shards on the host, and results back in the order of its rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from jaxpack._checks import at_least_one
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._plans.shards import check_shared_plan, deal_rows, plan_shards
from jaxpack._types import PyTree
from jaxpack.data._batch import Batch, lay_out
from jaxpack.data._form import Form
from jaxpack.data._source import Piece
from jaxpack.data._stacked import stack_shards


def pack_shards(
    sequences: Iterable[PyTree], num_shards: int, plan: BucketPlan | None = None, *, time_varying: PyTree = None
) -> Batch:
    """Deals sequences to shards as `deal` does, and packs each shard under one plan, in NumPy.

    Examples:
      >>> batch = pack_shards([[1, 2, 3], [4], [5, 6], [7, 8]], 2)
      >>> batch.indices.tolist(), batch.inputs.lengths.tolist()
      ([[0, 1], [2, 3]], [[3, 1], [2, 2]])
      >>> sums = jax.vmap(jaxpack.segment_sum)(batch.inputs)
      >>> in_caller_order(sums, batch.indices).tolist()
      [6, 4, 11, 15]

    Args:
      sequences: B examples, each an array [L, *F], a list of numbers, or a pytree of them.
      num_shards: the number D of shards.
      plan: the plan of every shard. Default: `plan_shards(lengths, num_shards)`, for which D must divide B. A plan for
        B/D sequences, rounded up, leaves the last rows empty where D does not divide B.
      time_varying: which leaves vary in time, as in `jaxpack.data.Batcher`; only one time axis.

    Returns:
      A `jaxpack.data.Batch` whose arrays have a leading axis of D shards, as jax.vmap and `sum_shards` take it:
      `inputs` packed data [D, plan.size, *F], `indices` [D, B/D] with the row of each sequence in the given order (-1
      for an empty row), and `weights` [D, B/D]. Dtypes are those to which JAX promotes those of all sequences.

    Raises:
      ValueError: if sequences is empty, B does not divide, the plan is for another number of sequences a shard, a
        sequence does not fit it, or sequences differ in structure or features.
      TypeError: if sequences is not a list of arrays of numbers, or their dtypes have no common one.
    """
    if isinstance(sequences, (str, bytes, Mapping, Set, PackedSequence)) or not isinstance(sequences, Iterable):
        raise TypeError(f"sequences must be a list of arrays, got {type(sequences).__name__}.")
    shards = at_least_one("num_shards", num_shards)
    form = Form(time_varying)
    if form.num_axes > 1:
        raise ValueError(
            f"pack_shards takes one time axis, but time_varying names {form.names}. Use jaxpack.data.SlotFilling with "
            f"local_shards={shards}, whose batches fit a plan for each axis."
        )
    held = isinstance(sequences, (list, tuple))  # another iterable may reuse its memory
    examples = []
    for i, sequence in enumerate(sequences):
        leaves = form.learn(sequence, i, promote=True)
        examples.append(Piece(i, leaves if held else [np.array(leaf) if leaf.size else leaf for leaf in leaves]))
    if not examples:
        raise ValueError("sequences is empty: at least one is needed.")
    form.settle()
    lengths = np.array([form.lengths(form.whole(leaves, i))[0] for i, leaves in examples])
    if plan is None:
        plan = plan_shards(lengths, shards)
    check_shared_plan(plan, lengths, shards)
    batches = []
    for rows in deal_rows(lengths, shards, plan.room):
        pieces = [examples[row] for row in rows if row >= 0]
        batches.append(lay_out(form, pieces, [lengths[piece.example] for piece in pieces], (plan,)))
    return stack_shards(batches)


def in_caller_order(results: PyTree, indices: npt.ArrayLike) -> PyTree:
    """Puts the results of all shards in the order of the rows that were dealt, on the host.

    in_caller_order([[a b], [c d]], [[0 3], [2 1]]) = [a d c b]

    Examples:
      >>> in_caller_order(np.array([[1.0, 2.0], [3.0, 4.0]]), [[1, 0], [2, -1]]).tolist()  # -1 is an empty row
      [2.0, 1.0, 3.0]

    Args:
      results: arrays [D, B/D, ...], or a pytree of them: a value for each sequence of each shard. Padded outputs are
        such values (`jax.vmap(jaxpack.pad_packed_sequence)`), packed ones are not.
      indices: int [D, B/D], the `indices` of the batch.

    Returns:
      NumPy arrays [B, ...], without the empty rows.

    Raises:
      ValueError: if an array does not have the axes of indices, indices are not those of a whole batch, or an array is
        not held by this process as a whole.
    """
    rows = _on_host(indices).ravel()
    kept = rows >= 0
    if not np.array_equal(np.sort(rows[kept]), np.arange(kept.sum())):
        raise ValueError(
            "indices must hold each row from 0 once, as those of pack_shards do. The indices of a batcher are numbers "
            "of its source: use them to write results there."
        )
    order = np.flatnonzero(kept)[np.argsort(rows[kept])]

    def restore(leaf: Any) -> np.ndarray:
        array = _on_host(leaf)
        if array.shape[:2] != np.shape(indices):
            raise ValueError(
                f"results must have the axes of indices, {np.shape(indices)}, in front, got shape {array.shape}."
            )
        return array.reshape(-1, *array.shape[2:])[order]

    return jax.tree.map(restore, results)


def _on_host(array: Any) -> np.ndarray:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        raise ValueError(
            "this process holds only a part of the array. Collect it first: "
            "jax.experimental.multihost_utils.process_allgather(array, tiled=True)."
        )
    return np.asarray(array)
