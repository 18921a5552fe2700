"""TimedLayer: the base of layers whose inputs are several arrays, among them the time that has passed since a step."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpack._layers.params import floating
from jaxpack._layers.states import shapes_of
from jaxpack._linear.diagonal import split
from jaxpack._packed.inputs import as_batch
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._stepped.layer import SteppedLayer
from jaxpack._types import PyTree


class TimedLayer(SteppedLayer):
    """A layer whose inputs are a tuple of arrays: x, and dt last. The layer runs over all of them side by side."""

    @property
    @abc.abstractmethod
    def widths(self) -> Mapping[str, int | None]:
        """The features of each array of the inputs, by name; None for one number a step, without an axis."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one step of all inputs side by side."""
        return (sum(width or 1 for width in self.widths.values()),)

    def init(self, key: jax.Array, dtype: Any = None) -> dict[str, jax.Array]:
        """Draws weights and biases as torch.nn.Linear does: uniform within 1/sqrt(inputs of a product) of 0.

        Args:
          key: a JAX random key.
          dtype: a floating dtype. Default: JAX's (float32, or float64 under x64).

        Raises:
          TypeError: if key is not a random key, or dtype is not floating.
        """
        dtype, shapes = floating(float if dtype is None else dtype), self.shapes
        params = {}
        for each, (name, shape) in zip(split(key, len(shapes)), shapes.items(), strict=True):
            bound = 1 / math.sqrt(shape[0] if len(shape) > 1 else self.hidden_size)
            params[name] = jax.random.uniform(each, shape, dtype, -bound, bound)
        return params

    def apply(self, params: PyTree, inputs: Any, initial_state: PyTree = None, **options: Any) -> tuple[Any, PyTree]:
        """Runs the layer.

        Args:
          params: the parameters, as `init` returns them.
          inputs: the tuple of arrays, packed together, or padded [B, T, ...], or of one sequence [T, ...].
          initial_state: in the layout of the final state. Default: zeros.
          options: lengths, plan, resets, fresh_state, reverse, dtype and forward_mode, as in `jaxpack.MinGRU.apply`.

        Returns:
          A pair (output, final state), as `jaxpack.MinGRU.apply` does.

        Raises:
          ValueError: if the inputs are no such tuple, or as `jaxpack.MinGRU.apply` does.
          TypeError: as `jaxpack.MinGRU.apply` does.
        """
        if isinstance(inputs, PackedSequence):
            inputs = inputs.replace(data=self._side_by_side(inputs.data, ("S",)))
        else:
            lead = ("T",) if self._rank_of(inputs) == 1 else ("B", "T")
            inputs = self._side_by_side(jax.tree.map(lambda leaf: as_batch(leaf, "inputs"), inputs), lead)
        return super().apply(params, inputs, initial_state, **options)

    def step(self, params: PyTree, state: PyTree, x: Any) -> tuple[PyTree, jax.Array]:
        """Runs one step, for step-by-step decoding.

        Args:
          params: the parameters.
          state: the state, as `apply` returns it: leaves [B, ...], or without a batch axis. None for the first
            step of a sequence.
          x: the tuple of arrays of one step, [B, ...], or [...].

        Returns:
          The new state, and the output [B, O], or [O].

        Raises:
          ValueError: if a shape does not match the layer.
          TypeError: if x, parameters or state are complex.
        """
        lead = () if self._rank_of(x) == 0 else ("B",)
        return super().step(params, state, self._side_by_side(x, lead))

    def apart(self, joined: jax.Array) -> list[jax.Array]:
        """Returns the arrays [M, F] of inputs that are side by side; of one number a step [M, 1]."""
        ends, end = [], 0
        for width in self.widths.values():
            end += width or 1
            ends.append(end)
        return jnp.split(joined, ends[:-1], axis=-1)

    def _rank_of(self, inputs: Any) -> int:
        """Returns the number of axes of dt, or -1 if the inputs are no tuple."""
        return np.ndim(inputs[-1]) if isinstance(inputs, (tuple, list)) and inputs else -1

    def _side_by_side(self, inputs: Any, lead: tuple[str, ...]) -> jax.Array:
        """Returns the arrays of a tuple side by side, in one dtype."""
        widths, rank = self.widths, len(lead)
        forms = [f"{name} [{', '.join([*lead, *([str(width)] if width else [])])}]" for name, width in widths.items()]
        right = isinstance(inputs, (tuple, list)) and len(inputs) == len(widths)
        arrays: list[Any] = [jnp.asarray(each) for each in inputs] if right else []
        shapes = [jnp.shape(each) for each in arrays]
        expected = [shapes[0][:rank] + ((width,) if width else ()) for width in widths.values()] if right else None
        if shapes != expected or len(shapes[0]) != rank + 1:
            raise ValueError(
                f"{type(self).__name__} takes a tuple of {', '.join(forms)}, got {shapes_of(inputs)}. Pack them "
                f"together, or pad them to one length."
            )
        arrays = [each if width else each[..., None] for each, width in zip(arrays, widths.values(), strict=True)]
        dtype = jnp.result_type(*(each for each in arrays if each.dtype != bool))
        return jnp.concatenate([each.astype(dtype) for each in arrays], axis=-1)
