"""Weights from and to Haiku's recurrent cores. Their parameters are dicts, so Haiku is never imported.

    LSTM         one linear for [x, h], its gates in the order i, g, f, o. It adds 1 to f, so b_f = b_ih + b_hh - 1.
    VanillaRNN   linear for x, linear_1 for h, each with a bias; always relu.
    GRU          w_i, w_h and b with the gates z, r, a. r multiplies h before the product, as in
                 jaxpack.GRU(..., reset_after=False), and z is the share of the new state, PyTorch's that of the old
                 one: since 1 - sigmoid(x) = sigmoid(-x), the weights of z change their sign.

The convolutional LSTMs are in _conv_lstm.py. Haiku has no stacks and no bidirectional layers, so there is one dict for
each layer and direction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxpack._cells.gru import ResetBeforeGRUCell
from jaxpack._cells.lstm import LSTMCell
from jaxpack._cells.rnn import RNNCell
from jaxpack._layers.recurrent_layer import RecurrentLayer
from jaxpack._stepped.conv import ConvLSTM
from jaxpack.interop._conv_lstm import from_two_convolutions, one_entry, to_two_convolutions
from jaxpack.interop._weights import (
    Weights,
    check_convertible,
    check_count,
    name_entries,
    params_from_weights,
    to_exact_numpy,
    weights_from_params,
)

CoreParams = Mapping[str, Mapping[str, Any]]

_LSTM_GATES = ("i", "g", "f", "o")
_GRU_GATES = ("z", "r", "n")
_GRU_NAMES = ("w_i", "w_h", "b")
_CONVOLUTIONS = ("input_to_hidden", "hidden_to_hidden")


def from_haiku(layer: RecurrentLayer | ConvLSTM, cells: CoreParams | Iterable[CoreParams]) -> Any:
    """Returns a layer's parameters from those of Haiku's LSTM, GRU, VanillaRNN, Conv1DLSTM, Conv2DLSTM or Conv3DLSTM.

    Exact, except that the sum of a convolutional LSTM's two biases and the 1 added to f is rounded once. An LSTM's
    bias goes to bias_ih, and the 1 that Haiku adds to the forget gate to bias_hh, so no bit is lost.

    Examples:
      >>> linear = {"w": np.zeros((2 + 4, 16), np.float32), "b": np.zeros(16, np.float32)}
      >>> params = from_haiku(jaxpack.LSTM(2, 4), {"lstm/linear": linear})  # of hk.LSTM(4) for 2 features
      >>> params["l0"]["bias_hh"][4:8].tolist()  # f is the second of the gates i, f, g, o
      [1.0, 1.0, 1.0, 1.0]

    Args:
      layer: a jaxpack.LSTM or ConvLSTM, a jaxpack.GRU with reset_after=False, or a jaxpack.RNN with
        nonlinearity="relu".
      cells: the parameters of one core for each layer and direction, in the order l0, l0_reverse, l1, ...; a single
        core needs no list. Only the last part of a name such as "my_net/~/lstm/linear" is read.

    Raises:
      KeyError: if a core lacks a part, or two parts have the same name.
      ValueError: if no core has the layer's equations; if there are not as many cells as
        layers and directions, a shape is not the layer's, a layer without biases is given some, or JAX would round a
        weight.
      TypeError: if a core is not a dict, or its parameters are traced.
    """
    if isinstance(layer, ConvLSTM):
        where, cell = one_entry(cells, "cells")
        of_x, of_h = _linears(cell, _CONVOLUTIONS, where)
        return from_two_convolutions(layer, of_x, of_h, where)
    _check(layer)
    found = name_entries(cells, "cells")
    check_count(len(found), len(layer.shapes), "cells", "layer and direction")
    if isinstance(layer.cell, RNNCell):
        return params_from_weights(layer, [(where, _from_vanilla(cell, where)) for where, cell in found])
    if isinstance(layer.cell, ResetBeforeGRUCell):
        return params_from_weights(layer, [(where, _from_gru(cell, where)) for where, cell in found], _GRU_GATES)
    sizes = [shapes["weight_ih"][0] for shapes in layer.shapes.values()]
    weights = [(where, _from_lstm(cell, size, where)) for size, (where, cell) in zip(sizes, found, strict=True)]
    return params_from_weights(layer, weights, _LSTM_GATES)


def to_haiku(layer: RecurrentLayer | ConvLSTM, params: Any) -> tuple[dict[str, dict[str, np.ndarray]], ...]:
    """Returns a layer's parameters for Haiku, a dict for each layer and direction (l0, l0_reverse, l1, ...).

    Exact, except that an LSTM's b_ih + b_hh, less the 1 that Haiku adds to the forget gate, is rounded once, as is
    Haiku's own sum; and a GRU's b_ih + b_hh. Parameters from `from_haiku` come back bit for bit. A VanillaRNN has its
    default double_bias=True. The second bias of a convolutional LSTM is -1 at f. The parameters of a GRU are those of
    the core itself, under "gru".

    Examples:
      >>> lstm = jaxpack.LSTM(2, 4)
      >>> (core,) = to_haiku(lstm, lstm.init(jax.random.key(0)))
      >>> hk_params = {f"lstm/{name}": value for name, value in core.items()}
      >>> hk_params["lstm/linear"]["w"].shape
      (6, 16)

    Raises:
      ValueError: if no core has the layer's equations.
      TypeError: if params are not the layer's, or are traced.
    """
    if isinstance(layer, ConvLSTM):
        parts = [dict(zip(("w", "b"), part, strict=True)) for part in to_two_convolutions(layer, params)]
        return (dict(zip(_CONVOLUTIONS, parts, strict=True)),)
    _check(layer)
    if isinstance(layer.cell, RNNCell):
        return tuple(
            {
                "linear": {"w": weights["weight_ih"], "b": weights["bias_ih"]},
                "linear_1": {"w": weights["weight_hh"], "b": weights["bias_hh"]},
            }
            for weights in weights_from_params(layer, params).values()
        )
    if isinstance(layer.cell, ResetBeforeGRUCell):
        return tuple(_to_gru(weights) for weights in weights_from_params(layer, params, _GRU_GATES).values())
    return tuple(_to_lstm(weights) for weights in weights_from_params(layer, params, _LSTM_GATES).values())


def _check(layer: RecurrentLayer) -> None:
    check_convertible(layer, "Haiku", (LSTMCell, ResetBeforeGRUCell, RNNCell))
    if isinstance(layer.cell, RNNCell) and layer.cell.nonlinearity != "relu":
        raise ValueError(f'{layer} has nonlinearity="tanh", but hk.VanillaRNN computes relu. Use nonlinearity="relu".')


def _from_lstm(cell: CoreParams, input_size: int, where: str) -> Weights:
    (linear,) = _linears(cell, ("linear",), where)
    w, b = linear["w"], linear["b"]
    forget = np.repeat(np.array([gate == "f" for gate in _LSTM_GATES], b.dtype), len(b) // len(_LSTM_GATES))
    return {"weight_ih": w[:input_size], "weight_hh": w[input_size:], "bias_ih": b, "bias_hh": forget}


def _to_lstm(weights: Weights) -> dict[str, dict[str, np.ndarray]]:
    b_ih, b_hh = weights["bias_ih"], weights["bias_hh"]
    size = len(b_ih) // len(_LSTM_GATES)
    forget = slice(_LSTM_GATES.index("f") * size, (_LSTM_GATES.index("f") + 1) * size)
    bias = b_ih + b_hh
    bias[forget] = b_ih[forget].astype(float) + (b_hh[forget].astype(float) - 1)
    return {"linear": {"w": np.concatenate([weights["weight_ih"], weights["weight_hh"]]), "b": bias}}


def _from_gru(cell: CoreParams, where: str) -> Weights:
    _check_core(cell, where)
    parts = [part for part in cell.values() if set(part) == set(_GRU_NAMES)]
    if len(cell) != 1 or len(parts) != 1:
        raise KeyError(
            f"{where} must hold the parameters of one hk.GRU, {{name: {{'w_i': ..., 'w_h': ..., 'b': ...}}}}, got "
            f"{ {name: sorted(part) for name, part in cell.items()} }."
        )
    (name,), (part,) = cell, parts
    w_i, w_h, b = (to_exact_numpy(part[key], f"{where}[{name!r}][{key!r}]") for key in _GRU_NAMES)
    weights = {"weight_ih": w_i, "weight_hh": w_h, "bias_ih": b, "bias_hh": np.zeros_like(b)}
    return {key: _negate_z(value) for key, value in weights.items()}


def _to_gru(weights: Weights) -> dict[str, dict[str, np.ndarray]]:
    weights = {key: _negate_z(value) for key, value in weights.items()}
    values = weights["weight_ih"], weights["weight_hh"], weights["bias_ih"] + weights["bias_hh"]
    return {"gru": dict(zip(_GRU_NAMES, values, strict=True))}


def _negate_z(array: np.ndarray) -> np.ndarray:
    """Returns the weights of the gates z, r, n, with those of z of the other sign; 0 stays 0."""
    z, rest = np.split(array, [array.shape[-1] // len(_GRU_GATES)], axis=-1)
    return np.concatenate([np.zeros_like(z) - z, rest], axis=-1)


def _from_vanilla(cell: CoreParams, where: str) -> Weights:
    x, h = _linears(cell, ("linear", "linear_1"), where)
    return {"weight_ih": x["w"], "weight_hh": h["w"], "bias_ih": x["b"], "bias_hh": h["b"]}


def _linears(cell: CoreParams, names: tuple[str, ...], where: str) -> list[Weights]:
    """Returns the linear or convolution modules of a core, found by the last part of their names.

    Where there is no bias it is zeros.
    """
    _check_core(cell, where)
    if sorted(name.rpartition("/")[2] for name in cell) != sorted(names):
        raise KeyError(
            f"{where} must hold the parameters of one core, whose names end in {list(names)}, got {sorted(cell)}. Pick "
            f"those of the core: {{k: v for k, v in params.items() if k.startswith('lstm/')}}."
        )
    found = {
        name.rpartition("/")[2]: {
            key: to_exact_numpy(value, f"{where}[{name!r}][{key!r}]") for key, value in part.items()
        }
        for name, part in cell.items()
    }
    return [{"b": np.zeros_like(found[name]["w"], shape=found[name]["w"].shape[-1]), **found[name]} for name in names]


def _check_core(cell: object, where: str) -> None:
    """Raises TypeError unless it is a dict of dicts."""
    if not isinstance(cell, Mapping) or not all(isinstance(part, Mapping) for part in cell.values()):
        raise TypeError(f"{where} must be a dict of Haiku's parameters, got {type(cell).__name__}.")
