"""SimpleRNN, LSTM and GRU as flax.nnx modules over jaxpack's layers, which hold every equation.

A module is called with packed data or with a padded batch:

    lstm = jaxpack.nnx.LSTM(12, 64, bidirectional=True, rngs=nnx.Rngs(0))
    output, (h_n, c_n) = lstm(packed)
    output, (h_n, c_n) = lstm(x, seq_lengths=lengths)

`lstm.layer` is the spec, jaxpack.LSTM(12, 64, bidirectional=True). `lstm.params` are its parameters as nnx.Param:

    nnx.update(lstm.params, lstm.layer.from_torch(state_dict))
    lstm.layer.to_torch(nnx.to_pure_dict(nnx.state(lstm.params)))
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypedDict, Unpack

import jax
from flax import nnx
from jax.typing import ArrayLike

from jaxpack._layers import layers
from jaxpack._layers.params import ROLES, Initializer, InitializerByGate
from jaxpack._layers.recurrent_layer import RecurrentLayer
from jaxpack._layers.regularization import Regularization
from jaxpack._layers.schemes import ForgetBias
from jaxpack._layers.specification import LayerParams
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._plans.bucket_plan import BucketPlan

__all__ = ["GRU", "LSTM", "SimpleRNN"]


class Options(TypedDict, total=False):
    """The keywords that all stacks take: those of the layer, then those that SimpleRNN documents."""

    learned_initial_state: bool
    merge: str | None
    dtype: Any
    param_dtype: Any
    kernel_init: InitializerByGate
    recurrent_kernel_init: InitializerByGate
    bias_init: InitializerByGate
    scheme: str
    forget_bias: ForgetBias
    kernel_metadata: Mapping[str, Any]
    recurrent_kernel_metadata: Mapping[str, Any]
    bias_metadata: Mapping[str, Any]
    deterministic: bool
    regularization: Regularization | None


_OF_LAYER = ("learned_initial_state", "merge", "regularization")


class _Stack(nnx.Module):
    """Base of the stacks: a layer spec with its parameters as nnx.Param, and a stream of keys for dropout."""

    layer_class: ClassVar[Callable[..., RecurrentLayer]]

    def _set_up(self, sizes: tuple[Any, ...], keywords: dict[str, Any], rngs: nnx.Rngs, options: Options) -> None:
        """Makes the layer and its parameters, from the layer's arguments and the options of all stacks."""
        for name in options.keys() - Options.__annotations__.keys():
            raise TypeError(f"{type(self).__name__} got an unexpected keyword argument {name!r}.")
        of_layer = {name: value for name, value in options.items() if name in _OF_LAYER}
        self.layer = layer = type(self).layer_class(*sizes, **keywords, **of_layer)
        self.dtype = options.get("dtype")
        params = layer.init(
            rngs.params(),
            options.get("param_dtype"),
            kernel_init=_boxing(options.get("kernel_init")),
            recurrent_kernel_init=_boxing(options.get("recurrent_kernel_init")),
            bias_init=_boxing(options.get("bias_init")),
            scheme=options.get("scheme", "pytorch"),
            forget_bias=options.get("forget_bias"),
        )
        metadata = {
            "kernel": options.get("kernel_metadata"),
            "recurrent_kernel": options.get("recurrent_kernel_metadata"),
            "bias": options.get("bias_metadata"),
        }
        for group, entries in params.items():
            variables = {name: _param(value, metadata.get(ROLES[name]) or {}) for name, value in entries.items()}
            setattr(self, group, nnx.data(variables))
        self.deterministic = options.get("deterministic", False)
        self.rngs = nnx.data(rngs.dropout.fork() if layer.has_dropout else None)

    def __call__(
        self,
        inputs: PackedSequence | ArrayLike,
        initial_state: Any = None,
        *,
        seq_lengths: ArrayLike | Sequence[int] | None = None,
        mask: ArrayLike | None = None,
        plan: BucketPlan | None = None,
        resets: PackedSequence | ArrayLike | None = None,
        fresh_state: Any = None,
        deterministic: bool | None = None,
        forward_mode: bool = False,
        return_all_states: bool = False,
        return_sequences: bool = True,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
    ) -> tuple[Any, ...]:
        """Runs the layer as `jaxpack.LSTM.apply` does.

        Args:
          inputs: packed data [S, F]; or padded [B, T, F] with `seq_lengths` or `mask`; or one sequence [T, F].
          initial_state: h_0, for LSTM (h_0, c_0), each [num_layers*D, B, H]. Default: the learned one, or zeros.
          seq_lengths: int [B], for padded inputs. Default: all T.
          mask: bool [B, T], in place of seq_lengths, True at valid steps, which may be anywhere in a row.
          plan: the jaxpack.BucketPlan for padded inputs. Default: no plan, one program for all lengths.
          resets: one bool a step, laid out as the inputs: True where an episode begins, from the fresh state.
          fresh_state: beside resets, the state with which episodes begin. Default: the initial state.
          deterministic: True to evaluate, without dropout. Default: as `train()` or `eval()` has set the module.
          forward_mode: Set True to differentiate this call in forward mode.
          return_all_states: set True to return the state after each step as well.
          return_sequences: set False to return the output after each sequence's own last step alone.
          rngs: the source of dropout's key, or a key. Default: the module's own stream.

        Returns:
          The output in the layout of the inputs, and the final state: h_n, for LSTM (h_n, c_n). With return_all_states,
          the states after each step come third.

        Raises:
          ValueError: as `jaxpack.LSTM.apply` does; or if the batch or time axis is symbolic, which RNN accepts.
          TypeError: as `jaxpack.LSTM.apply` does.
        """
        deterministic = self.deterministic if deterministic is None else deterministic
        active = self.layer.has_dropout and not deterministic
        return self.layer.apply(
            self._values(),
            inputs,
            initial_state,
            _key(self.rngs if rngs is None else rngs) if active else None,
            lengths=seq_lengths,
            mask=mask,
            plan=plan,
            resets=resets,
            fresh_state=fresh_state,
            deterministic=deterministic,
            dtype=self.dtype,
            forward_mode=forward_mode,
            return_all_states=return_all_states,
            return_sequences=return_sequences,
        )

    @property
    def params(self) -> nnx.Dict:
        """The module's nnx.Param by layer and direction (l0, l0_reverse, ...)."""
        return nnx.Dict({group: nnx.Dict(self._variables(group)) for group in self.layer.shapes})

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets the module's mode. nnx.view calls it.

        Args:
          deterministic: True to evaluate, without dropout.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def _values(self) -> LayerParams:
        """Returns the parameters as the layer takes them."""
        return {
            group: {name: param[...] for name, param in self._variables(group).items()} for group in self.layer.shapes
        }

    def _variables(self, group: str) -> dict[str, nnx.Param]:
        """Returns the parameters of one layer and direction, without what nnx.capture and others put into a module."""
        entries = getattr(self, group)
        return {name: entries[name] for name in self.layer.shapes[group]}


