import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxpack import GRU, LSTM, RNN

LAYERS = [
    RNN(3, 4),
    RNN(3, 4, num_layers=2, nonlinearity="relu", bias=False),
    LSTM(3, 4, num_layers=3, bidirectional=True),
    LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2),
    GRU(3, 4, num_layers=2, bidirectional=True, bias=False),
]
each_layer = pytest.mark.parametrize("layer", LAYERS, ids=str)


def torch_module(layer):
    options = {f: getattr(layer, f) for f in layer.__dataclass_fields__ if f not in oracles.NOT_TORCHS}
    return getattr(oracles.torch.nn, type(layer).__name__)(layer.input_size, layer.hidden_size, **options)


@oracles.needs_torch
@each_layer
def test_torch_state_dicts_go_in_and_out_unchanged(layer):
    state_dict = torch_module(layer).state_dict()
    params = layer.from_torch(state_dict)
    assert jax.tree.map(jnp.shape, params) == layer.shapes
    back = layer.to_torch(params)
    assert list(back) == list(state_dict)
    for key, tensor in state_dict.items():
        np.testing.assert_array_equal(back[key], tensor.numpy())
        assert back[key].dtype == np.float32
    torch_module(layer).load_state_dict({k: oracles.torch.from_numpy(v) for k, v in back.items()})


@each_layer
def test_numpy_arrays_round_trip_without_torch(layer):
    params = layer.init(jax.random.key(0))
    again = layer.from_torch(layer.to_torch(params))
    assert again.keys() == params.keys()
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_weights_are_transposed_and_biases_are_not():
    state_dict = LSTM(3, 4).to_torch(LSTM(3, 4).init(jax.random.key(0)))
    assert {key: value.shape for key, value in state_dict.items()} == {
        "weight_ih_l0": (16, 3),
        "weight_hh_l0": (16, 4),
        "bias_ih_l0": (16,),
        "bias_hh_l0": (16,),
    }


@oracles.needs_torch
def test_bfloat16_tensors_come_in_exactly():
    module = oracles.torch.nn.GRU(3, 4).to(oracles.torch.bfloat16)
    params = GRU(3, 4).from_torch(module.state_dict())
    assert params["l0"]["weight_ih"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        params["l0"]["weight_ih"].astype(jnp.float32), module.weight_ih_l0.detach().float().numpy().T
    )


def test_wrong_keys_and_shapes_are_named():
    layer = GRU(3, 4)
    good = layer.to_torch(layer.init(jax.random.key(0)))
    with pytest.raises(KeyError, match=r"missing \['bias_hh_l0'\]"):
        layer.from_torch({k: v for k, v in good.items() if k != "bias_hh_l0"})
    with pytest.raises(KeyError, match=r"not known \['weight_ih_l1'\]"):
        layer.from_torch({**good, "weight_ih_l1": good["weight_ih_l0"]})
    with pytest.raises(ValueError, match=r"state_dict\['weight_ih_l0'\] must have shape \(12, 3\), got \(3, 12\)"):
        layer.from_torch({**good, "weight_ih_l0": good["weight_ih_l0"].T})
    with pytest.raises(ValueError, match=r"state_dict\['bias_hh_l0'\] has dtype float64, which JAX would round"):
        layer.from_torch({**good, "bias_hh_l0": good["bias_hh_l0"].astype(np.float64)})
    with pytest.raises(KeyError, match=r"Strip the prefix: .*removeprefix\('model.rnn.'\)"):
        layer.from_torch({f"model.rnn.{k}": v for k, v in good.items()})


def test_params_of_another_layer_are_not_written():
    with pytest.raises(TypeError, match=r"l1.weight_ih is missing"):
        GRU(3, 4, num_layers=2).to_torch(GRU(3, 4).init(jax.random.key(0)))


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.bool_, np.complex64])
def test_weights_that_are_no_floating_numbers_are_named(dtype):
    floats = GRU(3, 4).to_torch(GRU(3, 4).init(jax.random.key(0)))
    state_dict = {key: value.astype(dtype) for key, value in floats.items()}
    with pytest.raises(TypeError, match=r"state_dict\['weight_ih_l0'\] must have a floating dtype, got"):
        GRU(3, 4).from_torch(state_dict)
