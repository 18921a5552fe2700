"""Batch: one batch inside a program, packed or padded beside its lengths, with what stacks do to its steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._packed.dropout import Origins, drop_sequences, drop_steps
from jaxpack._packed.gather import rearrange, reversed_cells
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._packed.resets import reversed_resets
from jaxpack._packed.slack import select_or_poison, zero_slack
from jaxpack._types import PyTree


class Batch(NamedTuple):
    """A batch and its resets. Its data are [S, ...] if it is packed, else [B, T, ...]: the layout of its outputs.

    Attributes:
      inputs: packed, or the padded array, or a tuple of arrays for layers that take one.
      lengths: int32 [B], of a padded batch; None for a packed one.
      resets: packed as the inputs are, or bool [B, T]; None for none.
    """

    inputs: Any
    lengths: jax.Array | None
    resets: Any

    @property
    def data(self) -> PyTree:
        """The inputs as data."""
        return self.inputs.data if isinstance(self.inputs, PackedSequence) else self.inputs

    def of(self, data: PyTree) -> Any:
        """Returns data of this batch as layers take it: packed or padded."""
        return self.inputs.replace(data=data) if isinstance(self.inputs, PackedSequence) else data

    def zeroed(self, data: jax.Array) -> jax.Array:
        """Sets data to zero past each length, and to NaN for sequences that do not fit."""
        if isinstance(self.inputs, PackedSequence):
            return zero_slack(self.inputs.replace(data=None), data)
        steps, spans, fits = self._steps()
        return select_or_poison(data, (steps < spans) | ~fits[:, None], jnp.zeros_like(data), fits)

    def turned(self, data: jax.Array) -> jax.Array:
        """Reverses the steps of each sequence. What is past its length stays in place."""
        if isinstance(self.inputs, PackedSequence):
            cells = reversed_cells(self.inputs)
            return rearrange(data, cells, cells)
        steps, spans, _ = self._steps()
        cells = self._cells(jnp.where(steps < spans, spans - 1 - steps, steps))
        return rearrange(data.reshape(len(cells), *data.shape[2:]), cells, cells).reshape(data.shape)

    def reversed(self) -> Batch:
        """Returns the batch with each sequence reversed, and the resets at which episodes begin that are read so."""
        return Batch(self.of(self.turned(self.data)), self.lengths, self._reversed_resets())

    def dropped(self, key: jax.Array, data: jax.Array, rate: float, locked: bool) -> jax.Array:
        """Zeroes features with probability `rate`: independently at each step, or locked at all steps of a sequence."""
        drop = drop_sequences if locked else drop_steps
        if not data.size:
            return data
        if isinstance(self.inputs, PackedSequence):
            return drop(key, data, Origins.of(self.inputs), rate)
        flat = data.reshape(-1, *data.shape[2:])
        return drop(key, flat, Origins.of_batch(*data.shape[:2]), rate).reshape(data.shape)

    def _reversed_resets(self) -> Any:
        if self.resets is None:
            return None
        if isinstance(self.inputs, PackedSequence):
            return self.resets.replace(data=reversed_resets(self.inputs, self.resets.data))
        if not self.resets.size:
            return self.resets
        steps, spans, _ = self._steps()
        inner = (steps > 0) & (steps < spans)  # a step ends an episode if the one after it begins one
        begins = jnp.take(self.resets.reshape(-1), self._cells(jnp.where(inner, spans - steps, 0)), mode="clip")
        return begins.reshape(inner.shape) & inner

    def _steps(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns of a padded batch the step at each place [B, T], the real steps [B, 1], and which rows fit [B]."""
        shape = jax.tree.leaves(self.inputs)[0].shape[:2]
        lengths = jnp.asarray(self.lengths)
        fits = (lengths >= 0) & (lengths <= shape[1])
        return lax.broadcasted_iota(jnp.int32, shape, 1), jnp.where(fits, lengths, 0)[:, None], fits

    def _cells(self, steps: jax.Array) -> jax.Array:
        """Returns the places of steps [B, T] in the flat batch, [B * T]."""
        rows = lax.broadcasted_iota(jnp.int32, steps.shape, 0)
        return (rows * steps.shape[1] + steps).reshape(-1)
