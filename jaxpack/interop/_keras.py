"""Weights from and to Keras 3's recurrent layers, read through the layers given: Keras is never imported.

    LSTM        kernel, recurrent_kernel, bias with the gates i, f, c, o (PyTorch's g is Keras's c). unit_forget_bias
                only says how the bias is drawn.
    GRU         kernel, recurrent_kernel, bias [2, 3H] with the gates z, r, h. reset_after=True is PyTorch's equation.
                With reset_after=False, jaxpack.GRU(..., reset_after=False), there is one bias, [3H].
    SimpleRNN   kernel, recurrent_kernel, bias.
    ConvLSTMs   are in _conv_lstm.py.

A Bidirectional holds the forward layer's arrays, then the backward layer's. A StackedRNNCells holds those of one cell
after the other. A cell has the weights of the layer of its name. Weights do not tell how outputs are returned
(merge_mode, return_sequences) and in which order a layer reads (go_backwards): .docs/guide/weights.md says how to run
either.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxpack._cells.cell import Cell
from jaxpack._cells.gru import GRUCell, ResetBeforeGRUCell
from jaxpack._cells.lstm import LSTMCell
from jaxpack._cells.rnn import RNNCell
from jaxpack._layers.recurrent_layer import RecurrentLayer
from jaxpack._stepped.conv import ConvLSTM
from jaxpack.interop._conv_lstm import from_keras_layer, one_entry, to_keras_layer
from jaxpack.interop._weights import (
    Weights,
    check_convertible,
    check_count,
    group_directions,
    is_nonlinearity,
    is_pair,
    merge_biases,
    merged_error,
    name_entries,
    params_from_weights,
    reversed_error,
    to_exact_numpy,
    weights_from_params,
)

_KINDS: dict[type[Cell], str] = {
    LSTMCell: "LSTM",
    GRUCell: "GRU",
    ResetBeforeGRUCell: "GRU",
    RNNCell: "SimpleRNN",
}
# The order of gates where it differs from the cell's.
_GATES: dict[type[Cell], tuple[str, ...]] = {GRUCell: ("z", "r", "n"), ResetBeforeGRUCell: ("z", "r", "n")}
_WAYS_OUT = {
    "units": "hidden_size must be Keras's units.",
    "activation": "Weights cannot make up for another function: rebuild the Keras layer, and train it again.",
    "recurrent_activation": "Weights cannot make up for another function: rebuild the Keras layer, and train it again.",
    "reset_after": "No weights make the two equal: give both the same reset_after.",
}


def from_keras(layer: RecurrentLayer | ConvLSTM, keras_layers: Any | Iterable[Any]) -> Any:
    """Returns a layer's parameters from those of Keras layers. Exact.

    Weights do not depend on dropout (which is off in inference), return_sequences, return_state, stateful and masking.
    Nor do they depend on two options that say how to run the layer:

      merge_mode      Give the layer the same merge ("mean" for "ave"). Below the last Keras layer it must be the same.
      go_backwards    If the first Keras layer has it, run the layer on jaxpack.reverse_sequences(packed).

    Examples:
      >>> import keras
      >>> keras_layer = keras.layers.SimpleRNN(4)
      >>> keras_layer.build((2, 3, 2))
      >>> params = from_keras(jaxpack.RNN(2, 4), keras_layer)
      >>> params["l0"]["weight_ih"].shape
      (2, 4)

    Args:
      layer: a jaxpack.RNN, LSTM, GRU or ConvLSTM.
      keras_layers: a Keras layer for each layer of the stack, from the input up; a single one needs no list. It is an
        LSTM, GRU or SimpleRNN, their cell (LSTMCell, ...), or a keras.layers.RNN of such a cell. A StackedRNNCells, or
        an RNN of it, counts as one layer for each of its cells. For a bidirectional layer each is a Bidirectional, or
        a pair (forward, backward) of the above. For a ConvLSTM it is a ConvLSTM1D, 2D or 3D with padding="same".

    Raises:
      ValueError: if a Keras layer computes another function than the layer, or has no weights yet; if merge_mode
        (except the last one's) or go_backwards (except the first one's) changes what the next layer reads; if a shape
        is not the layer's, a layer without biases is given some, or JAX would round a weight.
      TypeError: if a Keras layer is of another class.
    """
    if isinstance(layer, ConvLSTM):
        where, keras_layer = one_entry(keras_layers, "keras_layers")
        return from_keras_layer(layer, keras_layer, where)
    check_convertible(layer, "Keras", _KINDS)
    entries = name_entries(keras_layers, "keras_layers", one_pair=layer.bidirectional and layer.num_layers == 1)
    found = [cell for where, entry in entries for cell in _cells(layer, entry, where)]
    check_count(len(found) // layer.num_directions, layer.num_layers, "keras_layers", "layer")
    _check_order(layer, entries)
    return params_from_weights(
        layer, [(where, _weights(layer.cell, each, where)) for where, each in found], _gates(layer.cell)
    )


def to_keras(layer: RecurrentLayer | ConvLSTM, params: Any) -> tuple[list[np.ndarray], ...]:
    """Returns a layer's parameters for Keras: for each layer of the stack the list that `set_weights` takes.

    The Keras layers are LSTM, GRU with the layer's reset_after, and SimpleRNN with activation=nonlinearity, or an RNN
    of such a cell; and ConvLSTM1D, 2D or 3D with padding="same"; with use_bias=False if the layer has no biases. A
    bidirectional layer's list is for a Bidirectional: its first half for the forward layer, its second for the backward
    one. An RNN of StackedRNNCells takes the lists of all layers, one after the other. All but a GRU with
    reset_after=True hold the sum of the two biases, which computes the same.

    Examples:
      >>> gru = jaxpack.GRU(2, 4)
      >>> (arrays,) = to_keras(gru, gru.init(jax.random.key(0)))
      >>> [array.shape for array in arrays]  # for the set_weights of a built keras.layers.GRU(4)
      [(2, 12), (4, 12), (2, 12)]

    Raises:
      ValueError: if no Keras layer has the layer's equations, or the layer has a projection, which none has.
      TypeError: if params are not the layer's, or are traced.
    """
    if isinstance(layer, ConvLSTM):
        return (to_keras_layer(layer, params),)
    check_convertible(layer, "Keras", _KINDS)
    weights = weights_from_params(layer, params, _gates(layer.cell))
    arrays = [_arrays(layer, each) for each in weights.values()]
    return tuple([array for part in parts for array in part] for parts in group_directions(layer, arrays))


def _cells(layer: RecurrentLayer, entry: Any, where: str) -> list[tuple[str, Any]]:
    """Returns the Keras layers or cells in an entry, checked, in the layer's order, with their names in errors."""
    if not layer.bidirectional:
        found = _unwrapped(entry, where)
    else:
        found = [cell for part, each in _halves(layer, entry, where) for cell in _unwrapped(each, part)]
        if len(found) > 2:
            raise ValueError(
                f"{where} takes each direction through {len(found) // 2} cells by itself, but in {layer} the layers "
                f"above the first read both. Convert each direction for a jaxpack layer that is not bidirectional."
            )
    for part, each in found:
        _check_cell(layer, each, part)
    return found


