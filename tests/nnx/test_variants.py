"""The modules of further cells: each is its layer, with its options."""

from typing import Any

import jax
import numpy as np
import oracles
import pytest
from flax import nnx

import jaxpack
import jaxpack.nnx

F, H = 3, 4
OPTIONS: dict[str, Any] = {"num_layers": 2, "bias": False, "bidirectional": True, "learned_initial_state": True}
OPTIONS |= {"regularization": jaxpack.Regularization(zoneout=0.1)}
OWN: dict[str, dict[str, Any]] = {
    "GRU": {"reset_after": False},
    "MGU": {"reset": "after"},
    "IndRNN": {"nonlinearity": "tanh"},
}
NAMES = ("GRU", "MGU", "IndRNN", "PeepholeLSTM", "LayerNormLSTM", "LayerNormGRU")


@pytest.mark.parametrize("name", NAMES)
def test_a_module_is_its_layer(name):
    options = OPTIONS | OWN.get(name, {})
    module = getattr(jaxpack.nnx, name)(F, H, dropout=0.5, **options, rngs=nnx.Rngs(0))
    layer = getattr(jaxpack, name)(F, H, dropout=0.5, **options)
    assert module.layer == layer
    assert module.rngs is not None  # the stream of its masks
    params = nnx.to_pure_dict(nnx.state(module.params))
    assert jax.tree.map(np.shape, params) == layer.shapes
    plain = getattr(jaxpack.nnx, name)(F, H, rngs=nnx.Rngs(0))
    assert plain.layer == getattr(jaxpack, name)(F, H)


@pytest.mark.parametrize("name", ["MGU", "LayerNormLSTM"])
def test_a_module_computes_what_its_layer_does(name):
    module = getattr(jaxpack.nnx, name)(F, H, rngs=nnx.Rngs(0))
    x = oracles.random_batch([3, 5], F, dtype=np.float32)
    plan = jaxpack.plan_padded(2, 5)
    params = nnx.to_pure_dict(nnx.state(module.params))
    expected = module.layer.apply(params, x, lengths=[3, 5], plan=plan)
    jax.tree.map(np.testing.assert_array_equal, module(x, seq_lengths=[3, 5], plan=plan), expected)
