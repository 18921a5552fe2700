"""The independently recurrent cell (Li et al. 2018, "Independently recurrent neural network (IndRNN)").

Each unit sees its own past alone, by one weight u. With relu, or tanh in its place:

    h' = relu(W_ih x + b_ih + u * h + b_hh)

By default u is drawn from 0 to 1, as the paper draws it for relu.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

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
from jaxpack._cells.rnn import check_nonlinearity


@dataclasses.dataclass(frozen=True)
class IndRNNCell(Cell):
    """An independently recurrent cell, whose carry is h.

    Examples:
      >>> IndRNNCell(4).shapes(2, bias=False)
      {'weight_ih': (2, 4), 'weight_hh': (4,)}
    """

    nonlinearity: str = "relu"

    gates: ClassVar[tuple[str, ...]] = ("",)
    reads_activations: ClassVar[bool] = False
    initializers: ClassVar[Mapping[str, Callable[..., Any]]] = MappingProxyType({"weight_hh": jax.random.uniform})

    def shapes(self, input_size: int, bias: bool) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every parameter: weight_hh is u [H]."""
        return super().shapes(input_size, bias) | {"weight_hh": (self.hidden_size,)}

    def fuse(self, params: Params) -> Fused:
        """Returns the weights with one bias, the sum of both."""
        return Fused(params["weight_ih"], None, total_bias(params), more=params["weight_hh"])

    def activate(self, fused: Fused, projected: jax.Array, h: jax.Array) -> jax.Array:
        """Computes the equation at the top of this file."""
        nonlinearity = jnp.tanh if self.nonlinearity == "tanh" else jax.nn.relu
        u, bias = (expand_leading(vector, projected) for vector in (fused.more, fused.bias))
        return nonlinearity(projected + u * h + bias)

    def advance(self, fused: Fused, activations: jax.Array, carry: Carry) -> Carry:
        """The activations are h'."""
        return (activations,)

    def linearize(self, fused: Fused, activations: jax.Array, before: Carry, after: Carry) -> Linearization:
        """Computes the slope of the nonlinearity from its value."""
        (h,) = after
        slope = 1 - h * h if self.nonlinearity == "tanh" else jnp.sign(h)  # of relu; NaN of NaN
        return Linearization(da_gates=slope, dh_dh=slope * expand_leading(fused.more, slope))

    def pull_back(
        self, transposed: Fused, at: Linearization, d: jax.Array, dc: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """The one gate acts on h'."""
        return at.da_gates * d, None

    def more_gradients(
        self, fused: Fused, x: jax.Array, activations: Any, before: Carry, after: Carry, da: jax.Array
    ) -> jax.Array:
        """Returns the cotangent of u."""
        return (da * before[0]).sum(0)


def ind_rnn_cell(
    params: Params, carry: jax.Array, x: jax.Array, nonlinearity: str = "relu"
) -> tuple[jax.Array, jax.Array]:
    """Runs one step of an independently recurrent cell, for step-by-step decoding.

    Examples:
      >>> params = {"weight_ih": jnp.eye(2), "weight_hh": jnp.array([1.0, 0.5])}  # relu(x + u * h)
      >>> carry, output = jaxpack.ind_rnn_cell(params, jnp.array([1.0, 2.0]), jnp.array([3.0, -7.0]))
      >>> output.tolist()
      [4.0, 0.0]

    Args:
      params: the parameters of one layer and direction, such as `layer.init(key)["l0"]`.
      carry: h [..., H].
      x: [..., F].
      nonlinearity: "relu" or "tanh".

    Returns:
      The new carry h, and the output, which is h too.

    Raises:
      ValueError: if a last axis does not match the parameters, or the nonlinearity is unknown.
    Source: Li et al. 2018.
    """
    check_nonlinearity(nonlinearity)
    return step_from_input(IndRNNCell(params["weight_hh"].shape[0], nonlinearity), params, carry, x)
