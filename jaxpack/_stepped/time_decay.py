"""TimeDecay: any cell of a stack, whose state decays with the time between steps.

    s  = exp(-softplus(λ) dt) s         each unit of each state (h, or h and c), with a rate of its own
    s' = cell(x, s)

A unit of rate r forgets half of what it holds in log(2) / r units of time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxpack._layers.params import floating
from jaxpack._layers.recurrent_layer import RecurrentLayer
from jaxpack._linear.diagonal import split
from jaxpack._linear.solve import wide
from jaxpack._stepped.timed import TimedLayer
from jaxpack._types import PyTree

_DECAYS = (-4.0, 0.0)  # the least and the largest λ that is drawn


@dataclasses.dataclass(frozen=True)
class TimeDecay(TimedLayer):
    """A recurrent layer whose state decays with the time between steps. Returns (output, state).

        s' = cell(x, exp(-softplus(λ) dt) s)

    Inputs are tuples (x [.., F], dt [..]), where dt is the time since the step before. The state is that of the cell, h
    [B, H], or (h, c).

    Examples:
      >>> layer = jaxpack.TimeDecay(jaxpack.LSTM(input_size=2, hidden_size=4))
      >>> params = layer.init(jax.random.key(0))
      >>> events = [(np.ones((n, 2)), np.full(n, 0.5)) for n in (3, 1)]
      >>> output, (h, c) = layer.apply(params, jaxpack.pack_sequence(events))
      >>> output.shape, h.shape, params["decay"].shape  # a rate for each unit of h and of c
      ((4, 4), (2, 4), (8,))

    Args:
      base: a jaxpack.LSTM, GRU or any other stack, of one layer and one direction.

    Raises:
      TypeError: if base is no stack.
      ValueError: if base has several layers or directions, a learned initial state, or regularization.
    Source: Che et al. 2018, "Recurrent neural networks for multivariate time series with missing values", whose hidden
      state decays, too.
    """

    base: RecurrentLayer

    def __post_init__(self) -> None:
        if not isinstance(self.base, RecurrentLayer):
            raise TypeError(f"base must be a stack such as jaxpack.LSTM(2, 4), got {self.base!r}.")
        several = self.base.num_layers * self.base.num_directions != 1
        if several or self.base.learned_initial_state or self.base.has_dropout:
            raise ValueError(
                f"base must have one layer, one direction and no learned initial state or regularization, got "
                f"{self.base}. Run layers one after the other, and the other direction with reverse=True."
            )

    @property
    def input_size(self) -> int:  # type: ignore[override]
        """The number of features of x."""
        return self.base.input_size

    @property
    def hidden_size(self) -> int:  # type: ignore[override]
        """The width of the cell."""
        return self.base.hidden_size

    @property
    def output_size(self) -> int:
        """The width of the output."""
        return self.base.output_size

    @property
    def widths(self) -> dict[str, int | None]:
        """The features of x and dt."""
        return {"x": self.input_size, "dt": None}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter: those of the cell, and λ."""
        return self.base.shapes["l0"] | {"decay": (sum(jax.tree.leaves(self.base.cell.state_sizes)),)}

    def init(self, key: jax.Array, dtype: Any = None) -> dict[str, jax.Array]:
        """Draws the cell's parameters as its layer does, and λ uniformly from -4 to 0: rates of 0.02 to 0.7.

        Args:
          key: a JAX random key.
          dtype: a floating dtype. Default: JAX's (float32, or float64 under x64).

        Raises:
          TypeError: if key is not a random key, or dtype is not floating.
        """
        of_cell, of_decay = split(key, 2)
        dtype = floating(float if dtype is None else dtype)
        decay = jax.random.uniform(of_decay, self.shapes["decay"], dtype, *_DECAYS)
        return self.base.init(of_cell, dtype)["l0"] | {"decay": decay}

    def state_like(self, dtype: Any) -> PyTree:
        """Returns the cell's state for one sequence, as jax.ShapeDtypeStruct."""
        return jax.tree.map(lambda size: jax.ShapeDtypeStruct((size,), dtype), self.base.cell.state_sizes)

    def prepare(self, params: PyTree) -> PyTree:
        """Returns the cell's fused weights, and the rates side by side."""
        of_cell = {name: wide(params[name]) for name in self.base.shapes["l0"]}
        return self.base.cell.fuse(of_cell), jax.nn.softplus(wide(params["decay"]))[None]

    def project(self, params: PyTree, x: jax.Array) -> PyTree:
        """Returns the cell's projection of x, and dt."""
        fused, _ = params
        x, dt = map(wide, self.apart(x))
        return self.base.cell.project(fused, x), dt

    def advance(self, params: PyTree, state: PyTree, projected: PyTree) -> tuple[PyTree, jax.Array]:
        """Computes one step."""
        (fused, rates), (from_x, dt) = params, projected
        leaves, structure = jax.tree.flatten(state)
        kept, carry, start = jnp.exp(-rates * dt), [], 0
        for leaf in leaves:
            carry.append(kept[:, start : start + leaf.shape[1]] * leaf)
            start += leaf.shape[1]
        after = self.base.cell.step(fused, tuple(carry), from_x)
        return jax.tree.unflatten(structure, after), after[0]
