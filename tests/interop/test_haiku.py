"""Weights from and to Haiku: values against Haiku's own cores, round trips, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxpack import GRU, LSTM, RNN, PeepholeLSTM
from jaxpack.interop import from_haiku, to_haiku

hk = pytest.importorskip("haiku", reason="dm-haiku, whose outputs these tests compare with, is not installed")

F, H, T = 3, 4, 5
RELU = RNN(F, H, nonlinearity="relu")
LAYERS = [
    RELU,
    LSTM(F, H, bias=False),
    LSTM(F, H, num_layers=2, bidirectional=True),
    GRU(F, H, bidirectional=True, reset_after=False),
]
each_layer = pytest.mark.parametrize("layer", LAYERS, ids=str)


def core(layer, **options):
    if isinstance(layer, GRU):
        return hk.GRU(H)
    return hk.LSTM(H) if isinstance(layer, LSTM) else hk.VanillaRNN(H, **options)


def unroll(layer, reverse=False, **options):
    """Returns Haiku's own run of one direction over equal lengths, a transformed (x) -> (outputs, state)."""

    def run(x):
        module = core(layer, **options)
        return hk.dynamic_unroll(module, x, module.initial_state(len(x)), time_major=False, reverse=reverse)

    return hk.without_apply_rng(hk.transform(run))


def named(layer, cell):
    if isinstance(layer, GRU):
        return cell
    name = "lstm" if isinstance(layer, LSTM) else "vanilla_rnn"
    return {f"{name}/{key}": value for key, value in cell.items()}


def haiku_params(layer, seed=0, **options):
    """Returns random parameters in Haiku's layout for each layer and direction."""
    rng = np.random.default_rng(seed)
    sizes = [shapes["weight_ih"][0] for shapes in layer.shapes.values()]
    inits = [(unroll(layer, **options).init, jnp.ones((2, T, size))) for size in sizes]
    shapes = [jax.eval_shape(init, jax.random.key(0), x) for init, x in inits]
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), shapes)


@each_layer
def test_haiku_computes_what_the_layer_computes(layer, x64):
    params = oracles.random_params(layer)
    x = oracles.random_batch([T, T], F)
    output, state = jax.jit(layer.apply)(params, x)
    cells = [named(layer, cell) for cell in to_haiku(layer, params)]
    y, states = jnp.asarray(x), []
    for depth in range(layer.num_layers):
        pair = cells[depth * layer.num_directions : (depth + 1) * layer.num_directions]
        results = [jax.jit(unroll(layer, reverse=bool(d)).apply)(cell, y) for d, cell in enumerate(pair)]
        y = jnp.concatenate([outputs for outputs, _ in results], axis=-1)
        states += [final for _, final in results]
    np.testing.assert_allclose(output, y, atol=1e-10)
    if isinstance(layer, LSTM):
        state = jnp.stack(state, axis=1)
        states = [jnp.stack(final) for final in states]
    np.testing.assert_allclose(state, jnp.stack(states), atol=1e-10)


@each_layer
def test_haiku_parameters_come_back_bit_for_bit(layer):
    theirs = haiku_params(layer)
    if not layer.bias:
        theirs[0]["lstm/linear"]["b"] = np.repeat([0, 0, -1, 0], H).astype(np.float32)
    params = from_haiku(layer, theirs)
    assert jax.tree.map(jnp.shape, params) == layer.shapes
    back = [named(layer, cell) for cell in to_haiku(layer, params)]
    assert jax.tree.map(lambda leaf: leaf.dtype, back) == jax.tree.map(lambda leaf: np.dtype(np.float32), theirs)
    jax.tree.map(np.testing.assert_array_equal, back, theirs)


