"""CfC, closed-form continuous-time units (Hasani et al. 2022, "Closed-form continuous-time neural networks").

With a backbone y = φ(W x + U h + b), φ(a) = 1.7159 tanh(0.666 a), and a product of it for each head:

    g = tanh(W_g y + b_g),  k = tanh(W_k y + b_k),  s = σ((W_a y + b_a) dt + W_s y + b_s)

    h' = (1 - s) g + s k                                mode "gated", the paper's CfC
    h' = g + s k                                        mode "no_gate"
    h' = A - A exp(-dt (|w_τ| + |g|)) g                 mode "pure", the closed form of a liquid time constant (LTC)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxpack._checks import at_least_one
from jaxpack._linear.solve import wide
from jaxpack._stepped.timed import TimedLayer
from jaxpack._types import PyTree

_MODES = ("gated", "no_gate", "pure")


@dataclasses.dataclass(frozen=True)
class CfC(TimedLayer):
    """A closed-form continuous-time layer, for steps that are unequally far apart. Returns (output, h_n).

        h' = (1 - s) g + s k;  s = σ(a dt + b);  a, b, g and k of a backbone that sees x and h

    Inputs are tuples (x [.., F], dt [..]), where dt is the time since the step before.

    Examples:
      >>> layer = jaxpack.CfC(input_size=2, hidden_size=4, backbone_size=8)
      >>> params = layer.init(jax.random.key(0))
      >>> events = [(np.ones((n, 2)), np.full(n, 0.5)) for n in (3, 1)]
      >>> output, h_n = layer.apply(params, jaxpack.pack_sequence(events))
      >>> output.shape, h_n.shape
      ((4, 4), (2, 4))
      >>> h_n, y = layer.step(params, h_n, (np.ones((2, 2)), np.ones(2)))  # one step more

    Args:
      input_size: the number of features of x.
      hidden_size: the width of h.
      backbone_size: the width of the backbone, a layer that all heads share.
      mode: "gated", "no_gate" (g + s k), or "pure", the closed form of liquid time constants, which has g alone.

    Raises:
      TypeError: if a size is not an int.
      ValueError: if a size is below 1, or mode is another.
    Source: Hasani et al. 2022, https://arxiv.org/abs/2106.13898.
    """

    input_size: int
    hidden_size: int
    backbone_size: int = 128
    mode: str = "gated"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one("backbone_size", self.backbone_size)
        if self.mode not in _MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, _MODES))}, got {self.mode!r}.")

    @property
    def widths(self) -> dict[str, int | None]:
        """The features of x and dt."""
        return {"x": self.input_size, "dt": None}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter. Heads are side by side in the order g, k, a, s."""
        hidden, width = self.hidden_size, self.backbone_size
        heads = hidden if self.mode == "pure" else 4 * hidden
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (self.input_size, width),
            "weight_hh": (hidden, width),
            "bias": (width,),
            "weight_heads": (width, heads),
            "bias_heads": (heads,),
        }
        return shapes | ({"w_tau": (hidden,), "A": (hidden,)} if self.mode == "pure" else {})

    def state_like(self, dtype: Any) -> jax.ShapeDtypeStruct:
        """Returns h of one sequence, as jax.ShapeDtypeStruct."""
        return jax.ShapeDtypeStruct((self.hidden_size,), dtype)

    def project(self, params: PyTree, x: jax.Array) -> PyTree:
        """Returns W x + b, and dt."""
        x, dt = self.apart(x)
        return wide(x @ params["weight_ih"]) + wide(params["bias"])[None], wide(dt)

    def advance(self, params: PyTree, state: PyTree, projected: PyTree) -> tuple[PyTree, jax.Array]:
        """Computes one step."""
        from_x, dt = projected
        weight = params["weight_hh"]
        net = from_x + wide(state.astype(weight.dtype) @ weight)
        y = (1.7159 * jnp.tanh(0.666 * net)).astype(weight.dtype)
        heads = wide(y @ params["weight_heads"]) + wide(params["bias_heads"])[None]
        if self.mode == "pure":
            g, scale = jnp.tanh(heads), wide(params["A"])[None]
            h = scale - scale * jnp.exp(-dt * (jnp.abs(wide(params["w_tau"]))[None] + jnp.abs(g))) * g
            return h, h
        g, k, a, s = jnp.split(heads, 4, axis=-1)
        share = jax.nn.sigmoid(a * dt + s)
        kept = jnp.tanh(g) if self.mode == "no_gate" else (1 - share) * jnp.tanh(g)
        h = kept + share * jnp.tanh(k)
        return h, h
