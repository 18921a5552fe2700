"""KnownCell: a Flax cell whose equations jaxpack has, recognised by its class and options; and its parameters.

    LSTM     h's gates have the bias: ii, if, ig, io without one, hi, hf, hg, ho with one. (nnx writes if_.)
    GRU      linen: ir, iz, in with a bias, hr, hz without, hn with one. nnx: no bias on h's side (google/flax#5594).
    MGU      linen: if, in with a bias, hf without one, hn with one if there is a reset gate.
    Simple   linen: i with a bias, h without one.

nnx's OptimizedLSTMCell, GRUCell and SimpleCell hold their gates side by side, in dense_i and dense_h. Flax's carry of
an LSTM is (c, h), where jaxpack's state is (h, c).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from jaxpack._cells.cell import Cell, Params
from jaxpack._cells.gru import GRUCell
from jaxpack._cells.lstm import LSTMCell
from jaxpack._cells.mgu import FlaxMGUCell
from jaxpack._cells.rnn import RNNCell
from jaxpack._types import PyTree

Tree = Mapping[str, Any]

# From Flax's classes to the cells with the same equations. A subclass may compute something else.
LINEN_CELLS: Mapping[type, type[Cell]] = MappingProxyType(
    {
        linen.LSTMCell: LSTMCell,
        linen.OptimizedLSTMCell: LSTMCell,
        linen.GRUCell: GRUCell,
        linen.MGUCell: FlaxMGUCell,
        linen.SimpleCell: RNNCell,
    }
)
NNX_CELLS: Mapping[type, type[Cell]] = MappingProxyType(
    {nnx.LSTMCell: LSTMCell, nnx.OptimizedLSTMCell: LSTMCell, nnx.GRUCell: GRUCell, nnx.SimpleCell: RNNCell}
)

_SIGMOIDS = (jax.nn.sigmoid, jax.lax.logistic)
_TANHS = (jnp.tanh, jax.nn.tanh, jax.lax.tanh)
_RELUS = (jax.nn.relu,)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tree"], meta_fields=["cell", "dtype", "residual"])
@dataclasses.dataclass(frozen=True)
class KnownCell:
    """A Flax cell that jaxpack's own recurrence runs. A pytree of its parameters.

    Attributes:
      tree: the parameters of the Flax cell, arrays in nested mappings.
      cell: jaxpack's cell with the same equations.
      dtype: the dtype of the computation.
      residual: True if the cell adds h to its pre-activation.
    """

    tree: Tree
    cell: Cell
    dtype: Any
    residual: bool

    def params(self) -> Params:
        """Returns the parameters with which `cell` computes the same."""
        weights = {name: weight.astype(self.dtype) for name, weight in from_cell(self.cell, self.tree).items()}
        if self.residual:  # W x + b + U h + h = W x + b + (U + 1) h
            weights["weight_hh"] += jnp.eye(self.cell.hidden_size, dtype=self.dtype)
        return weights

    def state(self, carry: PyTree) -> PyTree:
        """Returns Flax's carry [B, ...] as the state of `cell`.

        Raises:
          ValueError: if the carry has another structure or width.
        """
        sizes: Any = self.cell.state_sizes
        size = jax.tree.leaves(sizes)[0]
        given: Any = jax.tree.structure(carry)
        if given != jax.tree.structure(sizes) or any(leaf.shape[1:] != (size,) for leaf in jax.tree.leaves(carry)):
            expected = f"(c, h), each [*batch, {size}]" if isinstance(sizes, tuple) else f"an array [*batch, {size}]"
            found = jax.tree.map(lambda leaf: leaf.shape[1:], carry)
            raise ValueError(f"initial_carry must be {expected}, got {found}.")
        return flip(carry)


def flip(state: PyTree) -> PyTree:
    """Turns (c, h) into (h, c) and back. Returns an array h unchanged."""
    return state[::-1] if isinstance(state, tuple) else state


def recognise(cell: Any, hidden_size: int, tree: Tree, dtype: Any, carry: PyTree) -> KnownCell | None:
    """Returns the Flax cell as jaxpack runs it; None if Flax's own step must run.

    A cell is known by its class and functions. In mixed precision, where a cell computes in another dtype than its
    carry has, Flax's step runs, with its own roundings.

    Args:
      cell: a cell of linen or nnx.
      hidden_size: its number of units.
      tree: its parameters.
      dtype: the dtype of the inputs.
      carry: its initial carry.
    """
    kind = LINEN_CELLS.get(type(cell)) or NNX_CELLS.get(type(cell))
    if kind is None:
        return None
    known: Cell
    if kind is RNNCell:
        nonlinearity = "tanh" if cell.activation_fn in _TANHS else "relu" if cell.activation_fn in _RELUS else None
        if nonlinearity is None:
            return None
        known = RNNCell(hidden_size, nonlinearity)
    elif cell.gate_fn in _SIGMOIDS and cell.activation_fn in _TANHS:
        known = FlaxMGUCell(hidden_size, reset_gate=cell.reset_gate) if kind is FlaxMGUCell else kind(hidden_size)
    else:
        return None
    dtype = jnp.result_type(dtype, *jax.tree.leaves(tree)) if cell.dtype is None else jnp.dtype(cell.dtype)
    if not jnp.issubdtype(dtype, jnp.floating) or any(leaf.dtype != dtype for leaf in jax.tree.leaves(carry)):
        return None
    return KnownCell(tree, known, dtype, getattr(cell, "residual", False))


def from_cell(cell: Cell, tree: Tree, where: str = "tree") -> Params:
    """Returns the parameters of one layer and direction from those of a Flax cell. Differentiable.

    Args:
      cell: jaxpack's cell, whose gates to look for.
      tree: the parameters of the Flax cell, arrays in nested mappings.
      where: the name of the tree in errors.

    Raises:
      KeyError: if a gate is missing.
    """
    (w_i, b_i), (w_h, b_h) = (_side(tree, side, cell.gates, where) for side in ("i", "h"))
    return {"weight_ih": w_i, "weight_hh": w_h, "bias_ih": b_i, "bias_hh": b_h}


def _side(tree: Tree, side: str, gates: tuple[str, ...], where: str) -> tuple[jax.Array, jax.Array]:
    """Returns the weights [.., gates*H] and biases [gates*H] that apply to the input ("i") or to h ("h")."""
    if f"dense_{side}" in tree:
        parts = [tree[f"dense_{side}"]]
    else:
        names = [side + gate for gate in gates]
        names = [name + "_" if name + "_" in tree else name for name in names]
        missing = [name for name in names if name not in tree]
        if missing:
            raise KeyError(f"{where} is not the tree of such a Flax cell: it lacks {missing}, and has {sorted(tree)}.")
        parts = [tree[name] for name in names]
    biases = [part["bias"] if "bias" in part else jnp.zeros_like(part["kernel"][0]) for part in parts]
    return jnp.concatenate([part["kernel"] for part in parts], axis=1), jnp.concatenate(biases)
