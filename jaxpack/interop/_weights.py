"""What every conversion shares: a layer's weights as NumPy arrays, one dict a direction, and what is refused of them.

Between libraries a direction's weights always have both biases, zeros where a library has none:

    weight_ih [F, gates*H]   weight_hh [H, gates*H]   bias_ih [gates*H]   bias_hh [gates*H]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpack._cells.cell import Cell
from jaxpack._cells.gru import GRUCell
from jaxpack._checks import is_traced
from jaxpack._layers.params import check_params
from jaxpack._layers.recurrent_layer import LayerParams, RecurrentLayer
from jaxpack._layers.state_dict import exactly

Weights = dict[str, np.ndarray]


def check_layer(layer: object) -> None:
    """Raises TypeError unless it is a layer spec."""
    if not isinstance(layer, RecurrentLayer):
        raise TypeError(f"layer must be a jaxpack.RNN, LSTM or GRU, got {type(layer).__name__}.")


def check_cell(layer: RecurrentLayer, library: str) -> None:
    """The door of every conversion to and from a library's cells.

    Raises:
      TypeError: if it is no layer spec.
      ValueError: if it projects h, which no cell of the library does.
    """
    check_layer(layer)
    if layer.cell.output_size != layer.cell.hidden_size:
        raise ValueError(
            f"{layer} projects h, and no cell of {library} does. Use proj_size=0, or carry the weights under PyTorch's "
            f"names (to_torch, from_torch, save_safetensors)."
        )


def listed(entries: Any, name: str, one_pair: bool = False) -> list[tuple[str, Any]]:
    """What the user gave, with what to call it in an error: a sequence, or one entry alone.

    Args:
      entries: as given.
      name: of the argument.
      one_pair: whether a list or tuple of two is one entry, the two directions of the only layer.
    """
    if isinstance(entries, Mapping) or not isinstance(entries, Iterable) or (one_pair and is_pair(entries)):
        return [(name, entries)]
    return [(f"{name}[{i}]", entry) for i, entry in enumerate(entries)]


def is_pair(entry: object) -> bool:
    """Whether an entry is a (forward, backward) list or tuple, the two directions of a bidirectional layer."""
    return isinstance(entry, (list, tuple)) and len(entry) == 2


def check_count(found: int, count: int, name: str, of_what: str) -> None:
    """Raises ValueError if there are not as many entries as are due."""
    if found != count:
        raise ValueError(f"{name} must have an entry for each {of_what}, {count} in all, got {found}.")


def one_each(layer: RecurrentLayer, entries: Any, name: str) -> list[tuple[str, Any]]:
    """An entry for each layer of the stack, with what to call it in an error. Raises as `check_count`."""
    found = listed(entries, name, one_pair=layer.bidirectional and layer.num_layers == 1)
    check_count(len(found), layer.num_layers, name, "layer")
    return found


def computes(function: Any, expected: str) -> bool:
    """Whether a function is tanh, sigmoid or relu, as seen on values: such functions are many, and have many names."""
    points = np.concatenate([np.linspace(-20, 20, 81), [-1000, 1000]]).astype(np.float32)
    known: dict[str, Callable[[Any], Any]] = {
        "tanh": np.tanh,
        "sigmoid": lambda x: 0.5 + 0.5 * np.tanh(x / 2),
        "relu": lambda x: np.maximum(x, 0),
    }
    with jax.ensure_compile_time_eval():  # so that traced weights are named by what reads them
        values = np.asarray(function(points))
    return np.allclose(values, known[expected](points), atol=1e-6)


def to_numpy(value: Any, where: str) -> np.ndarray:
    """An array's values.

    Raises:
      TypeError: if they are traced.
    """
    if is_traced(value):
        raise TypeError(f"{where} is traced, but a conversion reads values: call it outside jit, grad and vmap.")
    return np.asarray(value)


def from_library(value: Any, where: str) -> np.ndarray:
    """An array's values, which JAX can hold as they are.

    Raises:
      TypeError: if they are traced, or no floating numbers.
      ValueError: if JAX would round them.
    """
    return exactly(to_numpy(value, where), where)


def as_params(
    layer: RecurrentLayer, found: Sequence[tuple[str, Weights]], gates: Sequence[str] | None = None
) -> LayerParams:
    """A layer's parameters.

    Args:
      found: of each direction, in the layer's order, what to call it in an error, and its weights.
      gates: the order of their gates. Default: the cell's.

    Raises:
      ValueError: if a shape is not the layer's, or a layer without biases would need one.
    """
    params: LayerParams = {}
    for (group, shapes), (where, weights) in zip(layer.shapes.items(), found, strict=True):
        for name, shape in layer.cell.shapes(shapes["weight_ih"][0], bias=True).items():
            if weights[name].shape != shape:
                raise ValueError(f"{where}: {name} must have shape {shape} for {layer}, got {weights[name].shape}.")
        weights = _reordered(weights, layer.cell.gates if gates is None else gates, layer.cell.gates)
        if not layer.bias:
            _check_no_bias(layer, weights, where)
        params[group] = {name: jnp.asarray(weights[name]) for name in shapes}
    return params


def as_weights(layer: RecurrentLayer, params: LayerParams, gates: Sequence[str] | None = None) -> dict[str, Weights]:
    """The weights of each direction, under the layer's names for them, gates in another order if that is given.

    Raises:
      TypeError: if the parameters have another structure than the layer's, or are traced.
      ValueError: if one has another shape.
    """
    check_params(params, layer.shapes, layer)
    result = {}
    for group, entries in params.items():
        weights = {name: to_numpy(value, f"params[{group!r}][{name!r}]") for name, value in entries.items()}
        none = np.zeros_like(weights["weight_ih"][0])
        weights = {"bias_ih": none, "bias_hh": none, **weights}
        result[group] = _reordered(weights, layer.cell.gates, layer.cell.gates if gates is None else gates)
    return result


def merge_biases(cell: Cell, weights: Weights) -> Weights:
    """The same cell with one bias a gate, in bias_ih, as the cell itself adds them.

    A GRU's b_hn stays in bias_hh, since r multiplies it.
    """
    bias, rest = weights["bias_ih"] + weights["bias_hh"], np.zeros_like(weights["bias_hh"])
    if isinstance(cell, GRUCell):
        n = slice(2 * cell.hidden_size, None)
        bias[n], rest[n] = weights["bias_ih"][n], weights["bias_hh"][n]
    return weights | {"bias_ih": bias, "bias_hh": rest}


def _reordered(weights: Weights, order: Sequence[str], wanted: Sequence[str]) -> Weights:
    """Gates side by side in another order."""
    result = {}
    for name, array in weights.items():
        parts = dict(zip(order, np.split(array, len(order), axis=-1), strict=True))
        result[name] = np.concatenate([parts[gate] for gate in wanted], axis=-1)
    return result


def _check_no_bias(layer: RecurrentLayer, weights: Weights, where: str) -> None:
    merged = merge_biases(layer.cell, weights)
    biases = np.concatenate([merged["bias_ih"], merged["bias_hh"]]).astype(float)
    if biases.any():
        raise ValueError(
            f"{where} has biases up to {np.abs(biases).max():.3g}, and {layer} has none. Use bias=True (its "
            f"default), or set them to zero first."
        )
