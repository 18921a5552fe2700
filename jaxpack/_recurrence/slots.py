"""The cells of a batch as a recurrence sees them: which are real, and where sequences begin and end.

In a staircase a row is a slot: a sequence's carry is there from the start, and no cell needs to know of borders. Where
several slots share a row, the carry is replaced at the first cell of each. In the backward pass the roles are
exchanged: the cotangents of final carries enter at a slot's end, and those of initial carries leave at its beginning.

A reset is a border within a slot: the carry is replaced by the slot's initial one, or by another, fresh one. In the
backward pass its cotangent leaves, and none goes on to the step before.
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
      begins: bool [S], whether a slot's first cell is here, or a reset.
      ends: bool [S], whether a slot's last cell is here.
      slots: int32 [S], the slot of each cell.
    """

    begins: jax.Array
    ends: jax.Array
    slots: jax.Array


# The share of its value that each part of the carry keeps: [M, size], [M, 1], or None for 0; () for no zoneout.
Keeps = tuple[jax.Array | None, ...]


class Places(NamedTuple):
    """Where cells are that the recurrence goes over in another order than the batch has them.

    Attributes:
      sources: int32 [N], the cell of the batch for each cell of the recurrence; S for slack.
      targets: int32 [S], the inverse; N for slack.
    """

    sources: jax.Array
    targets: jax.Array


