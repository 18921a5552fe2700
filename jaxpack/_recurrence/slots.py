"""Slots: where a recurrence starts a sequence with its initial carry, and where it collects the final one.

In a staircase a row is a slot. Its carry is there from the start, and the carry it ends with is final. Where several
slots share a row, the carry is reset at the first cell of a slot to the slot's initial carry, and collected at its last
cell, where it is final. In the backward pass the roles are exchanged: cotangents of final carries are set at the last
cell, and those of initial carries are collected at the first.
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
    """The slots of a plan in the order in which one pass goes over them.

    Attributes:
      plan: the plan.
      values: the carry that each slot starts with, leaves [B, ...].
      entries, exits: the cells at which each slot is reset and collected, [B].
    """

    plan: BucketPlan
    values: Carry
    entries: np.ndarray
    exits: np.ndarray

    @classmethod
    def forward(cls, plan: BucketPlan, carry: Carry) -> Slots:
        """Returns the slots of the forward pass, which start with the initial carries."""
        return cls(plan, carry, plan.slot_begins, plan.slot_ends)

    @classmethod
    def backward(cls, plan: BucketPlan, dcarry: Carry) -> Slots:
        """Returns the slots of the backward pass, which start with the cotangents of the final carries."""
        return cls(plan, dcarry, plan.slot_ends, plan.slot_begins)

    @property
    def start(self) -> tuple[Carry, Carry]:
        """The carry of each row at the start, and buffers for what is collected of each slot."""
        if not self.plan.starts:
            return self.values, ()
        return tuple(buffer(leaf, (self.plan.rows[0], *leaf.shape[1:]), 0) for leaf in self.values), self.values

    def finish(self, by_row: Carry, by_slot: Carry) -> Carry:
        """Returns the carry that each slot ended with, leaves [B, ...]."""
        return by_slot if self.plan.starts else by_row

    def within(self, window: Window) -> WindowSlots:
        """Returns the slots that start or end in a window."""
        if not self.plan.starts:
            return WindowSlots(window, None, (), None, ())
        resets = np.zeros((self.plan.size, 1), bool)
        resets[self.entries] = True
        slots = window.read(jnp.asarray(self.plan.cell_slots))
        values = tuple(leaf.at[slots].get(mode="promise_in_bounds") for leaf in self.values)
        history = tuple(buffer(leaf, leaf.shape, 5 + i) for i, leaf in enumerate(values))
        return WindowSlots(window, window.read(jnp.asarray(resets)), values, self.exits, history)


class WindowSlots(NamedTuple):
    """The slots that start or end in a window of M cells.

    Attributes:
      window: the window.
      resets: bool [M, 1], the cells at which a slot starts; None if rows are slots.
      values: the carry that the slot of each cell starts with, leaves [M, ...].
      exits: the cell, among all cells, at which each slot ends [B].
      history: buffers for the carry after each cell, leaves [M, ...].
    """

    window: Window
    resets: jax.Array | None
    values: Carry
    exits: np.ndarray | None
    history: Carry

    def reset(self, j: jax.Array | int, carry: Carry) -> Carry:
        """Returns the carry with which each row takes step j."""
        if self.resets is None:
            return carry
        rows = self.window.stair.rows
        here = read(self.resets, j * rows, rows)
        return tuple(jnp.where(here, read(v, j * rows, rows), c) for v, c in zip(self.values, carry, strict=True))

    def reset_all(self, before: jax.Array) -> jax.Array:
        """Does what `reset` does, for the first leaf of the carry before every cell of the window [M, ...]."""
        return before if self.resets is None else jnp.where(self.resets, self.values[0], before)

    def reset_linear(self, decay: jax.Array, inject: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the factors of c' = decay * c + inject with which c needs no reset."""
        if self.resets is None:
            return decay, inject
        injected = jnp.where(self.resets, decay * self.values[0] + inject, inject)
        return jnp.where(self.resets, 0, decay), injected

    def of_memory(self) -> WindowSlots:
        """Returns the same for the memory c alone."""
        return self._replace(values=self.values[1:], history=self.history[1:])

    def record(self, j: jax.Array | int, carry: Carry, history: Carry) -> Carry:
        """Returns the history with the carry after step j."""
        rows = self.window.stair.rows
        return tuple(write(past, leaf, j * rows) for past, leaf in zip(history, carry, strict=False))

    def collect(self, history: Carry, by_slot: Carry) -> Carry:
        """Returns the final carry of each slot [B, ...], with those of the slots that end in this window."""
        if self.exits is None:
            return by_slot
        window = self.window
        at = jnp.asarray(self.exits) - window.cell(0)
        here = (at >= window.skip * window.stair.rows) & (at < window.size)
        at = jnp.clip(at, 0, window.size - 1)
        return tuple(
            jnp.where(here[:, None], past.at[at].get(mode="promise_in_bounds"), leaf)
            for past, leaf in zip(history, by_slot, strict=True)
        )
