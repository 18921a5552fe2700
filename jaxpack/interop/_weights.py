"""Code that all conversions share: a layer's weights as NumPy arrays, and the checks of arguments.

Between libraries, the weights of one layer and direction are a dict that always has both biases, zeros where a library
has none:

    weight_ih [F, gates*H]   weight_hh [H, gates*H]   bias_ih [gates*H]   bias_hh [gates*H]

`where` is the name of a value in errors, such as "trees[0]['cell']".
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxpack._cells.cell import Cell
from jaxpack._cells.gru import GRUCell, ResetBeforeGRUCell
from jaxpack._cells.mgu import FlaxMGUCell, MGUCell
from jaxpack._checks import is_traced
from jaxpack._layers.params import check_params
from jaxpack._layers.recurrent_layer import RecurrentLayer
from jaxpack._layers.specification import LayerParams
from jaxpack._layers.state_dict import exactly

Weights = dict[str, np.ndarray]
T = TypeVar("T")


# What to do about a cell whose variant another library has.
_OTHER_VARIANTS: dict[type[Cell], tuple[type[Cell], str]] = {
    GRUCell: (ResetBeforeGRUCell, "multiplies r with h before the product. Use reset_after=False"),
    ResetBeforeGRUCell: (GRUCell, "multiplies r with the recurrent product. Use reset_after=True"),
    MGUCell: (FlaxMGUCell, 'multiplies f with the recurrent product, or with nothing. Use reset="after" or None'),
}


def check_layer(layer: object) -> None:
    """Raises TypeError unless it is a layer spec."""
    if not isinstance(layer, RecurrentLayer):
        raise TypeError(f"layer must be a jaxpack.RNN, LSTM or GRU, got {type(layer).__name__}.")


def check_convertible(layer: RecurrentLayer, library: str, cells: Collection[type[Cell]]) -> None:
    """Validates a layer whose weights go to or come from a library's cells.

    Args:
      layer: as given.
      library: the library's name in errors.
      cells: those of the library, by their equations.

    Raises:
      TypeError: if it is not a layer spec.
      ValueError: if the library has no cell with its equations, or it projects h, which none of them does.
    """
    check_layer(layer)
    kind = type(layer.cell)
    if kind not in cells:
        variant, way_out = _OTHER_VARIANTS.get(kind, (None, ""))
        if variant in cells:
            name = kind.__name__.removeprefix("ResetBefore")
            raise ValueError(f"{layer} is not convertible: {library}'s {name} {way_out}, and train it again.")
        raise ValueError(
            f"{library} has no cell that computes what {layer} does. Carry its weights under PyTorch's names "
            f"(to_torch, from_torch, save_safetensors)."
        )
    if layer.cell.output_size != layer.cell.hidden_size:
        raise ValueError(
            f"{layer} projects h, and no cell of {library} does. Use proj_size=0, or carry the weights under PyTorch's "
            f"names (to_torch, from_torch, save_safetensors)."
        )


def name_entries(entries: Any, name: str, one_pair: bool = False) -> list[tuple[str, Any]]:
    """Returns the entries of an argument, each with its name in errors. An entry may be given without a list.

    Args:
      entries: as given.
      name: the name of the argument.
      one_pair: True if a list or tuple of two is one entry, the two directions of the only layer.
    """
    if isinstance(entries, Mapping) or not isinstance(entries, Iterable) or (one_pair and is_pair(entries)):
        return [(name, entries)]
    return [(f"{name}[{i}]", entry) for i, entry in enumerate(entries)]


def name_layer_entries(layer: RecurrentLayer, entries: Any, name: str) -> list[tuple[str, Any]]:
    """Returns one entry for each layer of the stack, with its name in errors. Raises as `check_count`."""
    named = name_entries(entries, name, one_pair=layer.bidirectional and layer.num_layers == 1)
    check_count(len(named), layer.num_layers, name, "layer")
    return named


def is_pair(entry: object) -> bool:
    """Returns True for a list or tuple (forward, backward), the two directions of a bidirectional layer."""
    return isinstance(entry, (list, tuple)) and len(entry) == 2


def check_count(found: int, expected: int, name: str, unit: str) -> None:
    """Raises ValueError unless an argument has as many entries as expected, one for each unit."""
    if found != expected:
        raise ValueError(f"{name} must have an entry for each {unit}, {expected} in all, got {found}.")


def reversed_error(layer: RecurrentLayer, found: str, unit: str) -> ValueError:
    """Returns the error for a reversed module above the first one, since a layer does not reverse between layers.

    Args:
      found: the module and its option, such as "modules[1] has reverse=True".
      unit: the library's word for a module.
    """
    return ValueError(
        f"{found}, but {layer} reads every layer in one order. {_split(unit, 'call jaxpack.reverse_sequences')}"
    )


def merged_error(layer: RecurrentLayer, found: str, unit: str) -> ValueError:
    """Returns the error for a module below the last one that joins directions otherwise. As `reversed_error`."""
    return ValueError(
        f"{found}, but {layer} joins both directions by merge={layer.merge!r} for the next layer. Give it the merge "
        f"that does the same. If there is none: {_split(unit, 'merge the halves')}"
    )


def _split(unit: str, between: str) -> str:
    return f"Convert each {unit} by itself, for a jaxpack layer with num_layers=1, and {between} between them."


def is_nonlinearity(function: Any, name: str) -> bool:
    """Returns True if a function computes tanh, sigmoid or relu, tested on values: each goes by many names."""
    points = np.concatenate([np.linspace(-20, 20, 81), [-1000, 1000]]).astype(np.float32)
    nonlinearities: dict[str, Callable[[Any], Any]] = {
        "tanh": np.tanh,
        "sigmoid": lambda x: 0.5 + 0.5 * np.tanh(x / 2),
        "relu": lambda x: np.maximum(x, 0),
    }
    with jax.ensure_compile_time_eval():  # so that under jit the error about traced weights is raised, which names them
        values = np.asarray(function(points))
    return np.allclose(values, nonlinearities[name](points), atol=1e-6)


def to_numpy(value: Any, where: str) -> np.ndarray:
    """Returns an array's values.

    Raises:
      TypeError: if they are traced.
    """
    if is_traced(value):
        raise TypeError(f"{where} is traced, but a conversion reads values: call it outside jit, grad and vmap.")
    return np.asarray(value)


def to_exact_numpy(value: Any, where: str) -> np.ndarray:
    """Returns a library's array, whose values JAX can hold without rounding.

    Raises:
      TypeError: if they are traced, or not floating.
      ValueError: if JAX would round them.
    """
    return exactly(to_numpy(value, where), where)


def params_from_weights(
    layer: RecurrentLayer, weights: Sequence[tuple[str, Weights]], gates: Sequence[str] | None = None
) -> LayerParams:
    """Returns a layer's parameters. A learned initial state begins at zero.

    Args:
      weights: for each layer and direction, in the layer's order, the name in errors and the weights.
      gates: the order of the gates in these weights. Default: the cell's.

    Raises:
      ValueError: if a shape is not the layer's, or a layer without biases would need one.
    """
    params: LayerParams = {}
    for (group, shapes), (where, given) in zip(layer._weight_shapes.items(), weights, strict=True):
        for name, shape in layer.cell.shapes(shapes["weight_ih"][0], bias=True).items():
            if given[name].shape != shape:
                raise ValueError(f"{where}: {name} must have shape {shape} for {layer}, got {given[name].shape}.")
        ordered = _reorder_gates(given, layer.cell.gates if gates is None else gates, layer.cell.gates)
        if not layer.bias:
            _check_no_bias(layer, ordered, where)
        params[group] = {name: jnp.asarray(ordered[name]) for name in shapes}
    return layer._with_initial_state(params)


def weights_from_params(
    layer: RecurrentLayer, params: LayerParams, gates: Sequence[str] | None = None
) -> dict[str, Weights]:
    """Returns the weights of each layer and direction, under the layer's names for them (l0, l0_reverse, ...).

    A learned initial state is left out.

    Args:
      gates: the order of the gates in the result. Default: the cell's.

    Raises:
      TypeError: if the parameters have another structure than the layer's, or are traced.
      ValueError: if one has another shape.
    """
    check_params(params, layer.shapes, layer)
    result = {}
    for group, entries in params.items():
        names = layer._weight_shapes[group]
        weights = {
            name: to_numpy(value, f"params[{group!r}][{name!r}]") for name, value in entries.items() if name in names
        }
        zeros = np.zeros_like(weights["weight_ih"][0])
        weights = {"bias_ih": zeros, "bias_hh": zeros, **weights}
        result[group] = _reorder_gates(weights, layer.cell.gates, layer.cell.gates if gates is None else gates)
    return result


def merge_biases(cell: Cell, weights: Weights) -> Weights:
    """Returns the weights of the same function with one bias for each gate, in bias_ih.

    A GRU's b_hn stays in bias_hh, since r multiplies it, and so does that of Flax's MGU.
    """
    bias, rest = weights["bias_ih"] + weights["bias_hh"], np.zeros_like(weights["bias_hh"])
    if scales_recurrent_bias(cell):
        n = slice(-cell.hidden_size, None)
        bias[n], rest[n] = weights["bias_ih"][n], weights["bias_hh"][n]
    return weights | {"bias_ih": bias, "bias_hh": rest}


def scales_recurrent_bias(cell: Cell) -> bool:
    """Returns True if a gate multiplies b_hn, which is no sum with b_in then."""
    return isinstance(cell, GRUCell) or (isinstance(cell, FlaxMGUCell) and cell.reset_gate)


def group_directions(layer: RecurrentLayer, entries: Sequence[T]) -> list[tuple[T, ...]]:
    """Groups entries for each layer and direction by layer: (entry,) or (forward, backward).

    group_directions(bidirectional, [a, b, c, d]) = [(a, b), (c, d)]
    """
    size = layer.num_directions
    return [tuple(entries[i : i + size]) for i in range(0, len(entries), size)]


def _reorder_gates(weights: Weights, order: Sequence[str], wanted: Sequence[str]) -> Weights:
    result = {}
    for name, array in weights.items():
        parts = dict(zip(order, np.split(array, len(order), axis=-1), strict=True))
        result[name] = np.concatenate([parts[gate] for gate in wanted], axis=-1)
    return result


def _check_no_bias(layer: RecurrentLayer, weights: Weights, where: str) -> None:
    """Raises ValueError if the biases, merged, are not zero."""
    merged = merge_biases(layer.cell, weights)
    biases = np.concatenate([merged["bias_ih"], merged["bias_hh"]]).astype(float)
    if biases.any():
        raise ValueError(
            f"{where} has biases up to {np.abs(biases).max():.3g}, and {layer} has none. Use bias=True (its "
            f"default), or set them to zero first."
        )
