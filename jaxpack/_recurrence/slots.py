"""The cells of a batch as a recurrence sees them: which are real, and where sequences begin and end.

In a staircase a row is a slot: a sequence's carry is there from the start, and no cell needs to know of borders. Where
several slots share a row, the carry is replaced at the first cell of each. In the backward pass the roles are
exchanged: the cotangents of final carries enter at a slot's end, and those of initial carries leave at its beginning.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpack._cells.cell import Carry
from jaxpack._packed.gather import CellMaps, Indexed, slot_spans
from jaxpack._packed.maps import cells_of
from jaxpack._recurrence.windows import Window


class Borders(NamedTuple):
    """The borders of slots that share rows.

    Attributes:
      begins, ends: bool [S], whether a slot's first or last cell is here.
      slots: int32 [S], the slot of each cell.
    """

    begins: jax.Array
    ends: jax.Array
    slots: jax.Array


class Places(NamedTuple):
    """Where cells are that the recurrence goes over in another order than the batch has them.

    Attributes:
      sources: int32 [N], the cell of the batch for each cell of the recurrence; S for slack.
      targets: int32 [S], the inverse; N for slack.
    """

    sources: jax.Array
    targets: jax.Array


class RealCells(NamedTuple):
    """The real cells of a batch, as all directions see them.

    Attributes:
      mask: bool [S].
      spans: int32 [B], how many real cells each slot has.
      first, last: int32 [B], the first cell of each slot, and its last real one; of an empty slot, any cell.
      borders: None where each row is one slot.
      places: where the cells of dealt rows are in the batch; None where both are the same.
    """

    mask: jax.Array
    spans: jax.Array
    first: jax.Array
    last: jax.Array
    borders: Borders | None
    places: Places | None = None

    @classmethod
    def of(cls, packed: Indexed, maps: CellMaps) -> RealCells:
        """Returns the real cells of a packed batch."""
        spans = slot_spans(packed)
        slots = jnp.arange(len(spans), dtype=jnp.int32)
        last = cells_of(packed.plan, slots, jnp.maximum(spans - 1, 0))
        borders = None
        if packed.plan.starts:
            cells = jnp.arange(packed.plan.size, dtype=jnp.int32)
            borders = Borders(maps.steps == 0, maps.last[maps.slots] == cells, maps.slots)
        return cls(maps.mask, spans, maps.first, last, borders)

    def read(self, window: Window, leaf: jax.Array) -> jax.Array:
        """Returns a window's cells [M, ...] out of all cells of the batch [S, ...]."""
        return window.read(leaf) if self.places is None else _get(leaf, window.read(self.places.sources))

    def before(self, window: Window, leaf: jax.Array, first: jax.Array) -> jax.Array:
        """Returns the cells one step before the window's [M, ...]; `first` [rows, ...] precedes the stair."""
        if self.places is None:
            return window.before(leaf, first)
        sources, rows = self.places.sources, window.stair.rows
        before = _get(leaf, window.before(sources, jnp.full(rows, len(leaf), sources.dtype)))
        if self.borders is not None:
            return before
        return jnp.concatenate([jnp.where(window.start == 0, first, before[:rows]), before[rows:]])

    def restore(self, leaf: jax.Array) -> jax.Array:
        """Returns the cells of the batch [S, ...] from those of the recurrence."""
        return leaf if self.places is None else _get(leaf, self.places.targets)

    def at_begins(self, window: Window, carry: Carry) -> Any:
        """Returns the initial carry where a slot begins in a window, for `enter`."""
        return None if self.borders is None else self._at(window, self.borders.begins, carry)

    def at_ends(self, window: Window, dcarry: Carry) -> Any:
        """Returns the cotangent of the final carry where a slot ends in a window, for `enter`."""
        return None if self.borders is None else self._at(window, self.borders.ends, dcarry)

    def _at(self, window: Window, borders: jax.Array, values: Carry) -> Any:
        assert self.borders is not None
        slots = window.read(self.borders.slots)
        return window.read(borders)[:, None], tuple(v.at[slots].get(mode="promise_in_bounds") for v in values)


class BatchCells(NamedTuple):
    """The real cells of a padded batch [B, T] that runs without a plan, each row of which is followed by the next.

    Attributes:
      mask: bool [B * T].
      spans: int32 [B], how many real cells each sequence has.
      order: int32 [B], the sequences, longest first.
      ranks: int32 [B], the inverse: the place of each sequence in the order.
    """

    mask: jax.Array
    spans: jax.Array
    order: jax.Array
    ranks: jax.Array

    @classmethod
    def of(cls, spans: jax.Array, max_length: int) -> BatchCells:
        """Returns the real cells of a batch."""
        mask = jnp.arange(max_length, dtype=jnp.int32)[None] < spans[:, None]
        order = jnp.argsort(-spans).astype(jnp.int32)
        return cls(mask.reshape(-1), spans, order, jnp.argsort(order).astype(jnp.int32))

    @property
    def ranked(self) -> jax.Array:
        """The spans, longest first."""
        return self.spans[self.order]


def enter(entry: Any, carry: Carry) -> Carry:
    """Returns a carry with the entry's values where slots are entered."""
    if entry is None:
        return carry
    here, values = entry
    return tuple(jnp.where(here, value, leaf) for value, leaf in zip(values, carry, strict=False))


def _get(leaf: jax.Array, indices: jax.Array) -> jax.Array:
    return leaf.at[indices].get(mode="fill", fill_value=0)