class SimpleRNN(_Stack):
    """A stack of simple (Elman) recurrent layers. rnn(packed) returns (output, h_n).

    The arguments input_size, hidden_size, num_layers, nonlinearity, bias, dropout, bidirectional,
    learned_initial_state, merge and regularization are those of jaxpack.RNN.

    Examples:
      >>> from flax import nnx
      >>> rnn = jaxpack.nnx.SimpleRNN(2, 4, nonlinearity="relu", rngs=nnx.Rngs(0))
      >>> output, h_n = rnn(jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))]))
      >>> output.shape, h_n.shape  # 4 real steps; [num_layers * directions, B, hidden_size]
      ((4, 4), (1, 2, 4))

    Args:
      rngs: the random streams: `params` draws the parameters, `dropout` the masks.
      dtype: the dtype to compute in. Default: the result type of inputs and parameters.
      param_dtype: the dtype of the parameters. Default: JAX's float.
      kernel_init: initialises kernels (see jaxpack.RNN.init). nnx.with_partitioning may wrap it. Default: PyTorch's.
      recurrent_kernel_init: likewise for recurrent kernels.
      bias_init: likewise for biases.
      scheme: the library whose defaults apply to what these leave open: "pytorch", "keras", "flax" or "haiku".
      forget_bias: the bias of the gate that keeps the state, a number or a jaxpack.Chrono (not for SimpleRNN).
      kernel_metadata: metadata of the kernels' nnx.Param, such as {"out_sharding": (None, "model")}.
      recurrent_kernel_metadata: likewise for recurrent kernels.
      bias_metadata: likewise for biases.
      deterministic: True to start in the mode that `eval()` sets, without dropout. Default: False.
    """

    layer_class = layers.RNN

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        rngs: nnx.Rngs,
        **options: Unpack[Options],
    ) -> None:
        sizes = input_size, hidden_size, num_layers, nonlinearity, bias, dropout, bidirectional
        self._set_up(sizes, {}, rngs, options)


