"""jaxpack on several devices of a CPU in `jaxpack bench`: a shard of the batch on each, under one plan."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

import jaxpack
from jaxpack.cli._devices import AXIS
from jaxpack.cli.bench.calls import Calls, Missing, jax_calls
from jaxpack.cli.bench.workloads import Workload
from jaxpack.sharding import deal, map_shards, plan_shards, put, stack_shards


def device_calls(workload: Workload) -> Calls:
    """Makes the calls of jaxpack from packed shards to packed outputs; weights are on all devices.

    Raises:
      Missing: if the workload has one device.
    """
    if workload.mesh is None:
        raise Missing("--cpu-devices N adds it")
    shards = deal(workload.lengths, workload.mesh.size)
    plan = plan_shards(workload.lengths, workload.mesh.size)

    def pack(array: np.ndarray) -> jaxpack.PackedSequence:
        packed = [
            jaxpack.pack_padded_sequence(array[rows], workload.lengths[rows], batch_first=True, plan=plan)
            for rows in shards
        ]
        return put(stack_shards(packed), workload.mesh, AXIS)

    def outputs(params: Any, packed: jaxpack.PackedSequence) -> jax.Array:
        output, _ = workload.layer.apply(params, packed)
        return output.data

    over_devices = map_shards(outputs, workload.mesh, AXIS)

    def apply(params: Any, data: jax.Array, rest: tuple[jaxpack.PackedSequence, list[jax.Array]]) -> jax.Array:
        packed, beside = rest
        return over_devices(params, packed.replace(data=workload.joined(data, beside)))

    packed, cotangent = pack(workload.inputs), pack(workload.cotangent).data
    params = jax.device_put(workload.params, jax.NamedSharding(workload.mesh, jax.P()))
    rest, cells = (packed.replace(data=None), [pack(each).data for each in workload.beside]), plan.size * len(shards)
    return jax_calls(apply, params, packed.data, rest, cotangent, cells, same_weights=True)
