"""Masks of valid steps: padded batches with the valid steps of each row first, and back to where they were.

Padding may be anywhere: at the end of a row, at its start, or between valid steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxpack._packed.describe import type_of
from jaxpack._packed.gather import rearrange
from jaxpack._packed.indices import values_of
from jaxpack._packed.inputs import as_batch, batch_shape, padded_batch
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._packed.resets import padded_resets
from jaxpack._types import PyTree


class ValidSteps(NamedTuple):
    """Where the valid steps of a padded batch [B, T] are, and where they go.

    Attributes:
      mask: bool [B, T], True at valid steps.
      sources: int32 [B * T], the place in the batch of each step of the compacted one; B * T past a row's valid steps.
      targets: int32 [B * T], the inverse: the place in the compacted batch of each step; B * T for masked steps.
    """

    mask: jax.Array
    sources: jax.Array
    targets: jax.Array

    @classmethod
    def of(cls, mask: jax.Array) -> ValidSteps:
        """Returns the valid steps of a mask [B, T]."""
        rows, steps = (lax.broadcasted_iota(jnp.int32, mask.shape, axis) for axis in (0, 1))
        starts, nowhere = rows * mask.shape[1], mask.size
        kept_first = jnp.argsort(~mask, axis=1, stable=True).astype(jnp.int32)
        taken = steps < mask.sum(1, dtype=jnp.int32, keepdims=True)
        sources = jnp.where(taken, starts + kept_first, nowhere)
        targets = jnp.where(mask, starts + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, nowhere)
        return cls(mask, sources.reshape(-1), targets.reshape(-1))

    def compact(self, batch: PyTree) -> PyTree:
        """Moves the valid steps of [B, T, ...] to the start of their rows, with zeros after them."""
        return jax.tree.map(lambda leaf: self._moved(leaf, self.sources, self.targets), batch)

    def compact_resets(self, resets: jax.Array) -> jax.Array:
        """Moves resets [B, T] as `compact` does. One at a masked step moves to the next valid step of its row."""
        until = self.compact(jnp.cumsum(resets, axis=1, dtype=jnp.int32))  # the resets up to each valid step
        before = jnp.concatenate([jnp.zeros_like(until[:, :1]), until[:, :-1]], axis=1)
        return until > before

    def scatter_back(self, outputs: PyTree) -> PyTree:
        """Moves the steps of a compacted batch to where they were, with zeros at masked steps."""
        return jax.tree.map(lambda leaf: self._moved(leaf, self.targets, self.sources), outputs)

    def _moved(self, leaf: jax.Array, sources: jax.Array, targets: jax.Array) -> jax.Array:
        flat = leaf.reshape(self.mask.size, *leaf.shape[2:])
        return rearrange(flat, sources, targets).reshape(leaf.shape)


def compact(batch: PyTree, mask: ArrayLike) -> tuple[PyTree, jax.Array]:
    """Moves the valid steps of each row to its start, in order, and counts them.

    This is how a mask becomes lengths: `pack_padded_sequence(*compact(x, mask), batch_first=True, plan=plan)`.

    Examples:
      >>> batch, lengths = jaxpack.compact([[9, 1, 2], [3, 9, 4]], [[False, True, True], [True, False, True]])
      >>> batch.tolist(), lengths.tolist()
      ([[1, 2, 0], [3, 4, 0]], [2, 2])

    Args:
      batch: [B, T, *F], or a pytree of such arrays. Values at masked steps, NaN included, are dropped.
      mask: bool [B, T], True at valid steps. It may be traced. A row may have none: an empty sequence.

    Returns:
      The batch with valid steps first, zeros after them; and the number of valid steps of each row, int32 [B].

    Raises:
      ValueError: if the mask is not [B, T].
      TypeError: if the mask is not bool.
    """
    batch, *lead = padded_batch(batch, True, "batch")
    mask = checked_mask("compact", mask, tuple(lead))
    steps = _valid_steps(mask)
    return _compact(steps, batch), jnp.asarray(lengths_of(mask))


def scatter_back(outputs: PyTree, mask: ArrayLike) -> PyTree:
    """Moves the first steps of each row to the valid steps of a mask: the inverse of `compact`, and its transpose.

    Examples:
      >>> jaxpack.scatter_back([[1, 2, 0], [3, 4, 0]], [[False, True, True], [True, False, True]]).tolist()
      [[0, 1, 2], [3, 0, 4]]

    Args:
      outputs: [B, T, *F], or a pytree of such arrays. Values past a row's number of valid steps are dropped.
      mask: bool [B, T], True at valid steps, as `compact` was given it.

    Returns:
      [B, T, *F], zeros at masked steps.

    Raises:
      ValueError: if the mask is not [B, T].
      TypeError: if the mask is not bool.
    """
    outputs, *lead = padded_batch(outputs, True, "outputs")
    return _scatter_back(_valid_steps(checked_mask("scatter_back", mask, tuple(lead))), outputs)


_valid_steps = jax.jit(ValidSteps.of)
_compact = jax.jit(ValidSteps.compact)
_compact_resets = jax.jit(ValidSteps.compact_resets)
_scatter_back = jax.jit(ValidSteps.scatter_back)


def checked_mask(function: str, mask: Any, lead: tuple[Any, ...]) -> jax.Array:
    """Validates a mask for inputs whose axes of batch and time are `lead`.

    Raises:
      TypeError: if it is not one array of bools.
      ValueError: if its shape is another.
    """
    mask = as_batch(mask, "mask")
    dtype = getattr(mask, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.bool_):
        found = type_of(mask) if dtype is None else f"dtype {dtype}"
        raise TypeError(f"{function}: mask must be one bool a step, True at valid steps, got {found}. Write mask != 0.")
    if mask.shape != lead:
        raise ValueError(
            f"{function}: mask must have a value for each step of the inputs, shape {list(lead)}, got "
            f"{list(mask.shape)}."
        )
    return jnp.asarray(mask)


def refuse_beside_mask(inputs: Any, lengths: Any, name: str = "lengths") -> None:
    """Raises TypeError if a mask is given beside packed inputs, or beside lengths, whose argument has this name."""
    if isinstance(inputs, PackedSequence):
        raise TypeError(
            "inputs are packed, and hold valid steps alone: do not give mask=. To pack by a mask: "
            "jaxpack.pack_padded_sequence(*jaxpack.compact(x, mask), batch_first=True, plan=plan)."
        )
    if lengths is not None:
        raise TypeError(
            f"mask= takes the place of {name}=: give one of them. To use both, mask what is past a length: "
            f"mask & (jnp.arange(T) < lengths[:, None])."
        )


def lengths_of(mask: jax.Array) -> np.ndarray | jax.Array:
    """Returns the number of valid steps of each row: int32 [B]; in NumPy if the mask is known, for checks."""
    values = values_of(mask)
    return jnp.sum(mask, axis=1, dtype=jnp.int32) if values is None else values[0].sum(axis=1, dtype=np.int32)


def run_on_valid_steps(
    function: str,
    run: Callable[..., tuple[Any, ...]],
    inputs: Any,
    mask: ArrayLike,
    lengths: ArrayLike | Sequence[int] | None,
    resets: Any,
    feature_axes: int = 1,
    by_step: bool = True,
) -> tuple[Any, ...]:
    """Runs a layer on the valid steps of padded inputs, and puts what it returns for each step back in place.

    Args:
      function: the name of the function in errors.
      run: run(inputs, lengths=, resets=) -> (outputs, final state, *states after each step).
      inputs: [B, T, F], or one sequence [T, F]; or a pytree of arrays, of which the first has these axes.
      mask: bool [B, T], or [T].
      lengths: as a user passed them: None, or this raises.
      resets: as a user passed them, [B, T], [T] or None.
      feature_axes: the number of axes of one step of the inputs.
      by_step: whether outputs are those of each step; otherwise nothing is put back.

    Raises:
      TypeError, ValueError: as `refuse_beside_mask`, `checked_mask` and `padded_resets` do.
    """
    refuse_beside_mask(inputs, lengths)
    batch = as_batch(inputs, "inputs")
    shape = jnp.shape(jax.tree.leaves(batch)[0])
    lead = shape[: len(shape) - feature_axes]
    if len(lead) not in (1, 2):
        return run(inputs, resets=resets)  # raises: these are no inputs of a layer
    valid = checked_mask(function, mask, lead)
    begins = padded_resets(function, resets, lead)
    alone = len(lead) == 1
    batch, valid, begins = jax.tree.map(lambda leaf: leaf[None] if alone else leaf, (batch, valid, begins))
    batch_shape(batch, "inputs")
    steps = _valid_steps(valid)
    given = _compact(steps, batch), lengths_of(valid), None if begins is None else _compact_resets(steps, begins)
    x, counts, begins = jax.tree.map(lambda leaf: leaf[0] if alone else leaf, given)
    outputs, final, *after = run(x, lengths=counts, resets=begins)
    if not by_step:
        return outputs, final

    def put_back(tree: PyTree) -> PyTree:
        if not alone:
            return _scatter_back(steps, tree)
        one = _scatter_back(steps, jax.tree.map(lambda leaf: leaf[None], tree))
        return jax.tree.map(lambda leaf: leaf[0], one)

    return put_back(outputs), final, *map(put_back, after)
