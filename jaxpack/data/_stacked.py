"""stack_shards: the batches of several shards as one batch with a leading axis."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxpack._types import PyTree


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
