"""linear_scan: h_t = a_t * h_{t-1} + b_t over the steps of each sequence, packed or padded."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxpack._dtypes import as_jax
from jaxpack._layers.states import shapes_of
from jaxpack._linear.inputs import Aligned, Lengths, align, clean
from jaxpack._linear.reading import Reading
from jaxpack._linear.solve import Form, blocks_of, solve
from jaxpack._packed.broadcast import expand, vary_like
from jaxpack._packed.maps import spread
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._packed.resets import Entering, check_fresh, check_resets
from jaxpack._plans.bucket_plan import BucketPlan


def linear_scan(
    decay: PackedSequence | ArrayLike,
    inputs: PackedSequence | ArrayLike,
    initial_state: ArrayLike | None = None,
    *,
    lengths: Lengths = None,
    mask: ArrayLike | None = None,
    plan: BucketPlan | None = None,
    resets: PackedSequence | ArrayLike | None = None,
    fresh_state: ArrayLike | None = None,
    reverse: bool = False,
) -> tuple[Any, jax.Array]:
    """Runs a linear recurrence over the steps of each sequence.

        h_t = decay_t * h_{t-1} + inputs_t

    Examples:
      >>> packed = jaxpack.pack_sequence([jnp.array([1.0, 1.0, 1.0]), jnp.array([8.0])])
      >>> states, final = jaxpack.linear_scan(0.5, packed)
      >>> [each.tolist() for each in jaxpack.unpack_sequence(states)], final.tolist()
      ([[1.0, 1.5, 1.75], [8.0]], [1.75, 8.0])

      Padded inputs, with a decay for each step, from another state than zero:

      >>> decay = jnp.array([[0.5, 0.5, 0.0], [0.5, 0.0, 0.0]])
      >>> states, final = jaxpack.linear_scan(decay, jnp.ones((2, 3)), jnp.array([4.0, 8.0]), lengths=[3, 1])
      >>> states.tolist(), final.tolist()
      ([[3.0, 2.5, 1.0], [5.0, 0.0, 0.0]], [1.0, 5.0])

      Padding in front, which a mask leaves out:

      >>> states, final = jaxpack.linear_scan(0.5, jnp.ones((1, 3)), mask=jnp.array([[False, True, True]]))
      >>> states.tolist(), final.tolist()
      ([[0.0, 1.0, 1.5]], [1.5])

    CPUs go step by step over the rows of the plan. Accelerators compose the steps of each row in a tree. Both forms
    give the same to rounding. The derivative is the recurrence in the other direction: for the backward pass the
    decays and the states are saved, each once, and it holds as much again while it runs. Half-precision states are kept
    in float32 from step to step.

    Args:
      decay: one value a step, laid out as the inputs ([S, *F] packed under the same plan, or [B, T, *F]); axes of F may
        be 1. Or an array that broadcasts to one step's features *F, which all steps share.
      inputs: packed data [S, *F]; or padded [B, T, *F] (batch first), with `lengths` or `mask`. Real or complex.
      initial_state: [B, *F], in the caller's row order. Default: zeros.
      lengths: int [B], for padded inputs. They may be traced. Default: all T.
      mask: bool [B, T], in place of lengths, True at valid steps. Padding may be anywhere; states there are 0. A reset
        at a masked step acts at the next valid one. The mask may be traced.
      plan: for padded inputs, the static shape to run under. Default: the padded batch.
      resets: bool, one a step, laid out as the inputs: True where an episode begins, which starts from the fresh state.
        They count beside the borders of the plan. Default: each sequence is one episode.
      fresh_state: [B, *F], beside resets, the state with which episodes begin. Default: the initial state.
      reverse: set True to read each sequence, or each of its episodes, from its end.

    Returns:
      The states after each step, in the layout of the inputs, with zeros past each length; and the final state
      [B, *F] in the caller's row order, which is the initial one for sequences of length 0. Both have the dtype to
      which JAX promotes decay, inputs and initial state, at least a float. Sequences that do not fit are NaN in both.

    Raises:
      TypeError: if inputs are packed and lengths, mask or plan are given too, both lengths and mask are given, one of
        inputs, decay and resets is packed and another padded, or mask or resets are not bool.
      ValueError: if decay or a state have another shape, the arrays are not of the same sequences, there is a fresh
        state without resets, or a concrete length does not fit.
    Source: Martin & Cundy 2018 (https://arxiv.org/abs/1709.04057), Blelloch 1990.
    """
    per_step = isinstance(decay, PackedSequence)
    given: Any = decay if per_step else as_jax(decay, "decay")
    if not per_step and not isinstance(inputs, PackedSequence):
        lead = jnp.shape(inputs)[:2]
        per_step = given.ndim == jnp.ndim(inputs) and given.shape[:2] == lead
    others = {"decay": given if per_step else None, "resets": resets}
    aligned = align("linear_scan", inputs, others, lengths, plan, mask)
    check_resets(aligned.others["resets"], ("S",))
    features = aligned.packed.data.shape[1:]
    _check_decay(aligned.others["decay"][:0] if per_step else given[None], given, features)
    arrays = [aligned.packed.data, aligned.others["decay"] if per_step else given]
    check_fresh(fresh_state, resets)
    entering, expected = Entering(initial_state, fresh_state), (aligned.packed.plan.num_sequences, *features)
    for name, state in zip(("initial_state", "fresh_state"), entering, strict=True):
        if state is not None:
            arrays.append(as_jax(state, name))
            if arrays[-1].shape != expected:
                raise ValueError(f"linear_scan: {name} must be [B, *F] = {list(expected)}, got {shapes_of(state)}.")
    dtype = jnp.result_type(*arrays)
    dtype = dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.result_type(dtype, float)
    shared = None if per_step else given.reshape((1,) * (1 + len(features) - given.ndim) + given.shape)
    states, final = _scan(bool(reverse), jnp.dtype(dtype).name, aligned.as_cells, shared, entering)
    return aligned.laid_out(aligned.packed.replace(data=states)), final


def _check_decay(decay: jax.Array, given: Any, features: tuple[int, ...]) -> None:
    """Raises ValueError unless decays [N, *D] broadcast to features *F."""
    own = decay.shape[1:]
    if len(own) > len(features) or any(n not in (1, m) for n, m in zip(own[::-1], features[::-1], strict=False)):
        shape = given.data.shape if isinstance(given, PackedSequence) else given.shape
        raise ValueError(
            f"linear_scan: decay must have a value for each step, laid out as the inputs, or broadcast to the features "
            f"of one step, {list(features)}, got shape {list(shape)}."
        )


@functools.partial(jax.jit, static_argnames=("reverse", "dtype"))
def _scan(
    reverse: bool, dtype: str, aligned: Aligned, shared: jax.Array | None, entering: Entering
) -> tuple[jax.Array, jax.Array]:
    """Computes `linear_scan`: the states [S, *F], and the final ones [B, *F]."""
    packed = clean(aligned.packed, aligned.agree, dtype)
    plan, inputs = packed.plan, packed.data
    zeros = lax.full_like(inputs, 0, shape=(plan.num_sequences, *inputs.shape[1:]))
    initial, fresh = (zeros if state is None else jnp.asarray(state, dtype) for state in entering)
    if not plan.size:  # a batch of no sequences
        return inputs, initial
    reading = Reading.of(packed.replace(data=None), aligned.others["resets"], reverse)
    cut, start = (expand(cells, inputs) for cells in (reading.cut, reading.start))
    decay = aligned.others["decay"] if shared is None else shared
    decay = decay.astype(dtype).reshape((len(decay),) + (1,) * (inputs.ndim - decay.ndim) + decay.shape[1:])
    initial = initial[packed.sorted_indices]
    if entering != (None, None):
        empty = expand(reading.empty, initial)  # which may hold NaN
        used = spread(plan, jnp.where(empty, 0, initial))
        if entering.fresh is not None and reading.resets is not None:
            fresh = spread(plan, jnp.where(empty, 0, fresh[packed.sorted_indices]))
            used = jnp.where(expand(reading.resets, inputs), fresh, used)
        inputs = jnp.where(start, jnp.where(start, decay, 0) * used + inputs, inputs)
    if shared is None:
        decay = jnp.where(cut, 0, decay)
    inputs = vary_like(inputs, decay)
    decay = vary_like(decay, inputs)
    h = solve(Form(blocks_of(plan), reverse), decay, inputs, reading.cut, zeros[:0])
    final = jnp.where(expand(reading.empty, initial), initial, h[reading.last])
    # h is 0 in slack already. The selection drops the cotangents there.
    return jnp.where(expand(reading.real, h), h, 0), final[packed.unsorted_indices]
