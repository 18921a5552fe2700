"""One training step on many devices equals that on one, for every way to write it, and what it communicates."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import jaxpack
import jaxpack.linen
import jaxpack.nnx
from jaxpack.data import Batch
from jaxpack.losses import Mean, token_cross_entropy
from jaxpack.sharding import in_caller_order, map_shards, pack_shards, put, sum_shards

LENGTHS = [5, 1, 4, 2, 0, 3, 3, 2]
CLASSES = 3
rng = np.random.default_rng(0)
SEQUENCES = [
    {"x": rng.normal(size=(n, 2)).astype(np.float32), "label": rng.integers(0, CLASSES, n).astype(np.int32)}
    for n in LENGTHS
]


def functional():
    layer = jaxpack.RNN(2, CLASSES)
    return layer.init(jax.random.key(0)), lambda params, x: layer.apply(params, x)[0]


def of_nnx():
    model = jaxpack.nnx.GRU(2, CLASSES, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    return params, lambda params, x: nnx.merge(graph, params)(x)[0]


def of_linen():
    model = jaxpack.linen.LSTM(CLASSES)
    packed = jaxpack.pack_sequence([np.ones((2, 2), np.float32)])
    return model.init(jax.random.key(0), packed), lambda params, x: model.apply(params, x)[0]


def loss_of(run):
    def loss(params, shard):
        return token_cross_entropy(run(params, shard.inputs["x"]), shard.inputs["label"], shard.weights)

    return loss


def one_batch(sequences):
    """The same sequences in one batch, as a single device has them."""
    plan = jaxpack.plan_exact(LENGTHS)
    packed = {name: jaxpack.pack_sequence([each[name] for each in sequences], plan=plan) for name in ("x", "label")}
    return Batch(packed, np.arange(len(sequences)), np.ones(len(sequences), np.float32))


def vmapped(loss, mesh):
    def value(params, batch):
        return jax.tree.map(lambda leaf: leaf.sum(axis=0), jax.vmap(loss, (None, 0))(params, batch)).value

    return jax.value_and_grad(value)


def summed(loss, mesh):
    return jax.value_and_grad(lambda params, batch: sum_shards(loss, mesh)(params, batch).value)


def summed_gradients(loss, mesh):
    """Takes each shard's own gradient, and sums gradients and weights over devices at once."""

    def total(params, shard):
        mean = loss(params, shard)
        return mean.total, mean

    def of_shard(params, shard):
        gradient, mean = jax.grad(total, has_aux=True)(params, shard)
        return Mean((mean.total, gradient), mean.weight)

    return lambda params, batch: sum_shards(of_shard, mesh)(params, batch).value


WAYS = {
    "vmap": (functional, vmapped, AxisType.Auto, 2),
    "sum": (functional, summed, AxisType.Auto, 2),
    "sum, several shards on a device": (functional, summed, AxisType.Auto, 4),
    "sum, explicit": (functional, summed, AxisType.Explicit, 2),
    "sum of gradients": (functional, summed_gradients, AxisType.Auto, 2),
    "sum of gradients, explicit, several shards": (functional, summed_gradients, AxisType.Explicit, 4),
    "nnx": (of_nnx, summed, AxisType.Auto, 2),
    "linen": (of_linen, summed, AxisType.Auto, 2),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_training_step_equals_that_of_one_device(way):
    make, differentiated, kind, shards = WAYS[way]
    params, run = make()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    loss = loss_of(run)
    with jax.set_mesh(mesh):
        batch = put(pack_shards(SEQUENCES, shards), mesh)
        found = jax.jit(differentiated(loss, mesh))(params, batch)
    one = jax.value_and_grad(lambda params: loss(params, one_batch(SEQUENCES)).value)
    expected = jax.jit(one)(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), found, expected)


