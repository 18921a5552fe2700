"""LRU, the linear recurrent unit (Orvieto et al. 2023, "Resurrecting recurrent neural networks for long sequences").

A complex state of N = hidden_size features, each of which turns and decays on its own:

    λ   = exp(-exp(ν) + i exp(θ))
    h_t = λ ⊙ h_{t-1} + exp(γ) ⊙ (B x_t)
    y_t = Re(C h_t) + D ⊙ x_t

|λ| < 1 for every ν, so the recurrence is stable. λ is drawn uniformly on a ring between r_min and r_max, with phases up
to max_phase, and exp(γ) starts as sqrt(1 - |λ|²), with which the variance of h is that of B x.
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


@dataclasses.dataclass(frozen=True)
class LRU(DiagonalLayer):
    """A linear recurrent unit, whose complex state decays and turns at learnt rates. Returns (output, h_n).

        h' = exp(-exp(ν) + i exp(θ)) h + exp(γ) (B x);  y = Re(C h') + D x

    Examples:
      >>> layer = jaxpack.LRU(input_size=2, hidden_size=4, r_min=0.9, r_max=0.999)
      >>> params = layer.init(jax.random.key(0))
      >>> output, h_n = layer.apply(params, jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))]))
      >>> output.shape, h_n.shape  # as wide as the input; real and imaginary parts of h
      ((4, 2), (2, 2, 4))

    The parameters have the names and shapes of the paper: nu_log, theta_log and gamma_log [N], B_re and B_im [N, F],
    C_re and C_im [F, N], D [F].

    Args:
      input_size: the number of features F of each step, and of the output, at least 1.
      hidden_size: the number of complex features N of the state, at least 1.
      r_min, r_max: the ring in which abs(λ) is drawn, 0 <= r_min < r_max <= 1. Long memories need it close to 1.
      max_phase: the largest phase of λ in radians, above 0 and at most 2 π.

    Raises:
      TypeError: if an argument has another type.
      ValueError: if an argument is out of range.
    Source: Orvieto et al. 2023, https://arxiv.org/abs/2303.06349.
    """

    input_size: int
    hidden_size: int
    r_min: float = 0.0
    r_max: float = 1.0
    max_phase: float = 2 * math.pi

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.r_min < self.r_max <= 1:
            raise ValueError(f"0 <= r_min < r_max <= 1 must hold, got r_min={self.r_min} and r_max={self.r_max}.")
        if not 0 < self.max_phase <= 2 * math.pi + 1e-6:
            raise ValueError(f"max_phase must be above 0 and at most 2 pi, got {self.max_phase}.")

    @property
    def output_size(self) -> int:
        """The width of the output, input_size."""
        return self.input_size

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        width, size = self.input_size, self.hidden_size
        rates = dict.fromkeys(("nu_log", "theta_log", "gamma_log"), (size,))
        return rates | {
            "B_re": (size, width),
            "B_im": (size, width),
            "C_re": (width, size),
            "C_im": (width, size),
            "D": (width,),
        }

    def init(self, key: jax.Array, dtype: Any = None) -> dict[str, jax.Array]:
        """Draws parameters as in the paper: λ on its ring, B, C and D normal.

        Args:
          key: a JAX random key.
          dtype: a floating dtype. Default: JAX's (float32, or float64 under x64).

        Raises:
          TypeError: if key is not a random key, or dtype is not floating.
        """
        dtype = floating(float if dtype is None else dtype)
        wide = accumulator(dtype)
        names = ("nu_log", "theta_log", "B_re", "B_im", "C_re", "C_im", "D")
        keys = dict(zip(names, split(key, len(names)), strict=True))
        radius, phase = (
            jax.random.uniform(keys[name], (self.hidden_size,), wide, jnp.finfo(wide).tiny) for name in names[:2]
        )
        squared = radius * (self.r_max**2 - self.r_min**2) + self.r_min**2
        params = {
            "nu_log": jnp.log(-0.5 * jnp.log(squared)),
            "theta_log": jnp.log(self.max_phase * phase),
            "gamma_log": 0.5 * jnp.log1p(-squared),
        }
        scales = {"B": math.sqrt(2 * self.input_size), "C": math.sqrt(self.hidden_size), "D": 1.0}
        for name in names[2:]:
            params[name] = jax.random.normal(keys[name], self.shapes[name], wide) / scales[name[0]]
        return {name: params[name].astype(dtype) for name in self.shapes}

    def from_minimal_lru(self, params: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Returns the parameters of an LRU of minimal-lru (NicolasZucchet/minimal-LRU), which has the paper's names.

        Examples:
          >>> layer = jaxpack.LRU(2, 4)
          >>> theirs = {name: np.ones(shape, np.float32) for name, shape in layer.shapes.items()}
          >>> layer.from_minimal_lru(theirs)["B_re"].shape
          (4, 2)

        Args:
          params: arrays by name; each layer of a model has its own.

        Raises:
          KeyError: if names are missing or not known.
          TypeError: if values are not floating numbers.
          ValueError: if a shape is wrong, or JAX would round a value (float64 without x64).
        """
        return converted(params, {name: Arrays(name, shape) for name, shape in self.shapes.items()})

    def state_like(self, dtype: Any) -> jax.ShapeDtypeStruct:
        """Returns the state of one sequence: real and imaginary parts of h, [2, N]."""
        return jax.ShapeDtypeStruct((2, self.hidden_size), dtype)

    def prepare(self, params: PyTree) -> PyTree:
        """Returns λ, the weights of both parts of h, and D."""
        get = {name: leaf.astype(accumulator(leaf.dtype)) for name, leaf in params.items()}
        into = jnp.concatenate([get["B_re"], get["B_im"]]) * jnp.exp(jnp.tile(get["gamma_log"], 2))[:, None]
        decay = jnp.exp(as_complex(-jnp.exp(get["nu_log"]), jnp.exp(get["theta_log"])))
        out = jnp.concatenate([params["C_re"], -params["C_im"]], axis=1)
        return {"decay": decay[None], "into": into.T.astype(params["B_re"].dtype), "out": out.T, "D": params["D"]}

    def gates(self, params: PyTree, x: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns λ [1, N] and exp(γ) B x."""
        parts = jnp.split(x @ params["into"], 2, axis=-1)
        return params["decay"], as_complex(*parts)

    def readout(self, params: PyTree, x: jax.Array, h: jax.Array) -> jax.Array:
        """Returns Re(C h) + D x."""
        parts = jnp.concatenate([h.real, h.imag], axis=-1).astype(x.dtype)
        return parts @ params["out"] + params["D"][None] * x

    def enter(self, state: PyTree) -> jax.Array:
        """Returns complex h from its parts."""
        return as_complex(state[:, 0], state[:, 1])

    def leave(self, h: jax.Array, dtype: Any) -> PyTree:
        """Returns the parts of h."""
        return jnp.stack([h.real, h.imag], axis=1).astype(dtype)


def as_complex(real: jax.Array, imaginary: jax.Array) -> jax.Array:
    """Returns complex numbers from their parts, at least complex64."""
    wide = accumulator(real.dtype)
    return jax.lax.complex(real.astype(wide), imaginary.astype(wide))
