"""Weights of convolutional LSTMs: values against Flax, Haiku and Keras, round trips, refusals."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxpack
from jaxpack.interop import from_haiku, from_keras, from_linen, to_haiku, to_keras, to_linen

B, T, F, H = 2, 3, 2, 3
LINES = jaxpack.ConvLSTM(F, H, (4,), 3)
IMAGES = jaxpack.ConvLSTM(F, H, (3, 4), (3, 2), bias=False)


def drawn(layer, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in layer.shapes.items()}


def inputs_of(layer):
    return np.random.default_rng(1).standard_normal((B, T, *layer.input_shape)).astype(np.float32)


def outputs_of(layer, params):
    return jax.jit(lambda params, x: layer.apply(params, x)[0])(params, inputs_of(layer))


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


@pytest.mark.parametrize("layer", [LINES, IMAGES], ids=["lines", "images without bias"])
def test_flax_computes_what_the_layer_computes(layer):
    params, cell = drawn(layer), nn.ConvLSTMCell(H, layer.kernel_size)
    (tree,) = to_linen(layer, params)
    assert_same(from_linen(layer, {"params": tree}), params)
    outputs = jax.jit(nn.RNN(cell).apply)({"params": tree}, inputs_of(layer))
    np.testing.assert_allclose(outputs, outputs_of(layer, params), atol=1e-5)


def test_both_biases_of_flax_and_the_1_that_it_adds_become_one():
    cell = nn.RNN(nn.ConvLSTMCell(H, (3,)))
    shapes = jax.eval_shape(cell.init, jax.random.key(0), inputs_of(LINES))
    rng = np.random.default_rng(2)
    variables = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), shapes)
    params = from_linen(LINES, variables)
    biases = [variables["params"]["cell"][side]["bias"].astype(float) for side in ("ih", "hh")]
    i, g, f, o = np.split(sum(biases), 4)
    np.testing.assert_array_equal(params["bias"], np.concatenate([i, f + 1, g, o]).astype(np.float32))
    np.testing.assert_allclose(jax.jit(cell.apply)(variables, inputs_of(LINES)), outputs_of(LINES, params), atol=1e-5)
    unbiased = {side: {"kernel": variables["params"]["cell"][side]["kernel"]} for side in ("ih", "hh")}
    assert from_linen(LINES, unbiased)["bias"].tolist() == [0.0] * H + [1.0] * H + [0.0] * 2 * H


def test_haiku_computes_what_the_layer_computes():
    hk = pytest.importorskip("haiku", reason="dm-haiku, whose outputs these tests compare with, is not installed")
    params = drawn(LINES)
    (core,) = to_haiku(LINES, params)
    assert_same(from_haiku(LINES, core), params)

    def run(x):
        module = hk.Conv1DLSTM(LINES.spatial_shape, H, 3)
        return hk.dynamic_unroll(module, x, module.initial_state(B), time_major=False)[0]

    transformed = hk.without_apply_rng(hk.transform(run))
    named = {f"conv1_dlstm/{name}": part for name, part in core.items()}
    outputs = jax.jit(transformed.apply)(named, inputs_of(LINES))
    np.testing.assert_allclose(outputs, outputs_of(LINES, params), atol=1e-5)


def keras_layer(layer, **options):
    """A built Keras layer of the same sizes."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="keras, whose outputs these tests compare with, is not installed")
    options = {"padding": "same", "kernel_size": layer.kernel_size, "use_bias": layer.bias} | options
    kind = getattr(keras.layers, f"ConvLSTM{len(layer.spatial_shape)}D")
    made = kind(H, return_sequences=True, kernel_initializer="ones", recurrent_initializer="ones", **options)
    made.build((B, T, *layer.input_shape))
    return made


@pytest.mark.parametrize("layer", [LINES, IMAGES], ids=["lines", "images without bias"])
def test_keras_computes_what_the_layer_computes(layer):
    params, made = drawn(layer), keras_layer(layer)
    (arrays,) = to_keras(layer, params)
    made.set_weights(arrays)
    assert_same(from_keras(layer, made), params)
    state = [variable.value for variable in made.non_trainable_variables]
    weights = [variable.value for variable in made.trainable_variables]
    outputs, _ = jax.jit(made.stateless_call)(weights, state, inputs_of(layer))
    np.testing.assert_allclose(outputs, outputs_of(layer, params), atol=1e-5)


def test_parameters_of_another_shape_or_layer_are_refused():
    (tree,) = to_linen(LINES, drawn(LINES))
    with pytest.raises(ValueError, match=r"trees: weight_ih must have shape \(3, 2, 12\) .*, got \(3, 2, 2, 12\)"):
        from_linen(LINES, to_linen(IMAGES, drawn(IMAGES))[0])
    with pytest.raises(KeyError, match="no kernel under 'hh'"):
        from_linen(LINES, {"cell": {"ih": tree["cell"]["ih"]}})
    with pytest.raises(ValueError, match="has biases up to"):
        from_linen(jaxpack.ConvLSTM(F, H, (4,), bias=False), tree)
    with pytest.raises(ValueError, match="an entry for each layer, 1 in all, got 2"):
        from_linen(LINES, [tree, tree])
    with pytest.raises(TypeError, match="is traced"):
        jax.jit(lambda params: to_linen(LINES, params))(drawn(LINES))
    with pytest.raises(TypeError, match="bias is missing"):
        to_haiku(LINES, drawn(IMAGES))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"padding": "valid"}, ValueError, "padding='valid'.* needs padding='same'"),
        ({"strides": 2}, ValueError, r"strides=\(2,\)"),
        ({"recurrent_activation": "hard_sigmoid"}, ValueError, "recurrent_activation='hard_sigmoid'"),
    ],
)
def test_a_keras_layer_that_computes_something_else_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        from_keras(LINES, keras_layer(LINES, **options))
    with pytest.raises(TypeError, match=r"must be a keras\.layers\.ConvLSTM1D"):
        from_keras(LINES, keras_layer(IMAGES))


def test_half_precision_is_kept():
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), drawn(LINES))
    assert_same(from_linen(LINES, to_linen(LINES, params)[0]), params)
    assert_same(from_haiku(LINES, to_haiku(LINES, params)[0]), params)
