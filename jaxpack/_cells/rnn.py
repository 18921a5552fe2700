"""The simple recurrent cell (Elman, "Finding structure in time", 1990), in PyTorch's equation.

With tanh, or relu in its place:

    h' = tanh(W_ih x + b_ih + W_hh h + b_hh)
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxpack._cells.cell import (
    Carry,
    Cell,
    Fused,
    Linearization,
    Params,
    expand_leading,
    step_from_input,
    total_bias,
)

NONLINEARITIES = ("tanh", "relu")


@dataclasses.dataclass(frozen=True)
class RNNCell(Cell):
    """A simple recurrent cell, whose carry is h.

    Examples:
      >>> RNNCell(4, nonlinearity="relu") == jaxpack.RNN(2, 4, nonlinearity="relu").cell
      True
    """

    nonlinearity: str = "tanh"

    gates: ClassVar[tuple[str, ...]] = ("",)  # the one gate needs no name
    reads_activations: ClassVar[bool] = False
    gates_apart: ClassVar[bool] = True

    def fuse(self, params: Params) -> Fused:
        """Returns the weights with one bias, the sum of both."""
        return Fused(params["weight_ih"], params["weight_hh"], total_bias(params))

    def activate(self, fused: Fused, projected: jax.Array, h: jax.Array) -> jax.Array:
        """Computes the equation at the top of this file."""
        nonlinearity = jnp.tanh if self.nonlinearity == "tanh" else jax.nn.relu
        return nonlinearity(projected + h @ fused.w_h + expand_leading(fused.bias, projected))

    def advance(self, fused: Fused, activations: jax.Array, carry: Carry) -> Carry:
        """The activations are h'."""
        return (activations,)

    def linearize(self, fused: Fused, activations: jax.Array, before: Carry, after: Carry) -> Linearization:
        """Computes the slope of the nonlinearity from its value."""
        (h,) = after
        slope = 1 - h * h if self.nonlinearity == "tanh" else jnp.sign(h)  # of relu; NaN of NaN
        return Linearization(da_gates=slope, dh_dh=jnp.zeros_like(slope[:, :1]))

    def pull_back(
        self, transposed: Fused, at: Linearization, d: jax.Array, dc: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """The one gate acts on h'."""
        return at.da_gates * d, None


def check_nonlinearity(nonlinearity: object) -> None:
    """Raises ValueError unless jaxpack has the nonlinearity."""
    if not isinstance(nonlinearity, str) or nonlinearity not in NONLINEARITIES:
        raise ValueError(f'nonlinearity must be "tanh" or "relu", got {nonlinearity!r}.')


def rnn_cell(params: Params, carry: jax.Array, x: jax.Array, nonlinearity: str = "tanh") -> tuple[jax.Array, jax.Array]:
    """Runs one step of a simple recurrent cell, for step-by-step decoding.

    Examples:
      >>> params = {"weight_ih": jnp.eye(2), "weight_hh": jnp.eye(2)}  # relu(x + h)
      >>> carry, output = jaxpack.rnn_cell(params, jnp.array([1.0, 2.0]), jnp.array([3.0, -7.0]), "relu")
      >>> output.tolist()
      [4.0, 0.0]

    Args:
      params: the parameters of one layer and direction, such as `layer.init(key)["l0"]`.
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