def test_accumulated_micro_steps_equal_one_step_on_all_their_batches():
    params, run = functional()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    plan = jaxpack.plan_padded(2, 5)
    micro = [pack_shards(SEQUENCES[:4], 2, plan), pack_shards(SEQUENCES[4:], 2, plan)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *micro)  # [D, micro-steps, ...]

    def total(params, shard):
        mean = loss_of(run)(params, shard)
        return mean.total, mean

    def accumulated(params, shards):
        def micro_step(so_far, shard):
            gradient, mean = jax.grad(total, has_aux=True)(params, shard)
            return so_far + Mean(gradient, mean.weight), None

        nothing = Mean(jax.tree.map(lambda leaf: 0 * leaf, params), 0 * shards.weights.sum())
        return jax.lax.scan(micro_step, nothing, shards)[0]

    step = jax.jit(lambda params, batch: sum_shards(accumulated, mesh)(params, batch).value)
    found = step(params, put(stacked, mesh))
    expected = jax.jit(jax.grad(lambda params: loss_of(run)(params, one_batch(SEQUENCES)).value))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), found, expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_results_of_shards_are_stacked_and_go_back_to_the_callers_rows(kind):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    batch = put(pack_shards([each["x"] for each in SEQUENCES], 4), mesh)
    keys = jax.random.split(jax.random.key(0), 4)  # as of dropout: one for each shard

    def sums(scale, shard, key):
        return scale * jaxpack.segment_sum(shard.inputs), jax.random.uniform(key)

    found, noise = jax.jit(map_shards(sums, mesh))(2.0, batch, put(keys, mesh))
    expected = [2 * each["x"].sum(axis=0) for each in SEQUENCES]
    np.testing.assert_allclose(in_caller_order(found, batch.indices), expected, rtol=1e-5, atol=1e-6)
    assert len(set(noise.tolist())) == 4


CALLS = {
    "packed": lambda packed, x, lengths: jaxpack.segment_sum(packed),
    "map": lambda packed, x, lengths: packed.map(jnp.sin).data,
    "padded": lambda packed, x, lengths: jaxpack.pack_padded_sequence(x, lengths, True, plan=packed.plan).data,
    "layer": lambda packed, x, lengths: jaxpack.RNN(2, 1).apply(jaxpack.RNN(2, 1).init(jax.random.key(0)), x)[0],
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("entered", [False, True])
def test_vmap_over_shards_of_an_explicit_mesh_is_refused_with_the_way_out(call, entered):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    packed = put(pack_shards([each["x"] for each in SEQUENCES], 2).inputs, mesh)
    x, lengths = put((np.ones((2, 4, 5, 2), np.float32), np.full((2, 4), 2)), mesh)
    with jax.set_mesh(mesh if entered else jax.sharding.get_mesh()):
        with pytest.raises(ValueError, match=r"spread over an axis of an explicit mesh.*sum_shards or map_shards"):
            jax.vmap(CALLS[call])(packed, x, lengths)
        in_automatic_axes = jax.sharding.auto_axes(jax.vmap(CALLS[call]), out_sharding=jax.P("data"), axes="data")
        if entered:
            assert jax.jit(in_automatic_axes)(packed, x, lengths).shape[0] == 2


@pytest.fixture(scope="module")
def on_eight_devices():
    """What `eight_devices.py` prints, which runs in a process of eight devices."""
    folder = pathlib.Path(__file__).parent
    paths = [str(folder.parent.parent), str(folder.parent)]  # of jaxpack, and of what tests share
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, folder / "eight_devices.py"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("way", ["vmap", "sum"])
def test_eight_devices_sum_the_gradients_once_and_gather_no_activations(on_eight_devices, way):
    found = on_eight_devices[way]
    assert found["error"] < 1e-5
    # One for all floats, the loss and every parameter together, and one for the integer number of tokens.
    assert found["collectives"] == {"all-reduce": 2}
    assert found["in loops"] == {}


def test_eight_devices_of_data_and_units_gather_and_scatter_once_a_step(on_eight_devices):
    found = on_eight_devices["units"]
    assert found["error"] < 1e-5
    assert found["in loops"] == {"all-gather": 1, "reduce-scatter": 1}
    assert set(found["collectives"]) == {"all-gather", "reduce-scatter", "all-reduce"}
