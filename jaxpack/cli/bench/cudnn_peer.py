"""cuDNN's LSTM in `jaxpack bench`, through jax.experimental.rnn."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpack.cli.bench.calls import Calls, Missing, jax_calls
from jaxpack.cli.bench.workloads import Workload


def cudnn_calls(workload: Workload) -> Calls:
    """Makes the calls of jax.experimental.rnn.lstm from a padded batch to padded outputs.

    cuDNN takes the lengths: the backward direction starts at each sequence's own end, and outputs past it are 0.
    """
    if (workload.cell, workload.dtype) != ("lstm", "float32"):
        raise Missing("jax.experimental.rnn has only an LSTM in float32")
    if jax.default_backend() != "gpu":
        raise Missing("it needs a CUDA device")
    rnn = importlib.import_module("jax.experimental.rnn")
    sizes = workload.features, workload.hidden_size, workload.num_layers
    carries = workload.num_layers * workload.layer.num_directions

    def apply(weights: jax.Array, inputs: jax.Array, lengths: jax.Array) -> jax.Array:
        zeros = jnp.zeros((carries, workload.batch_size, workload.hidden_size), inputs.dtype)
        outputs, _, _ = rnn.lstm(inputs, zeros, zeros, weights, lengths, *sizes, 0.0, workload.bidirectional)
        return outputs

    arrays = workload.inputs, workload.int32_lengths, workload.cotangent
    return jax_calls(apply, flat_weights(workload), *arrays, workload.padded_plan.size, same_weights=True)


def flat_weights(workload: Workload) -> np.ndarray:
    """Returns the layer's weights in one vector, as cuDNN takes them.

    Its gates have PyTorch's order. First come the matrices W and U of each layer and direction, then their biases.
    """
    state: dict[str, Any] = workload.layer.to_torch(workload.params)
    groups = list(workload.params)  # l0, l0_reverse, l1, ...
    parts = [state[f"{kind}_{group}"] for kinds in _KINDS for group in groups for kind in kinds]
    return np.concatenate([np.ravel(part) for part in parts])


_KINDS = (("weight_ih", "weight_hh"), ("bias_ih", "bias_hh"))
