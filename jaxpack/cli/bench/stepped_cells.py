"""The layers of `jaxpack bench` that run step by step, and their cells as a user of Flax would write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

import jaxpack
from jaxpack._stepped.layer import SteppedLayer

IMAGE = (8, 8)  # the height and width of the images that convolutional layers get
IMAGE_SIZES: Mapping[str, int] = MappingProxyType({"features": 4, "hidden_size": 8})  # channels, by default
Weights = Mapping[str, jax.Array]
Carry = Any


def _conv_lstm(features: int, hidden_size: int) -> jaxpack.ConvLSTM:
    return jaxpack.ConvLSTM(features, hidden_size, IMAGE)


def _conv_gru(features: int, hidden_size: int) -> jaxpack.ConvGRU:
    return jaxpack.ConvGRU(features, hidden_size, IMAGE)


def _time_decay(features: int, hidden_size: int) -> jaxpack.TimeDecay:
    return jaxpack.TimeDecay(jaxpack.LSTM(features, hidden_size))


STEPPED_LAYERS: Mapping[str, Callable[[int, int], SteppedLayer]] = MappingProxyType(
    {
        "slstm": jaxpack.SLSTM,
        "grud": jaxpack.GRUD,
        "cfc": jaxpack.CfC,
        "timedecay": _time_decay,
        "convlstm": _conv_lstm,
        "convgru": _conv_gru,
    }
)
CONVOLUTIONAL = ("convlstm", "convgru")


def arrays_beside(cell: str, generator: np.random.Generator, lead: tuple[int, ...], features: int) -> list[np.ndarray]:
    """Draws the arrays that a cell reads beside x: of GRUD what is observed, a half, and of timed cells the gaps.

    Args:
      cell: the name of a cell, which may read nothing else.
      lead: the shape before the features of x.
      features: the number of the features of x.
    """
    beside = []
    if cell == "grud":
        beside.append((generator.random((*lead, features)) < 0.5).astype(np.float32))
    if cell in ("grud", "cfc", "timedecay"):
        beside.append(generator.exponential(1, lead).astype(np.float32))
    return beside


def side_by_side(x: Any, beside: Any) -> Any:
    """Returns x and the arrays beside it as one array, which is what flax.nnx.RNN scans over."""
    if not beside:
        return x
    return jnp.concatenate([x, *(each if each.ndim == x.ndim else each[..., None] for each in beside)], axis=-1)


class SteppedCell(nnx.RNNCellBase):
    """A cell of flax.nnx in plain equations, with the parameters of jaxpack's layer."""

    def __init__(self, cell: str, layer: SteppedLayer, params: Weights) -> None:
        self.cell, self.layer = cell, layer
        self.weights = nnx.data({name: nnx.Param(value) for name, value in params.items()})

    def __call__(self, carry: Carry, inputs: jax.Array) -> tuple[Carry, jax.Array]:
        """Computes one step."""
        carry = _STEPS[self.cell]({name: param[...] for name, param in self.weights.items()}, carry, inputs)
        return carry, jax.tree.leaves(carry)[0]

    def initialize_carry(self, input_shape: tuple[int, ...], rngs: Any = None, carry_init: Any = None) -> Carry:
        """Returns a carry of zeros."""
        lead, like = input_shape[: -self.num_feature_axes], self.layer.state_like(self.weights["weight_ih"].dtype)
        return jax.tree.map(lambda leaf: jnp.zeros((*lead, *leaf.shape), leaf.dtype), like)

    @property
    def num_feature_axes(self) -> int:
        """The number of feature axes of inputs."""
        return len(self.layer.input_shape)


