"""ComposedLayer: the base of layers that are made of other layers, and what they ask of those, of whatever kind."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpack._deep.batch import Batch
from jaxpack._layers.recurrent_layer import RecurrentLayer
from jaxpack._layers.states import shapes_of
from jaxpack._linear.diagonal import split
from jaxpack._linear.layer import SingleLayer
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._packed.resets import Entering
from jaxpack._stepped.timed import TimedLayer
from jaxpack._types import PyTree


class Options(NamedTuple):
    """The static part of a call.

    Attributes:
      dtype: the name of the dtype to compute in.
      forward_mode: whether the call must be differentiable in forward mode.
      all_outputs: whether to return the outputs of every layer of a stack.
    """

    dtype: str
    forward_mode: bool
    all_outputs: bool = False


class Given(NamedTuple):
    """What a layer is given beside its parameters and the batch.

    Attributes:
      entering: the states with which sequences and episodes begin; of a composed layer each is a tuple with one, or
        None, for each part.
      key: a random key for dropout; None for no dropout.
      options: the static part of the call.
    """

    entering: Entering
    key: jax.Array | None
    options: Options

    def to_part(self, i: int) -> Given:
        """Returns what the i-th part is given."""
        states = (None if state is None else state[i] for state in self.entering)
        return Given(Entering(*states), None if self.key is None else jax.random.fold_in(self.key, i), self.options)


class ComposedLayer(abc.ABC):
    """A layer made of other layers, its parts: the base class of Bidirectional and DeepRNN.

    Its parameters are a dict with those of each part, its state a tuple with that of each part, in the part's layout.
    """

    @property
    @abc.abstractmethod
    def parts(self) -> Mapping[str, Layer]:
        """The parts by their names in the parameters, in the order of their states."""

    @property
    @abc.abstractmethod
    def output_shape(self) -> tuple[int, ...]:
        """The shape of one step of the output of one sequence."""

    @abc.abstractmethod
    def apply(self, *args: Any, **options: Any) -> tuple[Any, ...]:
        """Runs the layer, as the class says."""

    @abc.abstractmethod
    def run(self, params: PyTree, batch: Batch, given: Given) -> tuple[Any, ...]:
        """Runs the parts inside a program.

        Args:
          params: the parameters.
          batch: the batch.
          given: the rest.

        Returns:
          The output, as data of the batch or a tuple of them, and the final states.
        """

    @property
    def _first(self) -> Layer:
        return next(iter(self.parts.values()))

    @property
    def input_size(self) -> int:
        """The width of the input."""
        return self._first.input_size

    @property
    def output_size(self) -> int:
        """The width of the output."""
        return self.output_shape[-1]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one step of one sequence."""
        return input_shape(self._first)

    @property
    def has_dropout(self) -> bool:
        """Whether there is dropout in any part, or between parts."""
        return any(map(has_dropout, self.parts.values()))

    @property
    def shapes(self) -> dict[str, Any]:
        """The shape of every parameter, as a pytree with the structure of the parameters."""
        return {name: part.shapes for name, part in self.parts.items()}

    def init(self, key: jax.Array, dtype: Any = None) -> dict[str, Any]:
        """Draws parameters, those of each part as it does by itself.

        Args:
          key: a JAX random key.
          dtype: a floating dtype. Default: JAX's (float32, or float64 under x64).

        Raises:
          TypeError: if key is not a random key, or dtype is not floating.
        """
        keys = split(key, len(self.parts))
        return {name: part.init(each, dtype) for each, (name, part) in zip(keys, self.parts.items(), strict=True)}

    def initial_state(self, params: PyTree, batch_size: int) -> tuple[Any, ...]:
        """Returns the states with which sequences begin: those of each part, learned ones or zeros.

        Args:
          params: the parameters, which determine dtypes.
          batch_size: the number B of sequences.

        Raises:
          TypeError, ValueError: if the parameters are not this layer's.
        """
        return tuple(part.initial_state(params[name], batch_size) for name, part in self.parts.items())


Layer = RecurrentLayer | SingleLayer | ComposedLayer


def check_part(name: str, layer: object) -> None:
    """Validates a part.

    Raises:
      TypeError: if it is no layer.
      ValueError: if it has two outputs, one for each direction.
    """
    if not isinstance(layer, Layer):
        raise TypeError(f"{name} must be a layer such as jaxpack.GRU(2, 4), got {layer!r}.")
    if getattr(layer, "merge", "concat") is None:
        raise ValueError(
            f"{name} ({type(layer).__name__}) has merge=None, which makes an output for each direction, but what comes "
            f'next takes one. Give it merge="concat", "sum", "mean" or "mul".'
        )


