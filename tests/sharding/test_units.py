"""Layers whose hidden units are spread over devices: their values and gradients, and what a step communicates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counts import collectives
from jax.sharding import AxisType

import jaxpack
from jaxpack.sharding import UnitShards, map_shards, put, stack_shards

LENGTHS = [5, 1, 4, 2, 0, 3]
PLAN = jaxpack.plan_buckets(LENGTHS, 2)
SEQUENCES = [np.random.default_rng(n).normal(size=(n, 3)).astype(np.float32) for n in LENGTHS]
PACKED = jaxpack.pack_sequence(SEQUENCES, plan=PLAN)
BEGINS = jaxpack.pack_sequence([np.arange(n) % 2 == 1 for n in LENGTHS], plan=PLAN)
LAYERS = {
    "RNN": jaxpack.RNN(3, 4, nonlinearity="relu"),
    "LSTM": jaxpack.LSTM(3, 4),
    "GRU, two layers in both directions": jaxpack.GRU(3, 4, num_layers=2, bidirectional=True, bias=False),
}


def mesh_of(*sizes, names=("data", "model")):
    return jax.make_mesh(sizes, names[-len(sizes) :], axis_types=(AxisType.Auto,) * len(sizes))


def value(apply, params, packed, state, resets):
    """A number that every output and every final state has a share in."""
    output, final = apply(params, packed, state, resets=resets)
    return jnp.sum(jnp.sin(output.data)) + sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(final))


def states_of(layer, lead=()):
    lead = (*lead, layer.num_layers * layer.num_directions, len(LENGTHS), layer.hidden_size)
    state = 0.1 * np.arange(np.prod(lead), dtype=np.float32).reshape(lead) / np.prod(lead)
    return (state, -state) if isinstance(layer, jaxpack.LSTM) else state


def assert_close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_the_layers(name):
    layer = LAYERS[name]
    sharded, params = UnitShards(layer, mesh_of(2)), layer.init(jax.random.key(0))
    both = [
        jax.jit(jax.value_and_grad(lambda params, *rest, apply=each.apply: value(apply, params, *rest), (0, 2)))
        for each in (layer, sharded)
    ]
    expected, (of_params, of_state) = both[0](params, PACKED, states_of(layer), BEGINS)
    found, (of_split, of_split_state) = both[1](sharded.split(params), PACKED, states_of(layer), BEGINS)
    assert_close((found, sharded.join(of_split), of_split_state), (expected, of_params, of_state))


def test_shards_of_a_batch_run_on_a_mesh_of_data_and_units():
    layer, mesh = LAYERS["LSTM"], mesh_of(1, 2)
    sharded, params = UnitShards(layer, mesh, data_axis="data"), layer.init(jax.random.key(0))
    batch = put(stack_shards([PACKED, PACKED]), mesh)
    resets = put(stack_shards([BEGINS, BEGINS]), mesh)
    state = put(states_of(layer, (2,)), mesh)
    found = jax.jit(jax.value_and_grad(lambda params: value(sharded.apply, params, batch, state, resets)))
    each = jax.vmap(lambda params, x, s, resets: layer.apply(params, x, s, resets=resets), (None, 0, 0, 0))

    def mapped(params, packed, state, resets):
        return each(params, packed, state, resets)

    expected = jax.jit(jax.value_and_grad(lambda params: value(mapped, params, batch, state, resets)))
    of_value, of_params = found(sharded.split(params))
    assert_close((of_value, sharded.join(of_params)), expected(params))


def test_parameters_are_split_by_whole_units_and_joined_again_exactly():
    layer = LAYERS["LSTM"]
    sharded, params = UnitShards(layer, mesh_of(2)), layer.init(jax.random.key(0))
    split = sharded.split(params)
    for device, part in enumerate(split["l0"]["weight_hh"].addressable_shards):
        gates = np.split(np.asarray(params["l0"]["weight_hh"]), 4, axis=1)
        np.testing.assert_array_equal(part.data, np.stack([gate[:, 2 * device : 2 * device + 2] for gate in gates], 1))
    jax.tree.map(np.testing.assert_array_equal, sharded.join(split), params)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(sharded.split)(params), split)


@pytest.mark.parametrize(("name", "of_chunks"), [("LSTM", 0), ("GRU", 1)])
def test_a_step_gathers_h_once_and_scatters_its_cotangent_once(name, of_chunks):
    layer = getattr(jaxpack, name)(3, 4)
    sharded = UnitShards(layer, mesh_of(2))
    split = sharded.split(layer.init(jax.random.key(0)))
    plan = jaxpack.plan_padded(2, 3)
    packed = jaxpack.pack_sequence(SEQUENCES[4:], plan=plan)
    forward = jax.jit(sharded.apply).lower(split, packed).compile()
    assert collectives(forward.as_text()) == ({"all-gather": 1}, {"all-gather": 1})
    training = jax.jit(jax.grad(lambda params, packed: value(sharded.apply, params, packed, None, None)))
    total, in_loops = collectives(training.lower(split, packed).compile().as_text())
    # A GRU's h' depends on h past its gates: by z, which is gathered for all steps of a chunk at once.
    assert in_loops == {"all-gather": 1 + of_chunks, "reduce-scatter": 1}
    assert set(total) <= {"all-gather", "reduce-scatter", "all-reduce"}


MESH = mesh_of(2)
EXPLICIT = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Explicit,))
SHARDED = UnitShards(jaxpack.GRU(3, 4), MESH)
PARAMS = SHARDED.layer.init(jax.random.key(0))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: UnitShards(jaxpack.LSTM(3, 5), MESH),
            ValueError,
            "hidden_size=5 is not a multiple.* make it 6",
        ),
        (lambda: UnitShards(jaxpack.GRU(3, 4), EXPLICIT), ValueError, "needs automatic axes.* make the mesh with"),
        (lambda: UnitShards(jaxpack.LSTM(3, 4, proj_size=2), MESH), ValueError, "has a projection"),
        (lambda: UnitShards(jaxpack.GRU(3, 4, learned_initial_state=True), MESH), ValueError, "learned initial state"),
        (lambda: UnitShards(jaxpack.MinGRU(3, 4), MESH), TypeError, "takes a jaxpack.RNN, LSTM or GRU"),  # type: ignore[arg-type]
        (lambda: UnitShards(jaxpack.GRU(3, 4), MESH, "data"), ValueError, "none is named 'data'"),
        (lambda: UnitShards(jaxpack.GRU(3, 4), MESH, data_axis="data"), ValueError, "none is named 'data'"),
        (lambda: SHARDED.split({}), TypeError, "params do not match GRU"),
        (lambda: SHARDED.apply(PARAMS, np.ones((1, 2, 3))), TypeError, "takes a PackedSequence, got ndarray"),  # type: ignore[arg-type]
        (
            lambda: map_shards(lambda params, shard: SHARDED.apply(params, shard)[1], MESH, "model")(
                SHARDED.split(PARAMS), stack_shards([PACKED, PACKED])
            ),
            ValueError,
            "cannot be called inside jax.shard_map, map_shards or sum_shards. .* pass data_axis=",
        ),
        (
            lambda: dataclasses.replace(SHARDED, mesh=mesh_of(1, 2), data_axis="data").apply(
                SHARDED.split(PARAMS), PACKED
            ),
            ValueError,
            "all arrays of a sharded batch have the shards as their leading axis",
        ),
    ],
)
def test_what_cannot_be_spread_is_refused_with_the_way_out(call, error, message):
    with pytest.raises(error, match=message):
        call()