class LSTM(_Stack):
    """A stack of long short-term memory layers. lstm(packed) returns (output, (h_n, c_n)).

    The arguments input_size, hidden_size, num_layers, bias, dropout, bidirectional, proj_size, learned_initial_state,
    merge and regularization are those of jaxpack.LSTM.

    Examples:
      >>> from flax import nnx
      >>> lstm = jaxpack.nnx.LSTM(2, 4, bias_init={"f": nnx.initializers.ones}, rngs=nnx.Rngs(0))
      >>> output, (h_n, c_n) = lstm(jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))]))
      >>> output.shape, h_n.shape  # 4 real steps; [num_layers * directions, B, hidden_size]
      ((4, 4), (1, 2, 4))

    Args:
      rngs: the random streams: `params` draws the parameters, `dropout` the masks.
      options: dtype, param_dtype, initialisers (also gate by gate), metadata and deterministic are those of SimpleRNN.
    """

    layer_class = layers.LSTM

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        rngs: nnx.Rngs,
        **options: Unpack[Options],
    ) -> None:
        sizes = input_size, hidden_size, num_layers, bias, dropout, bidirectional, proj_size
        self._set_up(sizes, {}, rngs, options)


class GRU(_Stack):
    """A stack of gated recurrent layers. gru(packed) returns (output, h_n).

    The arguments input_size, hidden_size, num_layers, bias, dropout, bidirectional, reset_after, learned_initial_state,
    merge and regularization are those of jaxpack.GRU.

    Examples:
      >>> from flax import nnx
      >>> gru = jaxpack.nnx.GRU(2, 4, rngs=nnx.Rngs(0))
      >>> output, h_n = gru(jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))]))
      >>> output.shape, h_n.shape  # 4 real steps; [num_layers * directions, B, hidden_size]
      ((4, 4), (1, 2, 4))

    Args:
      rngs: the random streams: `params` draws the parameters, `dropout` the masks.
      options: dtype, param_dtype, initialisers (also gate by gate), metadata and deterministic are those of SimpleRNN.
    """

    layer_class = layers.GRU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        reset_after: bool = True,
        rngs: nnx.Rngs,
        **options: Unpack[Options],
    ) -> None:
        sizes = input_size, hidden_size, num_layers, bias, dropout, bidirectional
        self._set_up(sizes, {"reset_after": reset_after}, rngs, options)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["metadata"])
@dataclasses.dataclass
class _Boxed:
    """nnx.VariableMetadata as a pytree, so that the layer can put the arrays of its gates side by side."""

    array: jax.Array
    metadata: Any


def _boxing(initializer: InitializerByGate) -> InitializerByGate:
    """Returns an initialiser, or a mapping of them by gate, whose results are pytrees if nnx wraps them."""
    if isinstance(initializer, Mapping):
        return {gate: _boxing_one(each) for gate, each in initializer.items()}
    return None if initializer is None else _boxing_one(initializer)


def _boxing_one(initializer: Initializer) -> Initializer:
    if not callable(initializer):
        return initializer  # the layer refuses it

    def boxed(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> Any:
        drawn = initializer(key, shape, dtype)
        if not isinstance(drawn, nnx.VariableMetadata):
            return drawn
        return _Boxed(drawn.raw_value, dataclasses.replace(drawn, raw_value=None))

    return boxed


def _param(value: Any, metadata: Mapping[str, Any]) -> nnx.Param:
    """Returns the nnx.Param of a value, with its initialiser's metadata and the module's."""
    if isinstance(value, _Boxed):
        value = dataclasses.replace(value.metadata, raw_value=value.array)
    return nnx.Param(value, **metadata)


def _key(rngs: nnx.Rngs | nnx.RngStream | jax.Array) -> jax.Array:
    """Returns a key for dropout."""
    if isinstance(rngs, nnx.Rngs):
        return rngs.dropout()
    return rngs() if isinstance(rngs, nnx.RngStream) else rngs
