"""SimpleRNN, LSTM and GRU as flax.nnx modules: thin faces over jaxpack's layers, which hold every equation.

Made with Flax's rngs, called with packed data or with a padded batch:

    lstm = jaxpack.nnx.LSTM(12, 64, bidirectional=True, rngs=nnx.Rngs(0))
    output, (h_n, c_n) = lstm(packed)
    output, (h_n, c_n) = lstm(x, seq_lengths=lengths)
"""

from __future__ import annotations

from typing import Any

from flax import nnx
from jax.typing import ArrayLike

from jaxpack import layers
from jaxpack.layer import LayerParams, RecurrentLayer
from jaxpack.plan import BucketPlan
from jaxpack.sequence import PackedSequence

__all__ = ["GRU", "LSTM", "SimpleRNN"]


class _Recurrent(nnx.Module):
    """A layer spec with its parameters as nnx.Param and its dropout stream as nnx.Rngs."""

    def __init__(self, layer: RecurrentLayer, param_dtype: Any, rngs: nnx.Rngs) -> None:
        self.layer = layer
        params = layer.init(rngs.params(), param_dtype)
        self.params = nnx.Dict(
            {group: nnx.Dict({name: nnx.Param(p) for name, p in entries.items()}) for group, entries in params.items()}
        )
        self.deterministic = False
        self.rngs = nnx.data(rngs.dropout.fork() if layer.has_dropout else None)

    def __call__(
        self,
        inputs: PackedSequence | ArrayLike,
        initial_state: Any = None,
        *,
        seq_lengths: ArrayLike | None = None,
        plan: BucketPlan | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Any, Any]:
        """Runs the layer, as `jaxpack.LSTM.apply` does.

        Args:
          inputs: packed data [S, F]; or padded [B, T, F] with `seq_lengths`; or one sequence [T, F].
          initial_state: h_0, for LSTM (h_0, c_0), each [num_layers*D, B, H]. Default: zeros.
          seq_lengths: int [B], for padded inputs. Default: all T.
          plan: for padded inputs, the static shape to run under. Default: none, one program for all lengths.
          deterministic: whether to leave dropout out. Default: as `train()` and `eval()` have set the module.
          rngs: the source of dropout keys. Default: the module's own.

        Returns:
          The output, laid out as the inputs are, and the final state: h_n, for LSTM (h_n, c_n).

        Raises:
          ValueError, TypeError: as `jaxpack.LSTM.apply`.
        """
        deterministic = self.deterministic if deterministic is None else deterministic
        key = None
        if self.layer.has_dropout and not deterministic:
            key = self.rngs() if rngs is None else rngs.dropout()
        return self.layer.apply(
            self._values(),
            inputs,
            initial_state,
            key,
            lengths=seq_lengths,
            plan=plan,
            deterministic=deterministic,
        )

    def _values(self) -> LayerParams:
        """The parameters as the core takes them."""
        return {group: {name: param[...] for name, param in entries.items()} for group, entries in self.params.items()}


class SimpleRNN(_Recurrent):
    """A stack of simple (Elman) recurrent layers, called as `rnn(packed)`; returns (output, h_n).

    Args:
      input_size, hidden_size, num_layers, nonlinearity, bias, dropout, bidirectional: as of jaxpack.RNN.
      param_dtype: the parameters' dtype. Default: JAX's float.
      rngs: draws the parameters from `params` and dropout from `dropout`.
    """

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
        param_dtype: Any = None,
        rngs: nnx.Rngs,
    ) -> None:
        layer = layers.RNN(input_size, hidden_size, num_layers, nonlinearity, bias, dropout, bidirectional)
        super().__init__(layer, param_dtype, rngs)


class LSTM(_Recurrent):
    """A stack of long short-term memory layers, called as `lstm(packed)`; returns (output, (h_n, c_n)).

    Args:
      input_size, hidden_size, num_layers, bias, dropout, bidirectional, proj_size: as of jaxpack.LSTM.
      param_dtype: the parameters' dtype. Default: JAX's float.
      rngs: draws the parameters from `params` and dropout from `dropout`.
    """

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
        param_dtype: Any = None,
        rngs: nnx.Rngs,
    ) -> None:
        layer = layers.LSTM(input_size, hidden_size, num_layers, bias, dropout, bidirectional, proj_size)
        super().__init__(layer, param_dtype, rngs)


class GRU(_Recurrent):
    """A stack of gated recurrent layers, called as `gru(packed)`; returns (output, h_n).

    Args:
      input_size, hidden_size, num_layers, bias, dropout, bidirectional: as of jaxpack.GRU.
      param_dtype: the parameters' dtype. Default: JAX's float.
      rngs: draws the parameters from `params` and dropout from `dropout`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        param_dtype: Any = None,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            layers.GRU(input_size, hidden_size, num_layers, bias, dropout, bidirectional), param_dtype, rngs
        )
