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
from jaxpack._packed.resets import check_resets
from jaxpack._plans.bucket_plan import BucketPlan


def linear_scan(
    decay: PackedSequence | ArrayLike,
    inputs: PackedSequence | ArrayLike,
    initial_state: ArrayLike | None = None,
    *,
    lengths: Lengths = None,
    plan: BucketPlan | None = None,
    resets: PackedSequence | ArrayLike | None = None,
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

    CPUs go step by step over the rows of the plan. Accelerators compose the steps of each row in a tree. Both forms
    give the same to rounding. The derivative is the recurrence in the other direction: for the backward pass the
    decays and the states are saved, each once, and it holds as much again while it runs. Half-precision states are kept
    in float32 from step to step.

    Args:
      decay: one value a step, laid out as the inputs ([S, *F] packed under the same plan, or [B, T, *F]); axes of F may
        be 1. Or an array that broadcasts to one step's features *F, which all steps share.
      inputs: packed data [S, *F]; or padded [B, T, *F] (batch first), with `lengths`. Real or complex.
      initial_state: [B, *F], in the caller's row order. Default: zeros.
      lengths: int [B], for padded inputs. They may be traced. Default: all T.
      plan: for padded inputs, the static shape to run under. Default: the padded batch.
      resets: bool, one a step, laid out as the inputs: True where an episode begins, which starts from the initial
        state. They count beside the borders of the plan. Default: each sequence is one episode.
      reverse: set True to read each sequence, or each of its episodes, from its end.

    Returns:
      The states after each step, in the layout of the inputs, with zeros past each length; and the final state
      [B, *F] in the caller's row order, which is the initial one for sequences of length 0. Both have the dtype to
      which JAX promotes decay, inputs and initial state, at least a float. Sequences that do not fit are NaN in both.

    Raises:
      TypeError: if inputs are packed and lengths or plan are given too, one of inputs, decay and resets is packed and
        another padded, or resets are not bool.
      ValueError: if decay or initial_state have another shape, the arrays are not of the same sequences, or a concrete
        length does not fit.
    Source: Martin & Cundy 2018 (https://arxiv.org/abs/1709.04057), Blelloch 1990.
    """
    per_step = isinstance(decay, PackedSequence)
    given: Any = decay if per_step else as_jax(decay, "decay")
    if not per_step and not isinstance(inputs, PackedSequence):
        lead = jnp.shape(inputs)[:2]
        per_step = given.ndim == jnp.ndim(inputs) and given.shape[:2] == lead
    others = {"decay": given if per_step else None, "resets": resets}
    aligned = align("linear_scan", inputs, others, lengths, plan)
    check_resets(aligned.others["resets"], ("S",))
    features = aligned.packed.data.shape[1:]
    _check_decay(aligned.others["decay"][:0] if per_step else given[None], given, features)
    arrays = [aligned.packed.data, aligned.others["decay"] if per_step else given]
    if initial_state is not None:
        initial_state = as_jax(initial_state, "initial_state")
        expected = (aligned.packed.plan.num_sequences, *features)
        if initial_state.shape != expected:
            raise ValueError(
                f"linear_scan: initial_state must be [B, *F] = {list(expected)}, got {shapes_of(initial_state)}."
            )
        arrays.append(initial_state)
    dtype = jnp.result_type(*arrays)
    dtype = dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.result_type(dtype, float)
    shared = None if per_step else given.reshape((1,) * (1 + len(features) - given.ndim) + given.shape)
    states, final = _scan(bool(reverse), jnp.dtype(dtype).name, aligned._replace(length=None), shared, initial_state)
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
    reverse: bool, dtype: str, aligned: Aligned, shared: jax.Array | None, initial_state: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Computes `linear_scan`: the states [S, *F], and the final ones [B, *F]."""
    packed = clean(aligned.packed, aligned.agree, dtype)
    plan, inputs = packed.plan, packed.data
    zeros = lax.full_like(inputs, 0, shape=(plan.num_sequences, *inputs.shape[1:]))
    initial = zeros if initial_state is None else initial_state.astype(dtype)
    if not plan.size:  # a batch of no sequences
        return inputs, initial
    reading = Reading.of(packed.replace(data=None), aligned.others["resets"], reverse)
    fresh, start = (expand(cells, inputs) for cells in (reading.fresh, reading.start))
    decay = aligned.others["decay"] if shared is None else shared
    decay = decay.astype(dtype).reshape((len(decay),) + (1,) * (inputs.ndim - decay.ndim) + decay.shape[1:])
    initial = initial[packed.sorted_indices]
    if initial_state is not None:
        used = spread(plan, jnp.where(expand(reading.empty, initial), 0, initial))
        inputs = jnp.where(start, jnp.where(start, decay, 0) * used + inputs, inputs)
    if shared is None:
        decay = jnp.where(fresh, 0, decay)
    inputs = vary_like(inputs, decay)
    decay = vary_like(decay, inputs)
    h = solve(Form(blocks_of(plan), reverse), decay, inputs, reading.fresh, zeros[:0])
    final = jnp.where(expand(reading.empty, initial), initial, h[reading.last])
    # h is 0 in slack already. The selection drops the cotangents there.
    return jnp.where(expand(reading.real, h), h, 0), final[packed.unsorted_indices]
