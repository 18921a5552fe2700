"""Weights from and to Haiku's LSTM and VanillaRNN, whose parameters are dicts: Haiku is never imported.

    LSTM         one linear for [x, h], its gates in the order i, g, f, o. It adds 1 to f, so b_f = b_ih + b_hh - 1.
    VanillaRNN   linear for x, linear_1 for h, each with a bias; always relu.
    GRU          r multiplies h before the product, where PyTorch's multiplies the product: no weights make them equal.

Haiku has no stacks or directions of its own, so there is one dict for each layer and direction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxpack._cells.gru import GRUCell
from jaxpack._cells.rnn import RNNCell
from jaxpack._layers.recurrent_layer import LayerParams, RecurrentLayer
from jaxpack.interop._weights import Weights, as_params, as_weights, check_cell, check_count, from_library, listed

CoreParams = Mapping[str, Mapping[str, Any]]

_LSTM_GATES = ("i", "g", "f", "o")


def from_haiku(layer: RecurrentLayer, cells: CoreParams | Iterable[CoreParams]) -> LayerParams:
    """A layer's parameters from those of Haiku's LSTM or VanillaRNN. Exact.

    The 1 that Haiku adds to the forget gate goes to bias_hh, and its bias to bias_ih, so no bit is lost.

    Examples:
      >>> linear = {"w": np.zeros((2 + 4, 16), np.float32), "b": np.zeros(16, np.float32)}
      >>> params = from_haiku(jaxpack.LSTM(2, 4), {"lstm/linear": linear})  # of hk.LSTM(4) for 2 features
      >>> params["l0"]["bias_hh"][4:8].tolist()  # of the gates i, f, g, o the second
      [1.0, 1.0, 1.0, 1.0]

    Args:
      layer: a jaxpack.LSTM, or jaxpack.RNN with nonlinearity="relu".
      cells: the parameters of one core for each layer and direction, in the order l0, l0_reverse, l1, ..., or those
        of the only one. Of a name such as "my_net/~/lstm/linear" the last part counts.

    Raises:
      KeyError: if a core lacks a part, or two have one name.
      ValueError: if the layer is a GRU or has a projection or another nonlinearity; if there are not as many cells as
        directions, a shape is not the layer's, a layer without biases is given some, or JAX would round a weight.
      TypeError: if the parameters are traced.
    """
    _check(layer)
    found = listed(cells, "cells")
    check_count(len(found), len(layer.shapes), "cells", "layer and direction")
    if isinstance(layer.cell, RNNCell):
        return as_params(layer, [(where, _from_vanilla(cell, where)) for where, cell in found])
    sizes = [shapes["weight_ih"][0] for shapes in layer.shapes.values()]
    weights = [(where, _from_lstm(cell, size, where)) for size, (where, cell) in zip(sizes, found, strict=True)]
    return as_params(layer, weights, _LSTM_GATES)


def to_haiku(layer: RecurrentLayer, params: LayerParams) -> tuple[dict[str, dict[str, np.ndarray]], ...]:
    """A layer's parameters for Haiku, a dict for each layer and direction, in the order l0, l0_reverse, l1, ....

    Exact, but that an LSTM's b_ih + b_hh, less the 1 that Haiku adds to the forget gate, is rounded once: Haiku's own
    sum rounds as much. What `from_haiku` gave comes back to the bit. VanillaRNN is for double_bias=True, its default.

    Examples:
      >>> lstm = jaxpack.LSTM(2, 4)
      >>> (core,) = to_haiku(lstm, lstm.init(jax.random.key(0)))
      >>> hk_params = {f"lstm/{name}": value for name, value in core.items()}
      >>> hk_params["lstm/linear"]["w"].shape
      (6, 16)

    Raises:
      ValueError: if the layer is a GRU or has a projection or another nonlinearity.
      TypeError: if params are not the layer's, or traced.
    """
    _check(layer)
    if isinstance(layer.cell, RNNCell):
        return tuple(
            {
                "linear": {"w": weights["weight_ih"], "b": weights["bias_ih"]},
                "linear_1": {"w": weights["weight_hh"], "b": weights["bias_hh"]},
            }
            for weights in as_weights(layer, params).values()
        )
    return tuple(_to_lstm(weights) for weights in as_weights(layer, params, _LSTM_GATES).values())


def _check(layer: RecurrentLayer) -> None:
    check_cell(layer, "Haiku")
    if isinstance(layer.cell, GRUCell):
        raise ValueError(
            f"{layer} multiplies r with the recurrent product, and hk.GRU with h before it: no weights make them "
            f"equal. Run hk.GRU's step, or your own, in jaxpack.packed_scan."
        )
    if isinstance(layer.cell, RNNCell) and layer.cell.nonlinearity != "relu":
        raise ValueError(f'{layer} has nonlinearity="tanh", but hk.VanillaRNN is relu. Use nonlinearity="relu".')


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


def _from_vanilla(cell: CoreParams, where: str) -> Weights:
    x, h = _linears(cell, ("linear", "linear_1"), where)
    return {"weight_ih": x["w"], "weight_hh": h["w"], "bias_ih": x["b"], "bias_hh": h["b"]}


def _linears(cell: CoreParams, names: tuple[str, ...], where: str) -> list[Weights]:
    """A core's hk.Linear modules in this order, found by the last part of their names; no bias is zeros."""
    if not isinstance(cell, Mapping):
        raise TypeError(f"{where} must be a dict of Haiku's parameters, got {type(cell).__name__}.")
    if sorted(name.rpartition("/")[2] for name in cell) != sorted(names):
        raise KeyError(
            f"{where} must hold what ends in {list(names)}, the parameters of one core, got {sorted(cell)}. Pick those "
            f"of the core: {{k: v for k, v in params.items() if k.startswith('lstm/')}}."
        )
    found = {
        name.rpartition("/")[2]: {
            key: from_library(value, f"{where}[{name!r}][{key!r}]") for key, value in part.items()
        }
        for name, part in cell.items()
    }
    return [{"b": np.zeros_like(found[name]["w"][0]), **found[name]} for name in names]
