"""Mamba-2 (Dao & Gu 2024, "Transformers are SSMs", https://arxiv.org/abs/2405.21060).

With weights W_in of z, x, B, C and Δ side by side, H heads of size P = hidden_size / H, states of size N, and B and C
shared by the H / G heads of each of G groups:

    z, (x, B, C), δ = W_inᵀ u_t                            projections of the input u
    x, B, C         = SiLU(conv(x, B, C) + b)              a causal convolution of kernel_size steps, feature by feature
    Δ               = softplus(δ + Δ_bias)                 a number for each head
    S_t             = exp(-exp(A_log) Δ) S_{t-1} + Δ B xᵀ  [N, P] for each head
    y_t             = S_tᵀ C + D x
    output          = W_outᵀ (norm(y * SiLU(z)) * w)       norm divides by the root mean square of a group

Names of parameters are those of `mamba_ssm.modules.mamba2.Mamba2`; weights are stored input-major.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpack._checks import at_least_one
from jaxpack._layers.params import floating
from jaxpack._linear.diagonal import split
from jaxpack._linear.solve import wide
from jaxpack._matrix.chunks import Rule
from jaxpack._matrix.layer import Heads, MatrixLayer
from jaxpack._matrix.parts import conv_bound, divided, inverse_softplus_steps, rms_normalised, uniform
from jaxpack._matrix.rules import linear_attention
from jaxpack._matrix.state_dict import from_names
from jaxpack._types import PyTree

_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Mamba2(MatrixLayer):
    """A Mamba-2 layer: a state space with a scalar decay for each head. Returns (output, (conv, ssm)).

        S_t = exp(-exp(A_log) Δ_t) S_{t-1} + Δ_t B_t x_tᵀ;  y_t = S_tᵀ C_t + D x_t

    The output is as wide as the input. The state is the convolution's last inputs
    [B, kernel_size - 1, hidden_size + 2 * num_groups * state_size], and S [B, heads, state_size, head_size].

    Examples:
      >>> layer = jaxpack.Mamba2(input_size=4, hidden_size=8, head_size=4, state_size=3)
      >>> params = layer.init(jax.random.key(0))
      >>> output, (conv, ssm) = layer.apply(params, jaxpack.pack_sequence([np.ones((3, 4)), np.ones((1, 4))]))
      >>> output.shape, conv.shape, ssm.shape
      ((4, 4), (2, 3, 14), (2, 2, 3, 4))
      >>> state, y = layer.step(params, (conv, ssm), np.ones((2, 4)))  # one step more
      >>> y.shape
      (2, 4)

    Args:
      input_size: the number of features of each step, d_model in mamba_ssm.
      hidden_size: the width of x, y and z, d_inner in mamba_ssm, which makes it 2 * d_model.
      head_size: the features of a head; divides hidden_size.
      state_size: the size N of the state of each feature.
      num_groups: the number of B and C; divides the number of heads.
      kernel_size: the steps that the convolution sees.

    Raises:
      TypeError: if an argument is not an int.
      ValueError: if one is below 1, or does not divide what it must.
    Source: Dao & Gu 2024, https://arxiv.org/abs/2405.21060; state-spaces/mamba.
    """

    input_size: int
    hidden_size: int
    head_size: int = 64
    state_size: int = 128
    num_groups: int = 1
    kernel_size: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("head_size", "state_size", "num_groups", "kernel_size"):
            at_least_one(name, getattr(self, name))
        num_heads = divided("hidden_size", self.hidden_size, "head_size", self.head_size)
        divided("the number of heads, hidden_size / head_size", num_heads, "num_groups", self.num_groups)

    @property
    def heads(self) -> Heads:
        """The axes of the heads."""
        num_heads = self.hidden_size // self.head_size
        return Heads(self.num_groups, num_heads // self.num_groups, self.state_size, self.head_size)

    @property
    def rule(self) -> Rule:
        """Linear attention with keys B, queries C and values Δ x."""
        return linear_attention

    @property
    def conv_size(self) -> int:
        """The number of features that are convolved: x, B and C."""
        return self.hidden_size + 2 * self.num_groups * self.state_size

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        num_heads = self.heads.num_heads
        return {
            "in_proj": (self.input_size, self.hidden_size + self.conv_size + num_heads),
            "conv_kernel": (self.kernel_size, self.conv_size),
            "conv_bias": (self.conv_size,),
            "dt_bias": (num_heads,),
            "A_log": (num_heads,),
            "D": (num_heads,),
            "norm": (self.hidden_size,),
            "out_proj": (self.hidden_size, self.input_size),
        }

    def init(self, key: jax.Array, dtype: Any = None) -> dict[str, jax.Array]:
        """Draws parameters as mamba_ssm does: Δ from 0.001 to 0.1, log-uniform, exp(A_log) from 1 to 16, D = 1.

        Args:
          key: a JAX random key.
          dtype: a floating dtype. Default: JAX's (float32, or float64 under x64).

        Raises:
          TypeError: if key is not a random key, or dtype is not floating.
        """
        dtype, shapes = floating(float if dtype is None else dtype), self.shapes
        keys = dict(zip(shapes, split(key, len(shapes)), strict=True))
        conv = conv_bound(self.kernel_size)
        return {
            "in_proj": uniform(keys["in_proj"], shapes["in_proj"], dtype, 1 / math.sqrt(self.input_size)),
            "conv_kernel": uniform(keys["conv_kernel"], shapes["conv_kernel"], dtype, conv),
            "conv_bias": uniform(keys["conv_bias"], shapes["conv_bias"], dtype, conv),
            "dt_bias": inverse_softplus_steps(keys["dt_bias"], shapes["dt_bias"], dtype),
            "A_log": jnp.log(jax.random.uniform(keys["A_log"], shapes["A_log"], dtype, 1, 16)),
            "D": jnp.ones(shapes["D"], dtype),
            "norm": jnp.ones(shapes["norm"], dtype),
            "out_proj": uniform(keys["out_proj"], shapes["out_proj"], dtype, 1 / math.sqrt(self.hidden_size)),
        }

    def kernel(self, params: PyTree) -> tuple[jax.Array, jax.Array | None]:
        """Returns the kernel and the bias of the convolution."""
        return params["conv_kernel"], params["conv_bias"]

    def project(self, params: PyTree, x: jax.Array) -> tuple[jax.Array, PyTree]:
        """Returns (x, B, C); and z and δ."""
        ends = self.hidden_size, self.hidden_size + self.conv_size
        z, entering, delta = jnp.split(x @ params["in_proj"], ends, axis=-1)
        return entering, (z, delta)

    def operands(self, params: PyTree, convolved: jax.Array, kept: PyTree) -> tuple[dict[str, jax.Array], PyTree]:
        """Returns C as queries, B as keys, Δ x as values, and -exp(A_log) Δ; and x and z."""
        z, delta = kept
        groups, per_group, key_size, value_size = self.heads
        ends = self.hidden_size, self.hidden_size + groups * key_size
        x, keys, queries = jnp.split(jax.nn.silu(convolved), ends, axis=-1)
        step = jax.nn.softplus(wide(delta) + wide(params["dt_bias"])[None]).reshape(-1, groups, per_group, 1)
        rate = jnp.exp(wide(params["A_log"])).reshape(1, groups, per_group, 1)
        x = x.reshape(-1, groups, per_group, value_size)
        operands = {
            "query": queries.reshape(-1, groups, key_size),
            "key": keys.reshape(-1, groups, key_size),
            "value": (step * wide(x)).astype(x.dtype),
            "log_decay": -rate * step,
        }
        return operands, (x, z)

    def readout(self, params: PyTree, y: jax.Array, kept: PyTree) -> jax.Array:
        """Returns W_outᵀ (norm((y + D x) * SiLU(z)) * w)."""
        x, z = kept
        y = wide(y) + wide(params["D"]).reshape(1, *y.shape[1:3], 1) * wide(x)
        gated = y.reshape(len(y), self.num_groups, -1) * jax.nn.silu(wide(z)).reshape(len(y), self.num_groups, -1)
        normed = rms_normalised(gated, _EPSILON).reshape(len(y), -1) * wide(params["norm"])[None]
        return normed.astype(z.dtype) @ params["out_proj"]

    def from_mamba_ssm(self, state_dict: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Returns the parameters in the state dict of a mamba_ssm.Mamba2 with the same options. Exact.

        Options that the layer does not have (bias of projections, D_has_hdim, norm_before_gate, d_ssm, dt_limit) are
        refused where they show in names or shapes.

        Examples:
          >>> layer = jaxpack.Mamba2(input_size=4, hidden_size=8, head_size=4, state_size=3)
          >>> shapes = {
          ...     "in_proj.weight": (24, 4), "conv1d.weight": (14, 1, 4), "conv1d.bias": (14,), "dt_bias": (2,),
          ...     "A_log": (2,), "D": (2,), "norm.weight": (8,), "out_proj.weight": (4, 8),
          ... }
          >>> state_dict = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
          >>> layer.from_mamba_ssm(state_dict)["conv_kernel"].shape
          (4, 14)

        Args:
          state_dict: tensors or NumPy arrays under the module's names, such as a safetensors file of it holds.

        Raises:
          KeyError: if keys are missing or not known.
          TypeError: if values are not floating numbers.
          ValueError: if a shape is wrong, or JAX would round a value (float64 without x64).
        """
        names = {
            "in_proj": "in_proj.weight",
            "conv_kernel": "conv1d.weight",
            "conv_bias": "conv1d.bias",
            "norm": "norm.weight",
            "out_proj": "out_proj.weight",
        }
        return from_names(self.shapes, names, state_dict)
