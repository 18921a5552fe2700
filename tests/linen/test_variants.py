"""The modules of further cells: each is its layer, with its options."""

from typing import Any

import jax
import numpy as np
import oracles
import pytest

import jaxpack
import jaxpack.linen

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
    options = {"dropout": 0.5, **OPTIONS, **OWN.get(name, {})}
    assert getattr(jaxpack.linen, name)(H, **options).layer(F) == getattr(jaxpack, name)(F, H, **options)
    assert getattr(jaxpack.linen, name)(H).layer(F) == getattr(jaxpack, name)(F, H)


@pytest.mark.parametrize("name", ["MGU", "LayerNormLSTM"])
def test_a_module_computes_what_its_layer_does(name):
    module = getattr(jaxpack.linen, name)(H)
    x = oracles.random_batch([3, 5], F, dtype=np.float32)
    plan = jaxpack.plan_padded(2, 5)
    variables = module.init(jax.random.key(0), x, seq_lengths=[3, 5], plan=plan)
    expected = module.layer(F).apply(variables["params"], x, lengths=[3, 5], plan=plan)
    found = module.apply(variables, x, seq_lengths=[3, 5], plan=plan)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