def _halves(layer: RecurrentLayer, entry: Any, where: str) -> list[tuple[str, Any]]:
    """Returns the forward and the backward part of an entry, with their names in errors."""
    if is_pair(entry):
        return [(f"{where}[{i}]", each) for i, each in enumerate(entry)]
    if _kind(entry) != "Bidirectional":
        raise TypeError(
            f"{where} must be a keras.layers.Bidirectional for {layer}, or a pair (forward, backward), got "
            f"{_described(entry)}."
        )
    return [(f"{where}.{part}", getattr(entry, part)) for part in ("forward_layer", "backward_layer")]


def _unwrapped(entry: Any, where: str) -> list[tuple[str, Any]]:
    """Returns the cells of an RNN or a StackedRNNCells, or the entry itself, with their names in errors."""
    if _kind(entry) == "RNN":
        entry, where = entry.cell, f"{where}.cell"
    if _kind(entry) == "StackedRNNCells":
        return [(f"{where}.cells[{i}]", cell) for i, cell in enumerate(entry.cells)]
    return [(where, entry)]


def _check_order(layer: RecurrentLayer, entries: list[tuple[str, Any]]) -> None:
    """Raises ValueError unless each Keras layer passes on its outputs joined and in order as the layer does."""
    for i, (where, entry) in enumerate(entries):
        parts = [each for _, each in _halves(layer, entry, where)] if layer.bidirectional else [entry]
        backwards = [bool(getattr(part, "go_backwards", False)) for part in parts]
        if len(parts) == 2 and all(backwards):
            raise ValueError(f"{where} has go_backwards=True in both directions. Only the backward one may have it.")
        if i and backwards[0]:
            raise reversed_error(layer, f"{where} has go_backwards=True", "Keras layer")
        merge_mode = getattr(entry, "merge_mode", "concat")
        if i < len(entries) - 1 and merge_mode != {"mean": "ave"}.get(str(layer.merge), layer.merge):
            raise merged_error(layer, f"{where} has merge_mode={merge_mode!r}", "Keras layer")


