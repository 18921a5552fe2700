"""SimpleRNN, LSTM and GRU as flax.linen modules over jaxpack's layers, which hold every equation.

A module is called with packed data or with a padded batch. It takes the input size from the inputs:

    lstm = jaxpack.linen.LSTM(64, bidirectional=True)
    variables = lstm.init(jax.random.key(0), packed)
    output, (h_n, c_n) = lstm.apply(variables, packed)
    output, (h_n, c_n) = lstm.apply(variables, x, seq_lengths=lengths)

`lstm.layer(12)` is the spec, jaxpack.LSTM(12, 64, bidirectional=True). Its parameters are the variables:

    variables = {"params": lstm.layer(12).from_torch(state_dict)}
    lstm.layer(12).to_torch(variables["params"])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import FrozenDict, unfreeze
from jax.typing import ArrayLike

from jaxpack._layers import layers
from jaxpack._layers.params import InitializerByGate
from jaxpack._layers.recurrent_layer import RecurrentLayer
from jaxpack._layers.regularization import Regularization
from jaxpack._layers.schemes import ForgetBias
from jaxpack._layers.specification import LayerParams
from jaxpack._packed.inputs import as_batch, padded_plan
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._plans.bucket_plan import BucketPlan

__all__ = ["GRU", "LSTM", "SimpleRNN"]

_INITIALIZERS = ("kernel_init", "recurrent_kernel_init", "bias_init")


class _Stack(nn.Module):
    """Base of the stacks. A subclass has the options of its layer class, except input_size."""

    learned_initial_state: bool = dataclasses.field(default=False, kw_only=True)
    merge: str | None = dataclasses.field(default="concat", kw_only=True)
    dtype: Any = dataclasses.field(default=None, kw_only=True)
    param_dtype: Any = dataclasses.field(default=None, kw_only=True)
    kernel_init: InitializerByGate = dataclasses.field(default=None, kw_only=True)
    recurrent_kernel_init: InitializerByGate = dataclasses.field(default=None, kw_only=True)
    bias_init: InitializerByGate = dataclasses.field(default=None, kw_only=True)
    scheme: str = dataclasses.field(default="pytorch", kw_only=True)
    forget_bias: ForgetBias = dataclasses.field(default=None, kw_only=True)
    deterministic: bool | None = dataclasses.field(default=None, kw_only=True)
    regularization: Regularization | None = dataclasses.field(default=None, kw_only=True)

    layer_class: ClassVar[Any]

    def __post_init__(self) -> None:
        for name in _INITIALIZERS:  # a module is hashable, a dict is not
            if isinstance(getattr(self, name), Mapping):
                setattr(self, name, FrozenDict(getattr(self, name)))
        self.layer(1)  # validates the options
        super().__post_init__()

    @nn.nowrap
    def layer(self, input_size: int) -> RecurrentLayer:
        """Returns the layer's spec for inputs of this size."""
        names = [field.name for field in dataclasses.fields(self.layer_class) if field.name != "input_size"]
        return self.layer_class(input_size, **{name: getattr(self, name) for name in names})

    @nn.compact
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
          deterministic: True to evaluate, without dropout. The attribute or the call must say it if there is dropout
            or another regulariser, whose key comes from the rng "dropout".
          forward_mode: Set True to differentiate this call in forward mode.
          return_all_states: set True to return the state after each step as well.
          return_sequences: set False to return the output after each sequence's own last step alone.

        Returns:
          The output in the layout of the inputs, and the final state: h_n, for LSTM (h_n, c_n). With return_all_states,
          the states after each step come third.

        Raises:
          ValueError: as `jaxpack.LSTM.apply` does; or if the batch or time axis is symbolic, which RNN accepts.
          TypeError: as `jaxpack.LSTM.apply` does.
        """
        layer = self.layer(self._input_size(inputs))
        if self.is_initializing() and plan is None and (seq_lengths is not None or mask is not None):
            plan = _padded_plan(inputs)  # one loop to compile, for outputs that are rarely read
        active = layer.has_dropout and not nn.merge_param("deterministic", self.deterministic, deterministic)
        return layer.apply(
            self._params(layer),
            inputs,
            initial_state,
            self.make_rng("dropout") if active else None,
            lengths=seq_lengths,
            mask=mask,
            plan=plan,
            resets=resets,
            fresh_state=fresh_state,
            deterministic=not active,
            dtype=self.dtype,
            forward_mode=forward_mode,
            return_all_states=return_all_states,
            return_sequences=return_sequences,
        )

    @nn.nowrap
    def _input_size(self, inputs: PackedSequence | ArrayLike) -> int:
        """Returns the input size of the parameters or, before there are any, the size of the inputs' last axis."""
        weights = jax.tree.leaves(self.get_variable("params", "l0", {}).get("weight_ih"))
        if weights:
            return weights[0].shape[0]
        data = inputs.data if isinstance(inputs, PackedSequence) else as_batch(inputs, "inputs")
        size = (1, *jnp.shape(jax.tree.leaves(data)[0]))[-1]
        return max(size, 1)  # 1 for inputs without features, which the layer refuses

    @nn.nowrap
    def _params(self, layer: RecurrentLayer) -> LayerParams:
        """Returns the parameters as the layer takes them, drawn if there are none yet."""
        drawn: LayerParams = {}

        def draw(key: jax.Array, group: str) -> Any:
            if not drawn:
                options = {name: getattr(self, name) for name in (*_INITIALIZERS, "scheme", "forget_bias")}
                drawn.update(layer.init(key, self.param_dtype, **options))
            return drawn[group]

        if not self.has_variable("params", "l0"):
            for group in layer.shapes:
                self.param(group, draw, group)
        return {group: unfreeze(nn.meta.unbox(self.get_variable("params", group))) for group in layer.shapes}


