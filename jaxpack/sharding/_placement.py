"""put and prefetch_to_mesh: shards on the devices of a mesh, on one host or on many."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from jaxpack._checks import at_least_one
from jaxpack._types import PyTree
from jaxpack.data._prefetch import PrefetchIterator
from jaxpack.sharding._mesh import Axis, axis_size, check_shards


def put(batch: PyTree, mesh: Mesh, axis: Axis = "data") -> PyTree:
    """Puts the shards of a batch on the devices along a mesh axis.

    Each array gets the sharding NamedSharding(mesh, P(axis)). In a program of several processes, each passes the shards
    of its own devices, and the arrays are those of all processes.

    Examples:
      >>> from jaxpack.sharding import pack_shards
      >>> mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> batch = put(pack_shards([[1, 2, 3], [4], [5, 6], [7, 8]], 2), mesh)
      >>> batch.inputs.lengths.sharding.spec
      P('data',)

    Args:
      batch: a pytree of arrays with a leading axis of shards, as `pack_shards`, `stack_shards` and batchers with
        `local_shards=` make it.
      mesh: the devices.
      axis: the mesh axis, or several. Its devices get equally many shards.

    Raises:
      ValueError: if the mesh does not have the axis, arrays differ in the leading axis, or it is not a multiple of the
        devices (of this process) along the axis.
    Source: jax.device_put and jax.make_array_from_process_local_data.
    """
    devices = axis_size(mesh, axis)
    if jax.process_count() > 1:
        devices = axis_size(mesh.local_mesh, axis)
    check_shards(batch, devices, f"the mesh axis {axis!r}")
    sharding = NamedSharding(mesh, jax.P(axis))
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(functools.partial(jax.make_array_from_process_local_data, sharding), batch)


def prefetch_to_mesh(iterator: Iterable[Any], mesh: Mesh, size: int = 2, *, axis: Axis = "data") -> PrefetchIterator:
    """Takes batches from an iterator ahead of their use, in a thread, and puts their shards on the devices of a mesh.

    Examples:
      >>> from jaxpack.data import SlotFilling
      >>> mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> words = [[1, 2, 3], [4], [5, 6], [7]]
      >>> batches = SlotFilling(words, batch_size=1, local_shards=2)
      >>> [batch.weights.sharding.spec for batch in prefetch_to_mesh(batches, mesh)]
      [P('data',), P('data',)]

    Args:
      iterator: an iterable of batches that `put` takes, such as a batcher with `local_shards=`.
      mesh: the devices.
      size: how many batches are kept ready.
      axis: the mesh axis, or several.

    Returns:
      An iterator, with `get_state()` and `close()`, as that of `jaxpack.data.prefetch_to_device`. An exception of the
      iterator or of `put` is raised in place of its batch.

    Raises:
      TypeError: if size is not an int.
      ValueError: if size is below 1, or the mesh does not have the axis.
    """
    at_least_one("size", size)
    axis_size(mesh, axis)
    return PrefetchIterator(iter(iterator), size, functools.partial(put, mesh=mesh, axis=axis))
