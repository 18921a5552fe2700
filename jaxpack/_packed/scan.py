"""packed_scan: the masked lax.scan over a plan's buckets. Everything recurrent in jaxpack stands on it.

Within a bucket the rows are constant, so it is one lax.scan; from bucket to bucket the batch shrinks. A row whose
sequence has ended keeps its carry, so that the carry of each row, when its slot ends, is the one after the sequence's
own last step. Where slots share a row, a slot starts with its own initial carry.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpack._packed.broadcast import expand, mask_like, vary_like
from jaxpack._packed.gather import real_cells
from jaxpack._packed.packed_sequence import PackedSequence, check_packed
from jaxpack._packed.slack import fill_slack, in_caller_order, stand_in_slots, zero_slack
from jaxpack._plans.bucket_plan import Bucket, BucketPlan
from jaxpack._types import PyTree

Step = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
# scan(body, carry, xs) is lax.scan over functools.partial(body, step), with a step that the scan brings along: a
# function as it is, or the call of a Flax module, which has to be lifted into the loop by Flax's own scan.
Body = Callable[[Step, PyTree, PyTree], tuple[PyTree, PyTree]]
Scan = Callable[[Body, PyTree, PyTree], tuple[PyTree, PyTree]]


def packed_scan(
    step: Callable[..., tuple[PyTree, PyTree]], carry: PyTree, packed: PackedSequence, *, pass_mask: bool = False
) -> tuple[PyTree, PackedSequence]:
    """Runs any recurrence over each sequence's own steps.

    Examples:
      A running sum, with one program for every batch that fits the plan:

      >>> packed = jaxpack.pack_sequence([[1, 2, 3], [4]])
      >>> total, sums = jaxpack.packed_scan(lambda s, x: (s + x, s + x), jnp.zeros(2, int), packed)
      >>> total.tolist(), [each.tolist() for each in jaxpack.unpack_sequence(sums)]
      ([6, 4], [[1, 3, 6], [4]])

    Args:
      step: step(carry, x) -> (carry, y) for all rows alive at once: in bucket k, x is the data at one step,
        [rows[k], *F], and leaves of the carry are [rows[k], ...]. Called once per bucket while tracing. It must treat
        rows independently of each other: which rows are there depends on the plan, and in slack it is given a first
        step again (a sequence's initial carry and first data), and what it returns is dropped.
      carry: the initial carry, a pytree of arrays [B, ...] in the caller's row order.
      packed: data [S, *F], or a pytree of such arrays.
      pass_mask: whether to call step(carry, x, mask=mask), for statistics over the rows of one step. For each array in
        x the mask is bool, of its shape: True where a sequence has this step. Every staircase then gives the same;
        a plan whose rows hold several sequences has different steps of them side by side, and is refused.

    Outside jit every call traces and compiles the step anew, since what it closes over may have changed.

    Returns:
      The carry of each sequence after its own last step (the initial one if it has none), in the caller's order; and
      the outputs y, packed as the input is. Of sequences that do not fit the plan both are NaN.

    Raises:
      TypeError: if packed is no PackedSequence, or step changes the carry's structure, a shape or a dtype.
      ValueError: if a leaf of the carry or of y has another leading axis, or pass_mask is set and several sequences
        share a row of the plan.
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
    carry = jax.tree.map(lambda leaf: lax.convert_element_type(leaf, leaf.dtype), carry)  # no longer weakly typed
    if not pass_mask:
        _check_step(step, carry, packed.data, packed.plan.num_sequences)
        return scan_packed(scan_of(step), carry, packed)
    if packed.plan.starts:
        raise ValueError(
            "packed_scan: pass_mask is for statistics over the sequences that have a step, but in this plan different "
            "steps of sequences that share a row are side by side. Use a staircase (jaxpack.plan_buckets)."
        )

    def masked(carry: PyTree, cell: tuple[PyTree, jax.Array]) -> tuple[PyTree, PyTree]:
        x, real = cell
        return step(carry, x, mask=mask_like(real, x))

    # The mask itself is data without slack: the stand-in for what is not real is not real either.
    _check_step(masked, carry, (packed.data, packed.mask), packed.plan.num_sequences)
    return scan_packed(scan_of(masked), carry, packed, pass_mask=True)


def scan_packed(
    scan: Scan, carry: PyTree, packed: PackedSequence, pass_mask: bool = False
) -> tuple[PyTree, PackedSequence]:
    """`packed_scan` with another scan in lax.scan's place, and no checks. With pass_mask, x is (x, mask)."""
    if not packed.plan.num_sequences:
        return carry, packed.replace(data=_no_outputs(scan, carry, packed))
    carry, first, inputs, mask = _enter(carry, packed)
    carry, outputs = scan_slots(scan, carry, first, (inputs, mask) if pass_mask else inputs, mask, packed.plan)
    carry, outputs = _leave(carry, outputs, packed.replace(data=None))
    return carry, packed.replace(data=outputs)


@jax.jit
def _enter(carry: PyTree, packed: PackedSequence) -> tuple[PyTree, PyTree, PyTree, jax.Array]:
    """What `scan_slots` takes: by slot the carry and its stand-in, the data fit for a step, and the mask."""
    carry = jax.tree.map(lambda leaf: leaf[packed.sorted_indices], vary_like(carry, packed.data))
    first = jax.tree.map(lambda leaf: lax.stop_gradient(leaf[stand_in_slots(packed)]), carry)
    return carry, first, fill_slack(packed), real_cells(packed)


@jax.jit
def _leave(carry: PyTree, outputs: PyTree, packed: PackedSequence) -> tuple[PyTree, PyTree]:
    """What a user gets of the results of `scan_slots`."""
    return in_caller_order(packed, carry), zero_slack(packed, outputs)


def _no_outputs(scan: Scan, carry: PyTree, packed: PackedSequence) -> PyTree:
    """The outputs of a batch of no sequences: what one step makes of no rows, without its axis of time."""

    def one(step: Step, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        return carry, step(carry, x)[1]

    _, outputs = scan(one, carry, jax.tree.map(lambda leaf: leaf[None], packed.data))
    return jax.tree.map(lambda leaf: leaf[0], outputs)


def scan_of(step: Step) -> Scan:
    """lax.scan, for a step that is a function."""
    return lambda body, carry, xs: lax.scan(functools.partial(body, step), carry, xs)


def scan_slots(
    scan: Scan, carry: PyTree, stand_in: PyTree, inputs: PyTree, mask: jax.Array, plan: BucketPlan
) -> tuple[PyTree, PyTree]:
    """The recurrence itself, on slots: no sorting, no sanitising, no checks.

    Args:
      scan: runs the steps of a bucket.
      carry: [B, ...] per slot.
      stand_in: what the step is given for a carry in slack, whose gradients must not meet what a sequence ended with.
      inputs: [S, ...] per cell, of which slack may hold anything that the step can digest beside the stand-in.
      mask: bool [S], True at real cells.

    Returns:
      The carry after each slot's last real step [B, ...], and the outputs [S, ...], arbitrary in slack.
    """
    chex.assert_tree_shape_prefix((carry, stand_in), (plan.num_sequences,))
    chex.assert_tree_shape_prefix((inputs, mask), (plan.size,))
    initial, crossings = carry, _crossings(plan)

    def masked(step: Step, state: tuple[PyTree, PyTree], cell: tuple[PyTree, jax.Array, Any]) -> tuple[Any, PyTree]:
        carry, finals = state
        x, real, crossing = cell
        if crossing is None:
            safe = jax.tree.map(lambda leaf: leaf[: len(real)], stand_in)
        else:
            slots, entered, left = crossing
            carry = select(entered, jax.tree.map(lambda leaf: leaf[slots], initial), carry)
            safe = jax.tree.map(lambda leaf: leaf[slots], stand_in)
        stepped, y = step(select(real, carry, safe), x)
        carry = select(real, stepped, carry)
        if crossing is not None:
            finals = jax.tree.map(lambda leaf, new: leaf.at[left].set(new, mode="drop"), finals, carry)
        return (carry, finals), y

    finished, outputs, finals = [], [], None
    if crossings is not None:
        carry, finals = jax.tree.map(lambda leaf: leaf[plan.cell_slots[: plan.rows[0]]], carry), carry
    for bucket in plan.buckets:
        finished.append(jax.tree.map(lambda leaf, rows=bucket.rows: leaf[rows:], carry))
        carry = jax.tree.map(lambda leaf, rows=bucket.rows: leaf[:rows], carry)
        (carry, finals), ys = scan(masked, (carry, finals), _block(bucket, (inputs, mask, crossings)))
        outputs.append(jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), ys))
    if crossings is None:
        finals = jax.tree.map(lambda *parts: jnp.concatenate(parts), carry, *reversed(finished))
    return finals, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)


