"""SimpleRNN, LSTM and GRU as flax.linen modules: thin faces over jaxpack's layers, which hold every equation.

Called with packed data or with a padded batch; the input size is read off the inputs:

    lstm = jaxpack.linen.LSTM(64, bidirectional=True)
    variables = lstm.init(jax.random.key(0), packed)
    output, (h_n, c_n) = lstm.apply(variables, packed)
    output, (h_n, c_n) = lstm.apply(variables, x, seq_lengths=lengths)

`lstm.layer(12)` is the spec, jaxpack.LSTM(12, 64, bidirectional=True), whose parameters are the variables:

    variables = {"params": lstm.layer(12).from_torch(state_dict)}
    lstm.layer(12).to_torch(variables["params"])

nn.scan over stacks needs check_constancy_invariants=False where packed data is the carry: Flax 0.12.12 takes any effect
in the body, jax.debug.print or a layer's check for checkify, for a broadcast variable (since google/flax#5540).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import FrozenDict, unfreeze
from jax.typing import ArrayLike

from jaxpack._layers import layers
from jaxpack._layers.params import InitializerByGate
from jaxpack._layers.recurrent_layer import LayerParams, RecurrentLayer
from jaxpack._packed.inputs import as_batch
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._plans.planners import plan_padded

__all__ = ["GRU", "LSTM", "SimpleRNN"]


class _Recurrent(nn.Module):
    """What all stacks are; a subclass has the options of its layer class, but for input_size.

    Attributes:
      dtype: to compute in. Default: the result type of inputs and parameters.
      param_dtype: the parameters' own. Default: JAX's float.
      kernel_init, recurrent_kernel_init, bias_init: initialisers, or mappings from gates to some, as of
        jaxpack.LSTM.init; nn.with_partitioning may wrap them. Default: PyTorch's.
      deterministic: whether to leave dropout between layers out, unless the call says it.
    """

    dtype: Any = dataclasses.field(default=None, kw_only=True)
    param_dtype: Any = dataclasses.field(default=None, kw_only=True)
    kernel_init: InitializerByGate = dataclasses.field(default=None, kw_only=True)
    recurrent_kernel_init: InitializerByGate = dataclasses.field(default=None, kw_only=True)
    bias_init: InitializerByGate = dataclasses.field(default=None, kw_only=True)
    deterministic: bool | None = dataclasses.field(default=None, kw_only=True)

    layer_class: ClassVar[type[layers.RNN | layers.LSTM | layers.GRU]]

    def __post_init__(self) -> None:
        for name in ("kernel_init", "recurrent_kernel_init", "bias_init"):  # a module is hashable, a dict is not
            if isinstance(getattr(self, name), Mapping):
                setattr(self, name, FrozenDict(getattr(self, name)))
        self.layer(1)  # refuses bad options
        super().__post_init__()

    @nn.nowrap
    def layer(self, input_size: int) -> RecurrentLayer:
        """The layer's spec for inputs of that size."""
        names = [field.name for field in dataclasses.fields(self.layer_class) if field.name != "input_size"]
        return self.layer_class(input_size, **{name: getattr(self, name) for name in names})

    @nn.compact
    def __call__(
        self,
        inputs: PackedSequence | ArrayLike,
        initial_state: Any = None,
        *,
        seq_lengths: ArrayLike | None = None,
        plan: BucketPlan | None = None,
        deterministic: bool | None = None,
        forward_mode: bool = False,
    ) -> tuple[Any, Any]:
        """Runs the layer, as `jaxpack.LSTM.apply` does.

        Args:
          inputs: packed data [S, F]; or padded [B, T, F] with `seq_lengths`; or one sequence [T, F].
          initial_state: h_0, for LSTM (h_0, c_0), each [num_layers*D, B, H]. Default: zeros.
          seq_lengths: int [B], for padded inputs. Default: all T.
          plan: for padded inputs, the static shape to run under. Default: none, one program for all lengths.
          deterministic: whether to leave dropout out, if the attribute does not say it. Needed only where there is
            dropout between layers, whose key comes from the rng "dropout".
          forward_mode: whether jax.jvp, jacfwd or linearize will be taken of this call.

        Returns:
          The output, laid out as the inputs are, and the final state: h_n, for LSTM (h_n, c_n).

        Raises:
          ValueError: as `jaxpack.LSTM.apply`; or if the batch or time axis is symbolic (see RNN, which takes such).
          TypeError: as `jaxpack.LSTM.apply`.
        """
        layer = self.layer(self._input_size(inputs))
        if self.is_initializing() and plan is None and seq_lengths is not None:
            plan = _padded_plan(inputs)  # one loop to compile, for outputs that few read
        active = layer.has_dropout and not nn.merge_param("deterministic", self.deterministic, deterministic)
        return layer.apply(
            self._params(layer),
            inputs,
            initial_state,
            self.make_rng("dropout") if active else None,
            lengths=seq_lengths,
            plan=plan,
            deterministic=not active,
            dtype=self.dtype,
            forward_mode=forward_mode,
        )

    @nn.nowrap
    def _input_size(self, inputs: PackedSequence | ArrayLike) -> int:
        """As the parameters have it; before there are any, the inputs' last axis."""
        weights = jax.tree.leaves(self.get_variable("params", "l0", {}).get("weight_ih"))
        if weights:
            return weights[0].shape[0]
        data = inputs.data if isinstance(inputs, PackedSequence) else as_batch(inputs, "inputs")
        return max((1, *jnp.shape(jax.tree.leaves(data)[0]))[-1], 1)  # 1 for what has none, which the layer refuses

    @nn.nowrap
    def _params(self, layer: RecurrentLayer) -> LayerParams:
        """The parameters as the core takes them, drawn if there are none yet."""
        drawn: LayerParams = {}

        def draw(key: jax.Array, group: str) -> Any:
            if not drawn:
                inits = {name: getattr(self, name) for name in ("kernel_init", "recurrent_kernel_init", "bias_init")}
                drawn.update(layer.init(key, self.param_dtype, **inits))
            return drawn[group]

        if not self.has_variable("params", "l0"):
            for group in layer.shapes:
                self.param(group, draw, group)
        return {group: unfreeze(nn.meta.unbox(self.get_variable("params", group))) for group in layer.shapes}


