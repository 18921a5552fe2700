"""map_shards and sum_shards: a function of one shard, run on every device along a mesh axis."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._types import PyTree
from jaxpack.sharding._mesh import Axis, axis_size, check_shards

PerShard = Callable[..., PyTree]


def map_shards(fn: PerShard, mesh: Any, axis: Axis = "data") -> PerShard:
    """Returns a function that runs `fn` on each shard, on the shard's device, and stacks the results.

    map_shards(fn, mesh)(params, batch)[d] = fn(params, batch[d])

    It is jax.shard_map over the axis, with jax.vmap over the shards of one device. Inside, a shard is an ordinary
    batch, and nothing is sharded over the axis, so it works on meshes of automatic and of explicit axes. Other axes of
    the mesh stay as they are.

    Examples:
      >>> from jaxpack.sharding import in_caller_order, pack_shards, put
      >>> mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> batch = put(pack_shards([[1, 2, 3], [4], [5, 6], [7, 8]], 2), mesh)
      >>> sums = map_shards(lambda scale, shard: scale * jaxpack.segment_sum(shard.inputs), mesh)
      >>> in_caller_order(jax.jit(sums)(10, batch), batch.indices).tolist()
      [60, 40, 110, 150]

    Args:
      fn: fn(params, *shards), a pytree of arrays.
      mesh: the devices.
      axis: the mesh axis, or several, over which shards are spread.

    Returns:
      A function of params, which are the same on all devices along the axis, and of batches, which are pytrees whose
      arrays have a leading axis of D shards. Pass what differs between shards, such as dropout keys
      (`jax.random.split(key, D)`), as a further batch. Its results have a leading axis of D.

    Raises:
      ValueError: if the mesh does not have the axis; when called, if arrays differ in the leading axis, or it is not a
        multiple of the devices.
    """
    axis_size(mesh, axis)

    @functools.wraps(fn)
    def mapped(params: PyTree, *batches: PyTree) -> PyTree:
        def on_device(params: PyTree, *local: PyTree) -> PyTree:
            return run_shards(fn, params, local)

        return _over_devices(on_device, mesh, axis, jax.P(axis))(params, *batches)

    return mapped


def sum_shards(fn: PerShard, mesh: Any, axis: Axis = "data") -> PerShard:
    """Returns a function that runs `fn` on each shard, on the shard's device, and sums the results over all shards.

    sum_shards(fn, mesh)(params, batch) = sum over d of fn(params, batch[d])

    A loss is a `jaxpack.losses.Mean`, a sum beside its weights, so the sum over shards is the mean over all tokens. Its
    gradient takes one sum over devices for each parameter, which compilers combine. If `fn` returns gradients itself,
    such as those of several micro-steps, they are the shard's own, and are summed over devices once.

    Examples:
      >>> from jaxpack.losses import Mean
      >>> from jaxpack.sharding import pack_shards, put
      >>> mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> batch = put(pack_shards([[1.0, 2.0, 3.0], [4.0], [5.0, 6.0], [7.0, 8.0]], 2), mesh)
      >>> def loss(scale, shard):
      ...     return Mean(scale * jnp.sum(shard.inputs.data), jnp.sum(shard.inputs.lengths))
      >>> @jax.jit
      ... def step(scale, batch):
      ...     return jax.value_and_grad(lambda scale: sum_shards(loss, mesh)(scale, batch).value)(scale)
      >>> [float(x) for x in step(2.0, batch)]  # 36 / 8, twice
      [9.0, 4.5]

    Args:
      fn: fn(params, *shards), a pytree of numbers or arrays, such as a Mean.
      mesh, axis: as in `map_shards`.

    Returns:
      A function of params and batches, as `map_shards` returns it, whose results are those of all devices.

    Raises:
      ValueError: as `map_shards`.
    """
    axis_size(mesh, axis)

    @functools.wraps(fn)
    def summed(params: PyTree, *batches: PyTree) -> PyTree:
        def on_device(params: PyTree, *local: PyTree) -> PyTree:
            # Without this jax.grad inside fn would sum over devices, and the sum below would count them again.
            params = jax.tree.map(lambda leaf: lax.pcast(leaf, axis, to="varying"), params)
            return lax.psum(jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), run_shards(fn, params, local)), axis)

        return _over_devices(on_device, mesh, axis, jax.P())(params, *batches)

    return summed


def run_shards(fn: PerShard, params: PyTree, shards: tuple[PyTree, ...]) -> PyTree:
    """Runs a function on the shards of one device; results have a leading axis."""
    if len(jax.tree.leaves(shards)[0]) > 1:
        return jax.vmap(lambda *each: fn(params, *each))(*shards)
    result = fn(params, *jax.tree.map(lambda leaf: leaf[0], shards))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], result)


def _over_devices(on_device: PerShard, mesh: Any, axis: Axis, results: jax.P) -> PerShard:
    """Returns jax.shard_map of a function over one axis, with its batches checked."""
    names = {axis} if isinstance(axis, str) else set(axis)

    def call(params: PyTree, *batches: PyTree) -> PyTree:
        check_shards(batches, axis_size(mesh, axis), f"the mesh axis {axis!r}")
        specs = (jax.P(), *[jax.P(axis)] * len(batches))
        return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=results, axis_names=names)(
            params, *batches
        )

    return call
