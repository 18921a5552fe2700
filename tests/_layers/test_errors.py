"""What a layer refuses, and in which words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpack import GRU, LSTM, MGU, RNN, IndRNN, pack_padded_sequence, plan_padded

F, H = 3, 4


def test_dropout_without_a_key_is_an_error_in_training():
    layer = GRU(F, H, num_layers=2, dropout=0.5)
    with pytest.raises(ValueError, match=r"dropout=0.5 is on.*dropout_key=.*deterministic=True"):
        layer.apply(layer.init(jax.random.key(0)), jnp.ones((2, 3, F)))


@pytest.mark.parametrize("layer_class", [RNN, LSTM, GRU])
def test_dropout_in_a_single_layer_warns_where_the_user_makes_it(layer_class):
    with pytest.warns(UserWarning, match="dropout acts between layers") as caught:
        layer_class(F, H, dropout=0.5)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LSTM(0, H), ValueError, "input_size must be at least 1, got 0"),
        (lambda: LSTM(F, -1), ValueError, "hidden_size must be at least 1, got -1"),
        (lambda: LSTM(F, 2.5), TypeError, "hidden_size must be an int, got 2.5"),  # type: ignore[arg-type]
        (lambda: GRU(F, H, num_layers=0), ValueError, "num_layers must be at least 1, got 0"),
        (lambda: GRU(F, H, reset_after=0), TypeError, "reset_after must be a bool, got 0"),  # type: ignore[arg-type]
        (lambda: MGU(F, H, reset="r"), ValueError, r'reset must be "before" .the paper., "after" .Flax. or None, got'),
        (lambda: IndRNN(F, H, nonlinearity="x"), ValueError, 'nonlinearity must be "tanh" or "relu", got'),
        (lambda: GRU(F, H, 2, bias=1), TypeError, "bias must be a bool, got 1"),  # type: ignore[arg-type]
        (lambda: GRU(F, H, 2, True, 1.5), ValueError, r"dropout must be a number in \[0, 1\].*got 1.5"),
        (lambda: GRU(F, H, 2, True, "a"), ValueError, r"dropout must be a number in \[0, 1\].*got 'a'"),  # type: ignore[arg-type]
        (lambda: RNN(F, H, 1, ["tanh"]), ValueError, r"got \['tanh'\]"),  # type: ignore[arg-type]
        (lambda: RNN(F, H, nonlinearity="sigmoid"), ValueError, """must be "tanh" or "relu", got 'sigmoid'"""),
        (lambda: LSTM(F, H, proj_size=H), ValueError, "proj_size must be 0 .* below hidden_size=4, got 4"),
        (lambda: LSTM(F, H, proj_size=-1), ValueError, "proj_size must be 0 .* got -1"),
        (lambda: LSTM(F, H).init(jax.random.key(0), int), TypeError, "dtype must be a floating dtype, got int"),
    ],
)
def test_bad_options_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


SINGLE = LSTM(F, H)
SINGLE_PARAMS = SINGLE.init(jax.random.key(0))
PACKED = pack_padded_sequence(jnp.ones((2, 3, F)), [3, 2], batch_first=True)


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (jnp.ones(F), {}, ValueError, r"PackedSequence, \[B, T, 3\] or one sequence \[T, 3\], got shape \(3,\)"),
        (jnp.ones((2, 3, F + 1)), {}, ValueError, r"3 features .*got shape \(2, 3, 4\)"),
        (jnp.ones((3, F + 1)), {}, ValueError, r"3 features .*got shape \(3, 4\)"),
        (PACKED.map(lambda x: x[:, :2]), {}, ValueError, r"\[S, 3\].*got shape \(5, 2\)"),
        (PACKED.replace(data={"a": PACKED.data, "b": PACKED.data}), {}, ValueError, "one array of data"),
        (jnp.ones((2, 3, F)) * 1j, {}, TypeError, "inputs must be real, got dtype complex64"),
        (None, {}, ValueError, "inputs holds no array, got None"),
        (PACKED, {"lengths": [3, 2]}, TypeError, "carry their lengths and plan"),
        (PACKED, {"plan": PACKED.plan}, TypeError, "carry their lengths and plan"),
        (jnp.ones((2, 3, F)), {"lengths": [4, 1]}, ValueError, r"lengths\[0\] = 4 is longer"),
        (jnp.ones((2, 3, F)), {"lengths": [-1, 1]}, ValueError, "negative"),
        (
            jnp.ones((2, 3, F)),
            {"lengths": [1, 1, 1]},
            ValueError,
            "each sequence of inputs, got 3 lengths for a batch of 2",
        ),
        (jnp.ones((2, 3, F)), {"lengths": [2.5, 1]}, ValueError, "whole numbers"),
        (jnp.ones((2, 3, F)), {"lengths": [3, 1], "plan": plan_padded(2, 2)}, ValueError, "does not fit the plan"),
        (jnp.ones((2, 3, F)), {"plan": plan_padded(3, 3)}, ValueError, "plan is for 3 sequences, but the batch has 2"),
        (jnp.ones((3, F)), {"lengths": [3]}, ValueError, "one sequence without a batch axis"),
        (PACKED, {"dtype": int}, TypeError, "dtype must be a floating dtype, got int"),
        (PACKED, {"initial_state": jnp.zeros((1, 2, H))}, ValueError, r"\(h_0 \[1, 2, 4\], c_0 \[1, 2, 4\]\)"),
        (
            PACKED,
            {"initial_state": (jnp.zeros((1, 3, H)),) * 2},
            ValueError,
            r"got shapes \[\(1, 3, 4\), \(1, 3, 4\)\]",
        ),
    ],
)
def test_bad_inputs_are_named(inputs, options, error, message):
    with pytest.raises(error, match=message):
        SINGLE.apply(SINGLE_PARAMS, inputs, **options)


def test_parameters_of_another_layer_are_named():
    with pytest.raises(ValueError, match=r"l0.weight_ih has shape \(3, 12\), not \(3, 16\)"):
        SINGLE.apply(GRU(F, H).init(jax.random.key(0)), PACKED)
    with pytest.raises(TypeError, match=r"l0.bias_ih is not known"):
        LSTM(F, H, bias=False).apply(SINGLE_PARAMS, PACKED)
    with pytest.raises(TypeError, match=r"l0.weight_ih is missing"):
        SINGLE.apply({}, PACKED)


def test_a_parameter_sharded_under_an_explicit_mesh_is_named_with_the_way_out():
    spec = jax.sharding.PartitionSpec(None, "model")
    expected = SINGLE.apply(SINGLE_PARAMS, PACKED)
    mesh = jax.make_mesh((2,), ("model",))
    assert mesh.axis_types == (jax.sharding.AxisType.Explicit,)
    with jax.set_mesh(mesh):
        params = jax.tree.map(jnp.asarray, SINGLE_PARAMS)
        params["l0"]["weight_hh"] = jax.device_put(params["l0"]["weight_hh"], jax.sharding.NamedSharding(mesh, spec))
        with pytest.raises(ValueError, match=r"l0.weight_hh is sharded by .*'model'.*AxisType.Auto.*auto_axes"):
            SINGLE.apply(params, PACKED)
        automatic = jax.sharding.auto_axes(SINGLE.apply, out_sharding=jax.sharding.PartitionSpec())
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), automatic(params, PACKED), expected)


@pytest.mark.parametrize("params", [None, {}, {"l0": {}}, [jnp.ones(3)]])
def test_what_is_no_parameters_is_refused(params):
    with pytest.raises(TypeError, match=r"params do not match LSTM.*l0.weight_ih is missing"):
        SINGLE.apply(params, PACKED)


def test_a_seed_is_no_key():
    with pytest.raises(TypeError, match=r"random key, such as jax.random.key\(0\), got 7"):
        SINGLE.init(7)  # type: ignore[arg-type]
