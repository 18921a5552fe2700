"""DeepRNN in nnx and linen: parameters, modes and keys of dropout. The contract compares their programs."""

import jax
import numpy as np
import pytest
from flax import nnx

import jaxpack
import jaxpack.linen
import jaxpack.nnx
from jaxpack import RNN, DeepRNN

LAYERS = [RNN(2, 8), RNN(8, 8)]
PACKED = jaxpack.pack_sequence([np.ones((n, 2), np.float32) for n in (3, 1)])


def test_an_nnx_stack_drops_in_training_alone_from_its_own_stream():
    stack = jaxpack.nnx.DeepRNN(LAYERS, dropout=0.5, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(stack.params))
    assert jax.tree.map(np.shape, params) == stack.layer.shapes
    first, second, given, again = (
        np.asarray(stack(PACKED, rngs=rngs)[0].data) for rngs in (None, None, jax.random.key(3), nnx.Rngs(dropout=3))
    )
    expected, _ = stack.layer.apply(params, PACKED, dropout_key=jax.random.key(3))
    np.testing.assert_array_equal(given, expected.data)
    assert len({each.tobytes() for each in (first, second, given, again)}) == 4
    stack.eval()
    expected, _ = DeepRNN(LAYERS).apply(params, PACKED)
    np.testing.assert_allclose(stack(PACKED)[0].data, expected.data, rtol=1e-6)
    np.testing.assert_array_equal(
        nnx.view(stack, deterministic=False)(PACKED, deterministic=True)[0].data, expected.data
    )


def test_a_linen_stack_takes_its_key_from_dropout_and_asks_whether_to():
    stack = jaxpack.linen.DeepRNN(LAYERS, dropout=0.5)
    assert hash(stack) == hash(jaxpack.linen.DeepRNN(tuple(LAYERS), dropout=0.5))
    variables = stack.init(jax.random.key(0), PACKED, deterministic=True)
    assert jax.tree.map(np.shape, variables["params"]) == stack.layer().shapes
    dropped, kept = (
        np.asarray(stack.apply(variables, PACKED, deterministic=off, rngs={"dropout": jax.random.key(1)})[0].data)
        for off in (False, True)
    )
    assert (dropped != kept).any()
    expected, _ = stack.layer().apply(variables["params"], PACKED, deterministic=True)
    np.testing.assert_array_equal(kept, expected.data)
    with pytest.raises(ValueError, match="deterministic"):
        stack.apply(variables, PACKED)
    with pytest.raises(ValueError, match=r"layers\[1\] \(RNN\) takes 8 features"):
        jaxpack.linen.DeepRNN([RNN(2, 4), RNN(8, 8)])
