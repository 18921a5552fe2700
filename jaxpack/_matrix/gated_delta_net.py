"""Gated DeltaNet (Yang et al. 2024, "Gated delta networks", https://arxiv.org/abs/2412.06464).

With weights W of H heads, keys of size K and values of size V = hidden_size / H:

    q, k, v = SiLU(conv(W_q x)), SiLU(conv(W_k x)), SiLU(conv(W_v x))      causal convolutions, feature by feature
    q, k    = q / |q| / sqrt(K), k / |k|                                   head by head; |q|² + 1e-6 under the root
    β       = σ(W_b x)
    a       = exp(-exp(A_log) softplus(W_a x + Δ_bias))                    a number for each head
    S_t     = a_t (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ                [K, V] for each head
    y_t     = S_tᵀ q_t
    output  = W_o (norm(y) * w * SiLU(W_g x))                              norm divides by a head's root mean square

Names of parameters are those of `fla.layers.GatedDeltaNet`; weights are stored input-major.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._checks import at_least_one
from jaxpack._layers.params import floating
from jaxpack._linear.diagonal import split
from jaxpack._linear.solve import wide
from jaxpack._matrix.chunks import Rule
from jaxpack._matrix.layer import Heads, MatrixLayer
from jaxpack._matrix.parts import conv_bound, divided, inverse_softplus_steps, rms_normalised, uniform
from jaxpack._matrix.rules import delta_rule
from jaxpack._matrix.state_dict import from_names
from jaxpack._types import PyTree

_NORM_EPSILON = 1e-5
_LENGTH_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class GatedDeltaNet(MatrixLayer):
    """A gated delta network: a state that replaces what it holds for a key. Returns (output, (conv, memory)).

        S_t = a_t (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ;  y_t = S_tᵀ q_t

    The output is as wide as the input. The state is the convolution's last inputs
    [B, kernel_size - 1, width of q, k and v], and S [B, num_heads, key_size, hidden_size / num_heads].

    Examples:
      >>> layer = jaxpack.GatedDeltaNet(input_size=4, hidden_size=8, num_heads=2, key_size=3)
      >>> params = layer.init(jax.random.key(0))
      >>> output, (conv, memory) = layer.apply(params, jaxpack.pack_sequence([np.ones((3, 4)), np.ones((1, 4))]))
      >>> output.shape, conv.shape, memory.shape
      ((4, 4), (2, 3, 20), (2, 2, 3, 4))
      >>> state, y = layer.step(params, (conv, memory), np.ones((2, 4)))  # one step more
      >>> y.shape
      (2, 4)

    Args:
      input_size: the number of features of each step, hidden_size in FLA.
      hidden_size: the width of values and gates, num_v_heads * head_dim * expand_v in FLA.
      num_heads: the number of heads H of values; divides hidden_size.
      key_size: the size K of a key, head_dim in FLA.
      num_key_heads: the number of keys and queries; divides num_heads. Default: num_heads.
      kernel_size: the steps that the convolution sees.

    Raises:
      TypeError: if an argument is not an int.
      ValueError: if one is below 1, or does not divide what it must.
    Source: Yang et al. 2024, https://arxiv.org/abs/2412.06464; fla-org/flash-linear-attention.
    """

    input_size: int
    hidden_size: int
    num_heads: int = 4
    key_size: int = 64
    num_key_heads: int | None = None
    kernel_size: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_heads", "key_size", "kernel_size"):
            at_least_one(name, getattr(self, name))
        divided("hidden_size", self.hidden_size, "num_heads", self.num_heads)
        if self.num_key_heads is not None:
            divided("num_heads", self.num_heads, "num_key_heads", at_least_one("num_key_heads", self.num_key_heads))

    @property
    def heads(self) -> Heads:
        """The axes of the heads."""
        groups = self.num_key_heads or self.num_heads
        return Heads(groups, self.num_heads // groups, self.key_size, self.hidden_size // self.num_heads)

    @property
    def rule(self) -> Rule:
        """The gated delta rule."""
        return delta_rule

    @property
    def conv_size(self) -> int:
        """The number of features that are convolved: q, k and v."""
        return 2 * self._key_width + self.hidden_size

    @property
    def _key_width(self) -> int:
        return self.heads.groups * self.key_size

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        keys, values, heads = self._key_width, self.hidden_size, self.num_heads
        widths = {"q": keys, "k": keys, "v": values}
        projections = widths | {"a": heads, "b": heads, "g": values}
        return (
            {f"{name}_proj": (self.input_size, width) for name, width in projections.items()}
            | {f"{name}_conv": (self.kernel_size, width) for name, width in widths.items()}
            | {
                "A_log": (heads,),
                "dt_bias": (heads,),
                "o_norm": (values // heads,),
                "o_proj": (values, self.input_size),
            }
        )

    def init(self, key: jax.Array, dtype: Any = None) -> dict[str, jax.Array]:
        """Draws parameters as FLA does: softplus(Δ_bias) from 0.001 to 0.1, log-uniform, exp(A_log) from 0 to 16.

        Args:
          key: a JAX random key.
          dtype: a floating dtype. Default: JAX's (float32, or float64 under x64).

        Raises:
          TypeError: if key is not a random key, or dtype is not floating.
        """
        dtype, params = floating(float if dtype is None else dtype), {}
        for each, (name, shape) in zip(split(key, len(self.shapes)), self.shapes.items(), strict=True):
            if name == "A_log":
                tiny = float(jnp.finfo(dtype).tiny)
                params[name] = jnp.log(jax.random.uniform(each, shape, dtype, tiny, 16))
            elif name == "dt_bias":
                params[name] = inverse_softplus_steps(each, shape, dtype)
            elif name == "o_norm":
                params[name] = jnp.ones(shape, dtype)
            else:
                bound = conv_bound(self.kernel_size) if name.endswith("conv") else 1 / math.sqrt(shape[0])
                params[name] = uniform(each, shape, dtype, bound)
        return params

    def kernel(self, params: PyTree) -> tuple[jax.Array, jax.Array | None]:
        """Returns the kernels of q, k and v side by side; there is no bias."""
        return jnp.concatenate([params[f"{name}_conv"] for name in "qkv"], -1), None

    def project(self, params: PyTree, x: jax.Array) -> tuple[jax.Array, PyTree]:
        """Returns q, k and v; and the pre-activations of a, β and the gate."""
        entering = jnp.concatenate([x @ params[f"{name}_proj"] for name in "qkv"], -1)
        return entering, [x @ params[f"{name}_proj"] for name in "abg"]

    def operands(self, params: PyTree, convolved: jax.Array, kept: PyTree) -> tuple[dict[str, jax.Array], PyTree]:
        """Returns what the delta rule reads; and the pre-activation of the gate."""
        a, b, gate = kept
        groups, per_group, key_size, value_size = self.heads
        queries, keys, values = jnp.split(jax.nn.silu(convolved), (self._key_width, 2 * self._key_width), axis=-1)
        queries, keys = (each.reshape(-1, groups, key_size) for each in (queries, keys))
        step = jax.nn.softplus(wide(a) + wide(params["dt_bias"])[None])
        log_decay = -jnp.exp(wide(params["A_log"]))[None] * step
        operands = {
            "query": _unit(queries) / math.sqrt(key_size),
            "key": _unit(keys),
            "value": values.reshape(-1, groups, per_group, value_size),
            "beta": jax.nn.sigmoid(wide(b)).reshape(-1, groups, per_group),
            "log_decay": log_decay.reshape(-1, groups, per_group, 1),
        }
        return operands, gate

    def readout(self, params: PyTree, y: jax.Array, kept: PyTree) -> jax.Array:
        """Returns W_o (norm(y) * w * SiLU(gate))."""
        normed = rms_normalised(wide(y), _NORM_EPSILON) * wide(params["o_norm"]).reshape(1, 1, 1, -1)
        gated = normed.reshape(len(y), -1) * jax.nn.silu(wide(kept))
        return gated.astype(kept.dtype) @ params["o_proj"]

    def from_fla(self, state_dict: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Returns the parameters in the state dict of an fla.layers.GatedDeltaNet with the same options. Exact.

        Options that the layer does not have (use_gate=False, use_short_conv=False, conv_bias) are refused: their names
        differ. allow_neg_eigval and norm_eps do not show in a state dict; leave them at their defaults.

        Examples:
          >>> layer = jaxpack.GatedDeltaNet(input_size=4, hidden_size=8, num_heads=2, key_size=3)
          >>> names = {"o_norm": "o_norm.weight", "A_log": "A_log", "dt_bias": "dt_bias"}
          >>> state_dict = {}
          >>> for name, shape in layer.shapes.items():
          ...     key = names.get(name, f"{name}.weight".replace("conv", "conv1d"))
          ...     shape = (shape[1], 1, shape[0]) if "conv" in name else shape[::-1]
          ...     state_dict[key] = np.ones(shape, np.float32)
          >>> layer.from_fla(state_dict)["q_conv"].shape
          (4, 6)

        Args:
          state_dict: tensors or NumPy arrays under the module's names, such as a safetensors file of it holds.

        Raises:
          KeyError: if keys are missing or not known.
          TypeError: if values are not floating numbers.
          ValueError: if a shape is wrong, or JAX would round a value (float64 without x64).
        """
        plain = ("A_log", "dt_bias")
        names = {name: name.replace("conv", "conv1d") + ".weight" for name in self.shapes if name not in plain}
        return from_names(self.shapes, names, state_dict)


def _unit(x: jax.Array) -> jax.Array:
    """Divides by the length of the last axis."""
    x = wide(x)
    return x * lax.rsqrt((x * x).sum(-1, keepdims=True) + _LENGTH_EPSILON)
