"""A learned initial state: the parameters h_0 and c_0 of each layer and direction."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx

import jaxpack.linen
import jaxpack.nnx
from jaxpack import GRU, LSTM, RNN, plan_rows

F, H, B, T = 3, 4, 3, 6
LENGTHS = [6, 0, 4]
LAYERS = {
    "GRU": (GRU, {"num_layers": 2}, plan_rows(LENGTHS)),
    "LSTM": (LSTM, {"bidirectional": True, "proj_size": 2}, None),
    "RNN": (RNN, {}, jaxpack.plan_buckets(LENGTHS, 2)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)
RESETS = np.random.default_rng(2).random((B, T)) < 0.4


def pair_of(name):
    """A layer with a learned initial state, and without."""
    kind, options, plan = LAYERS[name]
    return kind(F, H, **options, learned_initial_state=True), kind(F, H, **options), plan


def given_state(params, layer):
    """The learned state as a user would pass it: [num_layers * D, B, size]."""
    columns = [
        np.stack([params[group][key] for group in layer.shapes]) for key in ("h_0", "c_0") if key in params["l0"]
    ]
    leaves = [np.repeat(column[:, None], B, axis=1) for column in columns]
    return jax.tree.unflatten(jax.tree.structure(layer.cell.state_sizes), leaves)


@pytest.mark.usefixtures("x64")
@each_layer
def test_it_is_the_given_state_and_its_gradient_the_sum_over_sequences_and_resets(name):
    learned, plain, plan = pair_of(name)
    params = oracles.random_params(learned)
    weights = {group: {key: params[group][key] for key in plain.shapes[group]} for group in params}
    x, options = oracles.random_batch(LENGTHS, F), {"lengths": LENGTHS, "plan": plan, "resets": RESETS}

    def loss(layer, params, x, state):
        output, final = layer.apply(params, x, state, **options)
        return (output**3).sum() + sum((leaf**2).sum() for leaf in jax.tree.leaves(final)), (output, final)

    found = jax.jit(jax.value_and_grad(lambda params, x: loss(learned, params, x, None), (0, 1), has_aux=True))
    given = jax.jit(jax.value_and_grad(lambda *args: loss(plain, *args), (0, 1, 2), has_aux=True))
    (_, values), (dparams, dx) = found(params, x)
    (_, expected), (dweights, dx_given, dstate) = given(weights, x, given_state(params, learned))
    for ours, theirs in zip(jax.tree.leaves((values, dx)), jax.tree.leaves((expected, dx_given)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    for i, group in enumerate(learned.shapes):
        for key, column in zip(("h_0", "c_0"), jax.tree.leaves(dstate), strict=False):
            np.testing.assert_allclose(dparams[group][key], column[i].sum(0), rtol=1e-12, atol=1e-12)
            assert (dparams[group][key] != 0).all()
        for key, weight in dweights[group].items():
            np.testing.assert_allclose(dparams[group][key], weight, rtol=1e-12, atol=1e-12)


@each_layer
def test_it_begins_at_zero_and_a_given_state_comes_first(name):
    learned, plain, plan = pair_of(name)
    key = jax.random.key(0)
    params, weights = learned.init(key), plain.init(key)
    assert jax.tree.map(jnp.shape, params) == learned.shapes
    for group in params:
        assert all((params[group][name] == 0).all() for name in params[group].keys() - weights[group].keys())
        assert all((params[group][name] == weights[group][name]).all() for name in weights[group])
    moved = jax.tree.map(lambda leaf: leaf + 1, params)
    weights = {group: {name: moved[group][name] for name in plain.shapes[group]} for group in moved}
    x, state = np.ones((B, T, F), np.float32), jax.tree.map(np.zeros_like, given_state(params, learned))
    options = {"lengths": LENGTHS, "plan": plan}
    ours, theirs = learned.apply(moved, x, state, **options), plain.apply(weights, x, state, **options)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@each_layer
def test_torchs_modules_do_not_have_it(name):
    learned, plain, _ = pair_of(name)
    params = plain.init(jax.random.key(0))
    restored = learned.from_torch(plain.to_torch(params))
    jax.tree.map(np.testing.assert_array_equal, restored, learned.init(jax.random.key(0)))
    assert learned.to_torch(restored).keys() == plain.to_torch(params).keys()


def test_one_sequence_begins_with_it():
    layer = GRU(F, H, learned_initial_state=True)
    params = jax.tree.map(lambda leaf: leaf + 0.5, layer.init(jax.random.key(0)))
    x = np.ones((T, F), np.float32)
    alone, together = layer.apply(params, x), layer.apply(params, x[None])
    np.testing.assert_allclose(alone[0], together[0][0], rtol=1e-6)


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_modules_of_flax_hold_it(api):
    x = np.ones((B, T, F), np.float32)
    if api == "nnx":
        module = jaxpack.nnx.LSTM(F, H, bidirectional=True, learned_initial_state=True, rngs=nnx.Rngs(0))
        params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
        nnx.update(module, nnx.State(jax.tree.map(lambda leaf: leaf + 0.5, params)))
        output, layer = module(x)[0], module.layer
    else:
        stack = jaxpack.linen.LSTM(H, bidirectional=True, learned_initial_state=True)
        params, layer = stack.init(jax.random.key(0), x)["params"], stack.layer(F)
        output, _ = stack.apply({"params": jax.tree.map(lambda leaf: leaf + 0.5, params)}, x)
    assert jax.tree.map(jnp.shape, dict(params)) == layer.shapes
    expected, _ = layer.apply(jax.tree.map(lambda leaf: leaf + 0.5, params), x)
    np.testing.assert_allclose(output, expected, rtol=1e-6)


@pytest.mark.parametrize("value", [1, None, "zeros"])
def test_it_is_a_bool(value):
    with pytest.raises(TypeError, match="learned_initial_state must be a bool"):
        GRU(F, H, learned_initial_state=value)
