"""The cells of a batch as a recurrence sees them: which are real, and where sequences begin and end.

In a staircase a row is a slot: a sequence's carry is there from the start, and no cell needs to know of borders. Where
several slots share a row, the carry is replaced at the first cell of each. In the backward pass the roles are
exchanged: the cotangents of final carries enter at a slot's end, and those of initial carries leave at its beginning.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpack._cells.cell import Carry
from jaxpack._packed.gather import Indexed, cells_of, real_cells, slot_spans
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


class RealCells(NamedTuple):
    """The real cells of a batch, as all directions see them.

    Attributes:
      mask: bool [S].
      spans: int32 [B], how many real cells each slot has.
      first, last: int32 [B], the first cell of each slot, and its last real one; of an empty slot, any cell.
      borders: None where each row is one slot.
      sources: int32 [N], where each cell of dealt rows is among the cells of the batch, S for slack; else None.
    """

    mask: jax.Array
    spans: jax.Array
    first: jax.Array
    last: jax.Array
    borders: Borders | None
    sources: jax.Array | None = None

    @classmethod
    def of(cls, packed: Indexed) -> RealCells:
        """Returns the real cells of a packed batch."""
        plan, spans = packed.plan, slot_spans(packed)
        slots = np.arange(plan.num_sequences)
        borders = None
        if plan.starts:
            begins, ends = (np.zeros(plan.size, bool) for _ in range(2))
            begins[plan.slot_begins] = ends[plan.slot_ends] = True
            borders = Borders(*map(jnp.asarray, (begins, ends, plan.cell_slots)))
        last = cells_of(plan, slots, jnp.maximum(spans - 1, 0))
        return cls(real_cells(packed), spans, jnp.asarray(plan.slot_begins), last, borders)

    def read(self, window: Window, leaf: jax.Array) -> jax.Array:
        """Returns a window's cells [M, ...] out of all cells [S, ...]."""
        if self.sources is None:
            return window.read(leaf)
        return leaf.at[window.read(self.sources)].get(mode="fill", fill_value=0)

    def before(self, window: Window, leaf: jax.Array, first: jax.Array) -> jax.Array:
        """Returns the cells one step before the window's [M, ...]; `first` [rows, ...] precedes the stair."""
        if self.sources is None:
            return window.before(leaf, first)
        none = jnp.full(window.stair.rows, len(leaf), self.sources.dtype)
        return leaf.at[window.before(self.sources, none)].get(mode="fill", fill_value=0)

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


def enter(entry: Any, carry: Carry) -> Carry:
    """Returns a carry with the entry's values where slots are entered."""
    if entry is None:
        return carry
    here, values = entry
    return tuple(jnp.where(here, value, leaf) for value, leaf in zip(values, carry, strict=False))
