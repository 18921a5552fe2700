"""Layers that run step by step: papers, peers, decoding, episodes, modules, errors. The contract has the rest."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import linen, nnx
from stepped_oracles import stepped_step

import jaxpack
import jaxpack.linen
import jaxpack.nnx

T = 5
LAYERS: dict[str, Any] = {
    "conv_lstm": jaxpack.ConvLSTM(2, 3, (4, 3), (3, 2)),
    "conv_gru": jaxpack.ConvGRU(2, 3, (5,), 4),
    "conv_gru in 3-d": jaxpack.ConvGRU(1, 2, (2, 3, 2)),
    "slstm": jaxpack.SLSTM(3, 4, 2),
    "slstm with exp": jaxpack.SLSTM(3, 4, 1, forget_gate="exp"),
    "gru_d": jaxpack.GRUD(3, 4),
    "cfc": jaxpack.CfC(3, 4, 5),
    "cfc, no gate": jaxpack.CfC(3, 4, 5, mode="no_gate"),
    "decay": jaxpack.TimeDecay(jaxpack.LSTM(3, 4, bias=False)),
    "cfc, pure": jaxpack.CfC(3, 4, 5, mode="pure"),
}
each_layer = pytest.mark.parametrize("kind", LAYERS)


def step_of(kind):
    return functools.partial(stepped_step, kind.replace(",", "").split(" ")[0], LAYERS[kind])


def random_inputs(layer, rows=2):
    """Random inputs; of GRUD with NaN where they are missing."""
    rng = np.random.default_rng(0)
    if not isinstance(layer, (jaxpack.GRUD, jaxpack.CfC, jaxpack.TimeDecay)):
        return rng.standard_normal((rows, T, *layer.input_shape))
    x, dt = rng.standard_normal((rows, T, layer.input_size)), rng.uniform(0, 2, (rows, T))
    mask = rng.uniform(size=x.shape) > 0.5
    return (np.where(mask, x, np.nan), mask, dt) if isinstance(layer, jaxpack.GRUD) else (x, dt)


def at(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def zeros(layer):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape), layer.state_like(float))


def assert_close(ours, theirs):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), ours, theirs)


@pytest.mark.usefixtures("x64")
@each_layer
def test_a_layer_and_its_steps_compute_the_papers_equations_from_the_first_step_on(kind):
    layer, params = LAYERS[kind], oracles.random_params(LAYERS[kind])
    x = random_inputs(layer)
    whole, final = jax.device_get(jax.jit(layer.apply)(params, x))
    step, state = jax.jit(layer.step), None
    expected = [zeros(layer)] * 2
    if "slstm" in kind:  # nothing is remembered, so a stabiliser of -inf says what n = 0 does
        expected = [(*each[:3], np.full(4, -np.inf)) for each in expected]
    for t in range(T):
        state, y = jax.device_get(step(params, state, at(x, np.s_[:, t])))
        for row in range(2):
            expected[row], output = step_of(kind)(params, expected[row], at(x, (row, t)))
            assert_close((y[row], whole[row, t]), (output, output))
    assert_close(final, state)
    assert_close(state, jax.tree.map(lambda *leaves: np.stack(leaves), *expected))
    one, y = jax.device_get(step(params, at(state, 0), at(x, (0, 0))))
    assert_close((one, y), at(jax.device_get(step(params, state, at(x, np.s_[:, 0]))), 0))
    sequence, of_one = jax.device_get(jax.jit(layer.apply)(params, at(x, 0)))
    assert_close((sequence, of_one), at((whole, final), 0))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["conv_lstm", "slstm"])
def test_episodes_begin_anew_in_both_directions(kind):
    layer, params = LAYERS[kind], oracles.random_params(LAYERS[kind])
    rng, x = np.random.default_rng(1), random_inputs(layer)
    initial, fresh = (
        jax.tree.map(lambda leaf: np.abs(rng.standard_normal((2, *leaf.shape))), layer.state_like(float))
        for _ in range(2)
    )
    resets = np.zeros((2, T), bool)
    resets[0, [0, 1, 3]] = resets[1, [3]] = True
    plan = jaxpack.plan_rows([T, T], 1)
    packed, packed_resets = (jaxpack.pack_padded_sequence(each, [T, T], True, plan=plan) for each in (x, resets))
    for reverse in (False, True):
        run = jax.jit(functools.partial(layer.apply, reverse=reverse))
        output, final = run(params, packed, initial, resets=packed_resets, fresh_state=fresh)
        for row, ours in enumerate(jaxpack.unpack_sequence(output)):
            begins = np.flatnonzero(resets[row] & (np.arange(T) > 0))
            pieces = [piece[::-1] if reverse else piece for piece in np.split(x[row], begins)]
            ys = []
            order = range(len(pieces))[::-1] if reverse else range(len(pieces))
            for place in order:
                carries_on = place == len(pieces) - 1 if reverse else place == 0 and not resets[row, 0]
                state = jax.tree.map(lambda leaf, row=row: leaf[row], initial if carries_on else fresh)
                of_piece = []
                for step in pieces[place]:
                    state, y = step_of(kind)(params, state, step)
                    of_piece.append(y)
                ys.append(of_piece[::-1] if reverse else of_piece)
            np.testing.assert_allclose(ours, np.concatenate(ys[::-1] if reverse else ys), rtol=0, atol=1e-12)
            jax.tree.map(lambda a, b, row=row: np.testing.assert_allclose(a[row], b, rtol=0, atol=1e-12), final, state)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("spatial_shape", [(5,), (4, 3), (2, 3, 2)])
def test_conv_lstm_with_converted_weights_is_flaxs(spatial_shape):
    layer = jaxpack.ConvLSTM(2, 3, spatial_shape)
    cell = linen.ConvLSTMCell(3, (3,) * len(spatial_shape), param_dtype=float)
    flax_layer = linen.RNN(cell, return_carry=True)
    x = random_inputs(layer)
    variables = jax.jit(flax_layer.init)(jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: np.random.default_rng(2).uniform(-0.5, 0.5, leaf.shape), variables)
    weights = variables["params"]["cell"]

    def in_our_order(array):  # of Flax's gates i, g, f, o
        i, g, f, o = np.split(array, 4, -1)
        return np.concatenate([i, f, g, o], -1)

    forget_bias = np.repeat([0, 1, 0, 0], 3)
    params = {
        "weight_ih": in_our_order(weights["ih"]["kernel"]),
        "weight_hh": in_our_order(weights["hh"]["kernel"]),
        "bias": in_our_order(weights["ih"]["bias"] + weights["hh"]["bias"]) + forget_bias,
    }
    lengths = np.array([5, 3])
    output, (h_n, c_n) = jax.jit(layer.apply)(params, x, lengths=lengths)
    (c, h), expected = jax.jit(flax_layer.apply)(variables, x, seq_lengths=lengths)
    real = (np.arange(T) < lengths[:, None]).reshape(2, T, *(1,) * (len(spatial_shape) + 1))
    assert_close(jax.device_get((output, h_n, c_n)), jax.device_get((np.where(real, expected, 0), h, c)))


@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
@pytest.mark.parametrize(("i", "f"), [(50, 50), (-50, -50), (50, -50), (-50, 50), (-200, -200)])
def test_exponential_gates_are_stable_in_values_and_gradients(forget_gate, i, f):
    layer = jaxpack.SLSTM(3, 4, 2, forget_gate=forget_gate)
    x = np.float32(random_inputs(layer))
    params = layer.init(jax.random.key(0))
    params["bias"] = jnp.asarray(np.repeat([i, f, 0, 0], 4), jnp.float32)

    @jax.jit
    def run(params, x):
        (output, final), vjp = jax.vjp(layer.apply, params, x)
        return output, vjp((jnp.ones_like(output), jax.tree.map(jnp.zeros_like, final)))

    output, gradients = jax.device_get(run(params, x))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((output, gradients)))
    assert (np.abs(output) <= 1).all()
    assert (output != 0).all()


@pytest.mark.usefixtures("x64")
def test_values_that_are_missing_may_be_anything_in_values_and_gradients():
    layer = LAYERS["gru_d"]
    params = oracles.random_params(layer)
    x, mask, dt = random_inputs(layer)

    @jax.jit
    def gradients(params, x):
        return jax.value_and_grad(lambda *given: layer.apply(given[0], (given[1], mask, dt))[0].sum(), (0, 1))(
            params, x
        )

    with_nan, with_zeros = jax.device_get((gradients(params, x), gradients(params, np.where(mask, x, 0))))
    jax.tree.map(np.testing.assert_array_equal, with_nan, with_zeros)
    assert (with_nan[1][1][~mask] == 0).all()
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(with_nan))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["gru_d", "cfc", "decay"])
def test_inputs_travel_together_and_what_came_without_dt_is_refused(kind):
    layer, params = LAYERS[kind], oracles.random_params(LAYERS[kind])
    inputs, lengths = random_inputs(layer), np.array([3, 5])
    output, _ = jax.jit(layer.apply)(params, jaxpack.pack_padded_sequence(inputs, lengths, batch_first=True))
    padded, _ = jax.jit(layer.apply)(params, inputs, lengths=lengths)
    assert_close(jaxpack.pad_packed_sequence(output, batch_first=True)[0], padded)
    for wrong in (inputs[0], inputs[:-1], (*inputs[:-1], inputs[0]), (inputs[0][:, 1:], *inputs[1:])):
        with pytest.raises(ValueError, match=r"takes a tuple of x \[B, T, 3\], .*dt \[B, T\], got"):
            layer.apply(params, wrong)
    with pytest.raises(ValueError, match=r"takes a tuple of x \[S, 3\], .*dt \[S\], got"):
        layer.apply(params, jaxpack.pack_sequence([inputs[0][0]]))
    with pytest.raises(ValueError, match=r"takes a tuple of x \[B, 3\], .*dt \[B\], got"):
        layer.step(params, None, inputs[0][:, 0])


def test_the_inputs_are_convolved_once_and_not_in_the_loop():
    layer = LAYERS["conv_lstm"]
    plan = jaxpack.plan_padded(2, T)
    run = functools.partial(layer.apply, plan=plan)
    text = str(jax.make_jaxpr(run)(layer.init(jax.random.key(0)), random_inputs(layer)))
    before, loop = text.split("scan[", 1)
    assert before.count("conv_general_dilated") == loop.count("conv_general_dilated") == 1


OPTIONS: dict[str, dict[str, Any]] = {
    "ConvLSTM": {"spatial_shape": (3,), "kernel_size": (2,)},
    "ConvGRU": {"spatial_shape": (3, 1), "bias": False},
    "SLSTM": {"num_heads": 2, "forget_gate": "exp"},
    "GRUD": {},
    "CfC": {"backbone_size": 3, "mode": "pure"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_module_is_its_layer(name):
    options = OPTIONS[name]
    layer = getattr(jaxpack, name)(2, 4, **options)
    x = jax.tree.map(np.float32, random_inputs(layer))
    module = getattr(jaxpack.nnx, name)(2, 4, **options, rngs=nnx.Rngs(0))
    assert module.layer == layer
    params = nnx.to_pure_dict(nnx.state(module.params))
    jax.tree.map(np.testing.assert_array_equal, module(x), layer.apply(params, x))
    linen_module = getattr(jaxpack.linen, name)(4, **options)
    assert linen_module.layer(2) == layer
    variables = jax.jit(linen_module.init)(jax.random.key(0), x)
    found = linen_module.apply(variables, x)
    jax.tree.map(np.testing.assert_array_equal, found, layer.apply(variables["params"], x))
    assert_close_in_float32 = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    _, y = linen_module.apply(variables, None, at(x, (0, 0)), method="step")
    jax.tree.map(assert_close_in_float32, y, found[0][0, 0])


def test_a_module_of_a_layer_that_decays_is_its_layer():
    layer = jaxpack.TimeDecay(jaxpack.GRU(2, 4))
    x = jax.tree.map(np.float32, random_inputs(layer))
    module, linen_module = jaxpack.nnx.TimeDecay(layer.base, rngs=nnx.Rngs(0)), jaxpack.linen.TimeDecay(layer.base)
    params = nnx.to_pure_dict(nnx.state(module.params))
    found = linen_module.apply({"params": params}, x)
    jax.tree.map(np.testing.assert_array_equal, (found, module(x)), (layer.apply(params, x),) * 2)


@pytest.mark.parametrize("kind", ["conv_lstm", "conv_gru"])
def test_a_mask_leaves_steps_out_whatever_the_axes_of_space(kind):
    layer, params = LAYERS[kind], oracles.random_params(LAYERS[kind], np.float32)
    close = functools.partial(np.testing.assert_allclose, atol=1e-6)
    x, mask = random_inputs(layer).astype(np.float32), np.array([[0, 1, 0, 1, 1], [1, 0, 0, 0, 1]], bool)
    run = jax.jit(layer.apply)
    whole, first = run(params, x, mask=mask), run(params, x[0], mask=mask[0])
    expected = run(params, jaxpack.compact(x, mask)[0], lengths=mask.sum(1))
    expected = jaxpack.scatter_back(expected[0], mask), expected[1]
    jax.tree.map(close, whole, expected)
    jax.tree.map(close, first, at(expected, 0))
    assert not np.asarray(whole[0])[~mask].any()


def test_initial_parameters_have_their_shapes():
    for layer in LAYERS.values():
        params = jax.eval_shape(layer.init, jax.random.key(0))
        assert jax.tree.map(jnp.shape, params) == layer.shapes
    assert "bias" not in jaxpack.ConvGRU(2, 3, (5,), bias=False).shapes
    forget = LAYERS["slstm"].init(jax.random.key(0))["bias"].reshape(4, 2, 2)[1]
    assert forget.tolist() == [[3, 6], [3, 6]]


INT: Any = 4  # where a tuple, or a bool, is wanted


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jaxpack.ConvLSTM(2, 3, ()), ValueError, "one to three axes"),
        (lambda: jaxpack.ConvLSTM(2, 3, (2, 2, 2, 2)), ValueError, "one to three axes"),
        (lambda: jaxpack.ConvLSTM(2, 3, INT), TypeError, "spatial_shape must be a tuple of ints, got 4"),
        (lambda: jaxpack.ConvLSTM(2, 3, (4, 0)), ValueError, r"spatial_shape\[1\] must be at least 1"),
        (lambda: jaxpack.ConvGRU(2, 3, (4, 4), (3,)), ValueError, "a size for each axis"),
        (lambda: jaxpack.ConvGRU(2, 3, (4, 4), 0), ValueError, r"kernel_size\[0\] must be at least 1"),
        (lambda: jaxpack.ConvGRU(2, 3, (4,), bias=INT), TypeError, "bias must be a bool"),
        (lambda: jaxpack.SLSTM(3, 6, 4), ValueError, "num_heads=4 does not divide hidden_size=6"),
        (lambda: jaxpack.SLSTM(3, 6, 0), ValueError, "num_heads must be at least 1"),
        (lambda: jaxpack.SLSTM(3, 4, 2, "tanh"), ValueError, "forget_gate must be 'sigmoid' or 'exp'"),
        (lambda: jaxpack.CfC(3, 4, mode="exact"), ValueError, "mode must be one of 'gated', 'no_gate', 'pure'"),
        (lambda: jaxpack.CfC(3, 4, 0), ValueError, "backbone_size must be at least 1"),
        (lambda: jaxpack.TimeDecay(jaxpack.GRU(3, 4, num_layers=2)), ValueError, "one layer, one direction"),
        (lambda: jaxpack.TimeDecay(INT), TypeError, "base must be a stack"),
        (lambda: jaxpack.GRUD(0, 4), ValueError, "input_size must be at least 1"),
        (lambda: LAYERS["cfc"].init(7), TypeError, "key must be a JAX random key"),
        (lambda: LAYERS["slstm"].init(7), TypeError, "key must be a JAX random key"),
        (
            lambda: LAYERS["conv_lstm"].apply(LAYERS["conv_lstm"].init(jax.random.key(0)), np.ones((2, T, 4, 2, 2))),
            ValueError,
            r"inputs must be \[B, T, 4, 3, 2\]",
        ),
        (
            lambda: LAYERS["conv_lstm"].step(LAYERS["conv_lstm"].init(jax.random.key(0)), None, np.ones(2)),
            ValueError,
            r"x must be \[B, 4, 3, 2\] or \[4, 3, 2\]",
        ),
    ],
)
def test_errors_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()
