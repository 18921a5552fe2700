"""The LSTM with layer normalisation (Ba, Kiros & Hinton 2016, "Layer normalization", equations 20 to 22).

Three norms: of the input's product and of h's product, each over all four gates together, and of the memory on its way
to h. With LN(s; w) = w * normalize(s), where `normalize` is that of norm.py, and the gates i, f, g, o side by side:

    i, f, g, o = LN(W_ih x; scale_ih) + b_ih + LN(W_hh h; scale_hh) + b_hh
    c' = sigmoid(f) * c + sigmoid(i) * tanh(g)
    h' = sigmoid(o) * tanh(LN(c'; scale_c) + b_c)

The memory that is handed on is c', not its norm. b_ih and b_hh are the shifts of the norms, and the paper's bias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn.initializers import ones, zeros

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
from jaxpack._cells.lstm import LSTMState, lstm_gates
from jaxpack._cells.norm import Normalized, normalize, product_for_norm


class Scales(NamedTuple):
    """The scales of the norms, those of the gates with the gates' own scale.

    Attributes:
      x, h: [4H], of the input's product and of h's.
      c: [H], of the memory.
    """

    x: jax.Array
    h: jax.Array
    c: jax.Array


class LayerNormLSTMGates(NamedTuple):
    """The gates of M steps.

    Attributes:
      t: [M, 4H], the tanh of all pre-activations, those of the sigmoid gates at half scale.
      product: of h with its weights, normalised.
    """

    t: jax.Array
    product: Normalized


@dataclasses.dataclass(frozen=True)
class LayerNormLSTMCell(Cell):
    """An LSTM cell with layer normalisation, whose carry is (h, c).

    Examples:
      >>> sorted(LayerNormLSTMCell(4).shapes(2, bias=False))
      ['scale_c', 'scale_hh', 'scale_ih', 'weight_hh', 'weight_ih']
    """

    gates: ClassVar[tuple[str, ...]] = ("i", "f", "g", "o")
    forget_gate: ClassVar[tuple[str, int] | None] = ("f", 1)
    gates_apart: ClassVar[bool] = True
    initializers: ClassVar[Mapping[str, Callable[..., Any]]] = MappingProxyType(
        {"scale_ih": ones, "scale_hh": ones, "scale_c": ones, "bias_ih": zeros, "bias_hh": zeros, "bias_c": zeros}
    )

    @property
    def state_sizes(self) -> tuple[int, int]:
        """The widths of h and c."""
        return self.hidden_size, self.hidden_size

    def shapes(self, input_size: int, bias: bool) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every parameter: scales [4*H] and [H], and bias_c [H], beside the usual ones."""
        width = 4 * self.hidden_size
        scales: dict[str, tuple[int, ...]] = {
            "scale_ih": (width,),
            "scale_hh": (width,),
            "scale_c": (self.hidden_size,),
        }
        return super().shapes(input_size, bias) | scales | ({"bias_c": (self.hidden_size,)} if bias else {})

    def fuse(self, params: Params) -> Fused:
        """Returns gate columns a [4H], c [H], s [4H]: the gates, the memory's norm, and h's product before its norm.

        The input reaches a, h reaches s. Sigmoid gates are at half scale, so that all gates are a tanh.
        """
        scale = jnp.repeat(jnp.array([0.5, 0.5, 1, 0.5], params["weight_ih"].dtype), self.hidden_size)
        bias_c = params.get("bias_c", jnp.zeros_like(params["scale_c"]))
        bias = jnp.concatenate([total_bias(params) * scale, bias_c, jnp.zeros_like(scale)])
        scales = Scales(params["scale_ih"] * scale, params["scale_hh"] * scale, params["scale_c"])
        return Fused(params["weight_ih"], params["weight_hh"], bias, more=scales)

    def project(self, fused: Fused, x: jax.Array) -> jax.Array:
        """Returns the norm of the input's product, scaled."""
        product = normalize(product_for_norm(x, fused.w_x, fused.more.x)).values
        return product * expand_leading(fused.more.x, product)

    def activate(self, fused: Fused, projected: jax.Array, h: jax.Array) -> LayerNormLSTMGates:
        """Returns one tanh for all gates, and the normalised product of h."""
        product = normalize(product_for_norm(h, fused.w_h, fused.more.h))
        bias = fused.bias[: 4 * self.hidden_size]
        scale, bias = (expand_leading(vector, projected) for vector in (fused.more.h, bias))
        return LayerNormLSTMGates(jnp.tanh(projected + product.values * scale + bias), product)

    def advance(self, fused: Fused, activations: LayerNormLSTMGates, carry: Carry) -> Carry:
        """Computes c' and h' as at the top of this file."""
        decay, inject = self.update(activations)
        c = decay * carry[1] + inject
        return lstm_gates(activations.t)[3] * self._seen(fused, normalize(c)), c

    def update(self, activations: LayerNormLSTMGates) -> tuple[jax.Array, jax.Array]:
        """Returns f and i * g."""
        i, f, g, _ = lstm_gates(activations.t)
        return f, i * g

    def linearize(self, fused: Fused, activations: LayerNormLSTMGates, before: Carry, after: Carry) -> Linearization:
        """Differentiates the gates; the columns s hold the normalised product, over which `pull_back` writes da."""
        t, (product, inverse) = activations
        i, f, g, o = lstm_gates(t)
        memory = normalize(after[1])
        tanh_c = self._seen(fused, memory)
        by_gate = jnp.concatenate([g / 2, before[1] / 2, i, tanh_c / 2], axis=-1) * (1 - t * t)
        return Linearization(
            da_gates=jnp.concatenate([by_gate, o * (1 - tanh_c * tanh_c), product], axis=-1),
            dh_dh=jnp.zeros_like(inverse),
            dc_dc=f,
            more=(inverse, memory),
        )

    def pull_back(
        self, transposed: Fused, at: Linearization, d: jax.Array, dc: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """The gates i, f and g act on c', o and the norm of c' on h', the norm of the product on all gates."""
        assert dc is not None
        assert at.dc_dc is not None
        size, (inverse, memory) = self.hidden_size, at.more
        by_gate, by_memory, product = jnp.split(at.da_gates, [4 * size, 5 * size], axis=-1)
        dm = by_memory * d
        dc = dc + memory.pull_back(dm * expand_leading(transposed.more.c, d))
        da = by_gate * jnp.concatenate([dc, dc, dc, d], axis=-1)
        ds = Normalized(product, inverse).pull_back(da * expand_leading(transposed.more.h, d))
        return jnp.concatenate([da, dm, ds], axis=-1), at.dc_dc * dc

    def pull_back_projected(self, fused: Fused, x: jax.Array, da: jax.Array) -> jax.Array:
        """Pulls da back through the norm of the input's product."""
        da = da[:, : 4 * self.hidden_size]
        return normalize(product_for_norm(x, fused.w_x, fused.more.x)).pull_back(da * expand_leading(fused.more.x, da))

    def more_gradients(
        self,
        fused: Fused,
        x: jax.Array,
        activations: LayerNormLSTMGates,
        before: Carry,
        after: Carry,
        da: jax.Array,
    ) -> Scales:
        """Returns the cotangents of the scales."""
        da, dm, _ = jnp.split(da, [4 * self.hidden_size, 5 * self.hidden_size], axis=-1)
        from_x, memory = normalize(product_for_norm(x, fused.w_x, fused.more.x)).values, normalize(after[1]).values
        return Scales((da * from_x).sum(0), (da * activations.product.values).sum(0), (dm * memory).sum(0))

    def _seen(self, fused: Fused, memory: Normalized) -> jax.Array:
        """Returns the memory as h sees it: the tanh of its norm."""
        bias = fused.bias[4 * self.hidden_size : 5 * self.hidden_size]
        scale, bias = (expand_leading(vector, memory.values) for vector in (fused.more.c, bias))
        return jnp.tanh(memory.values * scale + bias)


def layer_norm_lstm_cell(params: Params, carry: LSTMState, x: jax.Array) -> tuple[LSTMState, jax.Array]:
    """Runs one step of an LSTM cell with layer normalisation, for step-by-step decoding.

    Examples:
      >>> params = jaxpack.LayerNormLSTM(1, 2).init(jax.random.key(0))["l0"]
      >>> carry = jnp.zeros(2), jnp.array([8.0, 4.0])
      >>> (h, c), output = jax.jit(jaxpack.layer_norm_lstm_cell)(params, carry, jnp.array([1.0]))
      >>> h.shape, c.shape
      ((2,), (2,))

    Args:
      params: the parameters of one layer and direction, such as `lstm.init(key)["l0"]`.
      carry: (h [..., H], c [..., H]).
      x: [..., F].

    Returns:
      The new carry (h, c), and the output h.

    Raises:
      ValueError: if a last axis does not match the parameters.
      TypeError: if the carry is not a pair.
    Source: Ba et al. 2016.
    """
    return step_from_input(LayerNormLSTMCell(params["weight_hh"].shape[0]), params, carry, x)
