"""The minimal gated unit (Zhou et al. 2016, "Minimal gated unit for recurrent neural networks"), and Flax's variant.

The paper's, with the gates f, n side by side in this order:

    f = sigmoid(W_if x + b_if + W_hf h + b_hf)
    n = tanh(W_in x + b_in + W_hn (f * h) + b_hn)
    h' = (1 - f) * h + f * n

Flax's MGUCell multiplies f with the recurrent product, or with nothing, and f is the share of the old state:

    n = tanh(W_in x + b_in + f * (W_hn h + b_hn))     reset_gate=False: without "f *"
    h' = (1 - f) * n + f * h
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxpack._cells.cell import Carry, Fused, Linearization, Params, expand_leading, step_from_input, times, transpose
from jaxpack._cells.tanh import TanhCell

RESETS = ("before", "after", None)


class MGUGates(NamedTuple):
    """The gates of M steps.

    Attributes:
      t: [M, H], the tanh of the pre-activation of f at half scale.
      n: [M, H].
      hn: [M, H], W_hn h + b_hn; None where f multiplies h before the product.
    """

    t: jax.Array
    n: jax.Array
    hn: Any = None

    @property
    def f(self) -> jax.Array:
        """[M, H]."""
        return self.t / 2 + 0.5


@dataclasses.dataclass(frozen=True)
class MGUCell(TanhCell):
    """A minimal gated unit in the paper's equations, whose carry is h.

    Examples:
      >>> MGUCell(4).shapes(2, bias=False)
      {'weight_ih': (2, 8), 'weight_hh': (4, 8)}
    """

    gates: ClassVar[tuple[str, ...]] = ("f", "n")
    forget_gate: ClassVar[tuple[str, int] | None] = ("f", -1)

    def fuse(self, params: Params) -> Fused:
        """Returns gate columns n, f: h reaches the last, f * h the first by `more`; f at half scale."""
        (w_f, w_n), (u_f, u_n), (b_f, b_n), (c_f, c_n) = _split(params)
        return Fused(
            jnp.concatenate([w_n, w_f / 2], axis=1), u_f / 2, jnp.concatenate([b_n + c_n, (b_f + c_f) / 2]), more=u_n
        )

    def activate(self, fused: Fused, projected: jax.Array, h: jax.Array) -> MGUGates:
        """Returns the gates, by two products."""
        size = h.shape[-1]
        a = projected + expand_leading(fused.bias, projected)
        t = self.tanh(a[..., size:] + h @ fused.w_h)
        return MGUGates(t, self.tanh(a[..., :size] + times((t / 2 + 0.5) * h, fused.more)))

    def advance(self, fused: Fused, activations: MGUGates, carry: Carry) -> Carry:
        """Computes h' as at the top of this file."""
        (h,) = carry
        return (h + activations.f * (activations.n - h),)

    def linearize(self, fused: Fused, activations: MGUGates, before: Carry, after: Carry) -> Linearization:
        """Differentiates the equations at the top of this file; f acts on h' and on f * h."""
        (h,), (t, n, _), f = before, activations, activations.f
        slope = (1 - t * t) / 2
        da_gates = jnp.concatenate([f * (1 - n * n), slope * (n - h)], axis=-1)
        return Linearization(da_gates=da_gates, dh_dh=1 - f, more=(slope * h, f))

    def step_back(
        self, transposed: Fused, at: Linearization, d: jax.Array, dc: jax.Array | None
    ) -> tuple[jax.Array, Carry]:
        """The cotangent of f * h is a product."""
        (by_n, by_f), (by_fh, f) = jnp.split(at.da_gates, 2, axis=-1), at.more
        da_n = by_n * d
        dfh = times(da_n, transposed.more)
        da_f = by_f * d + by_fh * dfh
        return jnp.concatenate([da_n, da_f], axis=-1), (times(da_f, transposed.w_h) + f * dfh + at.dh_dh * d,)

    def more_gradients(
        self, fused: Fused, x: jax.Array, activations: MGUGates, before: Carry, after: Carry, da: jax.Array
    ) -> jax.Array:
        """Returns the cotangent of W_hn, which multiplies f * h."""
        return transpose(activations.f * before[0]) @ da[:, : self.hidden_size]


