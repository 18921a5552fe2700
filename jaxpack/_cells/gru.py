"""The gated recurrent unit (Cho et al. 2014), in PyTorch's equations: reset after the recurrent product, two biases.

With the gates r, z, n side by side in this order:

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
    z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
    n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
    h' = (1 - z) * n + z * h

With reset before the product, as in the paper, n depends on a second product in each step:

    n = tanh(W_in x + b_in + W_hn (r * h) + b_hn)
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxpack._cells.cell import (
    Carry,
    Fused,
    Linearization,
    Params,
    expand_leading,
    step_from_input,
    times,
    total_bias,
    transpose,
)
from jaxpack._cells.tanh import TanhCell


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
class GRUCell(TanhCell):
    """A gated recurrent unit, whose carry is h, with reset after the recurrent product.

    Examples:
      >>> GRUCell(4).gates
      ('r', 'z', 'n')
    """

    gates: ClassVar[tuple[str, ...]] = ("r", "z", "n")
    forget_gate: ClassVar[tuple[str, int] | None] = ("z", 1)
    gates_apart: ClassVar[bool] = True

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


class ResetBeforeGates(NamedTuple):
    """The gates of M steps of a ResetBeforeGRUCell.

    Attributes:
      rz: [M, 2H], the tanh of the pre-activations of r and z at half scale.
      n: [M, H].
    """

    rz: jax.Array
    n: jax.Array

    @property
    def r(self) -> jax.Array:
        """[M, H]."""
        return self.rz[..., : self.n.shape[-1]] / 2 + 0.5

    @property
    def z(self) -> jax.Array:
        """[M, H]."""
        return self.rz[..., self.n.shape[-1] :] / 2 + 0.5


@dataclasses.dataclass(frozen=True)
class ResetBeforeGRUCell(TanhCell):
    """A gated recurrent unit, whose carry is h, with reset before the recurrent product.

    Examples:
      >>> ResetBeforeGRUCell(4) == jaxpack.GRU(2, 4, reset_after=False).cell
      True
    """

    gates: ClassVar[tuple[str, ...]] = ("r", "z", "n")
    forget_gate: ClassVar[tuple[str, int] | None] = ("z", 1)

    def fuse(self, params: Params) -> Fused:
        """Returns gate columns n, r, z: h reaches the last two, r * h the first by `more`; r and z at half scale."""
        (w_r, w_z, w_n), (u_r, u_z, u_n) = (jnp.split(params[k], 3, axis=1) for k in ("weight_ih", "weight_hh"))
        b_r, b_z, b_n = jnp.split(total_bias(params), 3)
        return Fused(
            jnp.concatenate([w_n, w_r / 2, w_z / 2], axis=1),
            jnp.concatenate([u_r, u_z], axis=1) / 2,
            jnp.concatenate([b_n, b_r / 2, b_z / 2]),
            more=u_n,
        )

    def activate(self, fused: Fused, projected: jax.Array, h: jax.Array) -> ResetBeforeGates:
        """Returns the gates, by two products."""
        size = h.shape[-1]
        a = projected + expand_leading(fused.bias, projected)
        rz = self.tanh(a[..., size:] + h @ fused.w_h)
        r = rz[..., :size] / 2 + 0.5
        return ResetBeforeGates(rz, self.tanh(a[..., :size] + times(r * h, fused.more)))

    def advance(self, fused: Fused, activations: ResetBeforeGates, carry: Carry) -> Carry:
        """Computes h' as at the top of this file."""
        (h,), n = carry, activations.n
        return (n + activations.z * (h - n),)

    def linearize(self, fused: Fused, activations: ResetBeforeGates, before: Carry, after: Carry) -> Linearization:
        """Differentiates the equations at the top of this file; r acts on r * h."""
        (h,), (rz, n), z = before, activations, activations.z
        by_rz = jnp.concatenate([h, h - n], axis=-1) * (1 - rz * rz) / 2
        return Linearization(
            da_gates=jnp.concatenate([(1 - z) * (1 - n * n), by_rz], axis=-1), dh_dh=z, more=activations.r
        )

    def step_back(
        self, transposed: Fused, at: Linearization, d: jax.Array, dc: jax.Array | None
    ) -> tuple[jax.Array, Carry]:
        """Gates n and z act on h', r on r * h, whose cotangent is a product."""
        by_n, by_r, by_z = jnp.split(at.da_gates, 3, axis=-1)
        da_n = by_n * d
        drh = times(da_n, transposed.more)
        da_rz = jnp.concatenate([by_r * drh, by_z * d], axis=-1)
        dh = times(da_rz, transposed.w_h) + at.more * drh + at.dh_dh * d
        return jnp.concatenate([da_n, da_rz], axis=-1), (dh,)

    def more_gradients(
        self,
        fused: Fused,
        x: jax.Array,
        activations: ResetBeforeGates,
        before: Carry,
        after: Carry,
        da: jax.Array,
    ) -> jax.Array:
        """Returns the cotangent of W_hn, which multiplies r * h."""
        return transpose(activations.r * before[0]) @ da[:, : self.hidden_size]


def gru_cell(
    params: Params, carry: jax.Array, x: jax.Array, *, reset_after: bool = True
) -> tuple[jax.Array, jax.Array]:
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
      reset_after: whether r multiplies the recurrent product, as in PyTorch, or h before it, as in the paper.

    Returns:
      The new carry h, and the output, which is h too.

    Raises:
      ValueError: if a last axis does not match the parameters.
    Source: torch.nn.GRUCell; keras.layers.GRUCell for reset_after.
    """
    kind = GRUCell if reset_after else ResetBeforeGRUCell
    return step_from_input(kind(params["weight_hh"].shape[0]), params, carry, x)
