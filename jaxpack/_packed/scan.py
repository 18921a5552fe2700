"""packed_scan: a masked lax.scan over the buckets of a plan, for any step function.

Within a bucket the number of rows is constant, so a bucket is one lax.scan; from bucket to bucket the batch shrinks. A
row keeps its carry after its sequence has ended, so at the end of a slot the carry is the one after the sequence's last
step. If slots share a row, the carry is reset where a slot begins and collected where it ends. Resets within a slot do
the same as its beginning.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._packed.broadcast import mask_like, tree_where, vary_like
from jaxpack._packed.gather import real_cells
from jaxpack._packed.maps import by_cell, room_of_slots, take
from jaxpack._packed.packed_sequence import PackedSequence, check_packed
from jaxpack._packed.resets import Resets, packed_resets
from jaxpack._packed.slack import fill_slack, in_caller_order, stand_in_slots, zero_slack
from jaxpack._plans.bucket_plan import Bucket, BucketPlan
from jaxpack._types import PyTree

Step = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
# scan(body, carry, xs) runs lax.scan over functools.partial(body, step) with the step that it holds: a function, or the
# call of a Flax module, which Flax's own scan must lift into the loop.
Body = Callable[[Step, PyTree, PyTree], tuple[PyTree, PyTree]]
Scan = Callable[[Body, PyTree, PyTree], tuple[PyTree, PyTree]]


def packed_scan(
    step: Callable[..., tuple[PyTree, PyTree]],
    carry: PyTree,
    packed: PackedSequence,
    *,
    resets: PackedSequence | None = None,
    pass_mask: bool = False,
) -> tuple[PyTree, PackedSequence]:
    """Runs a recurrence over the steps of each sequence.

    Examples:
      A running sum; inside jit, one program for every batch that fits the plan:

      >>> packed = jaxpack.pack_sequence([[1, 2, 3], [4]])
      >>> total, sums = jaxpack.packed_scan(lambda s, x: (s + x, s + x), jnp.zeros(2, int), packed)
      >>> total.tolist(), [each.tolist() for each in jaxpack.unpack_sequence(sums)]
      ([6, 4], [[1, 3, 6], [4]])

      A reset begins anew:

      >>> resets = packed.replace(data=packed.data == 2)
      >>> total, sums = jaxpack.packed_scan(lambda s, x: (s + x, s + x), jnp.zeros(2, int), packed, resets=resets)
      >>> total.tolist(), [each.tolist() for each in jaxpack.unpack_sequence(sums)]
      ([5, 4], [[1, 2, 5], [4]])

    Args:
      step: step(carry, x) -> (carry, y) for all rows alive at a step: in bucket k, x is the data of one step,
        [rows[k], *F], and leaves of the carry are [rows[k], ...]. It is called once per bucket while tracing. It must
        treat rows independently of each other: the plan determines which rows are alive. In slack it is given the
        initial carry and the first data of a sequence, and its results are dropped.
      carry: the initial carry, a pytree of arrays [B, ...] in the caller's row order.
      packed: data [S, *F], or a pytree of such arrays.
      resets: one bool a step, packed like the input: True where an episode begins, from the initial carry of its
        sequence. Default: each sequence is one episode.
      pass_mask: whether to call step(carry, x, mask=mask), for statistics over the rows of one step. For each array in
        x the mask is a bool array of its shape, True where a sequence has this step. All staircases give the same
        result; a plan whose rows hold several sequences, with different steps side by side, is refused.

    Outside jit every call traces and compiles the step again, because its closure may have changed.

    Returns:
      The carry of each sequence after its own last step (the initial one if it has none), in the caller's order; and
      the outputs y, packed like the input. Both are NaN for sequences that do not fit the plan.

    Raises:
      TypeError: if packed is not a PackedSequence, resets are not packed or not bool, or step changes the structure, a
        shape or a dtype of the carry.
      ValueError: if a leaf of the carry or of y has another leading axis, resets are not of the same sequences, or
        pass_mask is set and several sequences share a row of the plan.
    Source: jax.lax.scan.
    """
    packed = check_packed(packed, "packed_scan")
    carry = jax.tree.map(jnp.asarray, carry)
    for leaf in jax.tree.leaves(carry):
        if leaf.ndim < 1 or leaf.shape[0] != packed.plan.num_sequences:
            raise ValueError(
                f"packed_scan: leaves of the carry must have a leading axis of {packed.plan.num_sequences} sequences, "
                f"got shape {leaf.shape}."
            )
    carry = jax.tree.map(lambda leaf: lax.convert_element_type(leaf, leaf.dtype), carry)  # drops weak types
    checked = packed_resets("packed_scan", packed, resets)
    if not pass_mask:
        _check_step(step, carry, packed.data, packed.plan.num_sequences)
        return scan_packed(scan_of(step), carry, packed, checked)
    if packed.plan.starts:
        raise ValueError(
            "packed_scan: pass_mask is for statistics over the rows of one step, but this plan has different steps of "
            "sequences that share a row side by side. Use a staircase (jaxpack.plan_buckets)."
        )

    def masked(carry: PyTree, cell: tuple[PyTree, jax.Array]) -> tuple[PyTree, PyTree]:
        x, real = cell
        return step(carry, x, mask=mask_like(real, x))

    # The mask is passed as data whose slack is not filled: it is False there.
    _check_step(masked, carry, (packed.data, packed.mask), packed.plan.num_sequences)
    return scan_packed(scan_of(masked), carry, packed, checked, pass_mask=True)


def scan_packed(
    scan: Scan, carry: PyTree, packed: PackedSequence, resets: Resets | None = None, pass_mask: bool = False
) -> tuple[PyTree, PackedSequence]:
    """Runs `packed_scan` without checks, with another scan in place of lax.scan. With pass_mask, x is (x, mask)."""
    if not packed.plan.num_sequences:
        return carry, packed.replace(data=_no_outputs(scan, carry, packed))
    cells, agree = (None, None) if resets is None else resets
    carry, first, inputs, mask = _to_slots(vary_like(carry, cells), packed)
    begins = None if cells is None else cells & mask
    starts = Starts(carry, first, carry)
    carry, outputs = scan_slots(scan, starts, (inputs, mask) if pass_mask else inputs, mask, packed.plan, begins)
    carry, outputs = _to_caller(carry, outputs, packed.replace(data=None), agree)
    return carry, packed.replace(data=outputs)


@jax.jit
def _to_slots(carry: PyTree, packed: PackedSequence) -> tuple[PyTree, PyTree, PyTree, jax.Array]:
    """Returns the arguments of `scan_slots`: the carry and its stand-in per slot, the data, and the mask."""
    carry = jax.tree.map(lambda leaf: leaf[packed.sorted_indices], vary_like(carry, packed.data))
    first = jax.tree.map(lambda leaf: lax.stop_gradient(leaf[stand_in_slots(packed)]), carry)
    return carry, first, fill_slack(packed), real_cells(packed)


@jax.jit
def _to_caller(
    carry: PyTree, outputs: PyTree, packed: PackedSequence, agree: jax.Array | None
) -> tuple[PyTree, PyTree]:
    """Returns the results of `scan_slots` as a user gets them."""
    return in_caller_order(packed, carry, agree), zero_slack(packed, outputs, agree)


def _no_outputs(scan: Scan, carry: PyTree, packed: PackedSequence) -> PyTree:
    """Returns the outputs for a batch of no sequences: those of one step with no rows, without the time axis."""

    def one(step: Step, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        return carry, step(carry, x)[1]

    _, outputs = scan(one, carry, jax.tree.map(lambda leaf: leaf[None], packed.data))
    return jax.tree.map(lambda leaf: leaf[0], outputs)


def scan_of(step: Step) -> Scan:
    """Returns lax.scan for a step that is a function."""
    return lambda body, carry, xs: lax.scan(functools.partial(body, step), carry, xs)


class Starts(NamedTuple):
    """The carries that enter a recurrence on slots, each a pytree of arrays [B, ...].

    Attributes:
      initial: of each slot.
      stand_in: those that the step is given in slack, so that no gradient meets a final carry there.
      fresh: those to which resets return.
    """

    initial: PyTree
    stand_in: PyTree
    fresh: PyTree


def scan_slots(
    scan: Scan,
    starts: Starts,
    inputs: PyTree,
    mask: jax.Array,
    plan: BucketPlan,
    resets: PyTree = None,
) -> tuple[PyTree, PyTree]:
    """Runs the recurrence on slots, without sorting, filling slack, or checks.

    Args:
      scan: runs the steps of a bucket.
      starts: the carries.
      inputs: [S, ...] per cell; slack may hold any values that the step can take beside the stand-in.
      mask: bool [S], True at real cells.
      plan: the static shape.
      resets: bool [S], the real cells at which the carry is the slot's fresh one, or a tree of such arrays for parts of
        the carry; None for none.

    Returns:
      The carry after each slot's last real step [B, ...], and the outputs [S, ...], arbitrary in slack.
    """
    chex.assert_tree_shape_prefix(starts, (plan.num_sequences,))
    chex.assert_tree_shape_prefix((inputs, mask), (plan.size,))
    carry, borders = starts.initial, _slot_borders(plan)

    def masked(step: Step, state: tuple[PyTree, PyTree], cell: tuple[PyTree, jax.Array, Any, Any]) -> tuple[Any, Any]:
        carry, finals = state
        x, real, here, reset = cell

        def of_rows(slots: PyTree) -> PyTree:
            return jax.tree.map(lambda leaf: leaf[: len(real)] if here is None else leaf[here.slot], slots)

        if here is not None:
            carry = tree_where(here.begins, of_rows(starts.initial), carry)
        if reset is not None:
            carry = jax.tree.map(tree_where, reset, of_rows(starts.fresh), carry)
        safe = of_rows(starts.stand_in)
        stepped, y = step(tree_where(real, carry, safe), x)
        carry = tree_where(real, stepped, carry)
        if here is not None:
            finals = jax.tree.map(lambda leaf, new: leaf.at[here.ending].set(new, mode="drop"), finals, carry)
        return (carry, finals), y

    finished, outputs, finals = [], [], None
    if borders is not None:
        carry, finals = jax.tree.map(lambda leaf: leaf[borders.slot[: plan.rows[0]]], carry), carry
    for bucket in plan.buckets:
        finished.append(jax.tree.map(lambda leaf, rows=bucket.rows: leaf[rows:], carry))
        carry = jax.tree.map(lambda leaf, rows=bucket.rows: leaf[:rows], carry)
        (carry, finals), ys = scan(masked, (carry, finals), _block(bucket, (inputs, mask, borders, resets)))
        outputs.append(jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), ys))
    if borders is None:
        finals = jax.tree.map(lambda *parts: jnp.concatenate(parts), carry, *reversed(finished))
    return finals, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)


class _Borders(NamedTuple):
    """The borders of slots that share rows, per cell.

    Attributes:
      slot: int32 [S], the slot of each cell.
      begins: bool [S], whether the slot begins there, which resets the carry.
      ending: int32 [S], the slot that ends there, whose carry is collected; B for none.
    """

    slot: jax.Array
    begins: jax.Array
    ending: jax.Array


def _slot_borders(plan: BucketPlan) -> _Borders | None:
    """Returns the borders of a plan's slots; None if each row is one slot, from its first step to its last."""
    if not plan.starts:
        return None
    slots, steps = by_cell(plan)
    ends = steps == take(room_of_slots(plan), slots) - 1
    return _Borders(slots, steps == 0, jnp.where(ends, slots, plan.num_sequences))


