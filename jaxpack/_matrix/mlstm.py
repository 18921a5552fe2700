"""mLSTM, the xLSTM layer with a matrix memory (Beck et al. 2024, "xLSTM", https://arxiv.org/abs/2405.04517).

With an inner width I = hidden_size, H heads of size D = I / H, and block-diagonal W_q, W_k, W_v of blocks of 4:

    u, z     = W_up x
    c        = SiLU(conv(u) + b)                        a causal convolution of kernel_size steps, feature by feature
    q, k, v  = W_q c, W_k c / sqrt(D), W_v u
    log i    = W_i [q, k sqrt(D), v] + b_i              a number for each head, as log f
    log f    = log σ(W_f [q, k sqrt(D), v] + b_f)
    C_t      = f_t C_{t-1} + i_t k_t v_tᵀ               [D, D] for each head
    n_t      = f_t n_{t-1} + i_t k_t
    h_t      = C_tᵀ q_t / max(|n_tᵀ q_t|, 1)
    output   = W_down ((norm(h) (1 + w) + s c) * SiLU(z))     norm standardises each head, with ε = 1e-5

C and n are held as exp(-m) C and exp(-m) n beside m >= 0, so that i = exp(...) does not overflow (`rules.mlstm`).
Names of parameters are those of `xlstm.blocks.mlstm.layer.mLSTMLayer`; weights are stored input-major.
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
from jaxpack._matrix.parts import conv_bound, divided, uniform
from jaxpack._matrix.rules import mlstm
from jaxpack._matrix.state_dict import from_names
from jaxpack._types import PyTree

_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class MLSTM(MatrixLayer):
    """An mLSTM layer: a matrix memory with exponential input gates. Returns (output, (conv, (C, n, m))).

        C_t = f_t C_{t-1} + i_t k_t v_tᵀ;  n_t = f_t n_{t-1} + i_t k_t;  h_t = C_tᵀ q_t / max(abs(n_tᵀ q_t), 1)

    The output is as wide as the input. The state is the convolution's last inputs [B, kernel_size - 1, hidden_size],
    and exp(-m) C [B, H, D, D], exp(-m) n [B, H, D] and m [B, H], for H heads of size D.

    Examples:
      >>> layer = jaxpack.MLSTM(input_size=4, hidden_size=8, num_heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> output, state = layer.apply(params, jaxpack.pack_sequence([np.ones((3, 4)), np.ones((1, 4))]))
      >>> output.shape, [each.shape for each in jax.tree.leaves(state)]
      ((4, 4), [(2, 3, 8), (2, 2, 4, 4), (2, 2, 4), (2, 2)])
      >>> state, y = layer.step(params, state, np.ones((2, 4)))  # one step more
      >>> y.shape
      (2, 4)

    Args:
      input_size: the number of features of each step, embedding_dim in xlstm.
      hidden_size: the inner width, 2 * embedding_dim in xlstm.
      num_heads: the number of heads; divides hidden_size.
      block_size: the features of a block of W_q, W_k and W_v; divides hidden_size.
      kernel_size: the steps that the convolution sees.

    Raises:
      TypeError: if an argument is not an int.
      ValueError: if one is below 1, or does not divide what it must.
    Source: Beck et al. 2024, https://arxiv.org/abs/2405.04517; NX-AI/xlstm, which adds 1e-6 to the denominator of h.
    """

    input_size: int
    hidden_size: int
    num_heads: int = 4
    block_size: int = 4
    kernel_size: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_heads", "block_size", "kernel_size"):
            at_least_one(name, getattr(self, name))
        for name in ("num_heads", "block_size"):
            divided("hidden_size", self.hidden_size, name, getattr(self, name))

    @property
    def heads(self) -> Heads:
        """The axes of the heads, none of which share a key."""
        size = self.hidden_size // self.num_heads
        return Heads(self.num_heads, 1, size, size)

    @property
    def rule(self) -> Rule:
        """The recurrence of C, n and m."""
        return mlstm

    @property
    def conv_size(self) -> int:
        """The number of features that are convolved."""
        return self.hidden_size

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        width, heads = self.hidden_size, self.num_heads
        block = (self.block_size, self.block_size, width // self.block_size)
        return {
            "proj_up": (self.input_size, 2 * width),
            "conv_kernel": (self.kernel_size, width),
            "conv_bias": (width,),
            "q_proj": block,
            "k_proj": block,
            "v_proj": block,
            "igate": (3 * width, heads),
            "igate_bias": (heads,),
            "fgate": (3 * width, heads),
            "fgate_bias": (heads,),
            "outnorm": (width,),
            "learnable_skip": (width,),
            "proj_down": (width, self.input_size),
        }

    def init(self, key: jax.Array, dtype: Any = None) -> dict[str, jax.Array]:
        """Draws parameters as xlstm does: gates see their biases alone, 3 to 6 for f and N(0, 0.1) for i.

        Args:
          key: a JAX random key.
          dtype: a floating dtype. Default: JAX's (float32, or float64 under x64).

        Raises:
          TypeError: if key is not a random key, or dtype is not floating.
        """
        dtype, shapes = floating(float if dtype is None else dtype), self.shapes
        keys = dict(zip(shapes, split(key, len(shapes)), strict=True))
        params = {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}
        small = math.sqrt(2 / (5 * self.input_size))
        deviations = dict.fromkeys(("proj_up", "q_proj", "k_proj", "v_proj"), small) | {
            "proj_down": 2 / math.sqrt(self.input_size),
            "igate_bias": 0.1,
        }
        for name, deviation in deviations.items():
            params[name] = deviation * jax.random.normal(keys[name], shapes[name], dtype)
        for name in ("conv_kernel", "conv_bias"):
            params[name] = uniform(keys[name], shapes[name], dtype, conv_bound(self.kernel_size))
        params["fgate_bias"] = jnp.linspace(3, 6, self.num_heads, dtype=dtype)
        params["learnable_skip"] = jnp.ones(shapes["learnable_skip"], dtype)
        return params

    def matrices_like(self, dtype: Any) -> PyTree:
        """Returns exp(-m) C, exp(-m) n and m of one sequence, as jax.ShapeDtypeStruct."""
        heads, _, size, _ = self.heads
        return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in ((heads, size, size), (heads, size), (heads,)))

    def enter(self, matrices: PyTree) -> PyTree:
        """Returns C and n side by side, and m."""
        memory, normaliser, m = matrices
        return jnp.concatenate([memory, normaliser[..., None]], -1)[:, :, None], m[:, :, None]

    def leave(self, state: PyTree) -> PyTree:
        """Returns C, n and m."""
        both, m = state
        return both[:, :, 0, :, :-1], both[:, :, 0, :, -1], m[:, :, 0]

    def kernel(self, params: PyTree) -> tuple[jax.Array, jax.Array | None]:
        """Returns the kernel and the bias of the convolution."""
        return params["conv_kernel"], params["conv_bias"]

    def project(self, params: PyTree, x: jax.Array) -> tuple[jax.Array, PyTree]:
        """Returns u; and u and z."""
        u, z = jnp.split(x @ params["proj_up"], 2, axis=-1)
        return u, (u, z)

    def operands(self, params: PyTree, convolved: jax.Array, kept: PyTree) -> tuple[dict[str, jax.Array], PyTree]:
        """Returns q, k, v and the logarithms of the gates; and c and z."""
        u, z = kept
        c = jax.nn.silu(convolved)
        q, k, v = (self._blocks(params[f"{name}_proj"], x) for name, x in (("q", c), ("k", c), ("v", u)))
        seen = jnp.concatenate([q, k, v], -1)
        gates = (wide(seen @ params[name]) + wide(params[f"{name}_bias"])[None] for name in ("igate", "fgate"))
        log_input, forget = (gate[..., None, None] for gate in gates)
        heads, _, size, _ = self.heads
        operands = {
            "query": q.reshape(-1, heads, size),
            "key": k.reshape(-1, heads, size) / math.sqrt(size),
            "value": v.reshape(-1, heads, 1, size),
            "log_decay": jax.nn.log_sigmoid(forget),
            "log_input": log_input,
        }
        return operands, (c, z)

    def readout(self, params: PyTree, y: jax.Array, kept: PyTree) -> jax.Array:
        """Returns W_down ((norm(h) (1 + w) + s c) * SiLU(z))."""
        c, z = kept
        h = wide(y)
        apart = h - h.mean(-1, keepdims=True)
        normed = (apart * lax.rsqrt((apart * apart).mean(-1, keepdims=True) + _EPSILON)).reshape(len(y), -1)
        skipped = normed * (1 + wide(params["outnorm"]))[None] + wide(params["learnable_skip"])[None] * wide(c)
        return (skipped * jax.nn.silu(wide(z))).astype(z.dtype) @ params["proj_down"]

    def from_xlstm(self, state_dict: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Returns the parameters in the state dict of an xlstm mLSTMLayer with the same options. Exact.

        Examples:
          >>> layer = jaxpack.MLSTM(input_size=4, hidden_size=8, num_heads=2)
          >>> shapes = {
          ...     "proj_up.weight": (16, 4), "conv1d.conv.weight": (8, 1, 4), "conv1d.conv.bias": (8,),
          ...     "q_proj.weight": (2, 4, 4), "k_proj.weight": (2, 4, 4), "v_proj.weight": (2, 4, 4),
          ...     "mlstm_cell.igate.weight": (2, 24), "mlstm_cell.igate.bias": (2,), "mlstm_cell.fgate.weight": (2, 24),
          ...     "mlstm_cell.fgate.bias": (2,), "mlstm_cell.outnorm.weight": (8,), "learnable_skip": (8,),
          ...     "proj_down.weight": (4, 8),
          ... }
          >>> state_dict = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
          >>> layer.from_xlstm(state_dict)["igate"].shape
          (24, 2)

        Args:
          state_dict: tensors or NumPy arrays under the module's names, such as a safetensors file of it holds.

        Raises:
          KeyError: if keys are missing or not known.
          TypeError: if values are not floating numbers.
          ValueError: if a shape is wrong, or JAX would round a value (float64 without x64).
        """
        names = {
            "conv_kernel": "conv1d.conv.weight",
            "conv_bias": "conv1d.conv.bias",
            "igate": "mlstm_cell.igate.weight",
            "igate_bias": "mlstm_cell.igate.bias",
            "fgate": "mlstm_cell.fgate.weight",
            "fgate_bias": "mlstm_cell.fgate.bias",
            "outnorm": "mlstm_cell.outnorm.weight",
        } | {name: f"{name}.weight" for name in ("proj_up", "q_proj", "k_proj", "v_proj", "proj_down")}
        return from_names(self.shapes, names, state_dict)

    def _blocks(self, weight: jax.Array, x: jax.Array) -> jax.Array:
        """Multiplies each block of features by its weights: [M, I] to [M, I]."""
        blocks = x.reshape(len(x), -1, self.block_size)
        return jnp.einsum("mbi,iob->mbo", blocks, weight).reshape(x.shape)
