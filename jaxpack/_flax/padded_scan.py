"""scan_padded: every step of every row of a padded batch, for sizes that no plan has (symbolic ones, and none)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._checks import concrete_lengths, is_traced
from jaxpack._flax.call import Call, Direction
from jaxpack._flax.layout import Layout, Lengths
from jaxpack._packed.broadcast import expand, tree_where, vary_like
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._packed.resets import Resets
from jaxpack._packed.slack import poison, select_or_poison
from jaxpack._types import PyTree


def scan_padded(call: Call, direction: Direction) -> tuple[PyTree, PyTree]:
    """Runs one direction over a padded batch without packing it.

    Returns:
      The final carry [*batch, ...], and the outputs in the layout of the inputs, zero past each length.

    Raises:
      ValueError: if there is a plan.
      TypeError: if lengths are not integers.
    """
    inputs, layout = call.inputs, call.layout
    assert not isinstance(inputs, PackedSequence)
    _check_no_plan(call, direction)
    x = jnp.swapaxes(layout.flatten_inputs(inputs), 0, 1)  # [T, B, *F]
    steps = jnp.arange(layout.num_steps, dtype=jnp.int32)[:, None]
    fits, spans = _fits_and_spans(layout, call.seq_lengths)
    real = steps < spans
    flipped = jnp.where(real, spans - 1 - steps, steps)

    def flip(leaf: jax.Array) -> jax.Array:
        return jnp.take_along_axis(leaf, expand(flipped, leaf), axis=0)

    x = flip(x) if direction.reverse else x
    assert not isinstance(call.resets, Resets)
    resets = None
    if call.resets is not None:
        resets = _begins(jnp.swapaxes(layout.flatten_inputs(call.resets), 0, 1), steps, spans, direction.reverse)
    initial = safe = carry = vary_like(layout.flatten_carry(direction.carry), (x, spans, resets))
    if layout.symbolic_axes:  # slack holds another step that is real, as in packed_scan
        rows = jnp.where(spans[0] > 0, jnp.arange(layout.batch_size), jnp.argmax(spans[0]))
        stand_in = jnp.where(jnp.any(real), lax.stop_gradient(x[:1, rows]), jnp.ones_like(x[:1]))
        x = jnp.where(expand(real, x), x, stand_in)
        safe = jax.tree.map(lambda leaf: lax.stop_gradient(leaf[rows]), carry)

    def masked(step: Callable[[PyTree, PyTree], Any], carry: PyTree, cell: tuple[jax.Array, jax.Array, Any]) -> Any:
        x, real, reset = cell
        carry = carry if reset is None else tree_where(reset, initial, carry)
        stepped, y = step(tree_where(real, carry, safe), x)
        return tree_where(real, stepped, carry), y

    carry, outputs = direction.scan(masked, carry, (x, real, resets))
    if direction.reverse and direction.keep_order:
        outputs = jax.tree.map(flip, outputs)
    outputs = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), outputs)
    outputs = jax.tree.map(lambda leaf: select_or_poison(leaf, real.T, jnp.zeros_like(leaf), fits), outputs)
    carry = jax.tree.map(lambda leaf: poison(leaf, fits), carry)
    return layout.restore_carry(carry), layout.restore_outputs(outputs)


def _begins(resets: jax.Array, steps: jax.Array, spans: jax.Array, reverse: bool) -> jax.Array:
    """Returns the real steps at which an episode begins, in the order in which they are read: bool [T, B]."""
    real = steps < spans
    if not reverse:
        return resets & real
    inner = real & (steps > 0)  # as in reversed_resets
    return jnp.take_along_axis(resets, jnp.where(inner, spans - steps, 0), axis=0) & inner


def _check_no_plan(call: Call, direction: Direction) -> None:
    layout = call.layout
    if direction.plan is None or direction.stacks_variables:
        return
    if not layout.symbolic_axes:
        layout.check_lengths(call.seq_lengths, direction.plan)  # raises, since no plan is for a batch of none
    raise ValueError(
        f"the inputs' shape {call.inputs.shape} is symbolic in {', '.join(map(str, layout.symbolic_axes))}, where a "
        f"plan's sizes are numbers. Export without a plan, or export a program for each plan, with its sizes."
    )


def _fits_and_spans(layout: Layout, seq_lengths: Lengths | None) -> tuple[jax.Array, jax.Array]:
    """Returns bool [B], True where a length fits the padded batch; and int32 [1, B], the length, or T where not.

    Raises:
      TypeError: if lengths are not integers.
    """
    num_steps = jnp.asarray(layout.num_steps, jnp.int32)
    if seq_lengths is None:
        lengths = jnp.broadcast_to(num_steps, (layout.batch_size,))
    else:
        lengths = layout.flatten_lengths(seq_lengths)
        lengths = lengths if is_traced(lengths) else jnp.asarray(concrete_lengths(lengths), jnp.int32)
        if not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise TypeError(f"traced lengths must be integers, got dtype {lengths.dtype}.")
    fits = (lengths >= 0) & (lengths <= num_steps)
    return fits, jnp.where(fits, lengths, num_steps).astype(jnp.int32)[None]
