"""Stream: a layer over inputs that never end, a step or a chunk at a time, whose users come and go."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxpack._dtypes import as_jax
from jaxpack._packed.broadcast import tree_where
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._plans.planners import plan_padded
from jaxpack._types import PyTree


@dataclasses.dataclass(frozen=True)
class Stream:
    """A layer over inputs that arrive in pieces: one row for each user, each at its own time.

    Its state is a pytree whose arrays have the rows in front, [B, ...], whatever the layout of the layer's own state. A
    row that gets no steps keeps its state bit for bit. A new user takes a free row with `begins`. Pieces of one shape
    under one plan are one program, whoever is in the rows.

    Examples:
      >>> layer = jaxpack.GRU(2, 4)
      >>> params, stream = layer.init(jax.random.key(0)), Stream(layer)
      >>> state = stream.init(params, 3)
      >>> x = jnp.ones((3, 5, 2))
      >>> output, state = stream.chunk(params, x, state, lengths=[5, 2, 0])  # the third row waits
      >>> y, state = stream.step(params, x[:, 0], state, begins=jnp.array([False, True, False]))  # one user leaves
      >>> output.shape, y.shape, state.shape
      ((3, 5, 4), (3, 4), (3, 1, 4))
      >>> bool(jnp.all(y[1] == y[2])), bool(jnp.all(y[0] == y[1]))  # both have now seen one step
      (True, False)

    Args:
      layer: an RNN, LSTM, GRU or any other layer of jaxpack, one with `apply` and `initial_state`.

    Raises:
      TypeError: if it is not such a layer.
      ValueError: if it is bidirectional: a backward direction begins at the end, which never comes.
    """

    layer: Any

    def __post_init__(self) -> None:
        if isinstance(self.layer, type) or not (hasattr(self.layer, "apply") and hasattr(self.layer, "initial_state")):
            raise TypeError(f"layer must be a layer of jaxpack, such as jaxpack.LSTM(12, 32), got {self.layer!r}.")
        if getattr(self.layer, "bidirectional", False):
            raise ValueError(
                f"a stream has no end at which a backward direction could begin, but {self.layer} is bidirectional. "
                f"Run it over whole sequences, or make the layer with bidirectional=False."
            )

    def init(self, params: PyTree, batch_size: int | None = None) -> PyTree:
        """Returns the state before the first step: zeros, or the layer's learned initial state.

        Examples:
          >>> lstm = jaxpack.LSTM(2, 4, num_layers=3)
          >>> h, c = Stream(lstm).init(lstm.init(jax.random.key(0)), 8)
          >>> h.shape
          (8, 3, 4)

        Args:
          params: the layer's parameters, which determine dtypes.
          batch_size: the number B of rows. Default: one user without a batch axis.

        Returns:
          The state, with the rows in front: leaves [B, ...].
        """
        state = self.layer.initial_state(params, 1 if batch_size is None else batch_size)
        state = jax.tree.map(lambda axis, leaf: jnp.moveaxis(leaf, axis, 0), self._batch_axes(params), state)
        return jax.tree.map(lambda leaf: leaf[0], state) if batch_size is None else state

    def chunk(
        self,
        params: PyTree,
        inputs: PackedSequence | ArrayLike,
        state: PyTree,
        *,
        lengths: ArrayLike | list[int] | None = None,
        begins: ArrayLike | None = None,
        fresh: PyTree = None,
    ) -> tuple[Any, PyTree]:
        """Runs the next steps of each row.

        Examples:
          Chunks of a sequence give what the whole gives:

          >>> layer = jaxpack.MinGRU(2, 4)
          >>> params, stream = layer.init(jax.random.key(0)), Stream(layer)
          >>> x, state = jnp.ones((1, 6, 2)), stream.init(params, 1)
          >>> for start in (0, 2, 4):
          ...     output, state = stream.chunk(params, x[:, start : start + 2], state)
          >>> bool(jnp.allclose(output, layer.apply(params, x)[0][:, 4:], atol=1e-6))
          True

        Args:
          params: the layer's parameters.
          inputs: padded [B, C, F], for at most C steps a row; or packed data [S, F] under the plan of all chunks.
          state: as `init` or the last call returned it.
          lengths: int [B], for padded inputs: the steps of each row, 0 for rows that wait. Default: all C.
          begins: bool [B], the rows in which a new user begins with these steps. Default: none.
          fresh: the state from which users begin, [B, ...] or, for all, [1, ...]. Default: as `init` returns it.

        Returns:
          The outputs in the layout of the inputs, with zeros past each length, and the state after the last step.

        Raises:
          ValueError: if state is for another number of rows or another layer, or begins is not one bool a row.
          TypeError: if begins are not bool, or inputs are packed and lengths are given too.
        """
        axes = self._batch_axes(params)
        if begins is not None:
            state = self._begun(state, begins, self.init(params, 1) if fresh is None else fresh)
        inner = jax.tree.map(lambda axis, leaf: jnp.moveaxis(leaf, 0, axis), axes, self._checked(state, axes))
        options: dict[str, Any] = {"deterministic": True} if getattr(self.layer, "has_dropout", False) else {}
        if not isinstance(inputs, PackedSequence):
            inputs = as_jax(inputs, "inputs")
            if inputs.ndim != 3 or not inputs.shape[0]:
                raise ValueError(f"inputs must be [B, C, {self.layer.input_size}], got shape {list(inputs.shape)}.")
            options["plan"] = plan_padded(inputs.shape[0], max(inputs.shape[1], 1))
        if lengths is not None:
            options["lengths"] = lengths
        outputs, final = self.layer.apply(params, inputs, inner, **options)
        return outputs, jax.tree.map(lambda axis, leaf: jnp.moveaxis(leaf, axis, 0), axes, final)

    def step(
        self,
        params: PyTree,
        x: ArrayLike,
        state: PyTree,
        *,
        active: ArrayLike | None = None,
        begins: ArrayLike | None = None,
        fresh: PyTree = None,
    ) -> tuple[jax.Array, PyTree]:
        """Runs the next step of the rows that have one.

        Examples:
          >>> rnn = jaxpack.RNN(2, 4)
          >>> params, stream = rnn.init(jax.random.key(0)), Stream(rnn)
          >>> y, state = stream.step(params, jnp.ones((2, 2)), stream.init(params, 2), active=jnp.array([True, False]))
          >>> bool(jnp.any(state[0])), bool(jnp.any(state[1]))
          (True, False)

        Args:
          params: the layer's parameters.
          x: [B, F].
          state, begins, fresh: as in `chunk`.
          active: bool [B], the rows that have a step; the others keep their state. Default: all.

        Returns:
          The outputs [B, O], zeros for rows without a step, and the state.

        Raises as `chunk`.
        """
        x = as_jax(x, "x")
        if x.ndim != 2:
            raise ValueError(f"x must be one step a row, [B, {self.layer.input_size}], got shape {list(x.shape)}.")
        lengths = None if active is None else _flags(active, "active", len(x)).astype(jnp.int32)
        outputs, state = self.chunk(params, x[:, None], state, lengths=lengths, begins=begins, fresh=fresh)
        return outputs[:, 0], state

    def _begun(self, state: PyTree, begins: ArrayLike, fresh: PyTree) -> PyTree:
        """Returns the state with that of new users where they begin."""
        leaves = jax.tree.leaves(state)
        flags = _flags(begins, "begins", len(leaves[0]) if leaves else 0)
        return tree_where(flags, jax.tree.map(jnp.asarray, fresh), jax.tree.map(jnp.asarray, state))

    def _checked(self, state: PyTree, axes: PyTree) -> PyTree:
        """Returns a state as arrays; raises ValueError unless it is structured as the layer's, rows in front."""
        found: Any = jax.tree.structure(state)
        expected: Any = jax.tree.structure(axes)
        if found != expected or any(not jnp.ndim(leaf) for leaf in jax.tree.leaves(state)):
            raise ValueError(
                f"state must be what Stream.init(params, batch_size) returns, with the structure {expected} and rows "
                f"in front, got {jax.tree.map(jnp.shape, state)}."
            )
        return jax.tree.map(jnp.asarray, state)

    def _batch_axes(self, params: PyTree) -> PyTree:
        """Returns the axis of rows in each array of the layer's state: the one that grows with the batch."""

        def grown(one: Any, two: Any) -> int:
            return next(axis for axis, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b)

        one, two = (
            jax.eval_shape(lambda params, rows=rows: self.layer.initial_state(params, rows), params) for rows in (1, 2)
        )
        return jax.tree.map(grown, one, two)


def _flags(flags: ArrayLike, name: str, count: int) -> jax.Array:
    """Returns flags [B]; raises unless they are one bool a row."""
    array = as_jax(flags, name)
    if array.dtype != bool:
        raise TypeError(f"{name} must be bool, got dtype {array.dtype}.")
    if array.shape != (count,):
        raise ValueError(f"{name} must be one bool for each of the {count} rows, got shape {list(array.shape)}.")
    return array
