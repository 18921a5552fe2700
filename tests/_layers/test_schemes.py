"""The defaults of other libraries by name, and biases that keep the memory."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.nn.initializers import ones, zeros

import jaxpack.linen
import jaxpack.nnx
from jaxpack import GRU, LSTM, MGU, RNN, Chrono, IndRNN, LayerNormLSTM, PeepholeLSTM
from jaxpack._cells.cell import step_from_input

F, H = 40, 60
KEY = jax.random.key(0)
SMALL = {
    "lstm": (LSTM(3, 4, num_layers=2, bidirectional=True), "f", 1),
    "peephole": (PeepholeLSTM(3, 4), "f", 1),
    "layer_norm": (LayerNormLSTM(3, 4), "f", 1),
    "gru": (GRU(3, 4), "z", 1),
    "gru before": (GRU(3, 4, reset_after=False), "z", 1),
    "mgu": (MGU(3, 4), "f", -1),
    "flax's mgu": (MGU(3, 4, reset="after"), "f", 1),
}
each_kept = pytest.mark.parametrize(("layer", "gate", "sign"), SMALL.values(), ids=SMALL)


def by_gate(layer, array):
    gates = layer.cell.gates
    return dict(zip(gates, np.split(np.asarray(array), len(gates), axis=-1), strict=True))


def assert_uniform(array, bound):
    """The numbers reach the bound, and none passes it."""
    assert 0.98 * bound < np.abs(array).max() <= bound
    np.testing.assert_allclose(np.std(array), bound / math.sqrt(3), rtol=0.05)


def assert_truncated(array, deviation, truncated_at):
    assert np.abs(array).max() <= truncated_at * (1 + 1e-6)
    np.testing.assert_allclose(np.std(array), deviation, rtol=0.05)


@pytest.mark.parametrize("layer", [LSTM(F, H), GRU(F, H), RNN(F, H)], ids=["lstm", "gru", "rnn"])
def test_keras(layer):
    weights = layer.init(KEY, scheme="keras")["l0"]
    assert_uniform(weights["weight_ih"], math.sqrt(6 / (F + weights["weight_ih"].shape[1])))
    recurrent = weights["weight_hh"]
    np.testing.assert_allclose(recurrent @ recurrent.T, np.eye(H), atol=1e-5)  # of all gates as one matrix
    for gate, bias in by_gate(layer, weights["bias_ih"]).items():
        assert (bias == (gate == "f")).all()
    assert not weights["bias_hh"].any()


@pytest.mark.parametrize(
    "layer", [LSTM(F, H), GRU(F, H), RNN(F, H), MGU(F, H, reset="after")], ids=["lstm", "gru", "rnn", "mgu"]
)
def test_flax(layer):
    weights = layer.init(KEY, scheme="flax")["l0"]
    assert_truncated(weights["weight_ih"], 1 / math.sqrt(F), 2 / 0.87962566103423978 / math.sqrt(F))
    for gate in by_gate(layer, weights["weight_hh"]).values():
        np.testing.assert_allclose(gate @ gate.T, np.eye(H), atol=1e-5)
    for gate, bias in by_gate(layer, weights["bias_ih"]).items():
        assert (bias == (gate == "f" and isinstance(layer, MGU))).all()
    assert not weights["bias_hh"].any()


@pytest.mark.parametrize(
    ("layer", "fans", "truncation"),
    [
        (LSTM(F, H), (F + H, F + H), 1.0),
        (GRU(F, H, reset_after=False), (F, H), 0.87962566103423978),
        (RNN(F, H, nonlinearity="relu"), (F, H), 1.0),
    ],
    ids=["lstm", "gru", "rnn"],
)
def test_haiku(layer, fans, truncation):
    weights = layer.init(KEY, scheme="haiku")["l0"]
    for name, fan_in in zip(("weight_ih", "weight_hh"), fans, strict=True):
        before = 1 / math.sqrt(fan_in) / truncation  # the deviation before truncation
        assert_truncated(weights[name], before * 0.87962566103423978, 2 * before)
    for gate, bias in by_gate(layer, weights["bias_ih"]).items():
        assert (bias == (gate == "f")).all()


def test_schemes_fill_in_what_no_initialiser_is_given_for():
    layer = LSTM(3, 4)
    weights = layer.init(KEY, scheme="keras", kernel_init=ones, bias_init=zeros)["l0"]
    assert (weights["weight_ih"] == 1).all()
    assert not weights["bias_ih"].any()
    np.testing.assert_allclose(weights["weight_hh"] @ weights["weight_hh"].T, np.eye(4), atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, layer.init(KEY, scheme="pytorch"), layer.init(KEY))
    assert layer.init(KEY, jnp.bfloat16, scheme="flax")["l0"]["weight_hh"].dtype == jnp.bfloat16


@pytest.mark.parametrize("scheme", ["pytorch", "keras", "flax", "haiku"])
def test_what_is_the_cells_own_stays_so_under_every_scheme(scheme):
    own = IndRNN(3, 64).init(KEY, scheme=scheme)["l0"]["weight_hh"]
    assert 0 <= own.min() < 0.1
    assert 0.9 < own.max() <= 1
    norms = LayerNormLSTM(3, 4).init(KEY, scheme=scheme)["l0"]
    assert all((norms[name] == 1).all() for name in ("scale_ih", "scale_hh", "scale_c"))
    assert not norms["bias_c"].any()
    assert PeepholeLSTM(3, 4).init(KEY, scheme=scheme)["l0"]["weight_ch"].any()


@each_kept
def test_a_forget_bias_is_that_of_the_gate_that_keeps_the_state_and_of_no_other(layer, gate, sign):
    before, after = layer.init(KEY), layer.init(KEY, forget_bias=2.5)
    for group, entries in after.items():
        for name, value in entries.items():
            if name not in ("bias_ih", "bias_hh"):
                np.testing.assert_array_equal(value, before[group][name])
                continue
            expected = by_gate(layer, before[group][name])
            expected[gate] = np.full(4, sign * 2.5 if name == "bias_ih" else 0)
            np.testing.assert_array_equal(value, np.concatenate(list(expected.values())))


@each_kept
def test_a_higher_forget_bias_keeps_more_of_the_state(layer, gate, sign):
    def kept(forget_bias):
        biases = layer.init(KEY, bias_init=zeros, forget_bias=forget_bias)["l0"]
        weights = jax.tree.map(jnp.zeros_like, biases) | {name: biases[name] for name in ("bias_ih", "bias_hh")}
        state = jax.tree.map(jnp.ones, layer.cell.state_sizes)
        final, _ = step_from_input(layer.cell, weights, state, jnp.zeros(3))
        return jax.tree.leaves(final)[-1][0]

    np.testing.assert_allclose([kept(b) for b in (-30.0, 0.0, 30.0)], [0, 0.5, 1], atol=1e-6)


@each_kept
def test_chrono_draws_time_scales_up_to_the_longest(layer, gate, sign):
    wide = type(layer)(
        3, 400, **{name: getattr(layer, name) for name in ("reset", "reset_after") if hasattr(layer, name)}
    )
    weights = wide.init(KEY, forget_bias=Chrono(101), bias_init=zeros)["l0"]
    biases = by_gate(wide, weights["bias_ih"])
    scales = np.exp(sign * biases[gate])  # uniform from 1 to 100
    assert 1 <= scales.min() < 2
    assert 99 < scales.max() <= 100 * (1 + 1e-6)
    np.testing.assert_allclose([scales.mean(), scales.std()], [50.5, 99 / math.sqrt(12)], rtol=0.1)
    if "i" in biases:
        np.testing.assert_array_equal(biases["i"], -biases["f"])
    for other in set(biases) - {gate, "i"}:
        assert not biases[other].any()
    assert not weights["bias_hh"].any()


def test_layers_and_directions_get_time_scales_of_their_own():
    params = LSTM(3, 4, num_layers=2, bidirectional=True).init(KEY, forget_bias=Chrono(1000))
    drawn = {tuple(np.asarray(group["bias_ih"][4:8])) for group in params.values()}
    assert len(drawn) == 4


def test_modules_of_flax_take_both():
    expected = LSTM(3, 4).init(KEY, scheme="keras", forget_bias=3.0)["l0"]["bias_ih"]
    module = jaxpack.nnx.LSTM(3, 4, scheme="keras", forget_bias=3.0, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(module.params["l0"]["bias_ih"][...], expected)
    linen = jaxpack.linen.LSTM(4, scheme="keras", forget_bias=3.0)
    variables = linen.init(KEY, jnp.ones((1, 1, 3)))
    np.testing.assert_array_equal(variables["params"]["l0"]["bias_ih"], expected)


def test_a_forget_bias_keeps_what_an_initialiser_wraps_around_its_array():
    params: Any = GRU(3, 4).init(KEY, bias_init=nn.with_partitioning(zeros, ("model",)), forget_bias=Chrono(50))
    assert params["l0"]["bias_ih"].names == ("model",)
    assert (params["l0"]["bias_ih"].unbox()[4:8] > 0).all()
    assert not params["l0"]["bias_ih"].unbox()[:4].any()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LSTM(3, 4).init(KEY, scheme="kears"), ValueError, r"one of 'pytorch', 'keras', .*got 'kears'"),
        (lambda: LSTM(3, 4).init(KEY, forget_bias="1"), TypeError, r"jaxpack.Chrono, got '1'"),  # type: ignore[arg-type]
        (lambda: LSTM(3, 4).init(KEY, forget_bias=True), TypeError, r"a number or a jaxpack.Chrono, got True"),
        (lambda: LSTM(3, 4).init(KEY, forget_bias=math.nan), ValueError, r"forget_bias must be finite, got nan"),
        (lambda: RNN(3, 4).init(KEY, forget_bias=1.0), ValueError, r"a gate that keeps their state, which RNNCell\("),
        (lambda: LSTM(3, 4, bias=False).init(KEY, forget_bias=1.0), ValueError, r"needs biases, .* bias=False"),
        (
            lambda: LSTM(3, 4).init(KEY, forget_bias=1.0, bias_init={"f": ones}),
            ValueError,
            r"both give the bias of the gate 'f'",
        ),
        (
            lambda: LSTM(3, 4).init(KEY, forget_bias=Chrono(9), bias_init={"i": ones}),
            ValueError,
            r"both give the bias of the gate 'i'",
        ),
        (lambda: Chrono(1), ValueError, r"max_length must be at least 2, got 1"),
        (lambda: Chrono(2.5), TypeError, r"max_length must be an int, got 2.5"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
