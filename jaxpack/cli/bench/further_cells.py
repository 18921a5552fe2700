"""The further cells of jaxpack as a user of Flax would write them: plain equations, all gates in one product."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

import jaxpack
from jaxpack._layers.recurrent_layer import RecurrentLayer

Weights = Mapping[str, jax.Array]
Carry = tuple[jax.Array, ...]


class FurtherCell(nnx.RNNCellBase):
    """A cell of flax.nnx with the parameters of one layer and direction of jaxpack, the two biases summed up."""

    make_layer: ClassVar[Callable[[int, int], RecurrentLayer]]
    step: ClassVar[Callable[[Weights, Carry, jax.Array], Carry]]

    def __init__(
        self, in_features: int, hidden_features: int, *, rngs: nnx.Rngs, param_dtype: Any = None, **_: Any
    ) -> None:
        layer = type(self).make_layer(in_features, hidden_features)
        drawn = layer.init(rngs.params(), param_dtype)["l0"]
        bias = drawn.pop("bias_hh")
        if not isinstance(layer, jaxpack.LayerNormGRU):
            drawn["bias_ih"] = drawn["bias_ih"] + bias
        else:  # r multiplies a part of it
            drawn["bias_hh"] = bias
        self.weights = nnx.data({name: nnx.Param(value) for name, value in drawn.items()})
        self.sizes = tuple(jax.tree.leaves(layer.cell.state_sizes))

    def __call__(self, carry: Any, inputs: jax.Array) -> tuple[Any, jax.Array]:
        """Computes one step."""
        carry = type(self).step({name: param[...] for name, param in self.weights.items()}, carry, inputs)
        return carry, carry[0]

    def initialize_carry(self, input_shape: tuple[int, ...], rngs: Any = None, carry_init: Any = None) -> Any:
        """Returns a carry of zeros."""
        dtype = self.weights["weight_ih"][...].dtype
        return tuple(jnp.zeros((*input_shape[:-1], size), dtype) for size in self.sizes)

    @property
    def num_feature_axes(self) -> int:
        """The number of feature axes of inputs."""
        return 1


def _reset_before(weights: Weights, carry: Carry, x: jax.Array) -> Carry:
    (h,), size = carry, carry[0].shape[-1]
    from_x = x @ weights["weight_ih"] + weights["bias_ih"]
    r, z = jnp.split(jax.nn.sigmoid(from_x[..., : 2 * size] + h @ weights["weight_hh"][:, : 2 * size]), 2, axis=-1)
    n = jnp.tanh(from_x[..., 2 * size :] + (r * h) @ weights["weight_hh"][:, 2 * size :])
    return ((1 - z) * n + z * h,)


def _mgu(weights: Weights, carry: Carry, x: jax.Array) -> Carry:
    (h,), size = carry, carry[0].shape[-1]
    from_x = x @ weights["weight_ih"] + weights["bias_ih"]
    f = jax.nn.sigmoid(from_x[..., :size] + h @ weights["weight_hh"][:, :size])
    n = jnp.tanh(from_x[..., size:] + (f * h) @ weights["weight_hh"][:, size:])
    return ((1 - f) * h + f * n,)


def _ind_rnn(weights: Weights, carry: Carry, x: jax.Array) -> Carry:
    return (jax.nn.relu(x @ weights["weight_ih"] + weights["weight_hh"] * carry[0] + weights["bias_ih"]),)


def _peephole(weights: Weights, carry: Carry, x: jax.Array) -> Carry:
    h, c = carry
    i, f, g, o = jnp.split(x @ weights["weight_ih"] + h @ weights["weight_hh"] + weights["bias_ih"], 4, axis=-1)
    p_i, p_f, p_o = jnp.split(weights["weight_ch"], 3)
    c = jax.nn.sigmoid(f + p_f * c) * c + jax.nn.sigmoid(i + p_i * c) * jnp.tanh(g)
    return jax.nn.sigmoid(o + p_o * c) * jnp.tanh(c), c


def _norm(s: jax.Array) -> jax.Array:
    return jax.nn.standardize(s, axis=-1, epsilon=1e-5)


def _layer_norm_lstm(weights: Weights, carry: Carry, x: jax.Array) -> Carry:
    h, c = carry
    from_x = weights["scale_ih"] * _norm(x @ weights["weight_ih"])
    from_h = weights["scale_hh"] * _norm(h @ weights["weight_hh"])
    i, f, g, o = jnp.split(from_x + from_h + weights["bias_ih"], 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(weights["scale_c"] * _norm(c) + weights["bias_c"]), c


def _layer_norm_gru(weights: Weights, carry: Carry, x: jax.Array) -> Carry:
    (h,), size = carry, carry[0].shape[-1]

    def normed(product: jax.Array, side: str) -> tuple[jax.Array, jax.Array]:
        parts = [_norm(product[..., : 2 * size]), _norm(product[..., 2 * size :])]
        scaled = weights[f"scale_{side}"] * jnp.concatenate(parts, axis=-1) + weights[f"bias_{side}"]
        return scaled[..., : 2 * size], scaled[..., 2 * size :]

    (x_rz, x_n), (h_rz, h_n) = normed(x @ weights["weight_ih"], "ih"), normed(h @ weights["weight_hh"], "hh")
    r, z = jnp.split(jax.nn.sigmoid(x_rz + h_rz), 2, axis=-1)
    return ((1 - z) * jnp.tanh(x_n + r * h_n) + z * h,)


def reset_before_gru(*sizes: Any, **options: Any) -> jaxpack.GRU:
    """Returns a jaxpack.GRU that resets before the product."""
    return jaxpack.GRU(*sizes, reset_after=False, **options)


FURTHER_LAYERS: Mapping[str, Callable[..., RecurrentLayer]] = MappingProxyType(
    {
        "grubefore": reset_before_gru,
        "mgu": jaxpack.MGU,
        "indrnn": jaxpack.IndRNN,
        "peepholelstm": jaxpack.PeepholeLSTM,
        "layernormlstm": jaxpack.LayerNormLSTM,
        "layernormgru": jaxpack.LayerNormGRU,
    }
)
_STEPS = {
    "grubefore": _reset_before,
    "mgu": _mgu,
    "indrnn": _ind_rnn,
    "peepholelstm": _peephole,
    "layernormlstm": _layer_norm_lstm,
    "layernormgru": _layer_norm_gru,
}


def _cell_of(name: str) -> type[FurtherCell]:
    members = {"make_layer": staticmethod(FURTHER_LAYERS[name]), "step": staticmethod(_STEPS[name])}
    return type(f"Further_{name}", (FurtherCell,), members)


FURTHER_CELLS: Mapping[str, type[FurtherCell]] = MappingProxyType({name: _cell_of(name) for name in FURTHER_LAYERS})
