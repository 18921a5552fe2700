"""Where a recurrence enters and leaves slots.

In a staircase a row is a slot: its carry is there from the start, and what it ends with is final. Where several slots
share a row, a step enters a slot at its first cell, with the slot's own initial carry, and leaves it at its last, where
the carry is the slot's final one. Backwards it is the other way round, with cotangents.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpack._cells.cell import Carry
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._recurrence.buffers import buffer, read, write
from jaxpack._recurrence.windows import Window


class Slots(NamedTuple):
    """The slots of a plan as a recurrence meets them.

    Attributes:
      values: what each slot is entered with, leaves [B, ...].
      entries, exits: the cells at which each slot is entered and left, [B].
    """

    plan: BucketPlan
    values: Carry
    entries: np.ndarray
    exits: np.ndarray

    @classmethod
    def forward(cls, plan: BucketPlan, carry: Carry) -> Slots:
        """In the order of time, with initial carries."""
        return cls(plan, carry, plan.slot_begins, plan.slot_ends)

    @classmethod
    def backward(cls, plan: BucketPlan, dcarry: Carry) -> Slots:
        """Last step first, with the cotangents of final carries."""
        return cls(plan, dcarry, plan.slot_ends, plan.slot_begins)

    @property
    def start(self) -> tuple[Carry, Carry]:
        """What to start with: a carry for each row, and buffers for what each slot is left with."""
        if not self.plan.starts:
            return self.values, ()
        return tuple(buffer(leaf, (self.plan.rows[0], *leaf.shape[1:]), 0) for leaf in self.values), self.values

    def finish(self, by_row: Carry, by_slot: Carry) -> Carry:
        """What each slot was left with [B, ...]."""
        return by_slot if self.plan.starts else by_row

    def crossings(self, window: Window) -> Crossings:
        """Those in a window."""
        if not self.plan.starts:
            return Crossings(window, None, (), None, ())
        entered = np.zeros((self.plan.size, 1), bool)
        entered[self.entries] = True
        slots = window.read(jnp.asarray(self.plan.cell_slots))
        values = tuple(leaf.at[slots].get(mode="promise_in_bounds") for leaf in self.values)
        trails = tuple(buffer(leaf, leaf.shape, 5 + i) for i, leaf in enumerate(values))
        return Crossings(window, window.read(jnp.asarray(entered)), values, self.exits, trails)


class Crossings(NamedTuple):
    """The slots entered and left in a window of M cells.

    Attributes:
      entered: bool [M, 1], the cells that enter a slot; None if rows are slots.
      values: with what, leaves [M, ...].
      exits: the cell, of all, at which each slot is left [B].
      trails: buffers for the carry after each cell, leaves [M, ...].
    """

    window: Window
    entered: jax.Array | None
    values: Carry
    exits: np.ndarray | None
    trails: Carry

    def enter(self, j: jax.Array | int, carry: Carry) -> Carry:
        """The carry of each row to go on with at step j."""
        if self.entered is None:
            return carry
        rows = self.window.stair.rows
        here = read(self.entered, j * rows, rows)
        return tuple(jnp.where(here, read(v, j * rows, rows), c) for v, c in zip(self.values, carry, strict=True))

    def enter_all(self, before: jax.Array) -> jax.Array:
        """`enter` for the first leaf of the carry before every cell of the window [M, ...]."""
        return before if self.entered is None else jnp.where(self.entered, self.values[0], before)

    def restart(self, decay: jax.Array, inject: jax.Array) -> tuple[jax.Array, jax.Array]:
        """c' = decay * c + inject with the c that slots are entered with put in."""
        if self.entered is None:
            return decay, inject
        injected = jnp.where(self.entered, decay * self.values[0] + inject, inject)
        return jnp.where(self.entered, 0, decay), injected

    def of_memory(self) -> Crossings:
        """For the memory c alone."""
        return self._replace(values=self.values[1:], trails=self.trails[1:])

    def trace(self, j: jax.Array | int, carry: Carry, trails: Carry) -> Carry:
        """The trails with the carry after step j."""
        rows = self.window.stair.rows
        return tuple(write(trail, leaf, j * rows) for trail, leaf in zip(trails, carry, strict=False))

    def leave(self, trails: Carry, by_slot: Carry) -> Carry:
        """What slots are left with [B, ...], those that are left here put in."""
        if self.exits is None:
            return by_slot
        window = self.window
        at = jnp.asarray(self.exits) - window.cell(0)
        here = (at >= window.skip * window.stair.rows) & (at < window.size)
        at = jnp.clip(at, 0, window.size - 1)
        return tuple(
            jnp.where(here[:, None], trail.at[at].get(mode="promise_in_bounds"), leaf)
            for trail, leaf in zip(trails, by_slot, strict=True)
        )
