"""Prints what training steps communicate on eight devices, as JSON; test_mapping.py runs it in a process of its own."""

import json

import jax
import numpy as np
from counts import collectives

import jaxpack
from jaxpack.losses import Mean
from jaxpack.sharding import UnitShards, pack_shards, put, sum_shards


def report(step, expected, *operands):
    """Compiles and runs a step; returns its collectives and its largest difference from what is expected."""
    compiled = jax.jit(step).lower(*operands).compile()
    found = compiled(*operands)
    pairs = zip(*map(jax.tree.leaves, (found, expected)), strict=True)
    total, in_loops = collectives(compiled.as_text())
    return {"collectives": total, "in loops": in_loops, "error": max(float(np.abs(a - b).max()) for a, b in pairs)}


def main():
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(2, 0.7, 128), 40).astype(int)
    sequences = [rng.normal(size=(n, 4)).astype(np.float32) for n in lengths]
    layer = jaxpack.RNN(4, 8)
    params = layer.init(jax.random.key(0))

    def loss(params, packed):
        output, _ = layer.apply(params, packed)
        return Mean(jax.numpy.sum(output.data**2), jax.numpy.sum(packed.lengths))

    def mapped(params, batch):
        return jax.tree.map(lambda leaf: leaf.sum(axis=0), jax.vmap(loss, (None, 0))(params, batch)).value

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    plan = jaxpack.plan_padded(16, 40)  # one loop over two chunks: their weight gradients are summed on the device
    shards = pack_shards(sequences, 8, plan).inputs
    batch, params = put(shards, mesh), jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    one = jaxpack.pack_sequence(sequences, plan=jaxpack.plan_padded(128, 40))
    expected = jax.jit(jax.value_and_grad(lambda params: loss(params, one).value))(jax.device_get(params))
    steps = {
        "vmap": jax.value_and_grad(mapped),
        "sum": jax.value_and_grad(lambda params, batch: sum_shards(loss, mesh)(params, batch).value),
    }
    reports = {name: report(step, expected, params, batch) for name, step in steps.items()}

    grid = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spread = UnitShards(layer, grid, data_axis="data")

    def of_units(params, batch):
        output, _ = spread.apply(params, batch)
        return jax.numpy.sum(output.data**2) / jax.numpy.sum(batch.lengths)

    split = spread.split(jax.device_get(params))
    expected = expected[0], jax.tree.map(np.asarray, spread.split(jax.device_get(expected[1])))
    reports["units"] = report(jax.value_and_grad(of_units), expected, split, put(shards, grid))
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