def _kind(entry: Any) -> str:
    """Returns the name of a Keras class, "" for another library's class of that name."""
    return type(entry).__name__ if hasattr(entry, "get_config") else ""


def _described(entry: Any) -> str:
    return f"a {type(entry).__module__}.{type(entry).__qualname__}"


def _check_cell(layer: RecurrentLayer, each: Any, where: str) -> None:
    """Raises TypeError or ValueError, with the way out, unless a Keras layer or cell computes what the layer does."""
    kind = _KINDS[type(layer.cell)]
    if _kind(each) not in (kind, f"{kind}Cell"):
        hint = " Use bidirectional=True." if _kind(each) == "Bidirectional" and not layer.bidirectional else ""
        raise TypeError(
            f"{where} must be a keras.layers.{kind} for {layer}, or a {kind}Cell, got {_described(each)}.{hint}"
        )
    activation = layer.cell.nonlinearity if isinstance(layer.cell, RNNCell) else "tanh"
    needed: dict[str, Any] = {
        "units": layer.hidden_size,
        "activation": activation,
        "recurrent_activation": "sigmoid",
        "reset_after": isinstance(layer.cell, GRUCell),
    }
    config = each.get_config()
    for option, value in needed.items():
        given = config.get(option, value)
        if given != value and not (option.endswith("activation") and _is_equal(given, getattr(each, option), value)):
            raise ValueError(
                f"{where} has {option}={given!r}, but {layer} needs {option}={value!r}. {_WAYS_OUT[option]}"
            )


def _is_equal(given: Any, function: Any, expected: str) -> bool:
    """Returns True if an activation without a name in Keras, such as jax.numpy.tanh, computes what is expected."""
    return not isinstance(given, str) and is_nonlinearity(function, expected)


def _weights(cell: Cell, keras_layer: Any, where: str) -> Weights:
    """Returns the weights of one direction, with the gates in Keras's order."""
    arrays = [to_exact_numpy(array, f"{where}: weight {i}") for i, array in enumerate(keras_layer.get_weights())]
    if not arrays:
        raise ValueError(f"{where} has no weights yet: build it first, by calling it on inputs.")
    kernel, recurrent = arrays[:2]
    zeros = np.zeros_like(kernel[0])
    bias = arrays[2] if keras_layer.get_config()["use_bias"] else zeros
    b_ih, b_hh = bias if isinstance(cell, GRUCell) and bias.ndim == 2 else (bias, zeros)
    return {"weight_ih": kernel, "weight_hh": recurrent, "bias_ih": b_ih, "bias_hh": b_hh}


def _arrays(layer: RecurrentLayer, weights: Weights) -> list[np.ndarray]:
    """Returns the arrays that one direction's `set_weights` takes."""
    kernels = [weights["weight_ih"], weights["weight_hh"]]
    if not layer.bias:
        return kernels
    if isinstance(layer.cell, GRUCell):
        return [*kernels, np.stack([weights["bias_ih"], weights["bias_hh"]])]
    return [*kernels, merge_biases(layer.cell, weights)["bias_ih"]]


def _gates(cell: Cell) -> tuple[str, ...]:
    return _GATES.get(type(cell), cell.gates)
