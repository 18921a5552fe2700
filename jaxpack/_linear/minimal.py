"""MinGRU and MinLSTM: gated layers whose gates see the input alone (Feng et al. 2024, "Were RNNs all we needed?").

MinGRU, with weights of z and v side by side:

    z_t = σ(W_z x_t + b_z)
    v_t = g(W_v x_t + b_v)
    h_t = (1 - z_t) h_{t-1} + z_t v_t

MinLSTM, with weights of f, i and v side by side, and both gates divided by their sum:

    f_t = σ(W_f x_t + b_f)
    i_t = σ(W_i x_t + b_i)
    v_t = g(W_v x_t + b_v)
    h_t = (f_t h_{t-1} + i_t v_t) / (f_t + i_t)

g is the identity (section 3 of the paper), or the positive function of its log-space form (appendix B):

    g(v) = v + 1/2 where v >= 0, else σ(v)

1 - z_t is computed as σ(-(W_z x_t + b_z)), and f_t / (f_t + i_t) as σ(log f_t - log i_t), with logarithms that do not
overflow. A product of decays is never divided by, so the recurrence itself needs no logarithms.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpack._layers.params import floating
from jaxpack._linear.convert import Arrays, converted
from jaxpack._linear.diagonal import DiagonalLayer, split
from jaxpack._linear.solve import accumulator
from jaxpack._types import PyTree

_CANDIDATES = ("identity", "positive")


@dataclasses.dataclass(frozen=True)
class _Minimal(DiagonalLayer):
    """The options and parameters of both layers."""

    input_size: int
    hidden_size: int
    candidate: str = "identity"
    bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidate not in _CANDIDATES:
            raise ValueError(f"candidate must be one of {', '.join(map(repr, _CANDIDATES))}, got {self.candidate!r}.")
        if not isinstance(self.bias, bool):
            raise TypeError(f"bias must be a bool, got {self.bias!r}.")

    @property
    def num_gates(self) -> int:
        """The number of products with the input."""
        raise NotImplementedError

    @property
    def output_size(self) -> int:
        """The width of the output, hidden_size."""
        return self.hidden_size

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        width = self.num_gates * self.hidden_size
        return {"weight": (self.input_size, width)} | ({"bias": (width,)} if self.bias else {})

    def init(self, key: jax.Array, dtype: Any = None) -> dict[str, jax.Array]:
        """Draws parameters as torch.nn.Linear does: uniform within 1/sqrt(input_size) of 0.

        Args:
          key: a JAX random key.
          dtype: a floating dtype. Default: JAX's (float32, or float64 under x64).

        Raises:
          TypeError: if key is not a random key, or dtype is not floating.
        """
        dtype, bound = floating(float if dtype is None else dtype), 1 / math.sqrt(self.input_size)
        keys = split(key, len(self.shapes))
        return {
            name: jax.random.uniform(each, shape, dtype, -bound, bound)
            for each, (name, shape) in zip(keys, self.shapes.items(), strict=True)
        }

    def _from_pytorch(self, state_dict: Mapping[str, Any], name: str, parts: tuple[int, ...]) -> dict[str, jax.Array]:
        """Returns parameters from the weight of a torch.nn.Linear; `parts` are its places of the gates and of v."""
        if self.bias or self.candidate != "positive":
            raise ValueError(
                f"minGRU-pytorch has no bias and a positive candidate: make the layer with bias=False and "
                f"candidate='positive', got {self}."
            )
        shape = self.shapes["weight"][::-1]
        return converted(state_dict, {"weight": Arrays(name, shape, parts, transpose=True)})

    def project(self, params: PyTree, x: jax.Array) -> list[jax.Array]:
        """Returns the pre-activations of the gates and of v, each [M, H]."""
        projected = x @ params["weight"]
        if self.bias:
            projected = projected + params["bias"][None]
        return jnp.split(projected.astype(accumulator(projected.dtype)), self.num_gates, axis=-1)

    def candidate_of(self, v: jax.Array) -> jax.Array:
        """Returns g(v)."""
        if self.candidate == "identity":
            return v
        return jnp.where(v >= 0, v + 0.5, jax.nn.sigmoid(v))


@dataclasses.dataclass(frozen=True)
class MinGRU(_Minimal):
    """A minimal gated recurrent layer. Returns (output, h_n).

        z = σ(W_z x + b_z);  v = g(W_v x + b_v);  h' = (1 - z) h + z v

    Examples:
      >>> layer = jaxpack.MinGRU(input_size=2, hidden_size=4)
      >>> params = layer.init(jax.random.key(0))
      >>> output, h_n = layer.apply(params, jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))]))
      >>> output.shape, h_n.shape
      ((4, 4), (2, 4))

    Args:
      input_size: the number of features of each step, at least 1.
      hidden_size: the width of h, at least 1.
      candidate: g, "identity" or "positive" (v + 1/2 where v >= 0, else σ(v)), for which h stays positive.
      bias: whether there are biases.

    Raises:
      TypeError: if an argument has another type.
      ValueError: if an argument is out of range.
    Source: Feng et al. 2024, https://arxiv.org/abs/2410.01201.
    """

    @property
    def num_gates(self) -> int:
        """2: z and v."""
        return 2

    def from_mingru_pytorch(self, state_dict: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Returns the parameters of a minGRU of minGRU-pytorch (lucidrains), without its output projection. Exact.

        Examples:
          >>> layer = jaxpack.MinGRU(2, 4, candidate="positive", bias=False)
          >>> layer.from_mingru_pytorch({"to_hidden_and_gate.weight": np.ones((8, 2), np.float32)})["weight"].shape
          (2, 8)

        Args:
          state_dict: tensors or arrays by name: to_hidden_and_gate.weight.

        Raises:
          KeyError: if names are missing or not known.
          TypeError: if values are not floating numbers.
          ValueError: if a shape is wrong, JAX would round a value, or the layer has a bias or another candidate.
        """
        return self._from_pytorch(state_dict, "to_hidden_and_gate.weight", (1, 0))

    def gates(self, params: PyTree, x: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns 1 - z and z v."""
        z, v = self.project(params, x)
        return jax.nn.sigmoid(-z), jax.nn.sigmoid(z) * self.candidate_of(v)


@dataclasses.dataclass(frozen=True)
class MinLSTM(_Minimal):
    """A minimal long short-term memory layer. Returns (output, h_n).

        f = σ(W_f x + b_f);  i = σ(W_i x + b_i);  v = g(W_v x + b_v);  h' = (f h + i v) / (f + i)

    Examples:
      >>> layer = jaxpack.MinLSTM(input_size=2, hidden_size=4)
      >>> params = layer.init(jax.random.key(0))
      >>> output, h_n = layer.apply(params, jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))]))
      >>> output.shape, h_n.shape
      ((4, 4), (2, 4))

    Args:
      input_size: the number of features of each step, at least 1.
      hidden_size: the width of h, at least 1.
      candidate: g, "identity" or "positive" (v + 1/2 where v >= 0, else σ(v)), for which h stays positive.
      bias: whether there are biases.

    Raises:
      TypeError: if an argument has another type.
      ValueError: if an argument is out of range.
    Source: Feng et al. 2024, https://arxiv.org/abs/2410.01201.
    """

    @property
    def num_gates(self) -> int:
        """3: f, i and v."""
        return 3

    def from_mingru_pytorch(self, state_dict: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Returns the parameters of a minLSTM of minGRU-pytorch (lucidrains), without its output projection. Exact.

        Examples:
          >>> layer = jaxpack.MinLSTM(2, 4, candidate="positive", bias=False)
          >>> state_dict = {"to_hidden_and_f_i_gate.weight": np.ones((12, 2), np.float32)}
          >>> layer.from_mingru_pytorch(state_dict)["weight"].shape
          (2, 12)

        Args:
          state_dict: tensors or arrays by name: to_hidden_and_f_i_gate.weight.

        Raises:
          KeyError: if names are missing or not known.
          TypeError: if values are not floating numbers.
          ValueError: if a shape is wrong, JAX would round a value, or the layer has a bias or another candidate.
        """
        return self._from_pytorch(state_dict, "to_hidden_and_f_i_gate.weight", (1, 2, 0))

    def gates(self, params: PyTree, x: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns f / (f + i) and i v / (f + i)."""
        f, i, v = self.project(params, x)
        ratio = _log_sigmoid(f) - _log_sigmoid(i)
        return jax.nn.sigmoid(ratio), jax.nn.sigmoid(-ratio) * self.candidate_of(v)


def _log_sigmoid(x: jax.Array) -> jax.Array:
    """Returns log σ(x), on a CPU in a third of the time of jax.nn.log_sigmoid, which is a logaddexp."""
    return jnp.minimum(x, 0) - jnp.log1p(jnp.exp(-jnp.abs(x)))
