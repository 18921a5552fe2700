"""HostLayout: packing in NumPy from concrete lengths, which compiles and runs no program."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._plans.bucket_plan import BucketPlan, longest_first
from jaxpack._types import PyTree


@dataclasses.dataclass(frozen=True)
class HostLayout:
    """The cells of a batch under a plan, computed in NumPy; `layout.lay_out` does the same in a program.

    Attributes:
      plan: the static shape.
      lengths, sorted_indices, unsorted_indices: as in PackedSequence.
      cells: int [sum(lengths)], the cell of each step, sequence by sequence.
    """

    plan: BucketPlan
    lengths: np.ndarray
    sorted_indices: np.ndarray
    unsorted_indices: np.ndarray
    cells: np.ndarray

    @classmethod
    def of(cls, lengths: npt.ArrayLike, plan: BucketPlan) -> HostLayout:
        """Computes the layout of lengths that fit the plan, [N]; if N < B, lengths of 0 follow."""
        given = np.asarray(lengths, np.int32)
        lengths = np.zeros(plan.num_sequences, np.int32)
        lengths[: len(given)] = given
        order = longest_first(lengths).astype(np.int32)
        slots = np.empty_like(order)
        slots[order] = np.arange(len(order), dtype=np.int32)
        ends = np.cumsum(lengths)
        steps = np.arange(lengths.sum()) + np.repeat(plan.slot_starts[slots] - (ends - lengths), lengths)
        cells = plan.step_offsets[steps] + np.repeat(plan.slot_rows[slots], lengths)
        return cls(plan, lengths, order, slots, cells)

    def spread(self, steps: np.ndarray) -> np.ndarray:
        """Returns data [plan.size, *F] from the steps of all sequences, one after the other; zeros in slack."""
        data = np.zeros((self.plan.size, *steps.shape[1:]), steps.dtype)
        data[self.cells] = steps
        return data

    def packed(self, data: PyTree) -> PackedSequence:
        """Returns a PackedSequence with this data."""
        return PackedSequence(data, self.lengths, self.sorted_indices, self.unsorted_indices, self.plan)  # type: ignore[arg-type]