def select(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """The new tree in the rows where the condition holds, the old one in the others."""
    return jax.tree.map(lambda a, b: jnp.where(expand(condition, b), a, b), new, old)


def _crossings(plan: BucketPlan) -> tuple[jax.Array, jax.Array, jax.Array] | None:
    """For each cell its slot, whether that is entered there, and which slot is left there (B for none).

    None where each row is one slot, which is there from the first step to the last.
    """
    if not plan.starts:
        return None
    left = np.full(plan.size, plan.num_sequences, np.int32)
    left[plan.slot_ends] = np.arange(plan.num_sequences)
    return jnp.asarray(plan.cell_slots), jnp.asarray(plan.cell_steps == 0), jnp.asarray(left)


def _block(bucket: Bucket, cells: PyTree) -> PyTree:
    """The cells [S, ...] of one bucket as [steps, rows, ...]."""

    def take(leaf: jax.Array) -> jax.Array:
        part = lax.slice_in_dim(leaf, bucket.offset, bucket.offset + bucket.size)
        return part.reshape(bucket.steps, bucket.rows, *leaf.shape[1:])

    return jax.tree.map(take, cells)


def _check_step(step: Step, carry: PyTree, data: PyTree, rows: int) -> None:
    """Raises unless step keeps the carry's type and returns one output per row."""
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
