"""The LSTM with peepholes (Gers & Schmidhuber 2000, "Recurrent nets that time and count").

Its gates i and f see the memory c, its gate o the new one, by a weight for each unit:

    i = sigmoid(W_ii x + b_ii + W_hi h + b_hi + p_i * c)
    f = sigmoid(W_if x + b_if + W_hf h + b_hf + p_f * c)
    g = tanh(W_ig x + b_ig + W_hg h + b_hg)
    c' = f * c + i * g
    o = sigmoid(W_io x + b_io + W_ho h + b_ho + p_o * c')
    h' = o * tanh(c')
"""

from __future__ import annotations

import dataclasses
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
from jaxpack._cells.lstm import LSTMState, lstm_gates, pull_back_lstm


@dataclasses.dataclass(frozen=True)
class PeepholeLSTMCell(Cell):
    """An LSTM cell with peepholes, whose carry is (h, c).

    Examples:
      >>> PeepholeLSTMCell(4).shapes(2, bias=False)["weight_ch"]  # p_i, p_f and p_o
      (12,)
    """

    gates: ClassVar[tuple[str, ...]] = ("i", "f", "g", "o")
    forget_gate: ClassVar[tuple[str, int] | None] = ("f", 1)
    gates_read_memory: ClassVar[bool] = True
    gates_apart: ClassVar[bool] = True

    @property
    def state_sizes(self) -> tuple[int, int]:
        """The widths of h and c."""
        return self.hidden_size, self.hidden_size

    def shapes(self, input_size: int, bias: bool) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every parameter: weight_ch [3*H] beside the usual ones."""
        return super().shapes(input_size, bias) | {"weight_ch": (3 * self.hidden_size,)}

    def fuse(self, params: Params) -> Fused:
        """Returns one bias, and sigmoid gates at half scale, so that all gates are a tanh."""
        scale = jnp.repeat(jnp.array([0.5, 0.5, 1, 0.5], params["weight_ih"].dtype), self.hidden_size)
        w_x, w_h = (params[name] * scale[None] for name in ("weight_ih", "weight_hh"))
        return Fused(w_x, w_h, total_bias(params) * scale, more=params["weight_ch"] / 2)

    def activate_from(self, fused: Fused, projected: jax.Array, carry: Carry) -> jax.Array:
        """Returns the tanh of all gates, [..., 4H]."""
        (h, c), size = carry, self.hidden_size
        a = projected + h @ fused.w_h + expand_leading(fused.bias, projected)
        p = expand_leading(fused.more, projected)
        seen = jnp.concatenate([c, c], axis=-1) * p[..., : 2 * size]
        t = jnp.tanh(jnp.concatenate([a[..., : 2 * size] + seen, a[..., 2 * size : 3 * size]], axis=-1))
        i, f, g = t[..., :size] / 2 + 0.5, t[..., size : 2 * size] / 2 + 0.5, t[..., 2 * size :]
        o = jnp.tanh(a[..., 3 * size :] + p[..., 2 * size :] * (f * c + i * g))
        return jnp.concatenate([t, o], axis=-1)

    def advance(self, fused: Fused, activations: jax.Array, carry: Carry) -> Carry:
        """Computes c' and h' as at the top of this file."""
        decay, inject = self.update(activations)
        c = decay * carry[1] + inject
        return lstm_gates(activations)[3] * jnp.tanh(c), c

    def update(self, activations: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns f and i * g."""
        i, f, g, _ = lstm_gates(activations)
        return f, i * g

    def linearize(self, fused: Fused, activations: jax.Array, before: Carry, after: Carry) -> Linearization:
        """Differentiates the equations at the top of this file; the peepholes are part of dh_dc and dc_dc."""
        i, f, g, o = lstm_gates(activations)
        (_, c), tanh_c = before, jnp.tanh(after[1])
        da_gates = jnp.concatenate([g / 2, c / 2, i, tanh_c / 2], axis=-1) * (1 - activations * activations)
        by_i, by_f, _, by_o = jnp.split(da_gates, 4, axis=-1)
        p_i, p_f, p_o = jnp.split(expand_leading(fused.more, activations), 3, axis=-1)
        return Linearization(
            da_gates=da_gates,
            dh_dh=jnp.zeros_like(before[0][:, :1]),
            dh_dc=o * (1 - tanh_c * tanh_c) + by_o * p_o,
            dc_dc=f + by_i * p_i + by_f * p_f,
        )

    def pull_back(
        self, transposed: Fused, at: Linearization, d: jax.Array, dc: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """The gates i, f and g act on c', o on h'."""
        return pull_back_lstm(at, d, dc)

    def more_gradients(
        self, fused: Fused, x: jax.Array, activations: Any, before: Carry, after: Carry, da: jax.Array
    ) -> jax.Array:
        """Returns the cotangent of the peepholes."""
        da_i, da_f, _, da_o = jnp.split(da, 4, axis=-1)
        return jnp.concatenate([(da_i * before[1]).sum(0), (da_f * before[1]).sum(0), (da_o * after[1]).sum(0)])


def peephole_lstm_cell(params: Params, carry: LSTMState, x: jax.Array) -> tuple[LSTMState, jax.Array]:
    """Runs one step of an LSTM cell with peepholes, for step-by-step decoding.

    Examples:
      >>> params = {"weight_ih": jnp.zeros((1, 8)), "weight_hh": jnp.zeros((2, 8)), "weight_ch": jnp.zeros(6)}
      >>> carry = jnp.zeros(2), jnp.array([8.0, 4.0])
      >>> (h, c), output = jax.jit(jaxpack.peephole_lstm_cell)(params, carry, jnp.array([1.0]))
      >>> c.tolist()  # f is 1/2, g is 0
      [4.0, 2.0]

    Args:
      params: the parameters of one layer and direction, such as `lstm.init(key)["l0"]`.
      carry: (h [..., H], c [..., H]).
      x: [..., F].

    Returns:
      The new carry (h, c), and the output h.

    Raises:
      ValueError: if a last axis does not match the parameters.
      TypeError: if the carry is not a pair.
    Source: Gers & Schmidhuber 2000.
    """
    return step_from_input(PeepholeLSTMCell(params["weight_hh"].shape[0]), params, carry, x)
