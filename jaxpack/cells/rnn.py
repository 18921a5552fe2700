"""The simple recurrent cell (Elman, "Finding structure in time", 1990), in PyTorch's equation.

With tanh, or relu in its place:

    h' = tanh(W_ih x + b_ih + W_hh h + b_hh)
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxpack.cells.cell import Cell, Params, step_from_input

NONLINEARITIES = {"tanh": jnp.tanh, "relu": jax.nn.relu}


@dataclasses.dataclass(frozen=True)
class RNNCell(Cell):
    """A simple recurrent cell; its carry is h."""

    nonlinearity: str = "tanh"

    num_gates: ClassVar[int] = 1

    def project(self, params: Params, x: jax.Array) -> jax.Array:
        """W_ih x + b_ih + b_hh."""
        projected = x @ params["weight_ih"]
        return projected + (params["bias_ih"] + params["bias_hh"]) if "bias_ih" in params else projected

    def step(self, params: Params, carry: jax.Array, projected: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The file's equation."""
        h = NONLINEARITIES[self.nonlinearity](projected + carry @ params["weight_hh"])
        return h, h


def check_nonlinearity(nonlinearity: object) -> None:
    """Raises ValueError unless it is one of ours."""
    if not isinstance(nonlinearity, str) or nonlinearity not in NONLINEARITIES:
        raise ValueError(f'nonlinearity must be "tanh" or "relu", got {nonlinearity!r}.')


def rnn_cell(params: Params, carry: jax.Array, x: jax.Array, nonlinearity: str = "tanh") -> tuple[jax.Array, jax.Array]:
    """One step of a simple recurrent cell, for step-by-step decoding.

    Args:
      params: of one layer and direction, such as `layer.init(key)["l0"]`.
      carry: h [..., H].
      x: [..., F].
      nonlinearity: "tanh" or "relu".

    Returns:
      The new carry h, and the output, which is h too.

    Raises:
      ValueError: if a last axis does not match the parameters, or the nonlinearity is unknown.
    Source: torch.nn.RNNCell.
    """
    check_nonlinearity(nonlinearity)
    return step_from_input(RNNCell(params["weight_hh"].shape[0], nonlinearity), params, carry, x)
