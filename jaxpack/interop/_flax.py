"""Weights from and to Flax's cells, linen's and nnx's, whose parameter trees say by their names which they are.

    LSTM     h's gates have the bias: ii, if, ig, io without one, hi, hf, hg, ho with one. (nnx writes if_.)
    GRU      linen: ir, iz, in with a bias, hr, hz without, hn with one. nnx: no bias on h's side (google/flax#5594).
    Simple   linen: i with a bias, h without one.

nnx's OptimizedLSTMCell, GRUCell and SimpleCell hold their gates side by side, in dense_i and dense_h.

Around a cell's tree, {"cell": ...} is that of an RNN, {"forward_rnn": ..., "backward_rnn": ...} of a Bidirectional.
Flax's carry of an LSTM is (c, h), where jaxpack's state is (h, c).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import meta

from jaxpack._cells.cell import Cell, Params
from jaxpack._cells.gru import GRUCell
from jaxpack._cells.lstm import LSTMCell
from jaxpack._cells.rnn import RNNCell
from jaxpack._layers.recurrent_layer import LayerParams, RecurrentLayer
from jaxpack.interop._weights import (
    Weights,
    as_params,
    as_weights,
    check_cell,
    computes,
    from_library,
    is_pair,
    merge_biases,
    one_each,
)

Tree = Mapping[str, Any]

SIGMOIDS = (jax.nn.sigmoid, jax.lax.logistic)
TANHS = (jnp.tanh, jax.nn.tanh, jax.lax.tanh)
RELUS = (jax.nn.relu,)

_DIRECTIONS = ("forward_rnn", "backward_rnn")
_CELLS: dict[type[Cell], tuple[type, ...]] = {
    LSTMCell: (nnx.LSTMCell, nnx.OptimizedLSTMCell),
    GRUCell: (nnx.GRUCell,),
    RNNCell: (nnx.SimpleCell,),
}


def from_cell(cell: Cell, tree: Mapping[str, Any]) -> Params:
    """The parameters of one layer and direction from those of a Flax cell. Differentiable.

    Args:
      cell: which gates to look for.
      tree: the parameters of the Flax cell, arrays in nested mappings.

    Raises:
      KeyError: if a gate is missing.
    """
    return _from_cell(cell, tree, "tree")


def from_linen(layer: RecurrentLayer, trees: Tree | Iterable[Tree]) -> LayerParams:
    """A layer's parameters from those of linen's LSTMCell, OptimizedLSTMCell, GRUCell or SimpleCell. Exact.

    A tree does not hold its cell's attributes, so they are not checked: gate_fn and activation_fn must be Flax's
    defaults, but a SimpleCell's activation_fn the layer's nonlinearity, and its residual False.

    Examples:
      >>> from flax import linen as nn
      >>> variables = nn.RNN(nn.GRUCell(4)).init(jax.random.key(0), np.ones((1, 3, 2), np.float32))
      >>> params = from_linen(jaxpack.GRU(2, 4), variables)
      >>> params["l0"]["weight_ih"].shape
      (2, 12)

    Args:
      layer: a jaxpack.RNN, LSTM or GRU.
      trees: one for each layer of the stack, from the input up, or that of a single layer: the parameters of a cell,
        an nn.RNN or an nn.Bidirectional, inside {"params": ...} or not, boxed for partitioning or not. For a
        bidirectional layer also a pair (forward, backward) of them, such as a compact module owns.

    Raises:
      KeyError: naming a gate that is missing.
      ValueError: if there are not as many trees as layers or directions, a shape is not the layer's, a layer without
        biases is given some, or JAX would round a weight.
      TypeError: if a tree is none, or traced.
    """
    check_cell(layer, "Flax")
    return _from_trees(layer, one_each(layer, trees, "trees"))


def to_linen(layer: RecurrentLayer, params: LayerParams) -> tuple[dict[str, Any], ...]:
    """A layer's parameters for linen, one tree for each layer of the stack: of an nn.RNN, or an nn.Bidirectional.

    Of two biases a tree holds the sum, which is what the layer computes with, and without biases zeros. The cells are
    LSTMCell or OptimizedLSTMCell, GRUCell, and SimpleCell with activation_fn=nn.relu for nonlinearity="relu".

    Examples:
      >>> gru = jaxpack.GRU(2, 4)
      >>> (tree,) = to_linen(gru, gru.init(jax.random.key(0)))
      >>> sorted(tree["cell"])  # for nn.RNN(nn.GRUCell(4)).apply({"params": tree}, x)
      ['hn', 'hr', 'hz', 'in', 'ir', 'iz']

    Returns:
      NumPy arrays in nested dicts.

    Raises:
      ValueError: if the layer has a projection, which no Flax cell has.
      TypeError: if params are not the layer's, or traced.
    """
    check_cell(layer, "Flax")
    return _to_trees(layer, params, _by_gate)


def from_nnx(layer: RecurrentLayer, modules: Any) -> LayerParams:
    """A layer's parameters from those of nnx's LSTMCell, OptimizedLSTMCell, GRUCell or SimpleCell. Exact.

    Two options of Flax's modules are in no weights, and say how to run the layer:

    - merge_fn: the output has both directions side by side; merge its halves.
    - reverse, of the first RNN: run the layer on jaxpack.reverse_sequences(packed), and with keep_order=True reverse
      the output too.

    Examples:
      >>> from flax import nnx
      >>> params = from_nnx(jaxpack.GRU(2, 4), nnx.RNN(nnx.GRUCell(2, 4, rngs=nnx.Rngs(0))))
      >>> params["l0"]["weight_ih"].shape
      (2, 12)

    Args:
      layer: a jaxpack.RNN, LSTM or GRU.
      modules: one for each layer of the stack, from the input up, or that of a single layer: a cell, an nnx.RNN or an
        nnx.Bidirectional; or the parameters of one, an nnx.State or a pure dict, whose functions are not checked. For
        a bidirectional layer also a pair (forward, backward) of them.

    Raises:
      KeyError: naming a gate that is missing.
      ValueError: if a module computes another function than the layer; if merge_fn (not of the last) or reverse (not
        of the first) changes what the next layer reads; else as `from_linen`.
      TypeError: if a module is of another kind, or traced.
    """
    check_cell(layer, "Flax")
    entries = one_each(layer, modules, "modules")
    _check_order(layer, entries)
    return _from_trees(layer, [(where, _params_of(layer, entry, where)) for where, entry in entries])


def to_nnx(layer: RecurrentLayer, params: LayerParams, *, optimized: bool = True) -> tuple[dict[str, Any], ...]:
    """A layer's parameters for nnx, one pure dict for each layer of the stack: of an nnx.RNN or an nnx.Bidirectional.

    Of two biases a tree holds the sum, which is what the layer computes with, and without biases zeros. The cells are
    OptimizedLSTMCell, GRUCell, and SimpleCell with activation_fn=nnx.relu for nonlinearity="relu".

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
      optimized: whether an LSTM's are for OptimizedLSTMCell; else for LSTMCell, which holds each gate by itself.

    Returns:
      NumPy arrays in nested dicts.

    Raises:
      ValueError: if a GRU has a bias b_hn, which nnx.GRUCell lacks, or the layer a projection.
      TypeError: if params are not the layer's, or traced.
    """
    check_cell(layer, "Flax")
    if isinstance(layer.cell, LSTMCell) and not optimized:
        return _to_trees(layer, params, _by_gate_in_nnx)
    return _to_trees(layer, params, _side_by_side)


def _from_cell(cell: Cell, tree: Tree, where: str) -> Params:
    (w_i, b_i), (w_h, b_h) = (_side(tree, side, cell.gates, where) for side in ("i", "h"))
    return {"weight_ih": w_i, "weight_hh": w_h, "bias_ih": b_i, "bias_hh": b_h}


def _side(tree: Tree, side: str, gates: tuple[str, ...], where: str) -> tuple[jax.Array, jax.Array]:
    """The weights [.., gates*H] and biases [gates*H] of what comes from the input ("i") or from h ("h")."""
    if f"dense_{side}" in tree:
        parts = [tree[f"dense_{side}"]]
    else:
        names = [side + gate for gate in gates]
        names = [name + "_" if name + "_" in tree else name for name in names]
        missing = [name for name in names if name not in tree]
        if missing:
            raise KeyError(f"{where} is no tree of such a Flax cell: it lacks {missing}, and holds {sorted(tree)}.")
        parts = [tree[name] for name in names]
    biases = [part["bias"] if "bias" in part else jnp.zeros_like(part["kernel"][0]) for part in parts]
    return jnp.concatenate([part["kernel"] for part in parts], axis=1), jnp.concatenate(biases)


def _from_trees(layer: RecurrentLayer, entries: list[tuple[str, Any]]) -> LayerParams:
    found = [cell for where, tree in entries for cell in _cell_trees(layer, _unboxed(tree), where)]
    return as_params(layer, [(where, _weights(layer.cell, tree, where)) for where, tree in found])


def _cell_trees(layer: RecurrentLayer, tree: Any, where: str) -> list[tuple[str, Tree]]:
    """The tree of the cell of each direction, and what to call it."""
    if layer.bidirectional and is_pair(tree):
        return [(f"{where}[{i}]", _cell_tree(part, f"{where}[{i}]")) for i, part in enumerate(tree)]
    tree = _within(tree, "params", where)
    if all(name in tree for name in _DIRECTIONS) != layer.bidirectional:
        directions = "both directions" if layer.bidirectional else "one direction"
        raise ValueError(
            f"{where} holds {sorted(tree)}, but {layer} has {directions}. Those of a Bidirectional are under "
            f"'forward_rnn' and 'backward_rnn', or a pair."
        )
    if not layer.bidirectional:
        return [(where, _cell_tree(tree, where))]
    return [(f"{where}[{name!r}]", _cell_tree(tree[name], where)) for name in _DIRECTIONS]


def _cell_tree(tree: Any, where: str) -> Tree:
    """The tree of a cell, within that of its RNN or its variables or not."""
    return _within(_within(tree, "params", where), "cell", where)


def _within(tree: Any, name: str, where: str) -> Tree:
    """What a tree holds under a name, or the tree, if it has no such wrapping."""
    if not isinstance(tree, Mapping) or not isinstance(tree.get(name, tree), Mapping):
        raise TypeError(
            f"{where} must be a tree of parameters, got {type(tree).__name__}. A linen module holds none: init gives "
            f'them, as variables["params"].'
        )
    return tree.get(name, tree)


def _weights(cell: Cell, tree: Tree, where: str) -> Weights:
    """A cell's weights, checked; what else a tree holds, such as nnx's random streams, is left."""
    dense = {name: part for name, part in tree.items() if isinstance(part, Mapping) and "kernel" in part}
    values = {
        name: {key: from_library(value, f"{where}[{name!r}][{key!r}]") for key, value in part.items()}
        for name, part in dense.items()
    }
    return {name: np.asarray(value) for name, value in _from_cell(cell, values, where).items()}


def _unboxed(tree: Any) -> Any:
    """Plain dicts of arrays from linen's boxes and from nnx's State and Variables."""
    if isinstance(tree, Mapping):
        return {name: _unboxed(value) for name, value in tree.items()}
    if is_pair(tree):
        return [_unboxed(part) for part in tree]
    if isinstance(tree, nnx.Variable):
        return tree[...]
    return tree.unbox() if isinstance(tree, meta.AxisMetadata) else tree


def _check_order(layer: RecurrentLayer, entries: list[tuple[str, Any]]) -> None:
    """Raises ValueError if one module hands the next anything but its outputs, side by side and in order."""
    apart = "Convert each module by itself, for a jaxpack layer with num_layers=1, and {} between them."
    for i, (where, entry) in enumerate(entries):
        if i and getattr(entry, "reverse", False):
            raise ValueError(
                f"{where} has reverse=True, but {layer} reads every layer in one order. "
                f"{apart.format('call jaxpack.reverse_sequences')}"
            )
        bidirectional = isinstance(entry, nnx.Bidirectional)
        if bidirectional and i < len(entries) - 1 and not _concatenates(entry.merge_fn):
            raise ValueError(
                f"{where}.merge_fn is {_name(entry.merge_fn)}, but {layer} hands both directions side by side to the "
                f"next layer. {apart.format('merge the halves')}"
            )


def _params_of(layer: RecurrentLayer, entry: Any, where: str) -> Any:
    """The parameters of an nnx module that computes what the layer computes; anything else as it is."""
    if layer.bidirectional and is_pair(entry):
        return [_params_of(layer, part, f"{where}[{i}]") for i, part in enumerate(entry)]
    if not isinstance(entry, nnx.Module):
        return entry
    if isinstance(entry, nnx.Bidirectional):
        return {name: _cell_params(layer, getattr(entry, name), f"{where}.{name}") for name in _DIRECTIONS}
    return _cell_params(layer, entry, where)


def _concatenates(merge_fn: Callable[[Any, Any], Any]) -> bool:
    """Whether it puts two arrays side by side, as seen on two: such functions are many, Flax's and jaxpack's first."""
    with jax.ensure_compile_time_eval():
        forward, backward = jnp.array([[-0.5, 0.25, 0.0]]), jnp.array([[0.75, -0.125, -1.0]])
        return np.array_equal(merge_fn(forward, backward), jnp.concatenate([forward, backward], axis=-1))


def _cell_params(layer: RecurrentLayer, module: Any, where: str) -> Any:
    if isinstance(module, nnx.RNN):
        module, where = module.cell, f"{where}.cell"
    kinds = _CELLS[type(layer.cell)]
    if type(module) not in kinds:
        names = " or ".join(f"nnx.{kind.__name__}" for kind in kinds)
        raise TypeError(
            f"{where} must be {names} for {layer}, got {type(module).__name__}. If that computes the same, pass "
            f"nnx.state(module, nnx.Param), which is read by its names."
        )
    if isinstance(layer.cell, RNNCell):
        _check_function(module, "activation_fn", layer.cell.nonlinearity, where)
        if module.residual:
            raise ValueError(
                f"{where} has residual=True, which {layer} has not: it adds h before the nonlinearity. Add the "
                f"identity to its dense_h.kernel and set residual=False first."
            )
    else:
        _check_function(module, "gate_fn", "sigmoid", where)
        _check_function(module, "activation_fn", "tanh", where)
    return nnx.state(module, nnx.Param)


def _check_function(module: Any, name: str, expected: str, where: str) -> None:
    function = getattr(module, name)
    if not computes(function, expected):
        raise ValueError(
            f"{where}.{name} is {_name(function)}, but the layer has {expected}. No weights make up for another "
            f"function: jaxpack.nnx.RNN runs the cell as it is. For the parameters alone, pass nnx.state(module, "
            f"nnx.Param), whose functions are not checked."
        )


def _name(function: Any) -> str:
    return getattr(function, "__name__", repr(function))


def _to_trees(
    layer: RecurrentLayer, params: LayerParams, tree_of: Callable[[Cell, Weights, str], dict[str, Any]]
) -> tuple[dict[str, Any], ...]:
    cells = [
        {"cell": tree_of(layer.cell, merge_biases(layer.cell, weights), group)}
        for group, weights in as_weights(layer, params).items()
    ]
    if not layer.bidirectional:
        return tuple(cells)
    pairs = zip(cells[::2], cells[1::2], strict=True)
    return tuple(dict(zip(_DIRECTIONS, pair, strict=True)) for pair in pairs)


def _by_gate(cell: Cell, weights: Weights, group: str) -> dict[str, Any]:
    """A cell of linen."""
    count = len(cell.gates)
    kernels = {side: np.split(weights[f"weight_{side}h"], count, axis=1) for side in "ih"}
    tree = {
        side + gate: {"kernel": np.array(kernel)}
        for side in "ih"
        for gate, kernel in zip(cell.gates, kernels[side], strict=True)
    }
    for gate, bias in zip(cell.gates, np.split(weights["bias_ih"], count), strict=True):
        tree[_bias_side(cell) + gate]["bias"] = np.array(bias)
    if isinstance(cell, GRUCell):
        tree["hn"]["bias"] = np.array(weights["bias_hh"][2 * cell.hidden_size :])
    return tree


def _by_gate_in_nnx(cell: Cell, weights: Weights, group: str) -> dict[str, Any]:
    """An LSTMCell of nnx: "if" is a word of Python's, so no attribute."""
    return {"if_" if name == "if" else name: part for name, part in _by_gate(cell, weights, group).items()}


def _side_by_side(cell: Cell, weights: Weights, group: str) -> dict[str, Any]:
    """Any other cell of nnx."""
    left = weights["bias_hh"]
    if left.any():
        raise ValueError(
            f"params[{group!r}]['bias_hh'] has b_hn up to {np.abs(left.astype(float)).max():.3g}, and nnx.GRUCell has "
            f"no bias there (google/flax#5594). linen's GRUCell has it: use to_linen; or train with b_hn, the last "
            f"third of bias_hh, at zero."
        )
    tree = {f"dense_{side}": {"kernel": np.array(weights[f"weight_{side}h"])} for side in "ih"}
    tree[f"dense_{_bias_side(cell)}"]["bias"] = weights["bias_ih"]
    return tree


def _bias_side(cell: Cell) -> str:
    return "h" if isinstance(cell, LSTMCell) else "i"
