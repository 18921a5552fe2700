"""What both passes of the fast recurrence share: their operands and results, what is kept, and how loops run.

In mixed precision inputs have a narrower dtype than weights and carry. Products then take their factors in the dtype of
the inputs; everything else (gates, carry, outputs, cotangents, sums of weight gradients) is in the dtype of the carry.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpack._cells.cell import Carry, Cell, Fused
from jaxpack._recurrence.buffers import StepLoop, buffer
from jaxpack._recurrence.slots import RealCells
from jaxpack._recurrence.windows import Stair
from jaxpack._types import PyTree


class Operands(NamedTuple):
    """The arrays of one direction that a recurrence is differentiated by; the cotangents of them have the same form.

    Attributes:
      weights: the fused weights.
      x: [S, F], the inputs; slack may hold anything.
      carry: the initial carry of each slot, leaves [B, ...]; [B, 1] for one by which nothing is differentiated.
      fresh: the carry of each slot to which a reset returns, leaves [B, ...]; () for the initial one.
    """

    weights: Fused
    x: jax.Array
    carry: Carry
    fresh: Carry = ()


class Results(NamedTuple):
    """The results of one direction.

    Attributes:
      y: [S, P], h after each cell's step, zero in slack; () unless it is asked for.
      carry: the carry after the last step of each slot, leaves [B, ...].
      memory: the memory c after each cell's step, leaves [S, H], zero in slack; () unless it is asked for.
    """

    y: Any
    carry: Carry
    memory: Carry = ()


class Kept(NamedTuple):
    """The arrays that the forward pass keeps for the backward pass, beside its operands and outputs.

    Attributes:
      activations: of each cell, leaves [S, ...]; () to compute them again.
      checkpoints: the memory c at the start of each chunk, leaves [checkpoint_rows, H].
    """

    activations: PyTree = ()
    checkpoints: Carry = ()


class Residuals(NamedTuple):
    """The arrays of one direction that the backward pass needs.

    Attributes:
      operands: the operands of the forward pass.
      y: [S, P], its outputs.
      kept: what it kept.
    """

    operands: Operands
    y: jax.Array
    kept: Kept


class Loops(NamedTuple):
    """How one program goes over its cells: all that is not an array of one direction.

    Attributes:
      cell: the cell, as its platform runs it.
      stairs: the loops, one after the other.
      steps: how the steps of a chunk run.
      wide: whether the platform wants few and large operations, and need not keep a chunk in cache.
      real: the real cells, as the direction sees them.
      all_states: whether results have the memory after each step.
      final_only: whether results have no h after each step.
      zoneout: the rate of zoneout of each part of the carry; () for none.
    """

    cell: Cell
    stairs: tuple[Stair, ...]
    steps: StepLoop
    wide: bool
    real: RealCells
    all_states: bool
    final_only: bool
    zoneout: tuple[float, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """The widths of the carry."""
        return tuple(jax.tree.leaves(self.cell.state_sizes))

    @property
    def size(self) -> int:
        """The number of cells."""
        return self.stairs[-1].end

    def start(self, carry: Carry) -> Carry:
        """Returns the carry of each row at the start, from that of each slot."""
        if self.real.borders is None:
            return carry
        return tuple(buffer(leaf, (self.stairs[0].rows, *leaf.shape[1:]), 0) for leaf in carry)

    def where_real(self, carry: Carry, empty: Carry) -> Carry:
        """Returns the carry of each slot, or another one for empty slots."""
        real = (self.real.spans > 0)[:, None]
        return tuple(jnp.where(real, leaf, other) for leaf, other in zip(carry, empty, strict=True))


def factors(weights: Fused, dtype: Any) -> Fused:
    """Returns weights whose matrices have the dtype of products. The bias, which is added, keeps its own."""
    return jax.tree.map(lambda w: w.astype(dtype) if w.ndim > 1 else w, weights)


def widened(cell: Cell, carry: Carry) -> Carry:
    """Returns a carry whose leaves [B, 1] are made [B, ...]."""
    sizes = jax.tree.leaves(cell.state_sizes)
    return tuple(jnp.broadcast_to(leaf, (len(leaf), size)) for leaf, size in zip(carry, sizes, strict=True))