def _padded_plan(inputs: PackedSequence | ArrayLike) -> BucketPlan | None:
    """The padded batch as a plan; None for a batch of none, and for what the layer refuses beside lengths."""
    if isinstance(inputs, PackedSequence) or np.ndim(inputs) != 3:
        return None
    batch_size, num_steps, _ = np.shape(inputs)
    return plan_padded(batch_size, max(num_steps, 1)) if batch_size else None


class SimpleRNN(_Recurrent):
    """A stack of simple (Elman) recurrent layers; returns (output, h_n).

    hidden_size, num_layers, nonlinearity, bias, dropout and bidirectional are as of jaxpack.RNN.

    Examples:
      >>> rnn = jaxpack.linen.SimpleRNN(4, nonlinearity="relu")
      >>> packed = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
      >>> output, h_n = rnn.apply(rnn.init(jax.random.key(0), packed), packed)
      >>> output.shape, h_n.shape  # 4 real steps; [num_layers * directions, B, hidden_size]
      ((4, 4), (1, 2, 4))

    Attributes:
      dtype: to compute in. Default: the result type of inputs and parameters.
      param_dtype: the parameters' own. Default: JAX's float.
      kernel_init: as of jaxpack.RNN.init; nn.with_partitioning may wrap it.
      recurrent_kernel_init: likewise.
      bias_init: likewise.
      deterministic: whether to leave dropout between layers out, unless the call says it.
    """

    layer_class = layers.RNN

    hidden_size: int
    num_layers: int = 1
    nonlinearity: str = "tanh"
    bias: bool = True
    dropout: float = 0.0
    bidirectional: bool = False


class LSTM(_Recurrent):
    """A stack of long short-term memory layers; returns (output, (h_n, c_n)).

    hidden_size, num_layers, bias, dropout, bidirectional and proj_size are as of jaxpack.LSTM; dtype,
    param_dtype, deterministic and initialisers, which may be given by gate, as of SimpleRNN.

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


class GRU(_Recurrent):
    """A stack of gated recurrent layers; returns (output, h_n).

    hidden_size, num_layers, bias, dropout and bidirectional are as of jaxpack.GRU; dtype, param_dtype, deterministic
    and initialisers, which may be given by gate, as of SimpleRNN.

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
