"""Weights from and to Flax's cells, linen's and nnx's, whose parameter trees say by their names which they are.

    LSTM     h's gates have the bias: ii, if, ig, io without one, hi, hf, hg, ho with one. (nnx writes if_.)
    GRU      linen: ir, iz, in with a bias, hr, hz without, hn with one. nnx: no bias on h's side (google/flax#5594).
    Simple   linen: i with a bias, h without one.

nnx's OptimizedLSTMCell, GRUCell and SimpleCell hold their gates side by side, in dense_i and dense_h.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpack.cells import Cell, Params


def from_cell(cell: Cell, tree: Mapping[str, Any]) -> Params:
    """The parameters of one layer and direction from those of a Flax cell. Differentiable.

    Args:
      cell: which gates to look for.
      tree: the parameters of the Flax cell, arrays in nested mappings.
    """
    (w_i, b_i), (w_h, b_h) = (_side(tree, side, cell.gates) for side in ("i", "h"))
    return {"weight_ih": w_i, "weight_hh": w_h, "bias_ih": b_i, "bias_hh": b_h}


def _side(tree: Mapping[str, Any], side: str, gates: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """The weights [.., gates*H] and biases [gates*H] of what comes from the input ("i") or from h ("h")."""
    if f"dense_{side}" in tree:
        parts = [tree[f"dense_{side}"]]
    else:
        names = [side + gate for gate in gates]
        parts = [tree[name if name in tree else name + "_"] for name in names]
    biases = [part["bias"] if "bias" in part else jnp.zeros_like(part["kernel"][0]) for part in parts]
    return jnp.concatenate([part["kernel"] for part in parts], axis=1), jnp.concatenate(biases)
