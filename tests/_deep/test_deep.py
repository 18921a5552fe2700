"""Stacks and directions of any layers: Haiku and Keras, layouts, dropout, memory, errors. The contract has the rest."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import jaxpack
from jaxpack import GRU, LSTM, RNN, SLSTM, Bidirectional, CfC, ConvGRU, ConvLSTM, DeepRNN, MinGRU
from jaxpack._deep.call import _run
from jaxpack.interop import to_haiku, to_keras

B, T, F, H = 3, 5, 2, 3
LENGTHS = np.array([3, 5, 1])
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def params_of(layer):
    return oracles.random_params(layer, np.float32)


def test_skip_connections_are_haikus():
    hk = pytest.importorskip("haiku", reason="dm-haiku, whose outputs this test compares with, is not installed")
    layers = [RNN(F, H, nonlinearity="relu"), GRU(F + H, H, reset_after=False)]
    stack = DeepRNN(layers, connection="skip")
    params, x = params_of(stack), random(B, T, F)

    def run(x):
        core = hk.deep_rnn_with_skip_connections([hk.VanillaRNN(H), hk.GRU(H)])
        return hk.dynamic_unroll(core, x, core.initial_state(B), time_major=False)

    (rnn,), (gru,) = (to_haiku(layer, params[f"layer_{i}"]) for i, layer in enumerate(layers))
    theirs = {f"vanilla_rnn/{name}": leaf for name, leaf in rnn.items()} | gru
    outputs, states = jax.jit(hk.without_apply_rng(hk.transform(run)).apply)(theirs, x)
    output, finals = stack.apply(params, x)
    close(output, outputs)
    for final, state in zip(finals, states, strict=True):
        close(final[0], state)
    assert output.shape[-1] == stack.output_size == 2 * H


@pytest.mark.parametrize("merge", ["mean", "mul"])
def test_merges_of_directions_are_keras(merge):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="keras, whose outputs this test compares with, is not installed")
    rnn = RNN(F, H)
    layer = Bidirectional(rnn, merge=merge)
    params, x = params_of(layer), random(B, T, F)
    mode = {"mean": "ave"}.get(merge, merge)
    theirs = keras.layers.Bidirectional(keras.layers.SimpleRNN(H, return_sequences=True, unroll=True), merge_mode=mode)
    theirs.build(x.shape)
    halves = [to_keras(rnn, params[name])[0] for name in ("forward", "backward")]
    theirs.set_weights([leaf for half in halves for leaf in half])
    close(layer.apply(params, x)[0], theirs(x))


def test_a_stack_is_keras_stack_of_cells():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="keras, whose outputs this test compares with, is not installed")
    rnn, gru = RNN(F, H), GRU(H, 4)
    stack = DeepRNN([rnn, gru])
    params, x = params_of(stack), random(B, T, F)
    cells = [keras.layers.SimpleRNNCell(H), keras.layers.GRUCell(4)]
    theirs = keras.layers.RNN(keras.layers.StackedRNNCells(cells), return_sequences=True, unroll=True)
    theirs.build(x.shape)
    theirs.set_weights([*to_keras(rnn, params["layer_0"])[0], *to_keras(gru, params["layer_1"])[0]])
    close(stack.apply(params, x)[0], theirs(x))


def test_a_stack_is_its_layers_one_after_the_other_and_the_outputs_of_each_are_there_on_request():
    layers: list[Any] = [RNN(F, H, bidirectional=True), SLSTM(2 * H, 4, 2)]
    stack, plan = DeepRNN(layers), jaxpack.plan_padded(B, T)
    params, x = params_of(stack), random(B, T, F)
    run: Any = _run
    programs = run._cache_size()
    for lengths in (np.array([5, 0, 2]), LENGTHS):
        output, states, outputs = stack.apply(params, x, lengths=lengths, plan=plan, return_layer_outputs=True)
    assert run._cache_size() == programs + 1
    for i, layer in enumerate(layers):
        x, state = layer.apply(params[f"layer_{i}"], x, lengths=LENGTHS, plan=plan)
        close(outputs[i], x)
        jax.tree.map(close, states[i], state)
    close(output, x)
    last = jaxpack.pack_padded_sequence(output, LENGTHS, batch_first=True, plan=plan)
    close(jaxpack.last(last), states[1][0])  # h of the last layer
    nested = DeepRNN([DeepRNN(layers[:1]), layers[1]])
    renamed = params | {"layer_0": {"layer_0": params["layer_0"]}}
    found, ((below,), above) = nested.apply(renamed, random(B, T, F), lengths=LENGTHS, plan=plan)
    jax.tree.map(close, (found, (below, above)), (output, states))


def test_directions_without_a_merge_are_a_pair_in_every_layout_and_a_layer_reads_from_the_end_by_itself():
    slstm = SLSTM(F, 4, 2)
    layer = Bidirectional(RNN(F, H), slstm, merge=None)
    params, x, resets = params_of(layer), random(B, T, F), random(B, T, seed=1) > 0.5
    plan = jaxpack.plan_rows(LENGTHS)
    packed = jaxpack.pack_padded_sequence((x, resets), LENGTHS, batch_first=True, plan=plan)
    inputs, begins = (packed.replace(data=leaf) for leaf in packed.data)
    of_packed, (_, state) = layer.apply(params, inputs, resets=begins)
    pair, _ = layer.apply(params, x, lengths=LENGTHS, plan=plan, resets=resets)
    masked, _ = layer.apply(params, x, mask=np.arange(T) < LENGTHS[:, None], plan=plan, resets=resets)
    for direction, padded, by_mask in zip(of_packed, pair, masked, strict=True):
        close(jaxpack.pad_packed_sequence(direction, batch_first=True, total_length=T)[0], padded)
        close(by_mask, padded)
    from_end, final = slstm.apply(params["backward"], inputs, resets=begins, reverse=True)
    close(of_packed[1].data, from_end.data)
    jax.tree.map(close, state, final)


def test_convolutional_layers_stack_and_directions_join_their_channels():
    both = Bidirectional(ConvLSTM(F, H, (4,)), ConvGRU(F, 2, (4,)))
    stack = DeepRNN([both, ConvLSTM(H + 2, H + 2, (4,), 1)], connection=(None, "highway"), norm=True)
    params, x, mask = params_of(stack), random(B, T, 4, F), np.arange(T) < LENGTHS[:, None]
    assert stack.output_shape == (4, H + 2)
    output, states = stack.apply(params, np.where(mask[..., None, None], x, np.nan), mask=mask)
    for row, length in enumerate(LENGTHS):
        alone, finals = stack.apply(params, x[row], lengths=length)
        close(output[row], alone)
        jax.tree.map(lambda leaf, one, row=row: close(leaf[row], one), states, finals)
    assert not np.asarray(output)[~mask].any()


def test_a_layer_that_takes_times_may_come_first():
    stack = DeepRNN([Bidirectional(CfC(F, H, 4), merge="sum"), RNN(H, H)], connection=(None, "residual"))
    params, x, dt = params_of(stack), random(B, T, F), abs(random(B, T))
    packed = jaxpack.pack_padded_sequence((x, dt), LENGTHS, batch_first=True)
    output = jaxpack.pad_packed_sequence(stack.apply(params, packed)[0], batch_first=True)[0]
    close(stack.apply(params, (x, dt), lengths=LENGTHS, plan=packed.plan)[0], output)
    close(stack.apply(params, (x, dt), mask=np.arange(T) < LENGTHS[:, None], plan=packed.plan)[0], output)
    close(stack.apply(params, (x[1], dt[1]))[0], output[1])


@pytest.mark.parametrize("locked", [False, True])
def test_dropout_acts_between_layers_whatever_the_plan(locked):
    stack, plan = DeepRNN([RNN(F, 16), RNN(16, 16)], dropout=0.5, locked=locked), jaxpack.plan_rows(LENGTHS)
    params, x, key = params_of(stack), np.ones((B, T, F), np.float32), jax.random.key(1)
    weights = {name: np.zeros_like(leaf) for name, leaf in params["layer_1"]["l0"].items()}
    params["layer_1"]["l0"] = weights | {"weight_ih": np.eye(16, dtype=np.float32)}  # the tanh of what it takes
    real = np.arange(T) < LENGTHS[:, None]
    given, dropped, planned = (
        np.asarray(stack.apply(params, x, None, key, lengths=LENGTHS, **options)[0])
        for options in ({"plan": plan, "deterministic": True}, {}, {"plan": plan})
    )
    close(planned, dropped)
    kept = dropped != 0
    close(dropped[real], np.where(kept, np.tanh(2 * np.arctanh(given)), 0)[real])
    assert 0.3 < kept[real].mean() < 0.7
    assert (kept[1] == kept[1, 0]).all() == locked


def test_dropout_in_a_layer_takes_a_key_of_the_stack():
    stack = DeepRNN([RNN(F, H, num_layers=2, dropout=1.0), RNN(H, H)])
    params, x = params_of(stack), random(B, T, F)
    zeroed, _ = stack.apply(params, x, None, jax.random.key(0))
    expected, _ = stack.apply(params, 5 * x, None, jax.random.key(1))  # the first layer of layers[0] is dropped
    close(zeroed, expected)
    with pytest.raises(ValueError, match="DeepRNN has dropout, between layers or in one, but there is no dropout_key"):
        stack.apply(params, x)


def test_norms_and_gates_are_float32_in_mixed_precision():
    stack = DeepRNN([RNN(4, 4), RNN(4, 4)], connection="highway", norm=True)
    params, x = params_of(stack), 1000 + random(B, T, 4)
    grads = jax.eval_shape(jax.grad(lambda p: stack.apply(p, x, dtype=jnp.bfloat16)[0].sum().astype(float)), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {np.dtype(np.float32)}
    half, exact = (stack.apply(params, x, dtype=dtype)[0] for dtype in (jnp.bfloat16, None))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), exact, rtol=0.02)


@pytest.mark.optimized
def test_a_stack_takes_no_more_memory_than_one_layer_of_as_many():
    def temporaries(layer):
        given = jax.eval_shape(layer.init, jax.random.key(0)), jax.ShapeDtypeStruct((8, 64, 32), np.float32)
        run = functools.partial(layer.apply, lengths=[64] + [20] * 7, plan=jaxpack.plan_padded(8, 64))
        analysis: Any = jax.jit(run).lower(*given).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    assert temporaries(DeepRNN([RNN(32, 32)] * 3)) < 1.05 * temporaries(RNN(32, 32, num_layers=3))


def test_initial_parameters_begin_mostly_carrying():
    stack = DeepRNN([LSTM(4, 4), MinGRU(4, 4)], connection="highway", norm=True)
    params = jax.device_get(jax.jit(stack.init)(jax.random.key(0)))
    assert jax.tree.map(jnp.shape, params) == stack.shapes
    assert params["highway_0"]["bias"].tolist() == [-1] * 4
    assert abs(params["highway_1"]["weight"]).max() <= 0.5
    assert (params["highway_0"]["weight"] != params["highway_1"]["weight"]).all()
    assert params["norm_1"]["scale"].tolist() == [1] * 4
    assert [jnp.shape(leaf) for leaf in jax.tree.leaves(stack.initial_state(params, 2))] == [(1, 2, 4)] * 2 + [(2, 4)]


STACK = DeepRNN([GRU(F, H), Bidirectional(MinGRU(H, H), merge="sum")])
WRONG: Any = 3  # where a layer, a bool or a key is wanted
X = np.ones((B, T, F), np.float32)


def applied(*args, x=X, **options):
    return STACK.apply(params_of(STACK), x, *args, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: DeepRNN([]), ValueError, "layers is empty"),
        (lambda: DeepRNN(WRONG), TypeError, "layers must be a list of layers"),
        (lambda: DeepRNN([GRU(2, 3), WRONG]), TypeError, r"layers\[1\] must be a layer .*, got 3"),
        (
            lambda: DeepRNN([GRU(2, 3), MinGRU(4, 5)]),
            ValueError,
            r"layers\[1\] \(MinGRU\) takes 4 features a step, but layers\[0\] \(GRU\) gives 3 .* input_size 3",
        ),
        (
            lambda: DeepRNN([ConvGRU(1, 2, (4,)), ConvGRU(2, 2, (5,))]),
            ValueError,
            r"takes \[5, 2\] a step, but layers\[0\] \(ConvGRU\) gives \[4, 2\]",
        ),
        (lambda: DeepRNN([GRU(2, 3), GRU(3, 3)], connection="skip"), ValueError, "Make its input_size 5"),
        (lambda: DeepRNN([GRU(2, 3)], connection="residual"), ValueError, "takes 2 features and gives 3 .* with None"),
        (lambda: DeepRNN([CfC(3, 3)], connection="highway"), ValueError, "takes a tuple of inputs"),
        (lambda: DeepRNN([GRU(2, 2)], connection="dense"), ValueError, "connection must be None, .* got 'dense'"),
        (lambda: DeepRNN([GRU(2, 2)], connection=WRONG), ValueError, "connection must be None, .* got 3"),
        (lambda: DeepRNN([GRU(2, 2)], connection=("skip",)), ValueError, "one of the first three for each layer"),
        (lambda: DeepRNN([GRU(2, 2)] * 2, connection=("residual",)), ValueError, "each of the 2 layers"),
        (lambda: DeepRNN([GRU(2, 3), CfC(3, 3)]), ValueError, "only the first layer of a stack takes"),
        (lambda: DeepRNN([Bidirectional(GRU(2, 2), merge=None)]), ValueError, r"layers\[0\] .* has merge=None"),
        (lambda: DeepRNN([GRU(2, 2)], dropout=1.5), ValueError, r"dropout must be a number in \[0, 1\]"),
        (lambda: DeepRNN([GRU(2, 2)], norm=WRONG), TypeError, "norm must be a bool, got 3"),
        (lambda: Bidirectional(GRU(2, 2, bidirectional=True)), ValueError, "forward must read in one direction"),
        (lambda: Bidirectional(GRU(2, 2), WRONG), TypeError, "backward must be a layer"),
        (lambda: Bidirectional(GRU(2, 2), GRU(3, 2)), ValueError, "read the same sequences, but take 2 features and 3"),
        (lambda: Bidirectional(GRU(2, 2), GRU(2, 3), "mul"), ValueError, 'merge="mul" cannot join .* 2 features and 3'),
        (lambda: Bidirectional(GRU(2, 2), merge="ave"), ValueError, 'merge must be "concat", "sum"'),
        (lambda: applied((None,)), ValueError, "initial_state must be a tuple of 2, .* got a tuple of 1"),
        (
            lambda: applied((None, (np.zeros((B, H)), np.zeros((B, 4))))),
            ValueError,
            r"initial_state\[1\]\[1\] must be a state of MinGRU.* of shape \(3, 3\), got shape \(3, 4\)",
        ),
        (lambda: applied(x=X[..., :1]), ValueError, r"inputs must be \[B, T, 2\] or \[T, 2\] \(input_size=2\), got"),
        (lambda: applied(x=X[0], lengths=[3]), ValueError, "one sequence without a batch axis"),
        (lambda: applied(x=X * 1j), TypeError, "inputs must be real"),
        (lambda: applied(lengths=[6, 1, 1]), ValueError, r"lengths\[0\] = 6 is longer than the padded batch"),
        (lambda: applied(fresh_state=(None, None)), ValueError, "fresh_state is the state with which resets begin"),
        (lambda: jax.jvp(lambda x: applied(x=x)[0], (X,), (X,)), TypeError, r"DeepRNN.apply has its own derivative"),
        (lambda: STACK.init(WRONG), TypeError, "key must be a JAX random key"),
        (lambda: STACK.apply({}, X), TypeError, "params do not match .* layer_0.l0.weight_ih is missing"),
    ],
)
def test_errors_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()
