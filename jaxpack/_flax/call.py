"""Call and Direction: one call of a drop-in RNN or Bidirectional, its arguments checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxpack._flax.known import KnownCell
from jaxpack._flax.layout import Layout, Lengths
from jaxpack._packed.masks import checked_mask, refuse_beside_mask
from jaxpack._packed.packed_sequence import PackedSequence, check_packed
from jaxpack._packed.resets import Resets, packed_resets, padded_resets
from jaxpack._packed.scan import Scan
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree


class Call(NamedTuple):
    """The part of a call that its directions share.

    Attributes:
      inputs: packed or padded, as `check_inputs` returns them.
      layout: their axes.
      seq_lengths: as given; None for padded inputs of which every step counts.
      plan: the plan of the call or of the Bidirectional; None for each RNN's own.
      forward_mode: True to differentiate the call in forward mode.
      resets: as `check_resets` returns them; None if each sequence is one episode.
      mask: as `check_mask` returns it; None if `seq_lengths` say which steps are valid.
    """

    inputs: PackedSequence | jax.Array
    layout: Layout
    seq_lengths: Lengths | None
    plan: BucketPlan | None
    forward_mode: bool
    resets: Resets | jax.Array | None = None
    mask: jax.Array | None = None


class Direction(NamedTuple):
    """One RNN in a call.

    Attributes:
      carry: the initial carry, leaves [*batch, ...].
      known: the cell, if jaxpack has its equations; else `scan` runs it.
      scan: lax.scan of the cell, lifted by Flax.
      plan: the plan for padded inputs; None to run without one.
      reverse: True to read each sequence from its end.
      keep_order: True to bring the outputs of a reversed direction back to the order of the inputs.
      stacks_variables: True if `scan` gives variables of the cell a time axis, which only a padded batch has.
      works_in_flax: False if Flax's own RNN fails on this call.
    """

    carry: PyTree
    known: KnownCell | None
    scan: Scan
    plan: BucketPlan | None
    reverse: bool
    keep_order: bool
    stacks_variables: bool
    works_in_flax: bool = True


def resolve_options(module: Any, **given: Any) -> dict[str, Any]:
    """Returns the options of a call: each as given, or the module's own where it is None."""
    return {name: getattr(module, name) if value is None else value for name, value in given.items()}


def check_inputs(
    inputs: PackedSequence | ArrayLike, seq_lengths: Lengths | None, plan: BucketPlan | None
) -> PackedSequence | jax.Array:
    """Validates the inputs of a call. Padded ones become an array.

    Raises:
      TypeError: if inputs are packed, and seq_lengths or plan are given too.
    """
    if not isinstance(inputs, PackedSequence):
        return jnp.asarray(inputs)
    if seq_lengths is not None or plan is not None:
        raise TypeError("inputs are packed, and carry their lengths and plan: do not give seq_lengths= or plan=.")
    return check_packed(inputs, "RNN")


def check_resets(resets: Any, inputs: PackedSequence | jax.Array, layout: Layout) -> Resets | jax.Array | None:
    """Validates the resets of a call. Those of padded inputs become an array in the inputs' layout.

    Raises:
      TypeError: if one of inputs and resets is packed and the other padded, or resets are not bool.
      ValueError: if they are not of the same sequences.
    """
    if isinstance(inputs, PackedSequence):
        return packed_resets("RNN", inputs, resets)
    return padded_resets("RNN", resets, layout.step_axes)


def check_mask(
    mask: Any, inputs: PackedSequence | jax.Array, seq_lengths: Lengths | None, layout: Layout
) -> jax.Array | None:
    """Validates the mask of a call, which has the axes of padded inputs before those of features.

    Raises:
      TypeError: if inputs are packed, seq_lengths are given too, or the mask is not bool.
      ValueError: if its shape is not that of the steps, or the sizes are symbolic.
    """
    if mask is None:
        return None
    refuse_beside_mask(inputs, seq_lengths, "seq_lengths")
    if layout.symbolic_axes:
        raise ValueError(
            f"a mask needs sizes that are numbers, but the inputs' shape {inputs.shape} is symbolic. If padding comes "
            f"last, pass seq_lengths=mask.sum(-1); else export a program for each size."
        )
    return checked_mask("RNN", mask, layout.step_axes)


def check_pair(rnns: tuple[Any, Any], rnn_class: type, inputs: PackedSequence | jax.Array, *options: Any) -> bool:
    """Returns True if both RNNs of a Bidirectional are jaxpack's, which can share a batch and its steps.

    Args:
      options: what only jaxpack's RNNs take: plan, resets and mask, None where not given.

    Raises:
      TypeError: if they are not, and the call has one of the options or packed inputs.
    """
    forward_rnn, backward_rnn = rnns
    if forward_rnn is backward_rnn:
        warnings.warn("forward_rnn and backward_rnn are the same object, and share their parameters.", stacklevel=4)
    if type(forward_rnn) is rnn_class and type(backward_rnn) is rnn_class:
        return True
    if isinstance(inputs, PackedSequence) or any(option is not None for option in options):
        raise TypeError(
            f"a plan, packed inputs, resets and a mask need RNNs of jaxpack, got {type(forward_rnn).__module__}."
            f"{type(forward_rnn).__name__} and {type(backward_rnn).__module__}.{type(backward_rnn).__name__}. Import "
            f"RNN from the module that Bidirectional comes from."
        )
    return False


def delegate_to_flax(call: Call, directions: Sequence[Direction]) -> bool:
    """Returns True if Flax's own call does as well: only inputs are given, no cell is known, no plan acts."""
    if isinstance(call.inputs, PackedSequence) or call.seq_lengths is not None:
        return False
    if call.resets is not None or call.mask is not None:
        return False
    return all(
        each.known is None and (each.plan is None or each.stacks_variables) and each.works_in_flax
        for each in directions
    )


def merge(
    results: Sequence[tuple[PyTree, PyTree]], merge_fn: Callable[[Any, Any], Any]
) -> tuple[tuple[PyTree, PyTree], PyTree]:
    """Returns the carries of both directions, and their outputs (packed: the data) merged leaf by leaf."""
    (carry, outputs), (backward_carry, backward) = results
    if isinstance(outputs, PackedSequence):
        merged = outputs.replace(data=jax.tree.map(merge_fn, outputs.data, backward.data))
    else:
        merged = jax.tree.map(merge_fn, outputs, backward)
    return (carry, backward_carry), merged
