"""Weights from and to Flax's cells, linen's and nnx's, as their parameter trees (see jaxpack._flax.known).

The tree of an RNN is {"cell": tree of the cell}, that of a Bidirectional {"forward_rnn": ..., "backward_rnn": ...}.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import meta

from jaxpack._cells.cell import Cell
from jaxpack._cells.lstm import LSTMCell
from jaxpack._cells.rnn import RNNCell
from jaxpack._flax.known import LINEN_CELLS, NNX_CELLS, Tree, from_cell
from jaxpack._layers.recurrent_layer import RecurrentLayer
from jaxpack._layers.specification import LayerParams
from jaxpack._packed.merge import merge_directions
from jaxpack._stepped.conv import ConvLSTM
from jaxpack.interop._conv_lstm import from_two_convolutions, one_entry, to_two_convolutions
from jaxpack.interop._weights import (
    Weights,
    check_convertible,
    group_directions,
    is_nonlinearity,
    is_pair,
    merge_biases,
    merged_error,
    name_layer_entries,
    params_from_weights,
    reversed_error,
    scales_recurrent_bias,
    to_exact_numpy,
    weights_from_params,
)

_DIRECTIONS = ("forward_rnn", "backward_rnn")


def from_linen(layer: RecurrentLayer | ConvLSTM, trees: Tree | Iterable[Tree | Sequence[Tree]]) -> Any:
    """Returns a layer's parameters from those of linen's LSTMCells, GRUCell, MGUCell, SimpleCell or ConvLSTMCell.

    Exact, except that the sum of a ConvLSTMCell's two biases and the 1 that it adds to f is rounded once.

    A tree does not hold its cell's attributes, so they are not checked. gate_fn and activation_fn must be Flax's
    defaults, except that a SimpleCell's activation_fn must be the layer's nonlinearity; residual must be False. An
    MGUCell's reset_gate must be True for a jaxpack.MGU with reset="after", and False for one with reset=None. A
    ConvLSTMCell's strides must be 1 and its padding "SAME".

    Examples:
      >>> from flax import linen as nn
      >>> variables = nn.RNN(nn.GRUCell(4)).init(jax.random.key(0), np.ones((1, 3, 2), np.float32))
      >>> params = from_linen(jaxpack.GRU(2, 4), variables)
      >>> params["l0"]["weight_ih"].shape
      (2, 12)

    Args:
      layer: a jaxpack.RNN, LSTM, GRU, MGU or ConvLSTM.
      trees: a tree for each layer of the stack, from the input up; a single layer's tree needs no list. A tree holds
        the parameters of a cell, an nn.RNN or an nn.Bidirectional, inside {"params": ...} or not, boxed for
        partitioning or not. For a bidirectional layer it may be a pair (forward, backward) of trees, as a compact
        module owns them.

    Raises:
      KeyError: naming a gate that is missing.
      ValueError: if no Flax cell has the layer's equations; there are not as many trees as layers or directions; a
        shape is not the layer's; a layer without biases is given some; or JAX would round a weight.
      TypeError: if an entry is not a tree of parameters, or is traced.
    """
    if isinstance(layer, ConvLSTM):
        return _from_conv_cell(layer, *one_entry(trees, "trees"))
    check_convertible(layer, "Flax", set(LINEN_CELLS.values()))
    return _from_trees(layer, name_layer_entries(layer, trees, "trees"))


def to_linen(layer: RecurrentLayer | ConvLSTM, params: Any) -> tuple[dict[str, Any], ...]:
    """Returns a layer's parameters for linen: a tree for the nn.RNN or nn.Bidirectional of each layer of the stack.

    A tree holds the sum of the layer's two biases, which computes the same, and zeros if the layer has no biases. The
    cells are LSTMCell or OptimizedLSTMCell, GRUCell, MGUCell, SimpleCell with activation_fn=nn.relu for
    nonlinearity="relu", and ConvLSTMCell, whose second bias is -1 at f, to which the cell adds 1.

    Examples:
      >>> gru = jaxpack.GRU(2, 4)
      >>> (tree,) = to_linen(gru, gru.init(jax.random.key(0)))
      >>> sorted(tree["cell"])  # for nn.RNN(nn.GRUCell(4)).apply({"params": tree}, x)
      ['hn', 'hr', 'hz', 'in', 'ir', 'iz']

    Returns:
      NumPy arrays in nested dicts.

    Raises:
      ValueError: if no Flax cell has the layer's equations, or the layer has a projection, which none has.
      TypeError: if params are not the layer's, or are traced.
    """
    if isinstance(layer, ConvLSTM):
        of_x, of_h = (dict(zip(("kernel", "bias"), part, strict=True)) for part in to_two_convolutions(layer, params))
        return ({"cell": {"ih": of_x, "hh": of_h}},)
    check_convertible(layer, "Flax", set(LINEN_CELLS.values()))
    return _to_trees(layer, params, _by_gate)


def from_nnx(layer: RecurrentLayer, modules: Any) -> LayerParams:
    """Returns a layer's parameters from those of nnx's LSTMCell, OptimizedLSTMCell, GRUCell or SimpleCell. Exact.

    Two options of Flax's modules are not part of the weights. They say how to run the layer:

    - merge_fn: give the layer the merge that does the same. Below the last module it must be the same.
    - reverse of the first RNN: run the layer on jaxpack.reverse_sequences(packed). With keep_order=True reverse the
      output too.

    Examples:
      >>> from flax import nnx
      >>> params = from_nnx(jaxpack.GRU(2, 4), nnx.RNN(nnx.GRUCell(2, 4, rngs=nnx.Rngs(0))))
      >>> params["l0"]["weight_ih"].shape
      (2, 12)

    Args:
      layer: a jaxpack.RNN, LSTM or GRU.
      modules: a module for each layer of the stack, from the input up; a single layer's module needs no list. It is a
        cell, an nnx.RNN or an nnx.Bidirectional; or the parameters of one, an nnx.State or a pure dict, whose functions
        are not checked. For a bidirectional layer it may be a pair (forward, backward) of modules.

    Raises:
      KeyError: naming a gate that is missing.
      ValueError: if a module computes another function than the layer; if merge_fn (except the last module's) or
        reverse (except the first module's) changes what the next layer reads; otherwise as `from_linen`.
      TypeError: if a module is of another class, or is traced.
    """
    check_convertible(layer, "flax.nnx", set(NNX_CELLS.values()))
    entries = name_layer_entries(layer, modules, "modules")
    _check_order(layer, entries)
    return _from_trees(layer, [(where, _params_of(layer, entry, where)) for where, entry in entries])


def to_nnx(layer: RecurrentLayer, params: LayerParams, *, optimized: bool = True) -> tuple[dict[str, Any], ...]:
    """Returns a layer's parameters for nnx: one dict for the nnx.RNN or nnx.Bidirectional of each layer in the stack.

    A dict holds the sum of the layer's two biases, which computes the same, and zeros if the layer has no biases. The
    cells are OptimizedLSTMCell, GRUCell, and SimpleCell with activation_fn=nnx.relu for nonlinearity="relu".

    Examples:
      >>> from flax import nnx
      >>> lstm = jaxpack.LSTM(2, 4)
      >>> (tree,) = to_nnx(lstm, lstm.init(jax.random.key(0)))
      >>> rnn = nnx.RNN(nnx.OptimizedLSTMCell(2, 4, rngs=nnx.Rngs(0)))
      >>> nnx.update(rnn, tree)
      >>> rnn.cell.dense_i.kernel.shape
      (2, 16)

    Args:
      layer: a jaxpack.RNN, LSTM or GRU.
      params: its parameters.
      optimized: False to write an LSTM's for LSTMCell, which holds each gate by itself, not for OptimizedLSTMCell.

    Returns:
      NumPy arrays in nested dicts.

    Raises:
      ValueError: if a GRU has a bias b_hn, which nnx.GRUCell lacks, or the layer has a projection.
      TypeError: if params are not the layer's, or are traced.
    """
    check_convertible(layer, "flax.nnx", set(NNX_CELLS.values()))
    if isinstance(layer.cell, LSTMCell) and not optimized:
        return _to_trees(layer, params, _by_gate_in_nnx)
    return _to_trees(layer, params, _side_by_side)


def _from_trees(layer: RecurrentLayer, entries: list[tuple[str, Any]]) -> LayerParams:
    found = [cell for where, tree in entries for cell in _cell_trees(layer, _unboxed(tree), where)]
    return params_from_weights(layer, [(where, _weights(layer.cell, tree, where)) for where, tree in found])


def _from_conv_cell(layer: ConvLSTM, where: str, tree: Any) -> dict[str, jax.Array]:
    """Returns parameters from the tree of a ConvLSTMCell."""
    cell = _cell_tree(_unboxed(tree), where)
    missing = [name for name in ("ih", "hh") if not isinstance(cell.get(name), Mapping) or "kernel" not in cell[name]]
    if missing:
        raise KeyError(f"{where} has no kernel under {missing[0]!r}, as a ConvLSTMCell has, but {sorted(cell)}.")
    return from_two_convolutions(layer, cell["ih"], cell["hh"], where)


def _cell_trees(layer: RecurrentLayer, tree: Any, where: str) -> list[tuple[str, Tree]]:
    """Returns the tree of each direction's cell, with its name in errors."""
    if layer.bidirectional and is_pair(tree):
        return [(f"{where}[{i}]", _cell_tree(part, f"{where}[{i}]")) for i, part in enumerate(tree)]
    tree = _within(tree, "params", where)
    if all(name in tree for name in _DIRECTIONS) != layer.bidirectional:
        directions = "both directions" if layer.bidirectional else "one direction"
        raise ValueError(
            f"{where} holds {sorted(tree)}, but {layer} has {directions}. Both directions come as a pair, or as a "
            f"Bidirectional's 'forward_rnn' and 'backward_rnn'."
        )
    if not layer.bidirectional:
        return [(where, _cell_tree(tree, where))]
    return [(f"{where}[{name!r}]", _cell_tree(tree[name], where)) for name in _DIRECTIONS]


def _cell_tree(tree: Any, where: str) -> Tree:
    """Returns the tree of a cell, given that tree, its RNN's, or either inside variables."""
    return _within(_within(tree, "params", where), "cell", where)


def _within(tree: Any, name: str, where: str) -> Tree:
    """Returns the subtree under a name, or the tree if it does not have the name."""
    if not isinstance(tree, Mapping) or not isinstance(tree.get(name, tree), Mapping):
        raise TypeError(
            f"{where} must be a tree of parameters, got {type(tree).__name__}. A linen module holds no parameters: its "
            f'init returns them, as variables["params"].'
        )
    return tree.get(name, tree)


def _weights(cell: Cell, tree: Tree, where: str) -> Weights:
    """Returns a cell's weights, checked. Other entries of the tree, such as nnx's random streams, are ignored."""
    dense = {name: part for name, part in tree.items() if isinstance(part, Mapping) and "kernel" in part}
    values = {
        name: {key: to_exact_numpy(value, f"{where}[{name!r}][{key!r}]") for key, value in part.items()}
        for name, part in dense.items()
    }
    return {name: np.asarray(value) for name, value in from_cell(cell, values, where).items()}


def _unboxed(tree: Any) -> Any:
    """Unwraps linen's boxes and nnx's State and Variables to plain dicts of arrays."""
    if isinstance(tree, Mapping):
        return {name: _unboxed(value) for name, value in tree.items()}
    if is_pair(tree):
        return [_unboxed(part) for part in tree]
    if isinstance(tree, nnx.Variable):
        return tree[...]
    return tree.unbox() if isinstance(tree, meta.AxisMetadata) else tree


def _check_order(layer: RecurrentLayer, modules: list[tuple[str, Any]]) -> None:
    """Raises ValueError unless each module passes on its outputs joined and in order as the layer does."""
    for i, (where, module) in enumerate(modules):
        if i and getattr(module, "reverse", False):
            raise reversed_error(layer, f"{where} has reverse=True", "module")
        bidirectional = isinstance(module, nnx.Bidirectional)
        if bidirectional and i < len(modules) - 1 and not _merges(module.merge_fn, layer.merge):
            raise merged_error(layer, f"{where}.merge_fn is {_name(module.merge_fn)}", "module")


def _params_of(layer: RecurrentLayer, entry: Any, where: str) -> Any:
    """Returns the parameters of an nnx module that computes what the layer computes, and parameters unchanged."""
    if layer.bidirectional and is_pair(entry):
        return [_params_of(layer, part, f"{where}[{i}]") for i, part in enumerate(entry)]
    if not isinstance(entry, nnx.Module):
        return entry
    if isinstance(entry, nnx.Bidirectional):
        return {name: _cell_params(layer, getattr(entry, name), f"{where}.{name}") for name in _DIRECTIONS}
    return _cell_params(layer, entry, where)


def _merges(merge_fn: Callable[[Any, Any], Any], merge: str | None) -> bool:
    """Returns True if a function joins two arrays as merge says, tested on two arrays: it may be the user's own."""
    with jax.ensure_compile_time_eval():
        arrays = jnp.array([[-0.5, 0.25, 0.0]]), jnp.array([[0.75, -0.125, -1.0]])
        return np.array_equal(merge_fn(*arrays), merge_directions(arrays, merge))


def _cell_params(layer: RecurrentLayer, module: Any, where: str) -> Any:
    """Returns the parameters of a cell, or of an RNN's cell, that computes what the layer computes."""
    if isinstance(module, nnx.RNN):
        module, where = module.cell, f"{where}.cell"
    kinds = [kind for kind, cell in NNX_CELLS.items() if cell is type(layer.cell)]
    if type(module) not in kinds:
        names = " or ".join(f"nnx.{kind.__name__}" for kind in kinds)
        raise TypeError(
            f"{where} must be {names} for {layer}, got {type(module).__name__}. If the module computes the same, pass "
            f"nnx.state(module, nnx.Param), whose entries are found by name."
        )
    if isinstance(layer.cell, RNNCell):
        _check_function(module, "activation_fn", layer.cell.nonlinearity, where)
        if module.residual:
            raise ValueError(
                f"{where} has residual=True, which adds h before the nonlinearity, but {layer} does not. Add the "
                f"identity to its dense_h.kernel and set residual=False first."
            )
    else:
        _check_function(module, "gate_fn", "sigmoid", where)
        _check_function(module, "activation_fn", "tanh", where)
    return nnx.state(module, nnx.Param)


def _check_function(module: Any, name: str, expected: str, where: str) -> None:
    function = getattr(module, name)
    if not is_nonlinearity(function, expected):
        raise ValueError(
            f"{where}.{name} is {_name(function)}, but the layer has {expected}. Weights cannot make up for another "
            f"function. jaxpack.nnx.RNN runs the cell unchanged. To convert the parameters alone, pass "
            f"nnx.state(module, nnx.Param), whose functions are not checked."
        )


def _name(function: Any) -> str:
    return getattr(function, "__name__", repr(function))


def _to_trees(
    layer: RecurrentLayer, params: LayerParams, tree_of: Callable[[Cell, Weights, str], dict[str, Any]]
) -> tuple[dict[str, Any], ...]:
    cells = [
        {"cell": tree_of(layer.cell, merge_biases(layer.cell, weights), group)}
        for group, weights in weights_from_params(layer, params).items()
    ]
    if not layer.bidirectional:
        return tuple(cells)
    return tuple(dict(zip(_DIRECTIONS, pair, strict=True)) for pair in group_directions(layer, cells))


def _by_gate(cell: Cell, weights: Weights, group: str) -> dict[str, Any]:
    """Returns the tree of a cell of linen, gate by gate."""
    count = len(cell.gates)
    kernels = {side: np.split(weights[f"weight_{side}h"], count, axis=1) for side in "ih"}
    tree = {
        side + gate: {"kernel": np.array(kernel)}
        for side in "ih"
        for gate, kernel in zip(cell.gates, kernels[side], strict=True)
    }
    for gate, bias in zip(cell.gates, np.split(weights["bias_ih"], count), strict=True):
        tree[_bias_side(cell) + gate]["bias"] = np.array(bias)
    if scales_recurrent_bias(cell):
        tree["hn"]["bias"] = np.array(weights["bias_hh"][-cell.hidden_size :])
    return tree


def _by_gate_in_nnx(cell: Cell, weights: Weights, group: str) -> dict[str, Any]:
    """Returns the tree of nnx.LSTMCell, which cannot name an attribute "if"."""
    return {"if_" if name == "if" else name: part for name, part in _by_gate(cell, weights, group).items()}


def _side_by_side(cell: Cell, weights: Weights, group: str) -> dict[str, Any]:
    """Returns the tree of any other cell of nnx, its gates side by side."""
    b_hn = weights["bias_hh"]  # all that is not merged into bias_ih
    if b_hn.any():
        raise ValueError(
            f"params[{group!r}]['bias_hh'] has b_hn up to {np.abs(b_hn.astype(float)).max():.3g}, and nnx.GRUCell has "
            f"no bias there (google/flax#5594). linen's GRUCell has it: use to_linen. Or train with b_hn, the last "
            f"third of bias_hh, at zero."
        )
    tree = {f"dense_{side}": {"kernel": np.array(weights[f"weight_{side}h"])} for side in "ih"}
    tree[f"dense_{_bias_side(cell)}"]["bias"] = weights["bias_ih"]
    return tree


def _bias_side(cell: Cell) -> str:
    """Returns the side, input or h, whose products have the bias in Flax."""
    return "h" if isinstance(cell, LSTMCell) else "i"
