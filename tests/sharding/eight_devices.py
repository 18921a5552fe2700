"""Prints what training steps communicate on eight devices, as JSON; test_mapping.py runs it in a process of its own."""

import collections
import json
import re

import jax
import numpy as np

import jaxpack
from jaxpack.losses import Mean
from jaxpack.sharding import pack_shards, put, sum_shards

KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def collectives(text):
    """Counts the collectives of a compiled program: all of them, and those in other computations than the entry."""
    total, inside, entry = collections.Counter(), collections.Counter(), False
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            entry = line.startswith("ENTRY")
        if found := re.search(rf" ({KINDS})(-start)?\(", line):
            total[found[1]] += 1
            inside[found[1]] += not entry
    return {"collectives": dict(total), "in loops": {kind: count for kind, count in inside.items() if count}}


def report(step, expected, *operands):
    """Compiles and runs a step; returns its collectives and its largest difference from what is expected."""
    compiled = jax.jit(step).lower(*operands).compile()
    found = compiled(*operands)
    pairs = zip(*map(jax.tree.leaves, (found, expected)), strict=True)
    return collectives(compiled.as_text()) | {"error": max(float(np.abs(a - b).max()) for a, b in pairs)}


def main():
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(2, 0.7, 64), 40).astype(int)
    sequences = [rng.normal(size=(n, 4)).astype(np.float32) for n in lengths]
    layer = jaxpack.LSTM(4, 8)
    params = layer.init(jax.random.key(0))

    def loss(params, packed):
        output, _ = layer.apply(params, packed)
        return Mean(jax.numpy.sum(output.data**2), jax.numpy.sum(packed.lengths))

    def total(params, packed):
        mean = loss(params, packed)
        return mean.total, mean

    def of_shard(params, packed):
        gradient, mean = jax.grad(total, has_aux=True)(params, packed)
        return Mean((mean.total, gradient), mean.weight)

    def mapped(params, batch):
        return jax.tree.map(lambda leaf: leaf.sum(axis=0), jax.vmap(loss, (None, 0))(params, batch)).value

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shards = pack_shards(sequences, 8, jaxpack.plan_buckets(np.sort(lengths)[::-1][::8], 3)).inputs
    batch, params = put(shards, mesh), jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    one = jaxpack.pack_sequence(sequences)
    expected = jax.jit(jax.value_and_grad(lambda params: loss(params, one).value))(jax.device_get(params))
    steps = {
        "vmap": jax.value_and_grad(mapped),
        "sum": jax.value_and_grad(lambda params, batch: sum_shards(loss, mesh)(params, batch).value),
        "sum of gradients": lambda params, batch: sum_shards(of_shard, mesh)(params, batch).value,
    }
    print(json.dumps({name: report(step, expected, params, batch) for name, step in steps.items()}))


if __name__ == "__main__":
    main()
