"""DeepRNN: layers of any kinds and widths, one after the other, with what stands between them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxpack._deep.batch import Batch
from jaxpack._deep.call import Call, run_composed
from jaxpack._deep.composed import (
    ComposedLayer,
    Given,
    Layer,
    check_part,
    has_dropout,
    input_shape,
    output_shape,
    run_part,
    size_of,
    takes_tuple,
)
from jaxpack._deep.connections import (
    CONNECTIONS,
    connected,
    gate_shapes,
    init_gate,
    init_norm,
    norm_shapes,
    normalized,
)
from jaxpack._linear.diagonal import split
from jaxpack._packed.dropout import check_rate
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree


@dataclasses.dataclass(frozen=True)
class DeepRNN(ComposedLayer):
    """A stack of layers of any kinds and widths, each over the outputs of the one before. Returns (output, states).

    The layers are any of jaxpack, `Bidirectional` and further stacks included. The state is a tuple with that of each
    layer. The output is that of the last layer; `jaxpack.last(output)` is the one of each sequence's last step.

    Examples:
      >>> layers = [jaxpack.LSTM(2, 4, bidirectional=True), jaxpack.MinGRU(8, 8), jaxpack.SLSTM(8, 8)]
      >>> stack = jaxpack.DeepRNN(layers, connection=(None, "residual", "highway"), norm=True)
      >>> params = stack.init(jax.random.key(0))
      >>> sorted(params)
      ['highway_2', 'layer_0', 'layer_1', 'layer_2', 'norm_1', 'norm_2']
      >>> packed = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
      >>> output, states = stack.apply(params, packed)
      >>> output.shape, len(states)
      ((4, 8), 3)

    Args:
      layers: the layers, from the input up. One whose inputs are a tuple (GRUD, CfC, TimeDecay) can be the first.
      connection: what a layer hands on beside its output y, given its input x. None: y alone. "residual": x + y.
        "highway": t y + (1 - t) x with t = σ(W x + b). A tuple names one of these three for each layer. "skip": y, but
        each layer after the first takes the inputs of the stack and the output of the layer before side by side, and
        the output of the stack is the outputs of all layers side by side.
      norm: whether to normalise what each layer after the first takes from the one before (layer normalisation of the
        last axis, with a learned scale and bias). A connection goes around it: x + layer(norm(x)).
      dropout: the probability of a zero in what each layer after the first takes from the one before.
      locked: whether dropout draws one mask for each sequence, the same at all its steps, not one for each step.

    Raises:
      TypeError: if layers are not layers, or norm or locked is not a bool.
      ValueError: if there is no layer, widths do not chain, a connection is not known or does not fit, one of the
        layers has merge=None, or dropout is not in [0, 1].
    Source: mirrors hk.DeepRNN and, with "skip", hk.deep_rnn_with_skip_connections; keras.layers.StackedRNNCells.
    """

    layers: Sequence[Layer]
    _: dataclasses.KW_ONLY
    connection: str | Sequence[str | None] | None = None
    norm: bool = False
    dropout: float = 0.0
    locked: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.layers, str) or not isinstance(self.layers, Sequence):
            raise TypeError(f"layers must be a list of layers such as [jaxpack.GRU(2, 4)], got {self.layers!r}.")
        if not self.layers:
            raise ValueError("layers is empty: a stack has at least one.")
        object.__setattr__(self, "layers", tuple(self.layers))
        for i, layer in enumerate(self.layers):
            check_part(f"layers[{i}]", layer)
        for name in ("norm", "locked"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}.")
        check_rate("dropout", self.dropout)
        if isinstance(self.connection, Sequence) and not isinstance(self.connection, str):
            object.__setattr__(self, "connection", tuple(self.connection))
        self._check_connection()
        for i in range(1, len(self.layers)):
            self._check_chain(i)

    def _check_connection(self) -> None:
        known = [*CONNECTIONS, "skip"] if not isinstance(self.connection, tuple) else CONNECTIONS
        of_layers = self.connection if isinstance(self.connection, tuple) else (self.connection,)
        for each in of_layers:
            if each not in known:
                raise ValueError(
                    f'connection must be None, "residual", "highway" or "skip", or a tuple with one of the first three '
                    f"for each layer, got {self.connection!r}."
                )
        if len(self._connections) != len(self.layers):
            raise ValueError(
                f"connection must name one connection for each of the {len(self.layers)} layers, got {self.connection}."
            )
        for i, (layer, connection) in enumerate(zip(self.layers, self._connections, strict=True)):
            taken, given = input_shape(layer), output_shape(layer)
            if connection is not None and (taken != given or takes_tuple(layer)):
                inputs = "a tuple of inputs" if takes_tuple(layer) else size_of(taken)
                raise ValueError(
                    f'a "{connection}" connection adds the input of a layer to its output, so both have one shape, but '
                    f"{_name(i, layer)} takes {inputs} and gives {size_of(given)} a step. Name connections layer "
                    f"by layer, with None for this one, or change its size."
                )

    def _check_chain(self, i: int) -> None:
        """Raises ValueError unless a layer after the first takes what comes before it."""
        layer, before = self.layers[i], self.layers[i - 1]
        taken, given = input_shape(layer), output_shape(before)
        if takes_tuple(layer) or (self._skips and takes_tuple(self._first)):
            raise ValueError(
                f"{_name(i, layer)} cannot come after {_name(i - 1, before)}: inputs with the time between steps are a "
                f'tuple, which only the first layer of a stack takes, without connection="skip".'
            )
        source = f"{_name(i - 1, before)} gives {size_of(given)}"
        if self._skips:
            from_input = input_shape(self._first)
            source += f", beside the inputs of the stack, {size_of(from_input)}"
            given = (*given[:-1], from_input[-1] + given[-1]) if from_input[:-1] == given[:-1] else ()
        if taken != given:
            way_out = f" Make its input_size {given[-1]}." if given and taken[:-1] == given[:-1] else ""
            raise ValueError(f"{_name(i, layer)} takes {size_of(taken)} a step, but {source}.{way_out}")

    @functools.cached_property
    def parts(self) -> dict[str, Layer]:
        """The layers by name: layer_0, layer_1, ..."""
        return {f"layer_{i}": layer for i, layer in enumerate(self.layers)}

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of one step of the output of one sequence."""
        shapes = [output_shape(layer) for layer in self.layers]
        width = sum(shape[-1] for shape in shapes) if self._skips else shapes[-1][-1]
        return (*shapes[-1][:-1], width)

    @property
    def has_dropout(self) -> bool:
        """Whether there is dropout between layers, or in one of them."""
        return (self.dropout > 0 and len(self.layers) > 1) or any(map(has_dropout, self.layers))

    @property
    def _skips(self) -> bool:
        return self.connection == "skip"

    @property
    def _connections(self) -> tuple[str | None, ...]:
        """The connection of each layer."""
        of_all: Any = None if self._skips else self.connection
        return of_all if isinstance(of_all, tuple) else (of_all,) * len(self.layers)

    @property
    def _norms(self) -> dict[str, int]:
        """The norms by name, with their widths."""
        before = enumerate(self.layers[:-1], 1)
        return {f"norm_{i}": output_shape(layer)[-1] for i, layer in before} if self.norm else {}

    @property
    def _gates(self) -> dict[str, int]:
        """The highway gates by name, with their widths."""
        each = enumerate(zip(self.layers, self._connections, strict=True))
        return {f"highway_{i}": output_shape(layer)[-1] for i, (layer, name) in each if name == "highway"}

    @property
    def shapes(self) -> dict[str, Any]:
        """The shape of every parameter, as a pytree with the structure of the parameters."""
        norms = {name: norm_shapes(width) for name, width in self._norms.items()}
        gates = {name: gate_shapes(width) for name, width in self._gates.items()}
        return super().shapes | norms | gates

    def init(self, key: jax.Array, dtype: Any = None) -> dict[str, Any]:
        """Draws parameters, those of each layer as it does by itself.

        To draw a layer with options of its own, put its parameters in place:
        `params["layer_0"] = stack.layers[0].init(key, scheme="keras")`.

        Norms begin with scale 1 and bias 0, highway gates as torch.nn.Linear does and with bias -1, so that layers
        begin mostly carrying their input.

        Args:
          key: a JAX random key.
          dtype: a floating dtype. Default: JAX's (float32, or float64 under x64).

        Raises:
          TypeError: if key is not a random key, or dtype is not floating.
        """
        of_layers, *of_gates = split(key, 1 + len(self._gates))
        norms = {name: init_norm(width, dtype) for name, width in self._norms.items()}
        gates = zip(of_gates, self._gates.items(), strict=True)
        drawn = {name: init_gate(each, width, dtype) for each, (name, width) in gates}
        return super().init(of_layers, dtype) | norms | drawn

    def apply(
        self,
        params: PyTree,
        inputs: Any,
        initial_state: Any = None,
        dropout_key: jax.Array | None = None,
        *,
        lengths: ArrayLike | Sequence[int] | None = None,
        mask: ArrayLike | None = None,
        plan: BucketPlan | None = None,
        resets: PackedSequence | ArrayLike | None = None,
        fresh_state: Any = None,
        deterministic: bool = False,
        dtype: Any = None,
        forward_mode: bool = False,
        return_layer_outputs: bool = False,
    ) -> tuple[Any, ...]:
        """Runs the layers, in one program.

        Examples:
          >>> stack = jaxpack.DeepRNN([jaxpack.GRU(2, 4), jaxpack.LRU(4, 4)], connection=(None, "residual"))
          >>> params = stack.init(jax.random.key(0))
          >>> x = np.ones((2, 3, 2))
          >>> output, (gru, lru), (first, second) = stack.apply(params, x, lengths=[3, 1], return_layer_outputs=True)
          >>> output.shape, first.shape, gru.shape, lru.shape
          ((2, 3, 4), (2, 3, 4), (1, 2, 4), (2, 2, 4))

        Args:
          params: the parameters, as `init` returns them: those of the layers under layer_0, layer_1, ..., of norms
            under norm_1, ..., and of highway gates under highway_0, ...
          inputs: packed data [S, F]; or padded [B, T, F] (batch first), with `lengths` or `mask`; or one sequence
            [T, F]. Where the first layer takes a tuple, a tuple.
          initial_state: a tuple with a state for each layer, in the layout of its final state, or None for its default.
          dropout_key: a JAX random key. Needed if there is dropout, between layers or in one, unless deterministic.
          lengths: int [B], for padded inputs; a number for one sequence. They may be traced. Default: all T.
          mask: bool [B, T], in place of lengths, True at valid steps; [T] for one sequence. Padding may be anywhere,
            and the valid steps are moved together once for all layers.
          plan: for padded inputs, the static shape to run under: the batch is packed once, and the output padded once.
            Default: no plan, one program for all lengths; each layer runs the padded batch as it does by itself.
          resets: bool, one a step, laid out as the inputs: True where an episode begins, in all layers.
          fresh_state: beside resets, a tuple with the state of each layer with which episodes begin, or None for its
            initial state. Default: None for all.
          deterministic: set True to leave all dropout out, as in evaluation.
          dtype: a floating dtype to compute in, for all layers. In mixed precision norms and highway gates are float32.
            Default: the result type of inputs and parameters.
          forward_mode: set True to differentiate this call in forward mode (jax.jvp, jacfwd, linearize).
          return_layer_outputs: set True to return what each layer hands on as well.

        Returns:
          A pair (output, states); with return_layer_outputs (output, states, outputs of the layers).

          The output has the layout of the inputs, with zeros past each length. The states are a tuple with the final
          state of each layer, in its own layout. Sequences that do not fit the plan are NaN in all of them.

        Raises:
          ValueError: if a shape does not match the stack or the batch, a concrete length does not fit, there is dropout
            and no key, or there is a fresh state without resets.
          TypeError: if inputs are packed and lengths, mask or plan are given too, both lengths and mask are given, one
            of inputs and resets is packed and the other padded, mask or resets are not bool, parameters have another
            structure, dtype is not floating, or the call is differentiated in forward mode without forward_mode.
        """
        given = initial_state, dropout_key, lengths, mask, plan, resets, fresh_state
        call = Call(*given, deterministic, dtype, forward_mode, return_layer_outputs)
        return run_composed(self, params, inputs, call)

    def run(self, params: PyTree, batch: Batch, given: Given) -> tuple[Any, ...]:
        """Runs the layers inside a program."""
        carries = any(self._connections)  # then what comes in and goes out has to be zero past each length
        x = inputs = batch.data
        if not takes_tuple(self):
            x = inputs = batch.zeroed(x.astype(given.options.dtype)) if carries else x.astype(given.options.dtype)
        outputs, finals = [], []
        for i, (name, layer) in enumerate(self.parts.items()):
            taken = x
            if i and self.norm:
                taken = normalized(params[f"norm_{i}"], taken)
            if i and self.dropout and given.key is not None:
                key = jax.random.fold_in(given.key, len(self.layers) + i)  # to_part takes the numbers below
                taken = batch.dropped(key, taken, float(self.dropout), self.locked)
            if i and self._skips:
                taken = jnp.concatenate([inputs, taken], axis=-1)
            y, final = run_part(layer, params[name], batch._replace(inputs=batch.of(taken)), given.to_part(i))
            x = connected(self._connections[i], params.get(f"highway_{i}"), x, y)
            outputs.append(x)
            finals.append(final)
        if not (self._skips or given.options.all_outputs):
            outputs = outputs[-1:]
        outputs = [batch.zeroed(each) if carries else each for each in outputs]
        output = jnp.concatenate(outputs, axis=-1) if self._skips else outputs[-1]
        return (output, tuple(finals), tuple(outputs)) if given.options.all_outputs else (output, tuple(finals))


def _name(i: int, layer: Layer) -> str:
    return f"layers[{i}] ({type(layer).__name__})"