class Entry(NamedTuple):
    """The cells of a window at which the carry is replaced, and by what.

    Attributes:
      here: bool [M, 1], the cells; None for no cell.
      values: of each cell, leaves [M, ...]; or of each row, leaves [rows, ...].
      by_cell: whether values are those of cells.
    """

    here: jax.Array | None = None
    values: Carry = ()
    by_cell: bool = True

    @property
    def cells(self) -> tuple[jax.Array | None, Carry]:
        """The part that steps read, leaves [M, ...]."""
        return self.here, self.values if self.by_cell else ()

    @property
    def memory(self) -> Entry:
        """The entry of the memory c alone."""
        return self._replace(values=self.values[1:])

    def step(self, cells: tuple[jax.Array | None, Carry], carry: Carry) -> Carry:
        """Returns the carry [rows, ...] with which a step begins; `cells` are those of the step."""
        here, values = cells
        return _where(here, values if self.by_cell else self.values, carry)

    def window(self, carry: Carry) -> Carry:
        """Returns the carry [M, ...] with which each step of the window begins, or its first leaves."""
        return _where(self.here, self.spread(), carry)

    def spread(self) -> Carry:
        """Returns the values of each cell."""
        if self.by_cell or self.here is None:
            return self.values
        return tuple(jnp.tile(leaf, (len(self.here) // len(leaf), 1)) for leaf in self.values)


class Masks(NamedTuple):
    """The random masks of one direction.

    Attributes:
      scale: [B, P], of each slot, by which h is multiplied where the gates see it; None for 1.
      kept: bool [S, size] for each part of the carry with zoneout, where it keeps its value; None for nowhere. () for
        the mean, which evaluation uses.
    """

    scale: jax.Array | None = None
    kept: tuple[jax.Array | None, ...] = ()


class Scale(NamedTuple):
    """By what h is multiplied where the gates see it, in the cells of a window.

    Attributes:
      values: of each cell [M, P], or of each row [rows, P]; None for 1.
      by_cell: whether values are those of cells.
    """

    values: jax.Array | None = None
    by_cell: bool = True

    @property
    def cells(self) -> jax.Array | None:
        """The part that steps read, [M, P]."""
        return self.values if self.by_cell else None

    def step(self, cells: jax.Array | None, h: jax.Array) -> jax.Array:
        """Returns h [rows, P] of a step, or a cotangent of it, scaled; `cells` are those of the step."""
        scale = cells if self.by_cell else self.values
        return h if scale is None else h * scale

    def window(self, h: jax.Array) -> jax.Array:
        """Returns h of all cells [M, P] scaled."""
        if self.values is None or self.by_cell:
            return self.step(self.values, h)
        return h * jnp.tile(self.values, (len(h) // len(self.values), 1))


class RealCells(NamedTuple):
    """The real cells of a batch, as all directions see them, or as one sees them that has resets and masks.

    Attributes:
      mask: bool [S].
      spans: int32 [B], how many real cells each slot has.
      first, last: int32 [B], the first cell of each slot, and its last real one; of an empty slot, any cell.
      borders: None where each row is one slot.
      places: where the cells of dealt rows are in the batch; None where both are the same.
      resets: bool [S], the real cells at which the carry is the slot's initial one again, or its fresh one; None for
        none.
      masks: the random masks.
    """

    mask: jax.Array
    spans: jax.Array
    first: jax.Array
    last: jax.Array
    borders: Borders | None
    places: Places | None = None
    resets: jax.Array | None = None
    masks: Masks = Masks()

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

    def with_resets(self, resets: jax.Array | None) -> RealCells:
        """Returns the cells as a direction sees them that is reset at these cells of the batch: bool [S], or None."""
        if resets is None:
            return self
        resets = resets if self.places is None else _get(resets, self.places.sources)
        borders = self.borders and self.borders._replace(begins=self.borders.begins | resets)
        return self._replace(borders=borders, resets=resets)

    def with_masks(self, masks: Masks) -> RealCells:
        """Returns the cells as a direction sees them that has these masks."""
        return self._replace(masks=masks)

    def scale(self, window: Window) -> Scale:
        """Returns the scale of h in a window."""
        values = self.masks.scale
        if values is None:
            return Scale()
        if self.borders is None:
            return Scale(values[: window.stair.rows], by_cell=False)
        return Scale(values.at[window.read(self.borders.slots)].get(mode="promise_in_bounds"))

    def keeps(self, window: Window, rates: tuple[float, ...], dtype: Any) -> Keeps:
        """Returns which share of its value each part of the carry keeps in a window, at these rates of zoneout."""
        if not any(rates):
            return ()
        if not self.masks.kept:
            return tuple(jnp.full((window.size, 1), rate, dtype) if rate else None for rate in rates)
        return tuple(None if kept is None else self.read(window, kept).astype(dtype) for kept in self.masks.kept)

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

    def entering(self, initial: Carry, fresh: Carry) -> Carry:
        """Returns the carries that enter while the loops run, as `at_begins` takes them.

        Args:
          initial: of each slot, leaves [B, ...].
          fresh: of each slot, to which a reset returns; () for the initial one.
        """
        if not fresh or self.borders is None:
            return fresh or initial
        return tuple(jnp.concatenate(each) for each in zip(initial, fresh, strict=True))

    def at_begins(self, window: Window, entering: Carry) -> Entry:
        """Returns the entry of a carry where a slot begins in a window, or a reset is."""
        if self.borders is None:
            if self.resets is None:
                return Entry()
            return Entry(self.resets_of(window), tuple(leaf[: window.stair.rows] for leaf in entering), by_cell=False)
        slots = window.read(self.borders.slots)
        if self.resets is not None and len(entering[0]) > len(self.spans):  # the second half is fresh
            slots = slots + len(self.spans) * window.read(self.resets)
        return _gathered(window.read(self.borders.begins), slots, entering)

    def at_ends(self, window: Window, dcarry: Carry) -> Entry:
        """Returns the entry of the cotangent of the final carry where a slot ends in a window."""
        if self.borders is None:
            return Entry()
        slots = window.read(self.borders.slots)
        return _gathered(window.read(self.borders.ends), slots, dcarry)

    def resets_of(self, window: Window) -> jax.Array | None:
        """Returns at which cells of a window a reset is: bool [M, 1]; None if there are none."""
        return None if self.resets is None else window.read(self.resets)[:, None]


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


def zone(keeps: Keeps, before: Carry, after: Carry) -> Carry:
    """Returns the carry after a step with zoneout (Krueger et al. 2017)."""
    return tuple(
        new if keep is None else keep * old + (1 - keep) * new
        for keep, old, new in zip(keeps or (None,) * len(after), before, after, strict=True)
    )


def _where(here: jax.Array | None, values: Carry, carry: Carry) -> Carry:
    """Returns a carry with the values at some of its cells."""
    if here is None:
        return carry
    return tuple(jnp.where(here, value, leaf) for value, leaf in zip(values, carry, strict=False))


def _gathered(here: jax.Array, rows: jax.Array, values: Carry) -> Entry:
    """Returns an entry of rows of values at some cells of a window: bool [M], int32 [M]."""
    return Entry(here[:, None], tuple(leaf.at[rows].get(mode="promise_in_bounds") for leaf in values))


def _get(leaf: jax.Array, indices: jax.Array) -> jax.Array:
    return leaf.at[indices].get(mode="fill", fill_value=0)