def _slstm_step(weights: Weights, carry: Carry, x: jax.Array) -> Carry:
    heads, size, _ = weights["weight_hh"].shape
    h, c, n, m = carry
    mixed = jnp.einsum("bhd,hdg->bhg", h.reshape(-1, heads, size), weights["weight_hh"])
    mixed = mixed.reshape(-1, heads, 4, size).swapaxes(1, 2).reshape(-1, 4 * heads * size)
    i, f, z, o = jnp.split(x @ weights["weight_ih"] + weights["bias"] + mixed, 4, axis=-1)
    kept = jnp.where(n == 0, -jnp.inf, jax.nn.log_sigmoid(f) + m)
    m = jnp.maximum(kept, i)
    forget, enter = jnp.exp(kept - m), jnp.exp(i - m)
    c, n = forget * c + enter * jnp.tanh(z), forget * n + enter
    return jax.nn.sigmoid(o) * c / n, c, n, m


def _gru_d_step(weights: Weights, carry: Carry, inputs: jax.Array) -> Carry:
    h, last, since = carry  # last is less its mean, so that 0 stands for a feature that was never observed
    x, mask, dt = jnp.split(inputs, [last.shape[-1], 2 * last.shape[-1]], axis=-1)
    since, apart = since + dt, x - weights["mean"]
    decay_x = jnp.exp(-jax.nn.relu(weights["decay_x"] * since + weights["decay_x_bias"]))
    h = jnp.exp(-jax.nn.relu(since @ weights["decay_h"] + weights["decay_h_bias"])) * h
    seen = weights["mean"] + mask * apart + (1 - mask) * decay_x * last
    net = seen @ weights["weight_ih"] + mask @ weights["weight_mask"] + weights["bias"]
    both = 2 * h.shape[-1]
    r, z = jnp.split(jax.nn.sigmoid(net[:, :both] + h @ weights["weight_hh"][:, :both]), 2, axis=-1)
    candidate = jnp.tanh(net[:, both:] + (r * h) @ weights["weight_hh"][:, both:])
    return (1 - z) * candidate + z * h, mask * apart + (1 - mask) * last, (1 - mask) * since


def _cfc_step(weights: Weights, h: Carry, inputs: jax.Array) -> Carry:
    x, dt = inputs[:, :-1], inputs[:, -1:]
    y = 1.7159 * jnp.tanh(0.666 * (x @ weights["weight_ih"] + h @ weights["weight_hh"] + weights["bias"]))
    g, k, a, s = jnp.split(y @ weights["weight_heads"] + weights["bias_heads"], 4, axis=-1)
    share = jax.nn.sigmoid(a * dt + s)
    return (1 - share) * jnp.tanh(g) + share * jnp.tanh(k)


def _time_decay_step(weights: Weights, carry: Carry, inputs: jax.Array) -> Carry:
    x, dt = inputs[:, :-1], inputs[:, -1:]
    decays = jnp.split(jnp.exp(-jax.nn.softplus(weights["decay"]) * dt), 2, axis=-1)
    h, c = (decay * leaf for decay, leaf in zip(decays, carry, strict=True))
    bias = weights["bias_ih"] + weights["bias_hh"]
    i, f, g, o = jnp.split(x @ weights["weight_ih"] + h @ weights["weight_hh"] + bias, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _conv_lstm_step(weights: Weights, carry: Carry, x: jax.Array) -> Carry:
    h, c = carry
    net = _convolved(x, weights["weight_ih"]) + _convolved(h, weights["weight_hh"]) + weights["bias"]
    i, f, g, o = jnp.split(net, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _conv_gru_step(weights: Weights, h: Carry, x: jax.Array) -> Carry:
    both, kernel = 2 * h.shape[-1], weights["weight_hh"]
    net = _convolved(x, weights["weight_ih"]) + weights["bias"]
    r, z = jnp.split(jax.nn.sigmoid(net[..., :both] + _convolved(h, kernel[..., :both])), 2, axis=-1)
    return (1 - z) * jnp.tanh(net[..., both:] + _convolved(r * h, kernel[..., both:])) + z * h


_STEPS: Mapping[str, Callable[[Weights, Carry, jax.Array], Carry]] = MappingProxyType(
    {
        "slstm": _slstm_step,
        "grud": _gru_d_step,
        "cfc": _cfc_step,
        "timedecay": _time_decay_step,
        "convlstm": _conv_lstm_step,
        "convgru": _conv_gru_step,
    }
)