def _block(bucket: Bucket, cells: PyTree) -> PyTree:
    """Returns the cells [S, ...] of one bucket as [steps, rows, ...]."""

    def take(leaf: jax.Array) -> jax.Array:
        part = lax.slice_in_dim(leaf, bucket.offset, bucket.offset + bucket.size)
        return part.reshape(bucket.steps, bucket.rows, *leaf.shape[1:])

    return jax.tree.map(take, cells)


def _check_step(step: Step, carry: PyTree, data: PyTree, rows: int) -> None:
    """Raises unless step keeps the type of the carry and returns one output per row."""
    x = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), data)
    stepped, y = jax.eval_shape(step, carry, x)
    before: Any = jax.tree.structure(carry)
    after: Any = jax.tree.structure(stepped)
    if before != after:
        raise TypeError(f"packed_scan: step must return a carry of the structure it was given, {before}, got {after}.")
    leaves = zip(jax.tree_util.tree_leaves_with_path(carry), jax.tree.leaves(stepped), strict=True)
    for (path, old), new in leaves:
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise TypeError(
                f"packed_scan: step must keep the carry's shape and dtype, but carry{jax.tree_util.keystr(path)} went "
                f"in as {old.dtype}{list(old.shape)} and came out as {new.dtype}{list(new.shape)}."
            )
    for leaf in jax.tree.leaves(y):
        if leaf.ndim < 1 or leaf.shape[0] != rows:
            raise ValueError(
                f"packed_scan: step must return outputs with a leading axis of rows ({rows} here), got shape "
                f"{leaf.shape}."
            )
