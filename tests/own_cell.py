"""LeakyRNN: the own cell and layer of CONTRIBUTING.md, built from jaxpack.cells alone."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxpack.cells import Cell, Fused, Linearization, RecurrentLayer, total_bias


@dataclasses.dataclass(frozen=True)
class LeakyCell(Cell):
    """A leaky cell: t = tanh(W x + U h + b), h' = (1 - leak) h + leak t."""

    leak: float = 0.5
    gates: ClassVar[tuple[str, ...]] = ("",)

    def fuse(self, params):
        return Fused(params["weight_ih"], params["weight_hh"], total_bias(params))

    def activate(self, fused, projected, h):
        bias = fused.bias.reshape((1,) * (h.ndim - 1) + fused.bias.shape)
        return jnp.tanh(projected + h @ fused.w_h + bias)

    def advance(self, fused, activations, carry):
        (h,) = carry
        return (h + self.leak * (activations - h),)

    def linearize(self, fused, activations, before, after):
        slope = self.leak * (1 - activations * activations)
        return Linearization(da_gates=slope, dh_dh=jnp.full_like(slope[:, :1], 1 - self.leak))

    def pull_back(self, transposed, at, d, dc):
        return at.da_gates * d, None


@dataclasses.dataclass(frozen=True)
class LeakyRNN(RecurrentLayer):
    """A stack of leaky cells. Returns (output, h_n)."""

    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    dropout: float = 0.0
    bidirectional: bool = False

    @property
    def cell(self):
        return LeakyCell(self.hidden_size)