def input_shape(layer: Layer) -> tuple[int, ...]:
    """Returns the shape of one step of the inputs of one sequence."""
    return (layer.input_size,) if isinstance(layer, RecurrentLayer) else layer.input_shape


def output_shape(layer: Layer) -> tuple[int, ...]:
    """Returns the shape of one step of the output of one sequence."""
    return (layer.output_size,) if isinstance(layer, RecurrentLayer) else layer.output_shape


def size_of(shape: tuple[int, ...]) -> str:
    """Returns the shape of a step in words, for errors."""
    return f"{shape[0]} features" if len(shape) == 1 else f"{list(shape)}"


def has_dropout(layer: Layer) -> bool:
    """Returns whether a layer takes a key for dropout."""
    return not isinstance(layer, SingleLayer) and layer.has_dropout


def takes_tuple(layer: Layer) -> bool:
    """Returns whether the inputs of a layer are a tuple with the time between steps as its last array."""
    return takes_tuple(layer._first) if isinstance(layer, ComposedLayer) else isinstance(layer, TimedLayer)


def checked_state(name: str, layer: Layer, state: Any, batch_size: int | None) -> Any:
    """Returns the state of a layer as the user gave it, with an axis of one row for one sequence.

    Args:
      name: the argument, for errors.
      layer: the layer.
      state: its state. None for a whole part stands for its default.
      batch_size: B; None for one sequence without a batch axis.

    Raises:
      ValueError: if it is not in the layer's layout.
    """
    if state is None:
        return None
    state = tuple(state) if isinstance(state, list) else state
    if isinstance(layer, ComposedLayer):
        if not isinstance(state, tuple) or len(state) != len(layer.parts):
            raise ValueError(
                f"{name} must be a tuple of {len(layer.parts)}, with the state of each layer, or None for its default, "
                f"got {f'a tuple of {len(state)}' if isinstance(state, tuple) else shapes_of(state)}."
            )
        parts = zip(layer.parts.values(), state, strict=True)
        return tuple(checked_state(f"{name}[{i}]", part, each, batch_size) for i, (part, each) in enumerate(parts))
    rows = () if batch_size is None else (batch_size,)
    expected, found = _state_shapes(layer, rows), jax.tree.map(jnp.shape, state)
    if found != expected:
        raise ValueError(f"{name} must be a state of {layer}, of shape {expected}, got shape {found}.")
    return state if batch_size is not None else _moved(layer, state, jnp.expand_dims)


def of_one(layer: Layer, state: Any) -> Any:
    """Returns the state of a batch of one sequence without its batch axis."""
    if isinstance(layer, ComposedLayer):
        return tuple(of_one(part, each) for part, each in zip(layer.parts.values(), state, strict=True))
    return _moved(layer, state, jnp.squeeze)


def _moved(layer: Layer, state: Any, function: Any) -> Any:
    """Applies a function of an array and an axis to the batch axis of each array of a state."""
    axis = 1 if isinstance(layer, RecurrentLayer) else 0
    return jax.tree.map(lambda leaf: function(jnp.asarray(leaf), axis), state)


def _state_shapes(layer: RecurrentLayer | SingleLayer, rows: tuple[int, ...]) -> Any:
    if isinstance(layer, RecurrentLayer):
        count = layer.num_layers * layer.num_directions
        return jax.tree.map(lambda size: (count, *rows, size), layer.cell.state_sizes)
    return jax.tree.map(lambda leaf: (*rows, *leaf.shape), layer.state_like(float))


def run_part(part: Layer, params: PyTree, batch: Batch, given: Given, from_end: bool = False) -> tuple[jax.Array, Any]:
    """Runs one part over a batch.

    Args:
      part: the layer.
      params: its parameters.
      batch: the batch, whose data are its inputs.
      given: what the part is given beside them.
      from_end: whether to read each sequence from its end.

    Returns:
      Its output, as data of the batch, and its final state.
    """
    more: dict[str, Any] = {}
    if has_dropout(part):
        more |= {"dropout_key": given.key, "deterministic": given.key is None}
    if from_end and isinstance(part, SingleLayer):
        more["reverse"] = True
    turned = from_end and not isinstance(part, SingleLayer)
    read = batch.reversed() if turned else batch
    output, final = part.apply(
        params,
        read.inputs,
        given.entering.initial,
        lengths=read.lengths,
        resets=read.resets,
        fresh_state=given.entering.fresh,
        dtype=given.options.dtype,
        forward_mode=given.options.forward_mode,
        **more,
    )
    data = output.data if isinstance(output, PackedSequence) else output
    return batch.turned(data) if turned else data, final
