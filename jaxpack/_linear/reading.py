"""Reading: where the sequences of a packed batch begin and end for a recurrence that reads them in either direction."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpack._packed.gather import Indexed, cells_of, real_cells, slot_spans
from jaxpack._plans.bucket_plan import BucketPlan


class Reading(NamedTuple):
    """The cells of a batch as a recurrence meets them.

    Attributes:
      real: bool [S], the cells that hold a step.
      start: bool [S], the real cells at which the state is the initial one: where a sequence or an episode begins, or,
        read from the end, where it ends.
      last: int32 [B], the cell of each slot that is read last.
      empty: bool [B], the slots whose sequence has no step.
    """

    real: jax.Array
    start: jax.Array
    last: jax.Array
    empty: jax.Array

    @classmethod
    def of(cls, packed: Indexed, resets: jax.Array | None = None, reverse: bool = False) -> Reading:
        """Returns the reading of a batch.

        Args:
          packed: the batch.
          resets: bool [S], the first steps of episodes; None if each sequence is one.
          reverse: whether each episode is read from its end.
        """
        plan, spans = packed.plan, slot_spans(packed)
        real, steps, ends = real_cells(packed), jnp.asarray(plan.cell_steps), spans[plan.cell_slots]
        start = steps == (ends - 1 if reverse else 0)
        if resets is not None:
            start |= resets[_next_cells(plan)] if reverse else resets
        slots = jnp.arange(plan.num_sequences)
        last = cells_of(plan, slots, jnp.zeros_like(spans) if reverse else jnp.maximum(spans - 1, 0))
        return cls(real, start & real, last, spans == 0)

    @property
    def fresh(self) -> jax.Array:
        """bool [S]: the cells into which no state is passed, starts and slack."""
        return self.start | ~self.real


def _next_cells(plan: BucketPlan) -> np.ndarray:
    """Returns the cell of the next step of the same sequence; of the last step of a slot, that step itself."""
    steps = np.minimum(plan.cell_steps + 1, plan.room[plan.cell_slots] - 1)
    return plan.step_offsets[plan.slot_starts[plan.cell_slots] + steps] + plan.slot_rows[plan.cell_slots]
