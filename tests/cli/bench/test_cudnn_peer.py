"""cuDNN's LSTM against its own reference on a CPU, and bfloat16 in the libraries that `jaxpack bench gpu` measures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import rnn

from jaxpack.cli.bench.calls import Missing
from jaxpack.cli.bench.cudnn_peer import flat_weights
from jaxpack.cli.bench.peers import PEERS
from jaxpack.cli.bench.workloads import Workload

LENGTHS = np.array([3, 5, 2])


@pytest.mark.parametrize("stack", [{}, {"num_layers": 2, "bidirectional": True}])
def test_weights_and_lengths_of_cudnn_mean_what_its_reference_computes(stack):
    workload = Workload("tiny", LENGTHS, features=3, hidden_size=4, **stack)
    sizes = 3, 4, workload.num_layers
    weights = flat_weights(workload)
    assert weights.shape == (rnn.get_num_params_in_lstm(*sizes, workload.bidirectional),)
    unpacked = rnn.unpack_lstm_weights(jnp.asarray(weights), *sizes, workload.bidirectional)
    zeros = jnp.zeros((workload.num_layers * workload.layer.num_directions, 3, 4))
    arrays = workload.inputs, zeros, zeros, *unpacked, jnp.asarray(workload.int32_lengths)
    expected, _, _ = rnn.lstm_ref(*arrays, *sizes, 0.0, workload.bidirectional)
    found, _ = workload.layer.apply(workload.params, workload.inputs, lengths=LENGTHS, plan=workload.padded_plan)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_cudnn_is_called_with_the_batch_and_its_lengths(monkeypatch):
    # The call itself needs a device: it is replaced by the reference.
    def lstm(x, h_0, c_0, weights, lengths, features, hidden_size, num_layers, dropout, bidirectional):
        sizes = features, hidden_size, num_layers
        unpacked = rnn.unpack_lstm_weights(weights, *sizes, bidirectional)
        return rnn.lstm_ref(x, h_0, c_0, *unpacked, lengths, *sizes, dropout, bidirectional)

    workload = Workload("tiny", LENGTHS, features=3, hidden_size=4, bidirectional=True)
    expected, _ = PEERS["jaxpack-padded"](workload).training()
    monkeypatch.setattr(rnn, "lstm", lstm)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    calls = PEERS["jax-cudnn"](workload)
    loss, (weights, inputs) = calls.training()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert calls.same_weights
    assert np.any(np.asarray(weights))
    np.testing.assert_array_equal(np.any(np.asarray(inputs), axis=-1), workload.mask)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"cell": "gru"}, "LSTM in float32"), ({"dtype": "bfloat16"}, "LSTM in float32"), ({}, "needs a CUDA device")],
)
def test_cudnn_says_what_it_lacks(options, reason):
    with pytest.raises(Missing, match=reason):
        PEERS["jax-cudnn"](Workload("tiny", LENGTHS, features=3, hidden_size=4, **options))


@pytest.mark.parametrize("name", ["jaxpack-padded", "flax.nnx", "torch-packed", "torch-padded"])
def test_libraries_compute_in_bfloat16(name):
    if name.startswith("torch"):
        pytest.importorskip("torch", reason="torch is not installed on this Python")
    workload = Workload("tiny", LENGTHS, features=3, hidden_size=4, dtype="bfloat16")
    calls = PEERS[name](workload)
    loss, gradients = calls.training()
    assert "float32" in str(loss.dtype)
    assert {str(leaf.dtype).removeprefix("torch.") for leaf in jax.tree.leaves(gradients)} == {"bfloat16"}
    assert str(calls.forward().dtype).endswith("bfloat16")
    if calls.same_weights:
        exact = Workload("tiny", LENGTHS, features=3, hidden_size=4)
        output, _ = exact.layer.apply(exact.params, exact.inputs, lengths=LENGTHS, plan=exact.padded_plan)
        assert loss.item() == pytest.approx(float(np.sum(output * exact.cotangent)), abs=0.05)
