"""GRU-D, a GRU for values that are missing and steps that are unequally far apart (Che et al. 2018).

For each feature, with the mask m (1 where it is observed), its mean μ, its last observed value x', and δ, the time
since that observation:

    γ_x = exp(-max(0, w_x δ + b_x))                     feature by feature
    γ_h = exp(-max(0, W_γ δ + b_γ))
    x̂   = m x + (1 - m) (γ_x x' + (1 - γ_x) μ)
    ĥ   = γ_h h
    r   = σ(W_r x̂ + U_r ĥ + V_r m + b_r)
    z   = σ(W_z x̂ + U_z ĥ + V_z m + b_z)
    n   = tanh(W_n x̂ + U_n (r ĥ) + V_n m + b_n)
    h'  = (1 - z) n + z ĥ

z is the share of the old state, as in jaxpack.GRU; the paper's z is that of the new one. The state holds x' - μ, which
is 0 for a feature that has not been observed yet, and the part of δ that has passed up to this step.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxpack._linear.solve import wide
from jaxpack._stepped.timed import TimedLayer
from jaxpack._types import PyTree


@dataclasses.dataclass(frozen=True)
class GRUD(TimedLayer):
    """A GRU-D layer, for missing values and uneven steps. Returns (output, (h, last, since)).

        x̂ = x, or a decay from its last value to its mean where it is missing;  h' = GRU(x̂, γ_h h, mask)

    Inputs are tuples (x [.., F], mask [.., F], dt [..]): the mask is True, or above 1/2, where a feature is observed, x
    may be NaN elsewhere, and dt is the time since the step before. The state is h [B, H], and for each feature its last
    observed value less its mean and the time since then, [B, F].

    Examples:
      >>> layer = jaxpack.GRUD(input_size=2, hidden_size=4)
      >>> params = layer.init(jax.random.key(0))
      >>> visits = [(np.ones((n, 2)), np.ones((n, 2), bool), np.full(n, 0.5)) for n in (3, 1)]
      >>> output, (h, last, since) = layer.apply(params, jaxpack.pack_sequence(visits))
      >>> output.shape, h.shape, last.shape
      ((4, 4), (2, 4), (2, 2))
      >>> state, y = layer.step(params, (h, last, since), (np.ones((2, 2)), np.ones((2, 2), bool), np.ones(2)))

    Args:
      input_size: the number of features of each step.
      hidden_size: the width of h.

    The parameter "mean" is drawn as 0, for features that are standardised. Set it to the means of your features
    otherwise; it is trained as the others are.

    Raises:
      TypeError: if a size is not an int.
      ValueError: if a size is below 1.
    Source: Che et al. 2018, "Recurrent neural networks for multivariate time series with missing values".
    """

    input_size: int
    hidden_size: int

    @property
    def widths(self) -> dict[str, int | None]:
        """The features of x, mask and dt."""
        return {"x": self.input_size, "mask": self.input_size, "dt": None}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        size, hidden = self.input_size, self.hidden_size
        return {
            "weight_ih": (size, 3 * hidden),
            "weight_hh": (hidden, 3 * hidden),
            "weight_mask": (size, 3 * hidden),
            "bias": (3 * hidden,),
            "decay_x": (size,),
            "decay_x_bias": (size,),
            "decay_h": (size, hidden),
            "decay_h_bias": (hidden,),
            "mean": (size,),
        }

    def init(self, key: jax.Array, dtype: Any = None) -> dict[str, jax.Array]:
        """Draws weights and biases as torch.nn.Linear does, and means of 0.

        Args:
          key: a JAX random key.
          dtype: a floating dtype. Default: JAX's (float32, or float64 under x64).

        Raises:
          TypeError: if key is not a random key, or dtype is not floating.
        """
        params = super().init(key, dtype)
        return params | {"mean": jnp.zeros_like(params["mean"])}

    def state_like(self, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns h, last and since of one sequence, as jax.ShapeDtypeStruct."""
        feature = jax.ShapeDtypeStruct((self.input_size,), dtype)
        return jax.ShapeDtypeStruct((self.hidden_size,), dtype), feature, feature

    def project(self, params: PyTree, x: jax.Array) -> PyTree:
        """Returns x, mask, dt, and V m + b."""
        x, mask, dt = self.apart(x)
        from_mask = wide(mask @ params["weight_mask"]) + wide(params["bias"])[None]
        return wide(x), mask, wide(dt), from_mask

    def advance(self, params: PyTree, state: PyTree, projected: PyTree) -> tuple[PyTree, jax.Array]:
        """Computes one step."""
        h, last, since = state
        x, mask, dt, from_mask = projected
        weights = {name: wide(params[name])[None] for name in ("decay_x", "decay_x_bias", "decay_h_bias", "mean")}
        observed, since = mask > 0.5, since + dt
        decay_x = jnp.exp(-jnp.maximum(weights["decay_x"] * since + weights["decay_x_bias"], 0))
        decay_h = jnp.exp(-jnp.maximum(_product(since, params["decay_h"]) + weights["decay_h_bias"], 0))
        apart = (
            jnp.where(observed, x, 0) - weights["mean"]
        )  # before the product, since x may be NaN where it is missing
        seen = weights["mean"] + jnp.where(observed, apart, decay_x * last)
        last, since = jnp.where(observed, apart, last), jnp.where(observed, 0, since)
        h, both = decay_h * h, 2 * self.hidden_size
        net, weight = from_mask + _product(seen, params["weight_ih"]), params["weight_hh"]
        r, z = jnp.split(jax.nn.sigmoid(net[:, :both] + _product(h, weight[:, :both])), 2, axis=-1)
        h = (1 - z) * jnp.tanh(net[:, both:] + _product(r * h, weight[:, both:])) + z * h
        return (h, last, since), h


def _product(array: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiplies in the dtype of the weights, and returns float32 or wider."""
    return wide(array.astype(weight.dtype) @ weight)
