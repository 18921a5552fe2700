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

LSTMState = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class LSTMCell(Cell):
    """An LSTM cell, whose carry is (h, c). With proj_size > 0, h has that width.

    Examples:
      >>> LSTMCell(4, proj_size=2).state_sizes
      (2, 4)
    """

    proj_size: int = 0

    gates: ClassVar[tuple[str, ...]] = ("i", "f", "g", "o")
    forget_gate: ClassVar[tuple[str, int] | None] = ("f", 1)
    gates_apart: ClassVar[bool] = True

    @property
    def output_size(self) -> int:
        """The width of h: proj_size if there is a projection, else hidden_size."""
        return self.proj_size or self.hidden_size

    @property
    def state_sizes(self) -> tuple[int, int]:
        """The widths of h and c."""
        return self.output_size, self.hidden_size

    def shapes(self, input_size: int, bias: bool) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every parameter: weight_hr [H, P] beside the usual ones if there is a projection."""
        projection = {"weight_hr": (self.hidden_size, self.proj_size)} if self.proj_size else {}
        return super().shapes(input_size, bias) | projection

    def fuse(self, params: Params) -> Fused:
        """Returns one bias, and sigmoid gates at half scale: sigmoid(a) = tanh(a / 2) / 2 + 1 / 2, one tanh for all."""
        scale = jnp.repeat(jnp.array([0.5, 0.5, 1, 0.5], params["weight_ih"].dtype), self.hidden_size)
        w_x, w_h = (params[name] * scale[None] for name in ("weight_ih", "weight_hh"))
        return Fused(w_x, w_h, total_bias(params) * scale, params.get("weight_hr"))

    def activate(self, fused: Fused, projected: jax.Array, h: jax.Array) -> jax.Array:
        """Returns one tanh for all gates, [..., 4H]."""
        return jnp.tanh(projected + h @ fused.w_h + expand_leading(fused.bias, projected))

    def advance(self, fused: Fused, activations: jax.Array, carry: Carry) -> Carry:
        """Computes c' and h' as at the top of this file."""
        decay, inject = self.update(activations)
        c = decay * carry[1] + inject
        out = lstm_gates(activations)[3] * jnp.tanh(c)
        return out if fused.w_out is None else out @ fused.w_out, c

    def update(self, activations: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns f and i * g."""
        i, f, g, _ = lstm_gates(activations)
        return f, i * g

    def linearize(self, fused: Fused, activations: jax.Array, before: Carry, after: Carry) -> Linearization:
        """Differentiates the equations at the top of this file."""
        i, f, g, o = lstm_gates(activations)
        tanh_c = jnp.tanh(after[1])
        return Linearization(
            da_gates=jnp.concatenate([g / 2, before[1] / 2, i, tanh_c / 2], axis=-1) * (1 - activations * activations),
            dh_dh=jnp.zeros_like(before[0][:, :1]),
            dh_dc=o * (1 - tanh_c * tanh_c),
            dc_dc=f,
            out=None if fused.w_out is None else o * tanh_c,
        )

    def pull_back(
        self, transposed: Fused, at: Linearization, d: jax.Array, dc: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """The gates i, f and g act on c', o on h'."""
        return pull_back_lstm(at, d if transposed.w_out is None else d @ transposed.w_out, dc)


def pull_back_lstm(at: Linearization, d: jax.Array, dc: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Returns da and the earlier dc from d, the cotangent of the cell's output, and dc, that of c'."""
    assert dc is not None
    assert at.dh_dc is not None
    assert at.dc_dc is not None
    dc = dc + at.dh_dc * d
    return at.da_gates * jnp.concatenate([dc, dc, dc, d], axis=-1), at.dc_dc * dc


def lstm_gates(t: jax.Array) -> tuple[jax.Array, ...]:
    """Returns i, f, g, o from the tanh of their pre-activations, those of the sigmoid gates at half scale."""
    i, f, g, o = jnp.split(t, 4, axis=-1)
    return i / 2 + 0.5, f / 2 + 0.5, g, o / 2 + 0.5


def lstm_cell(params: Params, carry: LSTMState, x: jax.Array) -> tuple[LSTMState, jax.Array]:
    """Runs one step of an LSTM cell, for step-by-step decoding.

    `functools.partial(lstm_cell, params)` is a step for packed_scan and for lax.scan.

    Examples:
      >>> params = {"weight_ih": jnp.zeros((1, 8)), "weight_hh": jnp.zeros((2, 8))}  # f is 1/2, g is 0
      >>> carry = jnp.zeros(2), jnp.array([8.0, 4.0])
      >>> (h, c), output = jax.jit(jaxpack.lstm_cell)(params, carry, jnp.array([1.0]))
      >>> c.tolist()
      [4.0, 2.0]

    Args:
      params: the parameters of one layer and direction, such as `lstm.init(key)["l0"]`.
      carry: (h [..., H], c [..., H]); with a projection h is [..., P].
      x: [..., F].

    Returns:
      The new carry (h, c), and the output h.

    Raises:
      ValueError: if a last axis does not match the parameters.
      TypeError: if the carry is not a pair.
    Source: torch.nn.LSTMCell.
    """
    proj_size = params["weight_hr"].shape[1] if "weight_hr" in params else 0
    cell = LSTMCell(params["weight_hh"].shape[1] // len(LSTMCell.gates), proj_size)
    return step_from_input(cell, params, carry, x)