def test_a_forget_bias_too_small_beside_1_comes_back_too():
    (theirs,) = haiku_params(LSTM(F, H))
    theirs["lstm/linear"]["b"][:] = 1e-12
    (back,) = to_haiku(LSTM(F, H), from_haiku(LSTM(F, H), theirs))
    np.testing.assert_array_equal(back["linear"]["b"], theirs["lstm/linear"]["b"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_are_kept(dtype):
    for layer in (LSTM(F, H), RELU):
        cells = to_haiku(layer, oracles.random_params(layer, dtype))
        assert {leaf.dtype for leaf in jax.tree.leaves(cells)} == {jnp.dtype(dtype)}
        assert {leaf.dtype for leaf in jax.tree.leaves(from_haiku(layer, cells))} == {jnp.dtype(dtype)}


def test_the_last_part_of_a_name_counts_and_a_single_core_stands_alone():
    (theirs,) = haiku_params(RELU)
    deep = {f"model/~/{name}": value for name, value in theirs.items()}
    short = {name.rpartition("/")[2]: value for name, value in theirs.items()}
    for given in ([theirs], deep, short):
        jax.tree.map(np.testing.assert_array_equal, from_haiku(RELU, given), from_haiku(RELU, theirs))


def test_a_single_bias_is_enough():
    params = from_haiku(RELU, haiku_params(RELU, double_bias=False))
    assert not params["l0"]["bias_hh"].any()
    assert params["l0"]["bias_ih"].any()


def test_what_haiku_does_not_have_is_refused_both_ways():
    way_out = r"not convertible: Haiku's GRUCell multiplies r with h before the product. Use reset_after=False"
    for function in (from_haiku, to_haiku):
        with pytest.raises(ValueError, match=way_out):
            function(GRU(F, H), {})
        with pytest.raises(ValueError, match=r"Haiku has no cell that computes what PeepholeLSTM.* does. .*to_torch"):
            function(PeepholeLSTM(F, H), {})
        with pytest.raises(ValueError, match=r'hk.VanillaRNN computes relu. Use nonlinearity="relu"'):
            function(RNN(F, H), {})
        with pytest.raises(ValueError, match=r"projects h, and no cell of Haiku does"):
            function(LSTM(F, H, proj_size=2), {})


def test_other_parts_counts_and_shapes_are_refused():
    layer = LSTM(F, H)
    (lstm,), (vanilla,) = haiku_params(layer), haiku_params(RELU)
    with pytest.raises(
        KeyError,
        match=r"cells must hold the parameters of one core, whose names end in \['linear'\], .*Pick those of the core",
    ):
        from_haiku(layer, vanilla)
    with pytest.raises(
        KeyError, match=r"cells must hold the parameters of one hk.GRU, .*got \{'lstm/linear': \['b', 'w'\]"
    ):
        from_haiku(GRU(F, H, reset_after=False), lstm)
    with pytest.raises(KeyError, match=r"must hold the parameters of one core, whose names end in \['linear'\]"):
        from_haiku(layer, {**lstm, "lstm_1/linear": lstm["lstm/linear"]})
    with pytest.raises(ValueError, match=r"an entry for each layer and direction, 2 in all, got 1"):
        from_haiku(LSTM(F, H, bidirectional=True), [lstm])
    with pytest.raises(ValueError, match=r"cells: weight_hh must have shape \(4, 16\) .*got \(3, 16\)"):
        from_haiku(LSTM(F + 1, H), lstm)
    with pytest.raises(TypeError, match=r"cells\[0\] must be a dict of Haiku's parameters, got str"):
        from_haiku(layer, ["lstm"])  # type: ignore[list-item]


def test_biases_need_a_layer_with_biases():
    with pytest.raises(ValueError, match=r"cells\[0\] has biases up to .*Use bias=True"):
        from_haiku(LSTM(F, H, bias=False), haiku_params(LSTM(F, H)))


def test_traced_and_wide_weights_are_refused():
    layer = LSTM(F, H)
    (theirs,) = haiku_params(layer)
    with pytest.raises(TypeError, match=r"cells\['lstm/linear'\]\['b'\] is traced"):
        jax.jit(lambda cell: from_haiku(layer, cell))(theirs)
    with pytest.raises(TypeError, match=r"params\['l0'\]\['.*'\] is traced"):
        jax.jit(lambda params: to_haiku(layer, params))(oracles.random_params(layer))
    with pytest.raises(ValueError, match=r"has dtype float64, which JAX would round"):
        from_haiku(layer, jax.tree.map(lambda leaf: leaf.astype(np.float64), theirs))
