"""Weights from and to Keras 3's LSTM, GRU and SimpleRNN, read through the layers given: Keras is never imported.

    LSTM        kernel, recurrent_kernel, bias with the gates i, f, c, o (PyTorch's g is Keras's c). unit_forget_bias
                only says how the bias is drawn.
    GRU         kernel, recurrent_kernel, bias [2, 3H] with the gates z, r, h. reset_after=True is PyTorch's equation;
                with reset_after=False r multiplies h before the product, which no weights can undo.
    SimpleRNN   kernel, recurrent_kernel, bias.

A Bidirectional holds the forward layer's arrays, then the backward layer's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxpack.cells import Cell, GRUCell, LSTMCell, RNNCell
from jaxpack.interop.weights import Weights, as_params, as_weights, check_cell, from_library, merge_biases, one_each
from jaxpack.layer import LayerParams, RecurrentLayer

_KINDS: dict[type[Cell], str] = {LSTMCell: "LSTM", GRUCell: "GRU", RNNCell: "SimpleRNN"}
_GATES: dict[type[Cell], tuple[str, ...]] = {GRUCell: ("z", "r", "n")}  # where they differ from the cell's order
_WAYS_OUT = {
    "units": "hidden_size must be Keras's units.",
    "activation": "No weights make up for another function: rebuild the Keras layer, and train it again.",
    "recurrent_activation": "No weights make up for another function: rebuild the Keras layer, and train it again.",
    "reset_after": "There r multiplies h before the product, which no weights undo: rebuild the Keras layer with "
    "reset_after=True (its default) and train it again, or run it as your own step in jaxpack.packed_scan.",
    "go_backwards": "Take the weights with a layer that reads forwards, and call it on jaxpack.reverse_sequences.",
}


def from_keras(layer: RecurrentLayer, keras_layers: Any | Iterable[Any]) -> LayerParams:
    """A layer's parameters from those of Keras layers. Exact.

    Dropout is no weight: a Keras layer that has some gives the same outputs in inference.

    Examples:
      >>> import keras
      >>> keras_layer = keras.layers.SimpleRNN(4)
      >>> keras_layer.build((2, 3, 2))
      >>> params = from_keras(jaxpack.RNN(2, 4), keras_layer)
      >>> params["l0"]["weight_ih"].shape
      (2, 4)

    Args:
      layer: a jaxpack.RNN, LSTM or GRU.
      keras_layers: one for each layer of the stack, from the input up, or that of a single layer: LSTM, GRU or
        SimpleRNN, or for a bidirectional layer a Bidirectional of them.

    Raises:
      ValueError: if a Keras layer computes another function than the layer, or has no weights yet; if a shape is not
        the layer's, a layer without biases is given some, or JAX would round a weight.
      TypeError: if a Keras layer is of another kind.
    """
    check_cell(layer, "Keras")
    entries = one_each(keras_layers, layer.num_layers, "keras_layers", "layer")
    found = [direction for where, entry in entries for direction in _directions(layer, entry, where)]
    return as_params(layer, [(where, _weights(layer.cell, each, where)) for where, each in found], _gates(layer.cell))


def to_keras(layer: RecurrentLayer, params: LayerParams) -> tuple[list[np.ndarray], ...]:
    """A layer's parameters for Keras, for each layer of the stack what its `set_weights` takes.

    The Keras layers are LSTM, GRU, and SimpleRNN with activation=nonlinearity; with use_bias=False if the layer has
    no biases. Of two biases LSTM and SimpleRNN hold the sum, which is what the layer computes with.

    Examples:
      >>> gru = jaxpack.GRU(2, 4)
      >>> (arrays,) = to_keras(gru, gru.init(jax.random.key(0)))
      >>> [array.shape for array in arrays]  # for the set_weights of a built keras.layers.GRU(4)
      [(2, 12), (4, 12), (2, 12)]

    Raises:
      ValueError: if the layer has a projection, which no Keras layer has.
      TypeError: if params are not the layer's, or traced.
    """
    check_cell(layer, "Keras")
    weights = as_weights(layer, params, _gates(layer.cell))
    arrays = [_arrays(layer, each) for each in weights.values()]
    if not layer.bidirectional:
        return tuple(arrays)
    return tuple(forward + backward for forward, backward in zip(arrays[::2], arrays[1::2], strict=True))


def _directions(layer: RecurrentLayer, entry: Any, where: str) -> list[tuple[str, Any]]:
    """The Keras layer of each direction, and what to call it, checked."""
    kind = _KINDS[type(layer.cell)]
    _check_kind(layer, entry, where, "Bidirectional" if layer.bidirectional else kind)
    if not layer.bidirectional:
        _check_options(layer, entry, where, backwards=False)
        return [(where, entry)]
    merge_mode = entry.get_config()["merge_mode"]
    if merge_mode != "concat":
        raise ValueError(
            f"{where} has merge_mode={merge_mode!r}, but {layer} puts both directions side by side: "
            f"build it with merge_mode='concat' (the default), and merge the halves of jaxpack's output yourself."
        )
    found = [(f"{where}.{part}", getattr(entry, part)) for part in ("forward_layer", "backward_layer")]
    for backwards, (part, each) in enumerate(found):
        _check_kind(layer, each, part, kind)
        _check_options(layer, each, part, bool(backwards))
    return found


def _check_kind(layer: RecurrentLayer, keras_layer: Any, where: str, kind: str) -> None:
    """Raises TypeError unless a Keras layer is of this class, and not just of its name."""
    given = type(keras_layer)
    if given.__name__ != kind or not hasattr(keras_layer, "get_config"):
        raise TypeError(
            f"{where} must be a keras.layers.{kind} for {layer}, got a {given.__module__}.{given.__qualname__}."
        )


def _check_options(layer: RecurrentLayer, keras_layer: Any, where: str, backwards: bool) -> None:
    """Raises ValueError, with the way out, unless a Keras layer computes what the layer computes."""
    activation = layer.cell.nonlinearity if isinstance(layer.cell, RNNCell) else "tanh"
    needed = {
        "units": layer.hidden_size,
        "activation": activation,
        "recurrent_activation": "sigmoid",
        "reset_after": True,
        "go_backwards": backwards,
    }
    config = keras_layer.get_config()
    for option, value in needed.items():
        if option in config and config[option] != value:
            raise ValueError(
                f"{where} has {option}={config[option]!r}, but {layer} needs {option}={value!r}. {_WAYS_OUT[option]}"
            )


def _weights(cell: Cell, keras_layer: Any, where: str) -> Weights:
    """The weights of one direction, its gates in Keras's order."""
    arrays = [from_library(array, f"{where}: weight {i}") for i, array in enumerate(keras_layer.get_weights())]
    if not arrays:
        raise ValueError(f"{where} has no weights yet: build it first, by calling it on inputs.")
    kernel, recurrent = arrays[:2]
    none = np.zeros_like(kernel[0])
    bias = arrays[2] if keras_layer.get_config()["use_bias"] else none
    b_ih, b_hh = bias if isinstance(cell, GRUCell) and bias.ndim == 2 else (bias, none)
    return {"weight_ih": kernel, "weight_hh": recurrent, "bias_ih": b_ih, "bias_hh": b_hh}


def _arrays(layer: RecurrentLayer, weights: Weights) -> list[np.ndarray]:
    """What one direction's `set_weights` takes."""
    kernels = [weights["weight_ih"], weights["weight_hh"]]
    if not layer.bias:
        return kernels
    if isinstance(layer.cell, GRUCell):
        return [*kernels, np.stack([weights["bias_ih"], weights["bias_hh"]])]
    return [*kernels, merge_biases(layer.cell, weights)["bias_ih"]]


def _gates(cell: Cell) -> tuple[str, ...]:
    return _GATES.get(type(cell), cell.gates)