def _padded_plan(inputs: PackedSequence | ArrayLike) -> BucketPlan | None:
    """Returns the plan with one bucket for a padded batch; None for inputs that are none, which the layer refuses."""
    if isinstance(inputs, PackedSequence) or np.ndim(inputs) != 3:
        return None
    batch_size, num_steps, _ = np.shape(inputs)
    return padded_plan(batch_size, num_steps)


class SimpleRNN(_Stack):
    """A stack of simple (Elman) recurrent layers. rnn.apply(variables, packed) returns (output, h_n).

    The attributes hidden_size, num_layers, nonlinearity, bias, dropout, bidirectional, learned_initial_state, merge and
    regularization are those of jaxpack.RNN.

    Examples:
      >>> rnn = jaxpack.linen.SimpleRNN(4, nonlinearity="relu")
      >>> packed = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
      >>> output, h_n = rnn.apply(rnn.init(jax.random.key(0), packed), packed)
      >>> output.shape, h_n.shape  # 4 real steps; [num_layers * directions, B, hidden_size]
      ((4, 4), (1, 2, 4))

    Attributes:
      dtype: the dtype to compute in. Default: the result type of inputs and parameters.
      param_dtype: the dtype of the parameters. Default: JAX's float.
      kernel_init: initialises kernels (see jaxpack.RNN.init). nn.with_partitioning may wrap it. Default: PyTorch's.
      recurrent_kernel_init: likewise for recurrent kernels.
      bias_init: likewise for biases.
      scheme: the library whose defaults apply to what these leave open: "pytorch", "keras", "flax" or "haiku".
      forget_bias: the bias of the gate that keeps the state, a number or a jaxpack.Chrono (not for SimpleRNN).
      deterministic: True to evaluate, without dropout. Default: as the call says.
    """

    layer_class = layers.RNN

    hidden_size: int
    num_layers: int = 1
    nonlinearity: str = "tanh"
    bias: bool = True
    dropout: float = 0.0
    bidirectional: bool = False


class LSTM(_Stack):
    """A stack of long short-term memory layers. lstm.apply(variables, packed) returns (output, (h_n, c_n)).

    The attributes hidden_size, num_layers, bias, dropout, bidirectional, proj_size, learned_initial_state, merge and
    regularization are those of jaxpack.LSTM. dtype, param_dtype, initialisers (also gate by gate) and deterministic are
    those of SimpleRNN.

    Examples:
      >>> from flax import linen as nn
      >>> lstm = jaxpack.linen.LSTM(4, bias_init={"f": nn.initializers.ones})
      >>> packed = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
      >>> output, (h_n, c_n) = lstm.apply(lstm.init(jax.random.key(0), packed), packed)
      >>> output.shape, h_n.shape  # 4 real steps; [num_layers * directions, B, hidden_size]
      ((4, 4), (1, 2, 4))
    """

    layer_class = layers.LSTM

    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    dropout: float = 0.0
    bidirectional: bool = False
    proj_size: int = 0


class GRU(_Stack):
    """A stack of gated recurrent layers. gru.apply(variables, packed) returns (output, h_n).

    The attributes hidden_size, num_layers, bias, dropout, bidirectional, reset_after, learned_initial_state, merge and
    regularization are those of jaxpack.GRU. dtype, param_dtype, initialisers (also gate by gate) and deterministic are
    those of SimpleRNN.

    Examples:
      >>> gru = jaxpack.linen.GRU(4)
      >>> packed = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
      >>> output, h_n = gru.apply(gru.init(jax.random.key(0), packed), packed)
      >>> output.shape, h_n.shape  # 4 real steps; [num_layers * directions, B, hidden_size]
      ((4, 4), (1, 2, 4))
    """

    layer_class = layers.GRU

    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    dropout: float = 0.0
    bidirectional: bool = False
    reset_after: bool = dataclasses.field(default=True, kw_only=True)
