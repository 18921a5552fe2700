"""DiagonalLayer: the base of layers whose state decays feature by feature, h_t = a_t * h_{t-1} + b_t."""

from __future__ import annotations

import abc
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxpack._layers.params import check_params
from jaxpack._linear.chunks import Operands, Recurrence, run_chunks
from jaxpack._linear.layer import Direction, LinearLayer
from jaxpack._linear.reading import Reading
from jaxpack._linear.solve import accumulator
from jaxpack._packed.broadcast import expand
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._types import PyTree


class DiagonalLayer(LinearLayer):
    """A linear layer that states a, b and its output for each step; what they are in time follows from that."""

    def prepare(self, params: PyTree) -> PyTree:
        """Returns what `gates` and `readout` take as parameters, computed before the loops; by default the same."""
        return params

    @abc.abstractmethod
    def gates(self, params: PyTree, x: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the decay a [M, *H], or [1, *H] for all cells, and the injected b [M, *H].

        Args:
          params: the parameters, prepared.
          x: [M, F], the inputs of M cells.
          start: bool [M], where a sequence begins with a state of zeros.
        """

    def readout(self, params: PyTree, x: jax.Array, h: jax.Array) -> jax.Array:
        """Returns the outputs [M, O] of M cells from inputs [M, F] and states [M, *H]; by default the states."""
        return h

    def enter(self, state: PyTree) -> jax.Array:
        """Returns h from a state as users have it."""
        return state

    def leave(self, h: jax.Array, dtype: Any) -> PyTree:
        """Returns a state as users have it, in a dtype, from h."""
        return h.astype(dtype)

    def state_like(self, dtype: Any) -> jax.ShapeDtypeStruct:
        """Returns the state of one sequence, h."""
        return jax.ShapeDtypeStruct((self.hidden_size,), dtype)

    def run(
        self, params: PyTree, packed: PackedSequence, state: PyTree, resets: jax.Array | None, direction: Direction
    ) -> tuple[jax.Array, PyTree]:
        """Runs the recurrence over a batch, a chunk of steps at a time."""
        order, places = packed.sorted_indices, packed.unsorted_indices
        reading = Reading.of(packed.replace(data=None), resets, direction.reverse)
        initial = None if state is None else self.enter(state)[order]
        used = None if initial is None else jnp.where(expand(reading.empty, initial), 0, initial)  # others may be NaN
        operands = Operands(self.prepare(params), packed.data, used)
        recurrence = Recurrence(self, packed.plan, direction.reverse, direction.planned)
        y, final = run_chunks(recurrence, operands, reading, direction.forward_mode)
        if initial is not None:
            final = jnp.where(expand(reading.empty, final), initial.astype(final.dtype), final)
        return y, jax.tree.map(lambda leaf: leaf[places], self.leave(final, packed.data.dtype))

    def step(self, params: PyTree, state: PyTree, x: ArrayLike) -> tuple[PyTree, jax.Array]:
        """Runs one step, for step-by-step decoding.

        Args:
          params: the parameters.
          state: the state, as `apply` returns it: leaves [B, ...], or without a batch axis. None for the first
            step of a sequence.
          x: [B, F], or [F].

        Returns:
          The new state, and the output [B, O], or [O].

        Raises:
          ValueError: if a shape does not match the layer.
        """
        dtype = jnp.result_type(x, check_params(params, self.shapes, self), float)
        x = jnp.asarray(x, dtype)
        if x.ndim not in (1, 2) or x.shape[-1] != self.input_size:
            raise ValueError(f"x must be [B, {self.input_size}] or [{self.input_size}], got shape {x.shape}.")
        given = None if state is None else self._checked_state(state, x.shape[:-1], dtype)
        if x.ndim == 1:
            given, y = self.step(params, jax.tree.map(lambda leaf: leaf[None], given), x[None])
            return jax.tree.map(lambda leaf: leaf[0], given), y[0]
        prepared = self.prepare(jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params))
        decay, h = self.gates(prepared, x, jnp.full(len(x), given is None))
        h = h.astype(accumulator(h.dtype))
        if given is not None:
            h += decay.astype(h.dtype) * self.enter(given).astype(h.dtype)
        return self.leave(h, dtype), self.readout(prepared, x, h).astype(dtype)


def split(key: jax.Array, number: int) -> jax.Array:
    """Returns keys. Raises TypeError if the key is none."""
    try:
        return jax.random.split(key, number)
    except TypeError as error:
        raise TypeError(f"key must be a JAX random key, such as jax.random.key(0), got {key!r}.") from error
