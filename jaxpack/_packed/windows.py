"""Windows over the steps of each sequence: how many there are, the batch that has one a step, and the steps in them.

Window t of a sequence covers its steps t * stride - before + j * dilation, for j below the size. Steps before the first
and after the last are outside. The number of windows follows from a sequence's length, so lengths stay dynamic; the
room of each slot changes in the same way, so the new plan is static.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpack._checks import as_int, at_least_one
from jaxpack._packed.broadcast import expand
from jaxpack._packed.gather import Cells, Indexed, real_cells, rearrange, slot_lengths
from jaxpack._packed.maps import by_cell, cells_of, room_of_slots, spread
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._packed.slack import checked_slot_fits
from jaxpack._plans.bucket_plan import INDEX_MAX, BucketPlan
from jaxpack._plans.resized import resized
from jaxpack._types import PyTree

Padding = str | tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Windows:
    """Where the windows of a sequence are.

    Attributes:
      size: the number K of steps in a window.
      stride: the number of steps between windows.
      dilation: the number of steps between the steps of a window.
      padding: the steps by which windows may reach beyond both ends; None for as many as ceil(length / stride) windows
        need, half of them before the first step (jax.lax's "SAME").
      ceil: whether a last window may be incomplete.
    """

    size: int
    stride: int
    dilation: int = 1
    padding: tuple[int, int] | None = (0, 0)
    ceil: bool = False

    def __post_init__(self) -> None:
        # No plan has more steps, so a larger stride, which int32 cannot hold, gives the same windows.
        object.__setattr__(self, "stride", min(self.stride, INDEX_MAX))

    @property
    def span(self) -> int:
        """The number of steps from the first to the last of a window, both included."""
        return (self.size - 1) * self.dilation + 1

    def count(self, lengths: Any) -> Any:
        """Returns the number of windows of sequences of these lengths; 0 for length 0. NumPy in, NumPy out."""
        xp = jnp if isinstance(lengths, jax.Array) else np
        if self.padding is None:
            return -(-lengths // self.stride)
        before, after = self.padding
        reach = lengths + (before + after - self.span)
        if self.ceil:  # windows that start at or past the end would be empty
            starting = -(-(lengths + before) // self.stride)
            number = xp.clip(-(-reach // self.stride) + 1, 1, starting)
        else:
            number = reach // self.stride + 1
        return xp.where(lengths > 0, xp.maximum(number, 0), 0)

    def before(self, lengths: jax.Array) -> jax.Array:
        """Returns the number of steps by which the first window begins before a sequence: int32, as the lengths."""
        if self.padding is not None:
            return jnp.full_like(lengths, self.padding[0])
        needed = (self.count(lengths) - 1) * self.stride + self.span - lengths
        return jnp.maximum(needed, 0) // 2


class Tap(NamedTuple):
    """One entry of each window.

    Attributes:
      source: int32 [S'], the old cell that each new cell's window has there; S or more for none.
      target: int32 [S], the inverse; S' for none.
      real: bool [S'], whether that cell is a step of the sequence.
    """

    source: jax.Array
    target: jax.Array
    real: jax.Array


class View(NamedTuple):
    """A batch seen through windows.

    Attributes:
      packed: the batch that has a step for each window, without data.
      taps: for each entry of a window where it comes from.
    """

    packed: PackedSequence
    taps: list[Tap]


def view(packed: Indexed, windows: Windows) -> View:
    """Returns the batch of windows over a batch, and where their entries come from.

    Sequences that do not fit get the length -1, because their number of windows may fit: what is made of them is NaN.
    """
    plan = packed.plan
    new, order, ranks = with_counts(packed, windows.count(slot_lengths(packed)), _window_plan(plan, windows))
    lengths = slot_lengths(packed)
    before = windows.before(lengths)
    old_slots, steps = (spread(new.plan, order), by_cell(new.plan).steps)
    firsts, ends, room = (leaf[old_slots] for leaf in (before, lengths, room_of_slots(plan)))
    firsts = steps * windows.stride - firsts
    slots, old_steps = by_cell(plan)
    new_slots, shifts, new_room = spread(plan, ranks), before[slots], room_of_slots(new.plan)

    def tap(offset: int) -> Tap:
        at = firsts + offset
        inside = (at >= 0) & (at < room)
        source = jnp.where(inside, cells_of(plan, old_slots, jnp.where(inside, at, 0)), plan.size)
        back = old_steps + shifts - offset
        to = back // windows.stride
        hit = (back >= 0) & (back % windows.stride == 0) & (to < new_room[new_slots])
        target = jnp.where(hit, cells_of(new.plan, new_slots, jnp.where(hit, to, 0)), new.plan.size)
        return Tap(source, target, inside & (at < ends))

    return View(new, [tap(j * windows.dilation) for j in range(windows.size)])


@functools.lru_cache(maxsize=256)
def _window_plan(plan: BucketPlan, windows: Windows) -> BucketPlan:
    """Returns the plan of the windows over the sequences of a plan."""
    return resized(plan, windows.count)


def with_counts(packed: Indexed, counts: jax.Array, plan: BucketPlan) -> tuple[PackedSequence, jax.Array, jax.Array]:
    """Returns the batch of the same sequences with other lengths, without data, as if it had been packed anew.

    Sequences whose lengths become equal are in the caller's order, as everywhere. So they may change slots.

    Args:
      packed: a batch.
      counts: int32 [B], the new length of the sequence in each slot; it does not decrease as the old one grows.
      plan: the new plan.

    Returns:
      The batch; for each new slot the old slot of its sequence, int32 [B]; and for each old slot the new one.
    """
    rows, slots = jnp.asarray(packed.sorted_indices), jnp.asarray(packed.unsorted_indices)
    lengths = jnp.where(checked_slot_fits(packed), counts, -1).astype(jnp.int32)[slots]
    new_rows = jnp.argsort(~lengths, stable=True).astype(jnp.int32)
    new_slots = jnp.argsort(new_rows).astype(jnp.int32)
    return PackedSequence(None, lengths, new_rows, new_slots, plan), slots[new_rows], new_slots[rows]


def real_data(packed: Cells) -> PyTree:
    """Returns the data with zeros in slack."""
    mask = real_cells(packed)
    return jax.tree.map(lambda leaf: jnp.where(expand(mask, leaf), leaf, jnp.zeros_like(leaf)), packed.data)


def entries(seen: View, leaf: jax.Array) -> list[jax.Array]:
    """Returns the entries of all windows, [S', ...] for each place in a window; zero outside of sequences."""
    return [rearrange(leaf, tap.source, tap.target) for tap in seen.taps]


def checked_batch(packed: PackedSequence) -> PackedSequence:
    """Marks a batch that was made from a checked one, whose index leaves therefore need no check."""
    object.__setattr__(packed, "_checked", True)
    return packed


def as_padding(padding: str | Sequence[int], most: int | None = None) -> tuple[int, int] | None:
    """Validates "VALID", "SAME" (in any case) or a pair of ints, and returns what `Windows` takes.

    Args:
      padding: the argument of a user.
      most: the most steps that each end may have; None for any number.

    Raises:
      TypeError: if it is neither a string nor a pair of ints.
      ValueError: if it is another string, or a number is negative or above the most.
    """
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "VALID"):
            raise ValueError(f'padding must be "VALID", "SAME" or a pair of ints (before, after), got {padding!r}.')
        return None if padding.upper() == "SAME" else (0, 0)
    if not isinstance(padding, (tuple, list)) or len(padding) != 2:
        raise TypeError(f'padding must be "VALID", "SAME" or a pair of ints (before, after), got {padding!r}.')
    before, after = (as_int("an entry of padding", value) for value in padding)
    if min(before, after) < 0:
        raise ValueError(f"padding must not be negative, got {(before, after)}.")
    if most is not None and max(before, after) > most:
        raise ValueError(
            f"padding must be below the size of a window, which is {most + 1}, got {(before, after)}: a window outside "
            f"of a sequence has no value."
        )
    return before, after


def as_windows(
    size: object, stride: object = None, padding: str | Sequence[int] = "VALID", ceil_mode: object = False
) -> Windows:
    """Validates the arguments of functions that pool. The stride is the size by default."""
    size = at_least_one("size", size)
    stride = size if stride is None else at_least_one("stride", stride)
    if not isinstance(ceil_mode, bool):
        raise TypeError(f"ceil_mode must be a bool, got {ceil_mode!r}.")
    return Windows(size, stride, padding=as_padding(padding, size - 1), ceil=ceil_mode)
