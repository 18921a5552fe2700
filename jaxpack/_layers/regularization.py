"""Regularization: the regularisers of a recurrent layer, and the random masks that one call of the layer draws."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpack._cells.cell import Cell, Params
from jaxpack._packed.dropout import (
    Origins,
    check_rate,
    draw_sequences,
    draw_steps,
    drop_sequences,
    drop_steps,
    drop_weights,
    scale_kept,
)
from jaxpack._packed.maps import take
from jaxpack._packed.slack import poison
from jaxpack._recurrence.slots import Masks

# Each has a stream of keys of its own, so that one does not change the masks of another.
STREAMS = (
    "dropout",
    "input_dropout",
    "hidden_dropout",
    "output_dropout",
    "recurrent_dropout",
    "weight_dropout",
    "zoneout of h",
    "zoneout of c",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regularization:
    """Regularisers of a recurrent layer, all of which are off by default, and in evaluation.

    A mask of dropout is one for all steps of a sequence (variational or locked dropout), and follows the sequence's row
    in the caller's order: every plan gives the same masks. Features that stay are divided by 1 - rate.

    Examples:
      >>> regularization = jaxpack.Regularization(recurrent_dropout=0.25, zoneout=0.1)
      >>> lstm = jaxpack.LSTM(2, 4, regularization=regularization)
      >>> params = lstm.init(jax.random.key(0))
      >>> output, _ = lstm.apply(params, np.ones((1, 3, 2)), dropout_key=jax.random.key(1))  # training
      >>> output, _ = lstm.apply(params, np.ones((1, 3, 2)), deterministic=True)  # evaluation

    Args:
      input_dropout: the probability of zeroing a feature of the input, at all steps of a sequence.
      hidden_dropout: the same for what each layer hands to the next.
      output_dropout: the same for the output of the last layer. Final states are not dropped.
      recurrent_dropout: the same for h as the gates of each layer and direction see it. What passes the gates by, such
        as z h of a GRU and the memory c, is not dropped. Resets within a sequence keep its mask.
      zoneout: the probability with which a unit keeps its value at a step, drawn anew at each; a number, or a pair for
        h and the memory c. In evaluation a unit is the mean, p times its value before and 1 - p times its new one.
      weight_dropout: the probability of zeroing an entry of the recurrent weights (weight_hh) of each layer and
        direction, once for the whole call (DropConnect).

    Raises:
      ValueError: if one is not a number in [0, 1].
    Source: Gal & Ghahramani 2016, "A theoretically grounded application of dropout in recurrent neural networks";
      Krueger et al. 2017, "Zoneout"; Wan et al. 2013, "Regularization of neural networks using DropConnect"; Merity
      et al. 2018, "Regularizing and optimizing LSTM language models" (AWD-LSTM).
    """

    input_dropout: float = 0.0
    hidden_dropout: float = 0.0
    output_dropout: float = 0.0
    recurrent_dropout: float = 0.0
    zoneout: float | tuple[float, float] = 0.0
    weight_dropout: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.zoneout, list):
            object.__setattr__(self, "zoneout", tuple(self.zoneout))
        for field in dataclasses.fields(self):
            rate = getattr(self, field.name)
            if field.name != "zoneout" or not isinstance(rate, tuple):
                check_rate(field.name, rate)
            elif len(rate) != 2:
                raise ValueError(f"zoneout must be a number in [0, 1], or a pair of them for h and c, got {rate!r}.")
            else:
                for i, each in enumerate(rate):
                    check_rate(f"zoneout[{i}]", each)

    @property
    def active(self) -> dict[str, Any]:
        """The regularisers that are on, by name."""
        rates = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: rate for name, rate in rates.items() if rate not in (0, (0, 0))}

    def zoneout_of(self, cell: Cell) -> tuple[float, ...]:
        """Returns the rate of zoneout of each part of a cell's carry; () if there is none.

        Raises:
          ValueError: if there is one for the memory of a cell without a memory.
        """
        number = len(jax.tree.leaves(cell.state_sizes))
        rates = self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout,) * number
        if any(rates[number:]):
            raise ValueError(
                f"zoneout={self.zoneout} is for h and a memory c, which the cell does not have. Pass a number, for h."
            )
        return tuple(map(float, rates[:number])) if any(rates) else ()


OFF = Regularization()


class Noise(NamedTuple):
    """What one call of a stack draws.

    Attributes:
      regularization: the rates.
      dropout: the rate of dropout between layers, with masks that differ by step.
      key: None in evaluation, in which nothing is dropped.
      origins: of the cells.
    """

    regularization: Regularization
    dropout: float
    key: jax.Array | None
    origins: Origins

    def key_of(self, stream: str, index: int) -> jax.Array:
        """Returns a key of its own for each stream, and each layer and direction."""
        assert self.key is not None
        return jax.random.fold_in(jax.random.fold_in(self.key, STREAMS.index(stream)), index)

    def on_inputs(self, data: jax.Array, index: int) -> jax.Array:
        """Drops the inputs [S, F] of the layer whose first direction has this index."""
        if index and self.key is not None and self.dropout:
            data = drop_steps(self.key_of("dropout", index), data, self.origins, self.dropout)
        return self._locked("hidden_dropout" if index else "input_dropout", data, index)

    def on_output(self, outputs: Any, fits: jax.Array) -> Any:
        """Drops the output [S, D*H], or the one of each direction, but no NaN of slots that do not fit: bool [B]."""
        if self.key is None or not self.regularization.output_dropout:
            return outputs
        leaves, structure = jax.tree.flatten(outputs)
        dropped = (self._locked("output_dropout", leaf, i) for i, leaf in enumerate(leaves))
        fits = take(fits, self.origins.slots)
        return jax.tree.unflatten(structure, [poison(leaf, fits) for leaf in dropped])

    def on_weights(self, params: Params, index: int) -> Params:
        """Drops entries of the recurrent weights of a layer and direction."""
        rate = self.regularization.weight_dropout
        if self.key is None or not rate or "weight_hh" not in params:
            return params
        return params | {"weight_hh": drop_weights(self.key_of("weight_dropout", index), params["weight_hh"], rate)}

    def masks(self, cell: Cell, index: int, dtype: Any) -> Masks | None:
        """Draws the masks of the recurrence of a layer and direction; None if there are none."""
        rate, zoneout = self.regularization.recurrent_dropout, self.regularization.zoneout_of(cell)
        if self.key is None or not (rate or zoneout):
            return None
        scale, kept = None, []
        if rate:
            dropped = draw_sequences(self.key_of("recurrent_dropout", index), rate, self.origins, (cell.output_size,))
            scale = scale_kept(jnp.ones((), dtype), dropped, rate)
        sizes = jax.tree.leaves(cell.state_sizes)
        for part, share, size in zip("hc", zoneout, sizes, strict=False):
            key = self.key_of(f"zoneout of {part}", index)
            kept.append(draw_steps(key, share, self.origins, (size,)) if share else None)
        return Masks(scale, tuple(kept))

    def _locked(self, name: str, data: jax.Array, index: int) -> jax.Array:
        rate = getattr(self.regularization, name)
        if self.key is None or not rate:
            return data
        return drop_sequences(self.key_of(name, index), data, self.origins, rate)
