"""run_rollout: a layer over a rollout as it is, whose rows continue, and whose episodes begin from another state."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy.typing as npt

from jaxpack._dtypes import as_jax
from jaxpack._packed.inputs import padded_batch, padded_plan
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._rollouts.chunks import refuse_both_directions
from jaxpack._rollouts.fragments import checked_axis
from jaxpack._rollouts.states import checked_fresh, checked_rows
from jaxpack._types import PyTree


def run_rollout(
    apply: Callable[..., tuple[PackedSequence, PyTree]],
    params: PyTree,
    inputs: PyTree,
    resets: npt.ArrayLike,
    carried: PyTree,
    fresh: PyTree = None,
    *,
    axis: int,
    batch_axis: int,
) -> tuple[PyTree, PyTree]:
    """Runs a layer over a rollout in one call, inside `jit` or outside.

        h_t = step(fresh   if resets_t else h_{t-1}, x_t),    h_{-1} = carried

    A rollout [T, N] is packed data of N sequences as it is in memory; one of [N, T] is transposed for it.

    Examples:
      >>> layer = jaxpack.MinGRU(2, 4)
      >>> params, x = layer.init(jax.random.key(0)), jnp.ones((3, 5, 2))
      >>> resets = jnp.zeros((3, 5), bool).at[0, 3].set(True)
      >>> output, state = run_rollout(layer.apply, params, x, resets, jnp.full((3, 4), 2.0), axis=1, batch_axis=0)
      >>> alone, _ = layer.apply(params, x[:1, :2])  # the episode that begins at step 3 of the first row, from zeros
      >>> bool(jnp.allclose(output[0, 3:], alone[0], atol=1e-6)), bool(jnp.all(output[1] == output[2]))
      (True, True)

    Args:
      apply: the layer, such as `gru.apply`, for one direction: apply(params, packed, state, resets=, fresh_state=) ->
        (packed outputs, state). Bind other options with functools.partial.
      params: the layer's parameters.
      inputs: [T, N, *F] or [N, T, *F], or a pytree of such arrays.
      resets: bool, [T, N] or [N, T], which may be traced: True where a step begins an episode, as `resets_from_dones`
        returns it.
      carried: the state of each row before the first step, with N rows at the batch axis. The last call's final state.
      fresh: the state at the beginning of an episode, with N rows or one for all. Default: zeros. Of a layer with a
        learned one, pass `layer.initial_state(params, 1)`.
      axis: the time axis of inputs and resets: 0 for [T, N], 1 for [N, T].
      batch_axis: 1 for the states of RNN, LSTM and GRU, [num_layers * D, N, H]; 0 where N comes first.

    Returns:
      The outputs, [T, N, *G] or [N, T, *G], and the state of each row after its last step.

    Raises:
      TypeError: if resets are not bool, inputs are packed (pack resets beside them, or see `cut_rollout`), or axis is
        not an int.
      ValueError: if resets have other axes than the inputs, a state has another number of rows, fresh has another
        structure, axis is neither 0 nor 1, or the layer is bidirectional.
    """
    refuse_both_directions(apply)
    time_first = checked_axis(axis) == 0
    if isinstance(inputs, PackedSequence):
        raise TypeError("run_rollout takes the arrays of a rollout, got a PackedSequence, which goes to layer.apply.")
    batch, *shape = padded_batch(inputs, True, "inputs")  # as it is, whichever axis is time
    flags = as_jax(resets, "resets")
    if flags.dtype != bool:
        raise TypeError(f"resets must be bool, got dtype {flags.dtype}. Of zeros and ones write resets.astype(bool).")
    names, (steps, rows) = ("[T, N]", shape) if time_first else ("[N, T]", shape[::-1])
    if list(flags.shape) != shape:
        raise ValueError(f"resets must be {names} = {shape}, as the inputs, got shape {list(flags.shape)}.")
    carried = checked_rows(carried, "carried", batch_axis, rows)
    if fresh is None:
        fresh = jax.tree.map(jnp.zeros_like, carried)
    fresh = checked_fresh(fresh, carried, "carried", batch_axis, rows, 1)
    fresh = jax.tree.map(lambda leaf, like: jnp.broadcast_to(leaf, like.shape).astype(like.dtype), fresh, carried)
    cells = batch, flags
    if not time_first:
        cells = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), cells)
    if not steps:  # a plan has a step at least
        cells = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype), cells)
    data, begins = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), cells)
    every = jnp.arange(rows, dtype=jnp.int32)
    packed = PackedSequence(data, jnp.full(rows, steps, jnp.int32), every, every, padded_plan(rows, steps))
    outputs, final = apply(params, packed, carried, resets=packed.replace(data=begins), fresh_state=fresh)

    def in_place(leaf: jax.Array) -> jax.Array:
        by_step = leaf.reshape(-1, rows, *leaf.shape[1:])[:steps]
        return by_step if time_first else jnp.swapaxes(by_step, 0, 1)

    return jax.tree.map(in_place, outputs.data), final
