"""The gated recurrent unit (Cho et al. 2014), in PyTorch's equations: reset after the recurrent product, two biases.

With the gates r, z, n side by side in this order:

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
    z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
    n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
    h' = (1 - z) * n + z * h
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxpack.cells.cell import Cell, Params, step_from_input


@dataclasses.dataclass(frozen=True)
class GRUCell(Cell):
    """A gated recurrent unit; its carry is h."""

    num_gates: ClassVar[int] = 3

    def project(self, params: Params, x: jax.Array) -> jax.Array:
        """W_ih x + b_ih."""
        projected = x @ params["weight_ih"]
        return projected + params["bias_ih"] if "bias_ih" in params else projected

    def step(self, params: Params, carry: jax.Array, projected: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The file's equations."""
        recurrent = carry @ params["weight_hh"]
        if "bias_hh" in params:
            recurrent = recurrent + params["bias_hh"]
        r, z, n = jnp.split(projected, 3, axis=-1)
        hr, hz, hn = jnp.split(recurrent, 3, axis=-1)
        r, z = jax.nn.sigmoid(r + hr), jax.nn.sigmoid(z + hz)
        n = jnp.tanh(n + r * hn)
        h = n + z * (carry - n)
        return h, h


def gru_cell(params: Params, carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One step of a gated recurrent unit, for step-by-step decoding.

    Args:
      params: of one layer and direction, such as `gru.init(key)["l0"]`.
      carry: h [..., H].
      x: [..., F].

    Returns:
      The new carry h, and the output, which is h too.

    Raises:
      ValueError: if a last axis does not match the parameters.
    Source: torch.nn.GRUCell.
    """
    return step_from_input(GRUCell(params["weight_hh"].shape[0]), params, carry, x)
