"""run_rollout: a layer over a rollout as it is, whose rows continue, and whose episodes begin from another state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy.typing as npt

from jaxpack._dtypes import as_jax
from jaxpack._packed.gather import rearrange
from jaxpack._packed.inputs import padded_batch
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._rollouts.chunks import refuse_both_directions
from jaxpack._rollouts.states import checked_fresh, checked_rows, where_rows
from jaxpack._types import PyTree


def run_rollout(
    apply: Callable[..., tuple[PyTree, PyTree]],
    params: PyTree,
    inputs: PyTree,
    resets: npt.ArrayLike,
    carried: PyTree,
    fresh: PyTree = None,
    *,
    batch_axis: int,
) -> tuple[PyTree, PyTree]:
    """Runs a layer over a rollout in one call, inside `jit` or outside.

        h_t = step(fresh   if resets_t else h_{t-1}, x_t),    h_{-1} = carried

    A layer's `resets=` alone returns to the state from which the row started, `carried`. So the steps of each row
    before its first reset run as a sequence of their own, beside the rest: 2 N sequences with as many steps in all.
    They run without a plan: on a CPU in loops that follow their lengths, on a GPU as a padded batch of 2 N rows.

    Examples:
      >>> layer = jaxpack.MinGRU(2, 4)
      >>> params, x = layer.init(jax.random.key(0)), jnp.ones((3, 5, 2))
      >>> resets = jnp.zeros((3, 5), bool).at[0, 3].set(True)
      >>> output, state = run_rollout(layer.apply, params, x, resets, jnp.full((3, 4), 2.0), batch_axis=0)
      >>> alone, _ = layer.apply(params, x[:1, :2])  # the episode that begins at step 3 of the first row, from zeros
      >>> bool(jnp.allclose(output[0, 3:], alone[0], atol=1e-6)), bool(jnp.all(output[1] == output[2]))
      (True, True)

    Args:
      apply: the layer: apply(params, inputs, state, lengths=, resets=) -> (outputs, state), such as `gru.apply`, for
        one direction; bind other options with functools.partial.
      params: the layer's parameters.
      inputs: [N, T, *F] (batch first), or a pytree of such arrays.
      resets: bool [N, T], which may be traced: True where a step begins an episode, as `resets_from_dones` returns it.
      carried: the state of each row before the first step, with N rows at the batch axis. The last call's final state.
      fresh: the state at the beginning of an episode, with N rows or one for all. Default: zeros.
      batch_axis: 1 for the states of RNN, LSTM and GRU, [num_layers * D, N, H]; 0 where N comes first.

    Returns:
      The outputs [N, T, *G], and the state of each row after its last step.

    Raises:
      TypeError: if resets are not bool, or inputs are packed (pack resets beside them, or see `cut_rollout`).
      ValueError: if resets are not [N, T], a state has another number of rows, fresh has another structure, or the
        layer is bidirectional.
    """
    refuse_both_directions(apply)
    if isinstance(inputs, PackedSequence):
        raise TypeError("run_rollout takes a rollout [N, T, ...], got a PackedSequence. Fragments go to layer.apply.")
    batch, rows, steps = padded_batch(inputs, True, "inputs")
    flags = as_jax(resets, "resets")
    if flags.dtype != bool:
        raise TypeError(f"resets must be bool, got dtype {flags.dtype}. Of zeros and ones write resets.astype(bool).")
    if flags.shape != (rows, steps):
        raise ValueError(f"resets must be [N, T] = {[rows, steps]}, as the inputs, got shape {list(flags.shape)}.")
    carried = checked_rows(carried, "carried", batch_axis, rows)
    if fresh is None:
        fresh = jax.tree.map(jnp.zeros_like, carried)
    fresh = checked_fresh(fresh, carried, "carried", batch_axis, rows, 1)
    halves = _Halves.of(flags)
    state = jax.tree.map(functools.partial(_one_after_the_other, axis=batch_axis), carried, fresh)
    pieces, begins = halves.split(batch), halves.split(flags)
    outputs, final = apply(params, pieces, state, lengths=halves.lengths, resets=begins)
    before, after = (jax.tree.map(lambda leaf, i=i: jnp.split(leaf, 2, batch_axis)[i], final) for i in range(2))
    return halves.join(outputs), where_rows(halves.first < steps, after, before, batch_axis)


class _Halves(NamedTuple):
    """The rows of a rollout, each cut before its first reset: 2 N sequences, the first N of which continue.

    Attributes:
      first: int32 [N], the step of the first reset; T without one.
      places: int32 [2 * N * T], the step of the rollout, flattened, at each step of the sequences; N * T for none.
      cells: int32 [N * T], the inverse.
    """

    first: jax.Array
    places: jax.Array
    cells: jax.Array

    @classmethod
    def of(cls, resets: jax.Array) -> _Halves:
        """Computes the cut of resets [N, T]."""
        rows, steps = resets.shape
        first = jnp.where(resets.any(1), resets.argmax(1), steps).astype(jnp.int32) if steps else jnp.zeros(rows, int)
        n, t = jnp.arange(rows, dtype=jnp.int32)[:, None], jnp.arange(steps, dtype=jnp.int32)
        border = first[:, None]
        before = jnp.where(t < border, n * steps + t, rows * steps)
        after = jnp.where(t + border < steps, n * steps + t + border, rows * steps)
        cells = jnp.where(t < border, n * steps + t, (rows + n) * steps + t - border)
        return cls(first, jnp.concatenate([before, after]).reshape(-1), cells.reshape(-1))

    @property
    def lengths(self) -> jax.Array:
        """The steps of each sequence: int32 [2 N]."""
        return jnp.concatenate([self.first, len(self.cells) // max(len(self.first), 1) - self.first])

    def split(self, tree: PyTree) -> PyTree:
        """Returns [2 N, T, ...] from [N, T, ...], zeros past each length."""

        def move(leaf: jax.Array) -> jax.Array:
            flat = leaf.reshape(-1, *leaf.shape[2:])
            return rearrange(flat, self.places, self.cells).reshape(2 * len(leaf), *leaf.shape[1:])

        return jax.tree.map(move, tree)

    def join(self, tree: PyTree) -> PyTree:
        """Returns [N, T, ...] from [2 N, T, ...]."""

        def move(leaf: jax.Array) -> jax.Array:
            flat = leaf.reshape(-1, *leaf.shape[2:])
            return rearrange(flat, self.cells, self.places).reshape(len(leaf) // 2, *leaf.shape[1:])

        return jax.tree.map(move, tree)


def _one_after_the_other(carried: jax.Array, fresh: jax.Array, axis: int) -> jax.Array:
    """Returns a state of 2 N rows: those that continue, and those that begin."""
    return jnp.concatenate([carried, jnp.broadcast_to(fresh, carried.shape).astype(carried.dtype)], axis)
