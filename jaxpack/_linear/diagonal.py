"""DiagonalLayer: the base of layers whose state decays feature by feature, h_t = a_t * h_{t-1} + b_t."""

from __future__ import annotations

import abc
from typing import Any

import jax
import jax.numpy as jnp

from jaxpack._linear.chunks import Operands, Recurrence, run_chunks
from jaxpack._linear.layer import Direction, SingleLayer
from jaxpack._linear.reading import Reading
from jaxpack._linear.solve import accumulator
from jaxpack._packed.broadcast import expand
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._packed.resets import Entering
from jaxpack._types import PyTree


class DiagonalLayer(SingleLayer):
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
        self, params: PyTree, packed: PackedSequence, entering: Entering, resets: jax.Array | None, direction: Direction
    ) -> tuple[jax.Array, PyTree]:
        """Runs the recurrence over a batch, a chunk of steps at a time."""
        order, places = packed.sorted_indices, packed.unsorted_indices
        reading = Reading.of(packed.replace(data=None), resets, direction.reverse)
        initial, fresh = (None if state is None else self.enter(state)[order] for state in entering)
        used, used_fresh = jax.tree.map(
            lambda each: jnp.where(expand(reading.empty, each), 0, each),  # others may be NaN
            (initial, fresh),
        )
        table = used
        if fresh is not None:
            table = jnp.concatenate([jnp.zeros_like(fresh) if used is None else used, used_fresh])
        operands = Operands(self.prepare(params), packed.data, table)
        recurrence = Recurrence(self, packed.plan, direction.reverse, direction.planned)
        y, final = run_chunks(recurrence, operands, reading, direction.forward_mode)
        if initial is not None:
            final = jnp.where(expand(reading.empty, final), initial.astype(final.dtype), final)
        return y, jax.tree.map(lambda leaf: leaf[places], self.leave(final, direction.state_dtype))

    def step_batch(self, params: PyTree, state: PyTree, x: jax.Array) -> tuple[PyTree, jax.Array]:
        """Computes the equations of one step."""
        prepared = self.prepare(params)
        decay, h = self.gates(prepared, x, jnp.full(len(x), state is None))
        h = h.astype(accumulator(h.dtype))
        if state is not None:
            h += decay.astype(h.dtype) * self.enter(state).astype(h.dtype)
        return self.leave(h, x.dtype), self.readout(prepared, x, h).astype(x.dtype)


def split(key: jax.Array, number: int) -> jax.Array:
    """Returns keys. Raises TypeError if the key is none."""
    try:
        return jax.random.split(key, number)
    except TypeError as error:
        raise TypeError(f"key must be a JAX random key, such as jax.random.key(0), got {key!r}.") from error
