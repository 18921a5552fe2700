"""Reading: where the sequences of a packed batch begin and end for a recurrence that reads them in either direction."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._packed.gather import Indexed, slot_spans
from jaxpack._packed.maps import by_cell, cells_of, room_of_slots, spread, take
from jaxpack._plans.bucket_plan import BucketPlan


class Reading(NamedTuple):
    """The cells of a batch as a recurrence meets them.

    Attributes:
      real: bool [S], the cells that hold a step.
      start: bool [S], the real cells at which a state enters: where a sequence or an episode begins, or, read from the
        end, where it ends.
      resets: bool [S], the real cells at which an episode begins, in the same sense; None if each sequence is one.
      last: int32 [B], the cell of each slot that is read last.
      empty: bool [B], the slots whose sequence has no step.
    """

    real: jax.Array
    start: jax.Array
    resets: jax.Array | None
    last: jax.Array
    empty: jax.Array

    @classmethod
    def of(cls, packed: Indexed, resets: jax.Array | None = None, reverse: bool = False) -> Reading:
        """Returns the reading of a batch.

        Args:
          packed: the batch.
          resets: bool [S], the first steps of episodes, arbitrary in slack; None if each sequence is one.
          reverse: whether each episode is read from its end.
        """
        plan, spans = packed.plan, slot_spans(packed)
        slots, steps = by_cell(plan)
        ends = take(spans, slots)
        real = steps < ends
        start = steps == (ends - 1 if reverse else 0)
        if resets is not None:
            resets = real & (take(resets, _next_cells(plan)) & (steps < ends - 1) if reverse else resets)
            start |= resets
        every = lax.iota(jnp.int32, plan.num_sequences)
        last = cells_of(plan, every, jnp.zeros_like(spans) if reverse else jnp.maximum(spans - 1, 0))
        return cls(real, start & real, resets, last, spans == 0)

    @property
    def cut(self) -> jax.Array:
        """bool [S]: the cells into which no state is passed, starts and slack."""
        return self.start | ~self.real


def _next_cells(plan: BucketPlan) -> jax.Array:
    """Returns the cell of the next step of the same sequence; of the last step of a slot, that step itself."""
    slots, steps = by_cell(plan)
    return cells_of(plan, slots, jnp.minimum(steps + 1, spread(plan, room_of_slots(plan)) - 1))