@dataclasses.dataclass(frozen=True)
class FlaxMGUCell(TanhCell):
    """A minimal gated unit in the equations of flax.linen.MGUCell, whose carry is h.

    Examples:
      >>> FlaxMGUCell(4) == jaxpack.MGU(2, 4, reset="after").cell
      True
    """

    reset_gate: bool = True

    gates: ClassVar[tuple[str, ...]] = ("f", "n")
    forget_gate: ClassVar[tuple[str, int] | None] = ("f", 1)
    gates_apart: ClassVar[bool] = True

    def fuse(self, params: Params) -> Fused:
        """Returns gate columns n, f, hn: the input reaches the first two, h the last two; f at half scale."""
        (w_f, w_n), (u_f, u_n), (b_f, b_n), (c_f, c_n) = _split(params)
        return Fused(
            jnp.concatenate([w_n, w_f / 2], axis=1),
            jnp.concatenate([u_f / 2, u_n], axis=1),
            jnp.concatenate([b_n, (b_f + c_f) / 2, c_n]),
        )

    def activate(self, fused: Fused, projected: jax.Array, h: jax.Array) -> MGUGates:
        """Returns the gates."""
        size = h.shape[-1]
        recurrent, bias = h @ fused.w_h, expand_leading(fused.bias, projected)
        t = self.tanh(projected[..., size:] + recurrent[..., :size] + bias[..., size : 2 * size])
        hn = recurrent[..., size:] + bias[..., 2 * size :]
        reset = (t / 2 + 0.5) * hn if self.reset_gate else hn
        return MGUGates(t, self.tanh(projected[..., :size] + bias[..., :size] + reset), hn)

    def advance(self, fused: Fused, activations: MGUGates, carry: Carry) -> Carry:
        """Computes h' as at the top of this file."""
        (h,), n = carry, activations.n
        return (n + activations.f * (h - n),)

    def linearize(self, fused: Fused, activations: MGUGates, before: Carry, after: Carry) -> Linearization:
        """Differentiates the equations at the top of this file."""
        (h,), (t, n, hn), f = before, activations, activations.f
        by_n = (1 - f) * (1 - n * n)
        by_f = h - n + by_n * hn if self.reset_gate else h - n
        by_hn = by_n * f if self.reset_gate else by_n
        return Linearization(jnp.concatenate([by_n, by_f * (1 - t * t) / 2, by_hn], axis=-1), dh_dh=f)

    def pull_back(
        self, transposed: Fused, at: Linearization, d: jax.Array, dc: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """All gates act on h'."""
        return at.da_gates * jnp.concatenate([d, d, d], axis=-1), None


def _split(params: Params) -> list[list[jax.Array]]:
    """Returns the two gates of each parameter."""
    zeros = jnp.zeros_like(params["weight_ih"][0])
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [jnp.split(params.get(name, zeros), 2, axis=-1) for name in names]


def mgu_of(hidden_size: int, reset: str | None) -> MGUCell | FlaxMGUCell:
    """Returns the cell that resets before the product, after it, or not at all.

    Raises:
      ValueError: if `reset` is something else.
    """
    if reset not in RESETS:
        raise ValueError(f'reset must be "before" (the paper), "after" (Flax) or None, got {reset!r}.')
    return MGUCell(hidden_size) if reset == "before" else FlaxMGUCell(hidden_size, reset_gate=reset == "after")


def mgu_cell(
    params: Params, carry: jax.Array, x: jax.Array, *, reset: str | None = "before"
) -> tuple[jax.Array, jax.Array]:
    """Runs one step of a minimal gated unit, for step-by-step decoding.

    Examples:
      >>> params = {"weight_ih": jnp.zeros((1, 4)), "weight_hh": jnp.zeros((2, 4))}  # f is 1/2, n is 0
      >>> carry, output = jax.jit(jaxpack.mgu_cell)(params, jnp.array([8.0, 4.0]), jnp.array([1.0]))
      >>> output.tolist()
      [4.0, 2.0]

    Args:
      params: the parameters of one layer and direction, such as `mgu.init(key)["l0"]`.
      carry: h [..., H].
      x: [..., F].
      reset: "before", "after" or None, as in jaxpack.MGU.

    Returns:
      The new carry h, and the output, which is h too.

    Raises:
      ValueError: if a last axis does not match the parameters, or `reset` is unknown.
    Source: Zhou et al. 2016; flax.linen.MGUCell for reset="after" and None.
    """
    return step_from_input(mgu_of(params["weight_hh"].shape[0], reset), params, carry, x)
