"""Resets: the steps at which an episode begins, checked, and as a recurrence meets them that reads from the end."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpack._packed.describe import type_of
from jaxpack._packed.gather import Indexed, slot_spans
from jaxpack._packed.indices import same_sequences
from jaxpack._packed.inputs import as_batch
from jaxpack._packed.maps import by_cell, cells_of, spread, take
from jaxpack._packed.packed_sequence import PackedSequence, check_packed

NOT_DONES = (
    "A reset says that its step begins an episode. A done flag says that its step ends one: "
    "jaxpack.rollouts.resets_from_dones makes resets of done flags."
)


class Entering(NamedTuple):
    """The states with which sequences and episodes begin, each an array or a pytree of arrays [B, ...].

    Attributes:
      initial: with which sequences begin; None for zeros.
      fresh: to which resets return; None for the initial one.
    """

    initial: Any = None
    fresh: Any = None


class Resets(NamedTuple):
    """The resets of a packed batch.

    Attributes:
      cells: bool [S]; slack may hold anything.
      agree: bool [B], the slots whose sequences have the same length in the inputs; None if all do.
    """

    cells: jax.Array
    agree: jax.Array | None = None


def check_resets(resets: Any, lead: tuple[Any, ...]) -> None:
    """Validates the dtype and the rank of resets.

    Args:
      resets: an array or a pytree of arrays; None for none.
      lead: the axes that one bool a step has.

    Raises:
      TypeError: if they are not one bool a step.
    """
    if resets is None:
        return
    dtype, shape = getattr(resets, "dtype", None), getattr(resets, "shape", ())
    is_bool = dtype is not None and jnp.issubdtype(dtype, jnp.bool_)
    if not is_bool or len(shape) != len(lead):
        found = type_of(resets) if dtype is None else f"dtype {dtype} and shape {list(shape)}"
        raise TypeError(
            f"resets must be one bool a step, laid out as the inputs [{', '.join(map(str, lead))}], got {found}. "
            f"{NOT_DONES}"
        )


def check_fresh(fresh_state: Any, resets: Any) -> None:
    """Raises ValueError if there is a state to which resets return, but no resets."""
    if fresh_state is not None and resets is None:
        raise ValueError("fresh_state is the state with which resets begin an episode. Pass resets= too, or neither.")


def packed_resets(function: str, packed: PackedSequence, resets: Any) -> Resets | None:
    """Validates the resets of packed inputs.

    Args:
      function: the name of the function in errors.
      packed: the inputs.
      resets: as a user passed them; None for none.

    Raises:
      TypeError: if they are not packed, or not one bool a step.
      ValueError: if they are not of the same sequences.
    """
    if resets is None:
        return None
    if not isinstance(resets, PackedSequence):
        raise TypeError(
            f"{function}: inputs are packed, so resets must be packed too, got {type(resets).__name__}: pack them "
            f"under plan=inputs.plan, or write inputs.replace(data=resets)."
        )
    resets = check_packed(resets, function)
    agree = same_sequences(packed, resets, function, ("inputs have", "resets have"))
    check_resets(resets.data, (packed.plan.size,))
    return Resets(resets.data, agree)


def padded_resets(function: str, resets: Any, lead: tuple[Any, ...]) -> jax.Array | None:
    """Validates the resets of padded inputs, whose axes of batch and time are `lead`.

    Raises:
      TypeError: if they are packed, or not one bool a step.
      ValueError: if their shape is another.
    """
    if resets is None:
        return None
    if isinstance(resets, PackedSequence):
        raise TypeError(f"{function}: resets are packed, but the inputs are not. Pack both, or neither.")
    resets = as_batch(resets, "resets")
    check_resets(resets, lead)
    if resets.shape != lead:
        raise ValueError(
            f"{function}: resets must have a value for each step of the inputs, shape {list(lead)}, got "
            f"{list(resets.shape)}."
        )
    return jnp.asarray(resets)


def packed_beside(both: PackedSequence) -> tuple[PackedSequence, Resets | None]:
    """Splits a batch that was packed as a pair of inputs and resets; None for the resets if there are none."""
    data, cells = both.data
    return both.replace(data=data), None if cells is None else Resets(cells)


def reversed_resets(packed: Indexed, cells: jax.Array) -> jax.Array:
    """Returns the cells at which a recurrence over reversed sequences begins an episode: at its last step.

    Args:
      packed: the batch.
      cells: bool [S], the first steps of episodes.

    Returns:
      bool [S] in the order of the reversed sequences, False in slack.
    """
    plan = packed.plan
    slots, steps = by_cell(plan)
    spans = spread(plan, slot_spans(packed))
    # Of length L, step s comes from step L - 1 - s. It ends an episode if step L - s begins one.
    inner = (steps > 0) & (steps < spans)
    return take(cells, cells_of(plan, slots, jnp.where(inner, spans - steps, 0))) & inner
