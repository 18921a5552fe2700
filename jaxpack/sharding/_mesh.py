"""Checks of meshes, and of batches whose leading axis is spread over one of their axes."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxpack._types import PyTree

Axis = str | tuple[str, ...]  # a mesh axis, or several that together are one


def axis_size(mesh: Any, axis: Axis) -> int:
    """Returns the number of devices along an axis. Raises ValueError if the mesh does not have it."""
    names = (axis,) if isinstance(axis, str) else tuple(axis)
    missing = [name for name in names if name not in mesh.axis_names]
    if missing or not names:
        raise ValueError(
            f"the mesh has the axes {tuple(mesh.axis_names)}, and none is named {missing[0] if missing else axis!r}. "
            f"Pass axis= one of them, or make the mesh with jax.make_mesh((devices,), ('data',))."
        )
    return math.prod(mesh.shape[name] for name in names)


def check_shards(batch: PyTree, devices: int, where: str) -> int:
    """Returns the number of shards of a batch, the size of the leading axis that all leaves have.

    Args:
      batch: a pytree of arrays.
      devices: the number of devices, of which each takes as many shards.
      where: the devices in words, for errors.

    Raises:
      ValueError: if a leaf has no leading axis, leaves differ in it, or it is not a multiple of the devices.
    """
    sizes: dict[int, str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "the array"
        if not jnp.ndim(leaf):
            raise ValueError(f"every array of a sharded batch has a leading axis of shards, but {name} is one number.")
        sizes.setdefault(jnp.shape(leaf)[0], name)
    if len(sizes) != 1:
        found = ", ".join(f"{name} has {size}" for size, name in sizes.items()) or "there is no array"
        raise ValueError(
            f"all arrays of a sharded batch have the shards as their leading axis, but {found}. Make the batch with "
            f"jaxpack.sharding.pack_shards or stack_shards, or give a batcher local_shards=."
        )
    (count,) = sizes
    if not count or count % devices:
        raise ValueError(
            f"the batch has {count} shards, which is not a multiple of the {devices} devices along {where}. Deal it to "
            f"{devices} shards, or make a mesh of as many devices as shards."
        )
    return count
