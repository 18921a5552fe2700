"""The long short-term memory cell (Hochreiter & Schmidhuber 1997; Gers et al. 2000 for f), in PyTorch's equations.

With the gates i, f, g, o side by side in this order, and the last line only with a projection (Sak et al. 2014):

    i, f, g, o = W_ih x + b_ih + W_hh h + b_hh
    c' = sigmoid(f) * c + sigmoid(i) * tanh(g)
    h' = sigmoid(o) * tanh(c')
    h' = W_hr h'
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxpack.cells.cell import Cell, Params, step_from_input

LSTMCarry = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class LSTMCell(Cell):
    """An LSTM cell; its carry is (h, c). With proj_size > 0, h has that width."""

    proj_size: int = 0

    num_gates: ClassVar[int] = 4

    @property
    def output_size(self) -> int:
        """The width of h: proj_size if there is a projection, else hidden_size."""
        return self.proj_size or self.hidden_size

    @property
    def state_sizes(self) -> tuple[int, int]:
        """The widths of h and c."""
        return self.output_size, self.hidden_size

    def shapes(self, input_size: int, bias: bool) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter: weight_hr [H, P] beside the usual ones if there is a projection."""
        projection = {"weight_hr": (self.hidden_size, self.proj_size)} if self.proj_size else {}
        return super().shapes(input_size, bias) | projection

    def project(self, params: Params, x: jax.Array) -> jax.Array:
        """W_ih x + b_ih + b_hh."""
        projected = x @ params["weight_ih"]
        return projected + (params["bias_ih"] + params["bias_hh"]) if "bias_ih" in params else projected

    def step(self, params: Params, carry: LSTMCarry, projected: jax.Array) -> tuple[LSTMCarry, jax.Array]:
        """The file's equations."""
        h, c = carry
        i, f, g, o = jnp.split(projected + h @ params["weight_hh"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        if self.proj_size:
            h = h @ params["weight_hr"]
        return (h, c), h


def lstm_cell(params: Params, carry: LSTMCarry, x: jax.Array) -> tuple[LSTMCarry, jax.Array]:
    """One step of an LSTM cell, for step-by-step decoding.

    `functools.partial(lstm_cell, params)` is a step for packed_scan and for lax.scan.

    Args:
      params: of one layer and direction, such as `lstm.init(key)["l0"]`.
      carry: (h [..., H], c [..., H]); with a projection h is [..., P].
      x: [..., F].

    Returns:
      The new carry (h, c), and the output h.

    Raises:
      ValueError: if a last axis does not match the parameters.
      TypeError: if the carry is no pair.
    Source: torch.nn.LSTMCell.
    """
    proj_size = params["weight_hr"].shape[1] if "weight_hr" in params else 0
    cell = LSTMCell(params["weight_hh"].shape[1] // LSTMCell.num_gates, proj_size)
    return step_from_input(cell, params, carry, x)
