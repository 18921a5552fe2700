"""The gated recurrent unit (Cho et al. 2014), in PyTorch's equations: reset after the recurrent product, two biases.

With the gates r, z, n side by side in this order:

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
    z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
    n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
    h' = (1 - z) * n + z * h
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._cells.cell import (
    Carry,
    Cell,
    Fused,
    Linearization,
    Params,
    expand_leading,
    step_from_input,
)


class GRUGates(NamedTuple):
    """The gates of M steps.

    Attributes:
      rz: [M, 2H], the tanh of the pre-activations of r and z at half scale.
      n: [M, H].
      hn: [M, H], W_hn h + b_hn.
    """

    rz: jax.Array
    n: jax.Array
    hn: jax.Array

    @property
    def r(self) -> jax.Array:
        """[M, H]."""
        return self.rz[..., : self.n.shape[-1]] / 2 + 0.5

    @property
    def z(self) -> jax.Array:
        """[M, H]."""
        return self.rz[..., self.n.shape[-1] :] / 2 + 0.5


@dataclasses.dataclass(frozen=True)
class GRUCell(Cell):
    """A gated recurrent unit, whose carry is h.

    Examples:
      >>> GRUCell(4).gates
      ('r', 'z', 'n')
    """

    tanh: Callable[[jax.Array], jax.Array] = dataclasses.field(default=jnp.tanh, repr=False)

    gates: ClassVar[tuple[str, ...]] = ("r", "z", "n")

    def on(self, platform: str) -> GRUCell:
        """Returns the cell with a tanh that a CPU computes for many numbers at once."""
        return dataclasses.replace(self, tanh=_separate_tanh) if platform == "cpu" else self

    def fuse(self, params: Params) -> Fused:
        """Returns gate columns n, r, z, hn: the input reaches the first three, h the last three; r, z at half scale."""
        (w_r, w_z, w_n), (u_r, u_z, u_n) = (jnp.split(params[k], 3, axis=1) for k in ("weight_ih", "weight_hh"))
        zeros = jnp.zeros_like(params["weight_ih"][0])
        (b_r, b_z, b_n), (c_r, c_z, c_n) = (jnp.split(params.get(k, zeros), 3) for k in ("bias_ih", "bias_hh"))
        return Fused(
            jnp.concatenate([w_n, w_r / 2, w_z / 2], axis=1),
            jnp.concatenate([u_r / 2, u_z / 2, u_n], axis=1),
            jnp.concatenate([b_n, (b_r + c_r) / 2, (b_z + c_z) / 2, c_n]),
        )

    def activate(self, fused: Fused, projected: jax.Array, h: jax.Array) -> GRUGates:
        """Returns the gates."""
        size = self.hidden_size
        recurrent, bias = h @ fused.w_h, expand_leading(fused.bias, projected)
        rz = self.tanh(projected[..., size:] + recurrent[..., : 2 * size] + bias[..., size : 3 * size])
        hn = recurrent[..., 2 * size :] + bias[..., 3 * size :]
        r = rz[..., :size] / 2 + 0.5
        return GRUGates(rz, self.tanh(projected[..., :size] + bias[..., :size] + r * hn), hn)

    def advance(self, fused: Fused, activations: GRUGates, carry: Carry) -> Carry:
        """Computes h' as at the top of this file."""
        (h,), n = carry, activations.n
        return (n + activations.z * (h - n),)

    def linearize(self, fused: Fused, activations: GRUGates, before: Carry, after: Carry) -> Linearization:
        """Differentiates the equations at the top of this file."""
        (h,), (rz, n, hn), z = before, activations, activations.z
        by_n = (1 - z) * (1 - n * n)
        by_rz = jnp.concatenate([by_n * hn, h - n], axis=-1) * (1 - rz * rz) / 2
        return Linearization(da_gates=jnp.concatenate([by_n, by_rz, by_n * activations.r], axis=-1), dh_dh=z)

    def pull_back(
        self, transposed: Fused, at: Linearization, d: jax.Array, dc: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """All gates act on h'."""
        return at.da_gates * jnp.concatenate([d, d, d, d], axis=-1), None


def _separate_tanh(x: jax.Array) -> jax.Array:
    """Computes tanh in a loop of its own, whose one iteration the compiler cannot see.

    XLA would fuse the tanh with the expressions around it, and a CPU would compute it number by number. Over one
    contiguous array it computes many at once. (GRU, forward: 21 ms where the fused one took 34.) The LSTM needs no such
    loop: both c and h read the tanh of its gates, so XLA does not fuse it.
    """
    once = lax.optimization_barrier(jnp.int32(1))
    return lax.fori_loop(0, once, lambda _, leaf: jnp.tanh(leaf), x)


def gru_cell(params: Params, carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Runs one step of a gated recurrent unit, for step-by-step decoding.

    Examples:
      >>> params = {"weight_ih": jnp.zeros((1, 6)), "weight_hh": jnp.zeros((2, 6))}  # z is 1/2, n is 0
      >>> carry, output = jax.jit(jaxpack.gru_cell)(params, jnp.array([8.0, 4.0]), jnp.array([1.0]))
      >>> output.tolist()
      [4.0, 2.0]

    Args:
      params: the parameters of one layer and direction, such as `gru.init(key)["l0"]`.
      carry: h [..., H].
      x: [..., F].

    Returns:
      The new carry h, and the output, which is h too.

    Raises:
      ValueError: if a last axis does not match the parameters.
    Source: torch.nn.GRUCell.
    """
    return step_from_input(GRUCell(params["weight_hh"].shape[0]), params, carry, x)
