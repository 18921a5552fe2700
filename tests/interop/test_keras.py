"""Weights from and to Keras: values against Keras's own layers, round trips, refusals."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxpack import (
    GRU,
    LSTM,
    RNN,
    BucketPlan,
    lstm_cell,
    pack_padded_sequence,
    packed_scan,
    pad_packed_sequence,
    reverse_sequences,
)
from jaxpack.interop import from_keras, to_keras

os.environ.setdefault("KERAS_BACKEND", "jax")
keras = pytest.importorskip("keras", reason="keras, whose outputs these tests compare with, is not installed")

F, H, T = 3, 4, 5
LAYERS = [
    LSTM(F, H, bidirectional=True),
    GRU(F, H),
    RNN(F, H),
    RNN(F, H, nonlinearity="relu", bias=False),
    GRU(F, H, num_layers=2, bidirectional=True),
    GRU(F, H, reset_after=False),
]
QUICK = {"kernel_initializer": "ones", "recurrent_initializer": "ones"}
each_layer = pytest.mark.parametrize("layer", LAYERS, ids=str)


def keras_layers(layer, dtype="float32", **options):
    """Returns built Keras layers, from the input up."""
    kind = getattr(keras.layers, "SimpleRNN" if isinstance(layer, RNN) else type(layer).__name__)
    options = {"activation": getattr(layer, "nonlinearity", "tanh"), "use_bias": layer.bias} | QUICK | options
    if isinstance(layer, GRU):
        options = {"reset_after": layer.reset_after} | options
    result = []
    for size in [F, layer.output_size][: layer.num_layers]:
        each = kind(H, return_sequences=True, return_state=True, dtype=dtype, **options)
        result.append(keras.layers.Bidirectional(each, dtype=dtype) if layer.bidirectional else each)
        result[-1].build((2, T, size))
    return result


def check_outputs(layer, lengths):
    """Compares output and final state with those of a stack of Keras layers, with a mask if lengths differ."""
    real = np.arange(T) < np.array(lengths)[:, None]
    check_masked_outputs(layer, real, lengths=lengths)


def check_masked_outputs(layer, real, **options):
    """Compares output and final state with those of a stack of Keras layers, whose mask is `real` unless all are."""
    params = oracles.random_params(layer, np.float32)
    x = oracles.random_batch([T] * len(real), F, dtype=np.float32)  # Keras's tanh has no float64
    x = np.where(real[..., None], x, np.nan)
    plan = BucketPlan((T,), (len(real),))
    output, state = jax.jit(functools.partial(layer.apply, plan=plan, **options))(params, x)
    mask = None if real.all() else real
    y: Any = jnp.nan_to_num(x)
    states: Any = []
    for each, arrays in zip(keras_layers(layer), to_keras(layer, params), strict=True):
        each.set_weights(arrays)
        y, *carries = jax.jit(functools.partial(each, mask=mask))(y)
        states += carries
    np.testing.assert_allclose(output, np.where(real[..., None], y, 0), atol=1e-6)
    if isinstance(layer, LSTM):
        states = states[::2], states[1::2]
        state = jnp.stack(state)
    np.testing.assert_allclose(state, np.array(states), atol=1e-6)


@each_layer
def test_keras_computes_what_the_layer_computes(layer):
    check_outputs(layer, [5, 3])


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[-1]], ids=str)
def test_keras_computes_what_the_layer_computes_with_padding_anywhere(layer):
    mask = np.array([[0, 0, 1, 1, 1], [1, 0, 1, 0, 1]], bool)
    check_masked_outputs(layer, mask, mask=mask)


def test_keras_computes_what_the_layer_computes_without_a_mask():
    check_outputs(GRU(F, H), [5, 5])


@each_layer
def test_keras_weights_come_back_bit_for_bit(layer):
    theirs, rng = keras_layers(layer), np.random.default_rng(0)
    for each in theirs:
        each.set_weights([rng.standard_normal(w.shape) for w in each.get_weights()])
    params = from_keras(layer, theirs)
    assert jax.tree.map(jnp.shape, params) == layer.shapes
    for arrays, each in zip(to_keras(layer, params), theirs, strict=True):
        for array, weight in zip(arrays, each.get_weights(), strict=True):
            np.testing.assert_array_equal(array, weight)
            assert array.dtype == weight.dtype == np.float32


def test_a_single_layer_stands_alone_and_may_keep_its_state_and_drop():
    layer = LSTM(F, H)
    (plain,) = keras_layers(layer, stateful=True, dropout=0.5)
    params = from_keras(layer, plain)
    jax.tree.map(np.testing.assert_array_equal, params, from_keras(layer, [plain]))
    np.testing.assert_array_equal(params["l0"]["weight_ih"], plain.get_weights()[0])


def test_unit_forget_bias_is_in_the_weights():
    params = from_keras(LSTM(F, H), keras_layers(LSTM(F, H), unit_forget_bias=True))
    bias = params["l0"]["bias_ih"] + params["l0"]["bias_hh"]
    np.testing.assert_array_equal(bias, np.repeat([0, 1, 0, 0], H))


def test_a_keras_layer_without_biases_gives_zeros():
    params = from_keras(GRU(F, H), keras_layers(GRU(F, H), use_bias=False))
    assert not params["l0"]["bias_ih"].any()
    assert not params["l0"]["bias_hh"].any()


def test_dtypes_are_kept():
    layer = GRU(F, H)
    (arrays,) = to_keras(layer, oracles.random_params(layer, jnp.bfloat16))
    assert {array.dtype for array in arrays} == {jnp.dtype(jnp.bfloat16)}
    assert [array.shape for array in arrays] == [(F, 3 * H), (H, 3 * H), (2, 3 * H)]


REFUSED = {
    "reset_after": (
        GRU(F, H),
        r"reset_after=False, but GRU.* needs reset_after=True. .*give both the same",
    ),
    "activation": (LSTM(F, H), r"activation='relu', but LSTM.* needs activation='tanh'. .*rebuild"),
    "recurrent_activation": (LSTM(F, H), r"recurrent_activation='hard_sigmoid', .* needs .*'sigmoid'. .*rebuild"),
}
OPTIONS = {
    "reset_after": False,
    "activation": "relu",
    "recurrent_activation": "hard_sigmoid",
}


@pytest.mark.parametrize("option", REFUSED)
def test_keras_layers_that_compute_something_else_are_refused(option):
    layer, match = REFUSED[option]
    with pytest.raises(ValueError, match=r"keras_layers\[0\] has " + match):
        from_keras(layer, keras_layers(layer, **{option: OPTIONS[option]}))


def test_the_nonlinearity_must_be_the_layers():
    with pytest.raises(ValueError, match=r"activation='tanh', but RNN.* needs activation='relu'"):
        from_keras(RNN(F, H, nonlinearity="relu"), keras_layers(RNN(F, H)))


def test_other_kinds_sizes_and_counts_are_refused():
    (lstm,), (gru,) = (keras_layers(layer) for layer in (LSTM(F, H), GRU(F, H)))
    with pytest.raises(TypeError, match=r"keras_layers must be a keras.layers.LSTM for LSTM.*, got a keras.*GRU"):
        from_keras(LSTM(F, H), gru)
    with pytest.raises(TypeError, match=r"keras_layers must be a keras.layers.LSTM for .*, got a .*test.*LSTM"):
        from_keras(LSTM(F, H), type("LSTM", (), {})())  # PyTorch's class has this name too
    with pytest.raises(TypeError, match=r"must be a keras.layers.Bidirectional for .*, got a keras.*LSTM"):
        from_keras(LSTM(F, H, bidirectional=True), lstm)
    with pytest.raises(
        TypeError, match=r"keras_layers.forward_layer must be a keras.layers.LSTM for .*, got a keras.*GRU"
    ):
        from_keras(LSTM(F, H, bidirectional=True), keras_layers(GRU(F, H, bidirectional=True))[0])
    with pytest.raises(ValueError, match=r"has units=4, but LSTM.* needs units=5. hidden_size must be Keras's units"):
        from_keras(LSTM(F, 5), lstm)
    with pytest.raises(ValueError, match=r"weight_ih must have shape \(2, 16\) .*got \(3, 16\)"):
        from_keras(LSTM(2, H), lstm)
    with pytest.raises(ValueError, match=r"an entry for each layer, 2 in all, got 1"):
        from_keras(LSTM(F, H, num_layers=2), lstm)
    with pytest.raises(ValueError, match=r"keras_layers has no weights yet: build it first"):
        from_keras(LSTM(F, H), keras.layers.LSTM(H))


MERGES = {"sum": "sum", "mean": "ave", "mul": "mul"}  # Keras's name for each
LENGTHS = [5, 3, 1]
X = oracles.random_batch(LENGTHS, F, dtype=np.float32)
MASK = np.arange(T) < np.array(LENGTHS)[:, None]


def keras_bidirectional(kind=None, merge_mode="concat", features=F, **options):
    """Returns a built Bidirectional with random weights, by default of an LSTM."""
    kind = keras.layers.LSTM if kind is None else kind
    theirs = keras.layers.Bidirectional(kind(H, **QUICK, **options), merge_mode=merge_mode)
    theirs.build((3, T, features))
    return with_weights(theirs)


def with_weights(theirs):
    rng = np.random.default_rng(0)
    theirs.set_weights([rng.uniform(-0.5, 0.5, w.shape) for w in theirs.get_weights()])
    return theirs


def run(theirs):
    return theirs(jnp.nan_to_num(X), mask=jnp.asarray(MASK))


@functools.cache
def jitted(layer):
    return jax.jit(functools.partial(layer.apply, plan=BucketPlan((T,), (len(LENGTHS),))))


def apply(layer, params, x=X):
    return jitted(layer)(params, x, lengths=np.array(LENGTHS))


@pytest.mark.parametrize("merge", MERGES)
def test_a_stack_merges_directions_as_keras_layers_of_that_merge_mode_do(merge):
    layer = LSTM(F, H, num_layers=2, bidirectional=True, merge=merge)
    below = keras_bidirectional(merge_mode=MERGES[merge], return_sequences=True)
    above = keras_bidirectional(merge_mode=MERGES[merge], return_sequences=True, features=H)
    output, _ = apply(layer, from_keras(layer, [below, above]))
    np.testing.assert_allclose(output, above(run(below), mask=jnp.asarray(MASK)), atol=1e-6)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "SimpleRNN"])
def test_the_final_output_is_what_keras_returns_without_sequences(kind):
    layer = {"LSTM": LSTM, "GRU": GRU, "SimpleRNN": RNN}[kind](F, H, bidirectional=True)
    theirs = keras_bidirectional(getattr(keras.layers, kind))
    _, state = apply(layer, from_keras(layer, theirs))
    np.testing.assert_allclose(layer.final_output(state), run(theirs), atol=1e-6)


def test_masked_outputs_are_those_of_keras_with_zero_output_for_mask():
    layer = LSTM(F, H)
    (theirs,) = keras_layers(layer, zero_output_for_mask=True)
    output, _ = apply(layer, from_keras(layer, with_weights(theirs)))
    np.testing.assert_allclose(output, run(theirs)[0], atol=1e-6)
    theirs.zero_output_for_mask = False
    assert np.abs(output - run(theirs)[0]).max() > 0.01  # it repeats the last output


def test_a_stateful_layer_is_the_state_handed_on():
    layer = GRU(F, H)
    x = oracles.random_batch([4, 4], F, dtype=np.float32)
    (theirs,) = keras_layers(layer, stateful=True)
    params, state = from_keras(layer, with_weights(theirs)), None
    for half in (x[:, :2], x[:, 2:]):
        output, state = layer.apply(params, half, state)
        np.testing.assert_allclose(output, theirs(half)[0], atol=1e-6)


def test_recurrent_dropout_is_a_mask_in_the_carry():
    layer = LSTM(F, H)
    (theirs,) = keras_layers(layer, recurrent_dropout=0.5)
    params = from_keras(layer, with_weights(theirs))["l0"]
    kept = np.array([[0, 2, 2, 0], [2, 0, 2, 2], [0, 0, 2, 2]], np.float32)
    theirs.cell._recurrent_dropout_mask = [jnp.asarray(kept)] * 4  # one for each gate

    def step(carry, x):
        h, c, kept = carry
        (h, c), output = lstm_cell(params, (h * kept, c), x)
        return (h, c, kept), output

    packed = pack_padded_sequence(X, LENGTHS, batch_first=True)
    (h_n, c_n, _), _ = jax.jit(functools.partial(packed_scan, step))(
        (jnp.zeros((3, H)), jnp.zeros((3, H)), kept), packed
    )
    _, *states = theirs(jnp.nan_to_num(X), mask=jnp.asarray(MASK), training=True)
    np.testing.assert_allclose((h_n, c_n), states, atol=1e-6)


def in_order(packed_output):
    """Returns the padded output of a layer that reads backwards, in the order of the inputs."""
    return pad_packed_sequence(reverse_sequences(packed_output), batch_first=True)[0]


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_layer_that_goes_backwards_runs_on_reversed_sequences(bidirectional):
    # Keras returns outputs in the order in which it read, after the padding, which it read first.
    layer = GRU(F, H, bidirectional=bidirectional)
    options = {"return_sequences": True, "return_state": True, "zero_output_for_mask": True} | QUICK
    theirs = keras.layers.GRU(H, go_backwards=True, **options)
    if bidirectional:
        backward = keras.layers.GRU(H, **options)
        theirs = keras.layers.Bidirectional(theirs, backward_layer=backward)
    theirs.build((3, T, F))
    expected, *states = run(with_weights(theirs))
    packed = pack_padded_sequence(X, LENGTHS, batch_first=True)
    output, h_n = layer.apply(from_keras(layer, theirs), reverse_sequences(packed))
    np.testing.assert_allclose(in_order(output), np.flip(expected, axis=1), atol=1e-6)
    np.testing.assert_allclose(h_n, np.array(states), atol=1e-6)


def cell_of(layer):
    return functools.partial(keras.layers.LSTMCell if isinstance(layer, LSTM) else keras.layers.GRUCell, **QUICK)


WRAPPED = {
    "RNN of a cell": (LSTM(F, H), lambda cell: keras.layers.RNN(cell(H))),
    "Bidirectional of an RNN": (
        GRU(F, H, bidirectional=True),
        lambda cell: keras.layers.Bidirectional(keras.layers.RNN(cell(H))),
    ),
    "RNN of cells": (GRU(F, H, num_layers=2), lambda cell: keras.layers.RNN([cell(H), cell(H)])),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_an_rnn_of_cells_converts_both_ways_and_computes_the_same(name):
    layer, make = WRAPPED[name]
    theirs = make(cell_of(layer))
    theirs.build((3, T, F))
    params = from_keras(layer, with_weights(theirs))
    np.testing.assert_allclose(layer.final_output(apply(layer, params)[1]), run(theirs), atol=1e-6)
    arrays = [array for arrays in to_keras(layer, params) for array in arrays]
    jax.tree.map(np.testing.assert_array_equal, arrays, theirs.get_weights())


def test_every_wrapping_of_the_same_weights_gives_the_same_parameters():
    layer = LSTM(F, H, bidirectional=True)
    both = keras_bidirectional()
    pair = [both.forward_layer, both.backward_layer]
    expected = from_keras(layer, both)
    cells = [each.cell for each in pair]
    for given in (pair, tuple(pair), [pair], [tuple(pair)], cells, [keras.layers.RNN(cell) for cell in cells]):
        jax.tree.map(np.testing.assert_array_equal, from_keras(layer, given), expected)
    deep = LSTM(F, H, num_layers=2)
    below, above = (with_weights(each) for each in keras_layers(deep))
    expected = from_keras(deep, [below, above])
    stacked = keras.layers.StackedRNNCells([below.cell, above.cell])
    for given in (stacked, [stacked], keras.layers.RNN(stacked), [below.cell, keras.layers.RNN(above.cell)]):
        jax.tree.map(np.testing.assert_array_equal, from_keras(deep, given), expected)


def test_activations_are_known_by_their_values():
    (theirs,) = keras_layers(GRU(F, H), activation=jnp.tanh, recurrent_activation=jax.nn.sigmoid)
    from_keras(GRU(F, H), theirs)
    (theirs,) = keras_layers(GRU(F, H), activation=jnp.sin)
    with pytest.raises(ValueError, match=r"has activation=.*, but GRU.* needs activation='tanh'"):
        from_keras(GRU(F, H), theirs)


def test_options_that_change_the_next_layers_inputs_are_refused():
    deep = GRU(F, H, num_layers=2)
    _, above = keras_layers(deep, go_backwards=True)
    below, _ = keras_layers(deep)
    match = r"keras_layers\[1\] has go_backwards=True, but GRU.* one order. Convert each .* num_layers=1, and call jaxp"
    with pytest.raises(ValueError, match=match):
        from_keras(deep, [below, above])
    layer = GRU(F, H, num_layers=2, bidirectional=True)
    theirs = [keras_bidirectional(keras.layers.GRU, "sum", return_sequences=True), keras_layers(layer)[1]]
    match = r"keras_layers\[0\] has merge_mode='sum', but GRU.* by merge='concat' .* num_layers=1, and merge the halves"
    with pytest.raises(ValueError, match=match):
        from_keras(layer, theirs)
    both = keras_layers(GRU(F, H), go_backwards=True) * 2
    with pytest.raises(ValueError, match=r"keras_layers has go_backwards=True in both directions"):
        from_keras(GRU(F, H, bidirectional=True), both)
    cells = keras.layers.RNN([keras.layers.GRUCell(H), keras.layers.GRUCell(H)])
    with pytest.raises(ValueError, match=r"keras_layers\[0\] takes each direction through 2 cells by itself, but"):
        from_keras(layer, [keras.layers.Bidirectional(cells)])


@pytest.mark.parametrize("reset_before", [keras.layers.GRU, keras.layers.GRUCell])
def test_a_gru_that_resets_at_another_place_is_refused_in_every_wrapping(reset_before):
    for reset_after in (True, False):
        with pytest.raises(ValueError, match=rf"reset_after={reset_after}, but .*needs reset_after={not reset_after}"):
            from_keras(GRU(F, H, reset_after=not reset_after), reset_before(H, reset_after=reset_after))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_weights_are_kept_exact(dtype):
    (theirs,) = keras_layers(LSTM(F, H), dtype, bias_initializer="ones")
    params = from_keras(LSTM(F, H), with_weights(theirs))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    np.testing.assert_array_equal(params["l0"]["weight_ih"], theirs.get_weights()[0])


def test_biases_need_a_layer_with_biases():
    (theirs,) = keras_layers(RNN(F, H))
    from_keras(RNN(F, H, bias=False), theirs)  # they are still zeros
    theirs.set_weights([np.ones_like(w) for w in theirs.get_weights()])
    with pytest.raises(ValueError, match=r"keras_layers has biases up to 1, and RNN.* has none. Use bias=True"):
        from_keras(RNN(F, H, bias=False), theirs)


def test_projections_traced_and_foreign_parameters_are_refused():
    layer = LSTM(F, H, proj_size=2)
    with pytest.raises(ValueError, match=r"projects h, and no cell of Keras does"):
        to_keras(layer, oracles.random_params(layer, np.float32))
    with pytest.raises(TypeError, match=r"params\['l0'\]\['.*'\] is traced"):
        jax.jit(lambda params: to_keras(GRU(F, H), params))(oracles.random_params(GRU(F, H), np.float32))
    with pytest.raises(TypeError, match=r"l0.weight_ih is missing"):
        to_keras(GRU(F, H), {})


def test_weights_that_jax_would_round_are_refused():
    with jax.enable_x64(True):
        theirs = keras_layers(RNN(F, H), "float64")
    with pytest.raises(ValueError, match=r"keras_layers\[0\]: weight 0 has dtype float64, which JAX would round"):
        from_keras(RNN(F, H), theirs)
