"""Aligned inputs: arrays with a value for each step, packed or padded alike, that one function is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxpack._layers.states import shapes_of
from jaxpack._packed.indices import same_sequences
from jaxpack._packed.inputs import as_batch, batch_shape, lengths_and_plan, padded_plan
from jaxpack._packed.layout import lay_out, pad
from jaxpack._packed.masks import ValidSteps, checked_mask, lengths_of, refuse_beside_mask
from jaxpack._packed.packed_sequence import PackedSequence, check_packed
from jaxpack._packed.resets import padded_resets
from jaxpack._packed.slack import zero_slack
from jaxpack._plans.bucket_plan import BucketPlan

Lengths = ArrayLike | Sequence[int] | None


class Aligned(NamedTuple):
    """Inputs and the arrays beside them, as cells of one plan.

    Attributes:
      packed: the inputs.
      others: the data [S, ...] of the other arrays, by name; None for those that were not given.
      agree: bool [B], the slots whose sequences have the same length in all arrays; None if all do.
      length: the number of steps T of the padded batch that was given; None for packed inputs.
      steps: where the valid steps of this batch are, if a mask was given; None if they come first in their rows.
    """

    packed: PackedSequence
    others: dict[str, Any]
    agree: jax.Array | None
    length: int | None
    steps: ValidSteps | None = None

    @property
    def as_cells(self) -> Aligned:
        """The same without what the caller's layout was: all that a recurrence sees."""
        return self._replace(length=None, steps=None)

    def laid_out(self, outputs: PackedSequence) -> PackedSequence | jax.Array:
        """Returns outputs in the layout of the inputs: packed, or padded [B, T, ...]."""
        if self.length is None:
            return outputs
        padded = pad(outputs, 0, self.length)
        return padded if self.steps is None else _scatter_back(self.steps, padded)


def align(
    function: str,
    inputs: Any,
    others: Mapping[str, Any],
    lengths: Lengths = None,
    plan: BucketPlan | None = None,
    mask: ArrayLike | None = None,
) -> Aligned:
    """Validates inputs and the arrays beside them.

    Args:
      function: the name of the function in errors.
      inputs: packed data [S, ...], or padded [B, T, ...].
      others: arrays with a value for each step, laid out as the inputs, by the name of the argument; or None. Those
        under "resets" move with a mask as resets do.
      lengths, plan, mask: for padded inputs, as in the layers' `apply`.

    Raises:
      TypeError: if inputs are packed and an array beside them is not, or lengths, plan or mask are given too; or both
        lengths and mask are given.
      ValueError: if the arrays are not of the same sequences, or as in `pack_padded_sequence`.
    """
    if mask is not None:
        refuse_beside_mask(inputs, lengths)
    if isinstance(inputs, PackedSequence):
        if lengths is not None or plan is not None:
            raise TypeError("inputs are packed, and carry their lengths and plan: do not give lengths= or plan=.")
        return _align_packed(function, inputs, others)
    for name, other in others.items():
        if isinstance(other, PackedSequence):
            raise TypeError(f"{function}: {name} is packed, but the inputs are not. Pack both, or neither.")
    batch = _one_array(function, as_batch(inputs, "inputs"), 2, "[B, T, ...]")
    arrays = {name: None if other is None else as_batch(other, name) for name, other in others.items()}
    for name, array in arrays.items():
        if array is not None and jnp.shape(array)[:2] != batch.shape[:2]:
            raise ValueError(
                f"{function}: {name} must have a value for each step of the inputs, [B, T] = {batch.shape[:2]}, got "
                f"{shapes_of(array)}."
            )
    batch_size, max_length = batch_shape(batch, "inputs")
    steps = None
    if mask is not None:
        mask = checked_mask(function, mask, batch.shape[:2])
        resets = padded_resets(function, arrays.pop("resets", None), batch.shape[:2])
        lengths, (steps, batch, arrays, resets) = lengths_of(mask), _valid_first(mask, batch, arrays, resets)
        arrays |= {"resets": resets} if "resets" in others else {}
    given = [each for each in arrays.values() if each is not None]
    lengths = np.full(batch_size, max_length) if lengths is None else lengths
    plan = padded_plan(batch_size, max_length) if plan is None else plan
    packed = lay_out((batch, *given), *lengths_and_plan(lengths, plan, batch_size, max_length))
    data = iter(packed.data[1:])
    cells = {name: None if array is None else next(data) for name, array in arrays.items()}
    return Aligned(packed.replace(data=packed.data[0]), cells, None, max_length, steps)


@jax.jit
def _valid_first(
    mask: jax.Array, batch: jax.Array, others: dict[str, Any], resets: jax.Array | None
) -> tuple[ValidSteps, jax.Array, dict[str, Any], jax.Array | None]:
    """Returns where the valid steps of a mask are, and the arrays with these steps first in their rows."""
    steps = ValidSteps.of(mask)
    return steps, *steps.compact((batch, others)), None if resets is None else steps.compact_resets(resets)


_scatter_back = jax.jit(ValidSteps.scatter_back)


def _align_packed(function: str, inputs: PackedSequence, others: Mapping[str, Any]) -> Aligned:
    packed, agree = check_packed(inputs, function), None
    _one_array(function, packed.data, 1, "[S, ...]")
    cells: dict[str, Any] = {}
    for name, other in others.items():
        if other is not None and not isinstance(other, PackedSequence):
            raise TypeError(
                f"{function}: inputs are packed, so {name} must be packed too, got {type(other).__name__}: pack it "
                f"under plan=inputs.plan, or write inputs.replace(data={name})."
            )
        if other is not None:
            other = check_packed(other, function)
            agree = same_sequences(packed, other, function, ("inputs have", f"{name} has"), agree)
            other = _one_array(function, other.data, 1, "[S, ...]", name)
        cells[name] = other
    return Aligned(packed, cells, agree, None)


def _one_array(function: str, data: Any, rank: int, form: str, name: str = "inputs") -> jax.Array:
    """Returns data that is one array of at least this rank. Raises ValueError if it is not."""
    if not hasattr(data, "ndim") or data.ndim < rank:
        raise ValueError(
            f"{function}: {name} must be one array {form}, got {shapes_of(data)}. Pass a list of sequences through "
            f"jaxpack.pack_sequence."
        )
    return data


def clean(packed: PackedSequence, agree: jax.Array | None, dtype: Any) -> PackedSequence:
    """Returns a batch in another dtype: zero in slack, and NaN in sequences that do not fit.

    What is computed from such data step by step is NaN for these sequences, and so are all gradients they take part in.
    """
    return packed.replace(data=zero_slack(packed.replace(data=None), packed.data.astype(dtype), agree))
