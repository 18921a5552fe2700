"""The GRU with layer normalisation (Ba, Kiros & Hinton 2016, "Layer normalization", equations 23 to 25).

Four norms: of the products of r and z, over both gates together, and of the products of n, for the input's and for h's.
With LN(s; w) = w * normalize(s), where `normalize` is that of norm.py, the parameters r, z, n side by side, and z the
share of the old state, as in PyTorch (the paper's z is that of the new one):

    r, z = LN([W_ir W_iz] x; scale_ih) + b_ih + LN([W_hr W_hz] h; scale_hh) + b_hh, and the sigmoid of both
    n = tanh(LN(W_in x; scale_ih) + b_in + r * (LN(W_hn h; scale_hh) + b_hn))
    h' = (1 - z) * n + z * h
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn.initializers import ones, zeros

from jaxpack._cells.cell import Carry, Cell, Fused, Linearization, Params, expand_leading, step_from_input
from jaxpack._cells.norm import Normalized, normalize, product_for_norm


class Scales(NamedTuple):
    """The scales of the norms, those of r and z at half scale.

    Attributes:
      x: [3H], for the gates n, r, z, of the input's product.
      h: [3H], for the gates r, z, n, of h's product.
    """

    x: jax.Array
    h: jax.Array


class LayerNormGRUGates(NamedTuple):
    """The gates of M steps.

    Attributes:
      rz: [M, 2H], the tanh of the pre-activations of r and z at half scale.
      n: [M, H].
      hn: [M, H], what r multiplies.
      product: [M, 3H], of h with the weights of r, z, n, normalised.
      inverse: [M, 2], the inverse standard deviations of the products of r, z and of n.
    """

    rz: jax.Array
    n: jax.Array
    hn: jax.Array
    product: jax.Array
    inverse: jax.Array


@dataclasses.dataclass(frozen=True)
class LayerNormGRUCell(Cell):
    """A gated recurrent unit with layer normalisation, whose carry is h.

    Examples:
      >>> sorted(LayerNormGRUCell(4).shapes(2, bias=False))
      ['scale_hh', 'scale_ih', 'weight_hh', 'weight_ih']
    """

    gates: ClassVar[tuple[str, ...]] = ("r", "z", "n")
    forget_gate: ClassVar[tuple[str, int] | None] = ("z", 1)
    gates_apart: ClassVar[bool] = True
    initializers: ClassVar[Mapping[str, Callable[..., Any]]] = MappingProxyType(
        {"scale_ih": ones, "scale_hh": ones, "bias_ih": zeros, "bias_hh": zeros}
    )

    def shapes(self, input_size: int, bias: bool) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every parameter: two scales [3*H] beside the usual ones."""
        width = 3 * self.hidden_size
        return super().shapes(input_size, bias) | {"scale_ih": (width,), "scale_hh": (width,)}

    def fuse(self, params: Params) -> Fused:
        """Returns gate columns n, r, z, hn, and s [3H], h's product with the weights of r, z, n before its norm.

        The input reaches n, r, z, and h reaches s. The gates r and z are at half scale.
        """
        empty = jnp.zeros_like(params["weight_ih"][0])
        (b_r, b_z, b_n), (c_r, c_z, c_n) = (jnp.split(params.get(k, empty), 3) for k in ("bias_ih", "bias_hh"))
        x_r, x_z, x_n = jnp.split(params["scale_ih"], 3)
        h_r, h_z, h_n = jnp.split(params["scale_hh"], 3)
        w_r, w_z, w_n = jnp.split(params["weight_ih"], 3, axis=1)
        return Fused(
            jnp.concatenate([w_n, w_r, w_z], axis=1),
            params["weight_hh"],
            jnp.concatenate([b_n, (b_r + c_r) / 2, (b_z + c_z) / 2, c_n, empty]),
            more=Scales(jnp.concatenate([x_n, x_r / 2, x_z / 2]), jnp.concatenate([h_r / 2, h_z / 2, h_n])),
        )

    def project(self, fused: Fused, x: jax.Array) -> jax.Array:
        """Returns the norms of the input's product, scaled."""
        of_n, of_rz = self._of_input(fused, x)
        values = jnp.concatenate([of_n.values, of_rz.values], axis=-1)
        return values * expand_leading(fused.more.x, values)

    def activate(self, fused: Fused, projected: jax.Array, h: jax.Array) -> LayerNormGRUGates:
        """Returns the gates, and the normalised product of h."""
        size, s = self.hidden_size, product_for_norm(h, fused.w_h, fused.more.h)
        of_rz, of_n = normalize(s[..., : 2 * size]), normalize(s[..., 2 * size :])
        product = jnp.concatenate([of_rz.values, of_n.values], axis=-1)
        scaled, bias = product * expand_leading(fused.more.h, s), expand_leading(fused.bias, s)
        rz = jnp.tanh(projected[..., size:] + scaled[..., : 2 * size] + bias[..., size : 3 * size])
        hn = scaled[..., 2 * size :] + bias[..., 3 * size : 4 * size]
        n = jnp.tanh(projected[..., :size] + bias[..., :size] + (rz[..., :size] / 2 + 0.5) * hn)
        return LayerNormGRUGates(rz, n, hn, product, jnp.concatenate([of_rz.inverse, of_n.inverse], axis=-1))

    def advance(self, fused: Fused, activations: LayerNormGRUGates, carry: Carry) -> Carry:
        """Computes h' as at the top of this file."""
        (h,), n = carry, activations.n
        z = activations.rz[..., self.hidden_size :] / 2 + 0.5
        return (n + z * (h - n),)

    def linearize(self, fused: Fused, activations: LayerNormGRUGates, before: Carry, after: Carry) -> Linearization:
        """Differentiates the gates; the columns s hold the normalised product, over which `pull_back` writes da."""
        (h,), (rz, n, hn, product, inverse) = before, activations
        r, z = jnp.split(rz / 2 + 0.5, 2, axis=-1)
        by_n = (1 - z) * (1 - n * n)
        by_rz = jnp.concatenate([by_n * hn, h - n], axis=-1) * (1 - rz * rz) / 2
        return Linearization(jnp.concatenate([by_n, by_rz, by_n * r, product], axis=-1), dh_dh=z, more=inverse)

    def pull_back(
        self, transposed: Fused, at: Linearization, d: jax.Array, dc: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """All gates act on h', the norms of h's product on r, z and hn."""
        size = self.hidden_size
        da = at.da_gates[..., : 4 * size] * jnp.concatenate([d, d, d, d], axis=-1)
        of_rz, of_n = jnp.split(at.da_gates[..., 4 * size :], [2 * size], axis=-1)
        d_rz, d_n = jnp.split(da[..., size:] * expand_leading(transposed.more.h, d), [2 * size], axis=-1)
        ds_rz = Normalized(of_rz, at.more[..., :1]).pull_back(d_rz)
        ds_n = Normalized(of_n, at.more[..., 1:]).pull_back(d_n)
        return jnp.concatenate([da, ds_rz, ds_n], axis=-1), None

    def pull_back_projected(self, fused: Fused, x: jax.Array, da: jax.Array) -> jax.Array:
        """Pulls da back through the norms of the input's product."""
        size = self.hidden_size
        of_n, of_rz = self._of_input(fused, x)
        d = da[:, : 3 * size] * expand_leading(fused.more.x, da)
        return jnp.concatenate([of_n.pull_back(d[:, :size]), of_rz.pull_back(d[:, size:])], axis=-1)

    def more_gradients(
        self,
        fused: Fused,
        x: jax.Array,
        activations: LayerNormGRUGates,
        before: Carry,
        after: Carry,
        da: jax.Array,
    ) -> Scales:
        """Returns the cotangents of the scales."""
        size = self.hidden_size
        from_x = jnp.concatenate([part.values for part in self._of_input(fused, x)], axis=-1)
        of_h = da[:, size : 4 * size] * activations.product
        return Scales((da[:, : 3 * size] * from_x).sum(0), of_h.sum(0))

    def _of_input(self, fused: Fused, x: jax.Array) -> tuple[Normalized, Normalized]:
        """Returns the norms of the input's products with the weights of n, and of r and z."""
        s, size = product_for_norm(x, fused.w_x, fused.more.x), self.hidden_size
        return normalize(s[..., :size]), normalize(s[..., size:])


def layer_norm_gru_cell(params: Params, carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Runs one step of a gated recurrent unit with layer normalisation, for step-by-step decoding.

    Examples:
      >>> params = jaxpack.LayerNormGRU(1, 2).init(jax.random.key(0))["l0"]
      >>> carry, output = jax.jit(jaxpack.layer_norm_gru_cell)(params, jnp.zeros(2), jnp.array([1.0]))
      >>> output.shape
      (2,)

    Args:
      params: the parameters of one layer and direction, such as `gru.init(key)["l0"]`.
      carry: h [..., H].
      x: [..., F].

    Returns:
      The new carry h, and the output, which is h too.

    Raises:
      ValueError: if a last axis does not match the parameters.
    Source: Ba et al. 2016.
    """
    return step_from_input(LayerNormGRUCell(params["weight_hh"].shape[0]), params, carry, x)
