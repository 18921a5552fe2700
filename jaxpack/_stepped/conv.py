"""ConvLSTM and ConvGRU: recurrent layers whose products are convolutions over one to three axes of space.

With * a convolution that keeps the shape (zeros beyond the border), ConvLSTM (Shi et al. 2015, "Convolutional LSTM
network", without its peepholes, as in Flax and Keras) is

    i  = σ(W_i * x + U_i * h + b_i)
    f  = σ(W_f * x + U_f * h + b_f)
    g  = tanh(W_g * x + U_g * h + b_g)
    o  = σ(W_o * x + U_o * h + b_o)
    c' = f c + i g
    h' = o tanh(c')

and ConvGRU (Ballas et al. 2016, "Delving deeper into convolutional networks for learning video representations") is

    r  = σ(W_r * x + U_r * h + b_r)
    z  = σ(W_z * x + U_z * h + b_z)
    n  = tanh(W_n * x + U_n * (r h) + b_n)
    h' = (1 - z) n + z h

where z is the share of the old state, as in jaxpack.GRU; the paper's z is that of the new one. Gates are side by side
in the last axis of the kernels. The convolutions of x are one convolution of all steps together, before the loop.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._checks import at_least_one
from jaxpack._layers.params import floating
from jaxpack._linear.diagonal import split
from jaxpack._linear.solve import wide
from jaxpack._stepped.layer import SteppedLayer
from jaxpack._types import PyTree


@dataclasses.dataclass(frozen=True)
class _Convolutional(SteppedLayer):
    """The options and parameters of both layers."""

    num_gates: ClassVar[int]

    input_size: int
    hidden_size: int
    spatial_shape: Sequence[int]
    kernel_size: int | Sequence[int] = 3
    bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = _sizes("spatial_shape", self.spatial_shape)
        if len(shape) not in (1, 2, 3):
            raise ValueError(f"spatial_shape must have one to three axes, got {shape}.")
        each = self.kernel_size if isinstance(self.kernel_size, Sequence) else (self.kernel_size,) * len(shape)
        kernel = _sizes("kernel_size", each)
        if len(kernel) != len(shape):
            raise ValueError(
                f"kernel_size={kernel} must have a size for each axis of spatial_shape={shape}, or be one int."
            )
        if not isinstance(self.bias, bool):
            raise TypeError(f"bias must be a bool, got {self.bias!r}.")
        object.__setattr__(self, "spatial_shape", shape)
        object.__setattr__(self, "kernel_size", kernel)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one step of one sequence: (*spatial_shape, input_size)."""
        return (*self.spatial_shape, self.input_size)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of one step of the output of one sequence: (*spatial_shape, hidden_size)."""
        return (*self.spatial_shape, self.hidden_size)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        kernel, width = _sizes("kernel_size", self.kernel_size), self.num_gates * self.hidden_size
        weights = {"weight_ih": (*kernel, self.input_size, width), "weight_hh": (*kernel, self.hidden_size, width)}
        return weights | ({"bias": (width,)} if self.bias else {})

    def init(self, key: jax.Array, dtype: Any = None) -> dict[str, jax.Array]:
        """Draws parameters as torch.nn.Conv2d does: uniform within 1/sqrt(n) of 0.

        n is the number of inputs of each sum, kernel sizes included; for biases it is that of the convolution of x.

        Args:
          key: a JAX random key.
          dtype: a floating dtype. Default: JAX's (float32, or float64 under x64).

        Raises:
          TypeError: if key is not a random key, or dtype is not floating.
        """
        dtype, shapes = floating(float if dtype is None else dtype), self.shapes
        params = {}
        for each, (name, shape) in zip(split(key, len(shapes)), shapes.items(), strict=True):
            bound = 1 / math.sqrt(math.prod(shapes["weight_ih" if name == "bias" else name][:-1]))
            params[name] = jax.random.uniform(each, shape, dtype, -bound, bound)
        return params

    def project(self, params: PyTree, x: jax.Array) -> jax.Array:
        """Returns W * x + b of all gates."""
        projected = wide(_convolved(x, params["weight_ih"]))
        return projected + wide(params["bias"]).reshape((1,) * (x.ndim - 1) + (-1,)) if self.bias else projected


@dataclasses.dataclass(frozen=True)
class ConvLSTM(_Convolutional):
    """A convolutional LSTM layer, for sequences of images, lines or volumes. Returns (output, (h_n, c_n)).

        i, f, g, o = σ, σ, tanh, σ of W * x + U * h + b;  c' = f c + i g;  h' = o tanh(c')

    The convolutions keep the shape, with zeros beyond the border. States are [B, *spatial_shape, hidden_size].

    Examples:
      >>> layer = jaxpack.ConvLSTM(input_size=3, hidden_size=4, spatial_shape=(8, 8))
      >>> params = layer.init(jax.random.key(0))
      >>> videos = jaxpack.pack_sequence([np.ones((3, 8, 8, 3)), np.ones((1, 8, 8, 3))])
      >>> output, (h_n, c_n) = layer.apply(params, videos)
      >>> output.shape, c_n.shape  # 4 real steps
      ((4, 8, 8, 4), (2, 8, 8, 4))
      >>> (h_n, c_n), y = layer.step(params, (h_n, c_n), np.ones((2, 8, 8, 3)))  # one step more

    Args:
      input_size: the number of features of each place, the last axis of the inputs.
      hidden_size: the number of features of h and c at each place.
      spatial_shape: the sizes of the one to three axes between the axis of time and the features.
      kernel_size: the size of the kernels, for all axes or for each.
      bias: whether there is a bias.

    Raises:
      TypeError: if an argument has another type.
      ValueError: if a size is below 1, or there are too many axes.
    Source: Shi et al. 2015, https://arxiv.org/abs/1506.04214; mirrors flax.linen.ConvLSTMCell, which adds 1 to the bias
      of f.
    """

    num_gates = 4

    def state_like(self, dtype: Any) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Returns h and c of one sequence, as jax.ShapeDtypeStruct."""
        like = jax.ShapeDtypeStruct(self.output_shape, dtype)
        return like, like

    def advance(self, params: PyTree, state: PyTree, projected: jax.Array) -> tuple[PyTree, jax.Array]:
        """Computes one step."""
        h, c = state
        weight = params["weight_hh"]
        i, f, g, o = jnp.split(projected + wide(_convolved(h.astype(weight.dtype), weight)), 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h


@dataclasses.dataclass(frozen=True)
class ConvGRU(_Convolutional):
    """A convolutional GRU layer, for sequences of images, lines or volumes. Returns (output, h_n).

        r, z = σ of W * x + U * h + b;  n = tanh(W_n * x + U_n * (r h) + b_n);  h' = (1 - z) n + z h

    The convolutions keep the shape, with zeros beyond the border. The state is [B, *spatial_shape, hidden_size]. The
    arguments are those of jaxpack.ConvLSTM.

    Examples:
      >>> layer = jaxpack.ConvGRU(input_size=3, hidden_size=4, spatial_shape=(8,), kernel_size=5)
      >>> params = layer.init(jax.random.key(0))
      >>> lines = jaxpack.pack_sequence([np.ones((3, 8, 3)), np.ones((1, 8, 3))])
      >>> output, h_n = layer.apply(params, lines)
      >>> output.shape, h_n.shape
      ((4, 8, 4), (2, 8, 4))

    Raises:
      TypeError: if an argument has another type.
      ValueError: if a size is below 1, or there are too many axes.
    Source: Ballas et al. 2016, https://arxiv.org/abs/1511.06432, whose z is 1 - z here.
    """

    num_gates = 3

    def state_like(self, dtype: Any) -> jax.ShapeDtypeStruct:
        """Returns h of one sequence, as jax.ShapeDtypeStruct."""
        return jax.ShapeDtypeStruct(self.output_shape, dtype)

    def advance(self, params: PyTree, state: PyTree, projected: jax.Array) -> tuple[PyTree, jax.Array]:
        """Computes one step."""
        h, weight, both = state, params["weight_hh"], 2 * self.hidden_size
        gates = projected[..., :both] + wide(_convolved(h.astype(weight.dtype), weight[..., :both]))
        r, z = jnp.split(jax.nn.sigmoid(gates), 2, axis=-1)
        candidate = projected[..., both:] + wide(_convolved((r * h).astype(weight.dtype), weight[..., both:]))
        h = (1 - z) * jnp.tanh(candidate) + z * h
        return h, h


def _sizes(name: str, sizes: int | Sequence[int]) -> tuple[int, ...]:
    """Returns the sizes of axes as a tuple of ints, each at least 1."""
    if not isinstance(sizes, Sequence) or isinstance(sizes, str):
        raise TypeError(f"{name} must be a tuple of ints, got {sizes!r}.")
    return tuple(at_least_one(f"{name}[{i}]", size) for i, size in enumerate(sizes))


def _convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves [M, *spatial, F] with a kernel [*sizes, F, O], and keeps the shape of space."""
    axes = tuple(range(kernel.ndim - 2))
    rows = (0, len(axes) + 1, *(axis + 1 for axis in axes))
    numbers = lax.ConvDimensionNumbers(rows, (len(axes) + 1, len(axes), *axes), rows)
    return lax.conv_general_dilated(x, kernel, (1,) * len(axes), "SAME", dimension_numbers=numbers)
