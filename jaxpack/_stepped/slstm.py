"""sLSTM, the xLSTM cell with exponential gates and memory mixing within heads (Beck et al. 2024, "xLSTM").

With R block-diagonal, a block for each head:

    z̃, ĩ, f̃, õ = W x + R h + b
    c' = f c + i tanh(z̃)            i = exp(ĩ)
    n' = f n + i                    f = σ(f̃) or exp(f̃)
    h' = σ(õ) c' / n'

exp overflows, so c and n are held as exp(-m) c and exp(-m) n beside a stabiliser m, which cancels in h' (equations 15
to 17 of the paper):

    m' = max(log f + m, ĩ)
    i' = exp(ĩ - m'),  f' = exp(log f + m - m')

Where n = 0 nothing has been remembered, and m' = ĩ whatever m is. One of i' and f' is then 1 at every step, so n stays
at 1 or above from the first step on. Gates are side by side in the order i, f, z, o.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxpack._checks import at_least_one
from jaxpack._layers.params import floating
from jaxpack._linear.diagonal import split
from jaxpack._linear.solve import wide
from jaxpack._stepped.layer import SteppedLayer
from jaxpack._types import PyTree

_FORGET_GATES = ("sigmoid", "exp")


@dataclasses.dataclass(frozen=True)
class SLSTM(SteppedLayer):
    """An sLSTM layer: exponential gates, and heads that do not see each other. Returns (output, (h, c, n, m)).

        c' = f c + i tanh(z);  n' = f n + i;  h' = σ(o) c' / n';  i = exp(...)

    The state is h, exp(-m) c, exp(-m) n and m, each [B, hidden_size].

    Examples:
      >>> layer = jaxpack.SLSTM(input_size=3, hidden_size=8, num_heads=2)
      >>> params = layer.init(jax.random.key(0))
      >>> output, state = layer.apply(params, jaxpack.pack_sequence([np.ones((3, 3)), np.ones((1, 3))]))
      >>> output.shape, [each.shape for each in state]
      ((4, 8), [(2, 8), (2, 8), (2, 8), (2, 8)])
      >>> params["weight_hh"].shape  # for each head the products of its part of h with the four gates
      (2, 4, 16)

    Args:
      input_size: the number of features of each step.
      hidden_size: the width of h.
      num_heads: the number of heads; divides hidden_size.
      forget_gate: f, "sigmoid" as in NX-AI/xlstm, or "exp".

    Raises:
      TypeError: if a size is not an int.
      ValueError: if a size is below 1, num_heads does not divide hidden_size, or forget_gate is another.
    Source: Beck et al. 2024, https://arxiv.org/abs/2405.04517.
    """

    input_size: int
    hidden_size: int
    num_heads: int = 4
    forget_gate: str = "sigmoid"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one("num_heads", self.num_heads)
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}. Choose sizes with no "
                f"remainder."
            )
        if self.forget_gate not in _FORGET_GATES:
            raise ValueError(f"forget_gate must be 'sigmoid' or 'exp', got {self.forget_gate!r}.")

    @property
    def head_size(self) -> int:
        """The width of a head, hidden_size / num_heads."""
        return self.hidden_size // self.num_heads

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        width = 4 * self.hidden_size
        return {
            "weight_ih": (self.input_size, width),
            "weight_hh": (self.num_heads, self.head_size, 4 * self.head_size),
            "bias": (width,),
        }

    def init(self, key: jax.Array, dtype: Any = None) -> dict[str, jax.Array]:
        """Draws weights uniformly within 1/sqrt(hidden_size) of 0. Biases are 0, and 3 to 6 for f, as in MLSTM.

        Args:
          key: a JAX random key.
          dtype: a floating dtype. Default: JAX's (float32, or float64 under x64).

        Raises:
          TypeError: if key is not a random key, or dtype is not floating.
        """
        dtype, bound = floating(float if dtype is None else dtype), 1 / math.sqrt(self.hidden_size)
        params = {
            name: jax.random.uniform(each, self.shapes[name], dtype, -bound, bound)
            for each, name in zip(split(key, 2), ("weight_ih", "weight_hh"), strict=True)
        }
        zeros = jnp.zeros(self.hidden_size, dtype)
        forget = jnp.tile(jnp.linspace(3, 6, self.head_size, dtype=dtype), self.num_heads)
        return params | {"bias": jnp.concatenate([zeros, forget, zeros, zeros])}

    def state_like(self, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns h, exp(-m) c, exp(-m) n and m of one sequence, as jax.ShapeDtypeStruct."""
        return (jax.ShapeDtypeStruct((self.hidden_size,), dtype),) * 4

    def project(self, params: PyTree, x: jax.Array) -> jax.Array:
        """Returns W x + b, [M, heads, 4, head_size], head by head as R h is computed."""
        projected = wide(x @ params["weight_ih"]) + wide(params["bias"])[None]
        return jnp.swapaxes(projected.reshape(len(x), 4, self.num_heads, self.head_size), 1, 2)

    def advance(self, params: PyTree, state: PyTree, projected: jax.Array) -> tuple[PyTree, jax.Array]:
        """Computes one step."""
        rows, weight = len(projected), params["weight_hh"]
        h, c, n, m = (leaf.reshape(rows, self.num_heads, self.head_size) for leaf in state)
        mixed = jnp.einsum("bhd,hdg->bhg", h.astype(weight.dtype), weight)
        i, f, z, o = (gate[:, :, 0] for gate in jnp.split(projected + wide(mixed).reshape(projected.shape), 4, axis=2))
        log_forget = f if self.forget_gate == "exp" else jax.nn.log_sigmoid(f)
        kept = jnp.where(n == 0, -jnp.inf, log_forget + m)
        m = jnp.maximum(kept, i)
        forget, enter = jnp.exp(kept - m), jnp.exp(i - m)
        c = forget * c + enter * jnp.tanh(z)
        n = forget * n + enter
        h = jax.nn.sigmoid(o) * c / n
        state = tuple(leaf.reshape(rows, self.hidden_size) for leaf in (h, c, n, m))
        return state, state[0]
