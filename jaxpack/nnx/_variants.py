"""MGU, IndRNN, PeepholeLSTM, LayerNormLSTM and LayerNormGRU as flax.nnx modules."""

from __future__ import annotations

from typing import Unpack

from flax import nnx

from jaxpack._layers import variants
from jaxpack.nnx._stacks import Options, _Stack

__all__ = ["MGU", "IndRNN", "LayerNormGRU", "LayerNormLSTM", "PeepholeLSTM"]


class MGU(_Stack):
    """A stack of layers of minimal gated units. mgu(packed) returns (output, h_n).

    The arguments input_size, hidden_size, num_layers, bias, dropout, bidirectional, reset, learned_initial_state, merge
    and regularization are those of jaxpack.MGU.

    Examples:
      >>> from flax import nnx
      >>> mgu = jaxpack.nnx.MGU(2, 4, rngs=nnx.Rngs(0))
      >>> output, h_n = mgu(jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))]))
      >>> output.shape, h_n.shape  # 4 real steps; [num_layers * directions, B, hidden_size]
      ((4, 4), (1, 2, 4))

    Args:
      rngs: the random streams: `params` draws the parameters, `dropout` the masks.
      options: dtype, param_dtype, initialisers (also gate by gate), metadata and deterministic are those of SimpleRNN.
    """

    layer_class = variants.MGU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        reset: str | None = "before",
        rngs: nnx.Rngs,
        **options: Unpack[Options],
    ) -> None:
        sizes = input_size, hidden_size, num_layers, bias, dropout, bidirectional
        self._set_up(sizes, {"reset": reset}, rngs, options)


class IndRNN(_Stack):
    """A stack of layers of independently recurrent units. rnn(packed) returns (output, h_n).

    The arguments input_size, hidden_size, num_layers, bias, dropout, bidirectional, nonlinearity,
    learned_initial_state, merge and regularization are those of jaxpack.IndRNN.

    Examples:
      >>> from flax import nnx
      >>> rnn = jaxpack.nnx.IndRNN(2, 4, num_layers=2, rngs=nnx.Rngs(0))
      >>> output, h_n = rnn(jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))]))
      >>> output.shape, h_n.shape  # 4 real steps; [num_layers * directions, B, hidden_size]
      ((4, 4), (2, 2, 4))

    Args:
      rngs: the random streams: `params` draws the parameters, `dropout` the masks.
      options: dtype, param_dtype, initialisers, metadata and deterministic are those of SimpleRNN.
    """

    layer_class = variants.IndRNN

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        nonlinearity: str = "relu",
        rngs: nnx.Rngs,
        **options: Unpack[Options],
    ) -> None:
        sizes = input_size, hidden_size, num_layers, bias, dropout, bidirectional
        self._set_up(sizes, {"nonlinearity": nonlinearity}, rngs, options)


class PeepholeLSTM(_Stack):
    """A stack of LSTM layers whose gates see the memory. lstm(packed) returns (output, (h_n, c_n)).

    The arguments input_size, hidden_size, num_layers, bias, dropout, bidirectional, learned_initial_state, merge and
    regularization are those of jaxpack.PeepholeLSTM.

    Examples:
      >>> from flax import nnx
      >>> lstm = jaxpack.nnx.PeepholeLSTM(2, 4, rngs=nnx.Rngs(0))
      >>> output, (h_n, c_n) = lstm(jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))]))
      >>> output.shape, h_n.shape  # 4 real steps; [num_layers * directions, B, hidden_size]
      ((4, 4), (1, 2, 4))

    Args:
      rngs: the random streams: `params` draws the parameters, `dropout` the masks.
      options: dtype, param_dtype, initialisers (also gate by gate), metadata and deterministic are those of SimpleRNN.
    """

    layer_class = variants.PeepholeLSTM

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        rngs: nnx.Rngs,
        **options: Unpack[Options],
    ) -> None:
        sizes = input_size, hidden_size, num_layers, bias, dropout, bidirectional
        self._set_up(sizes, {}, rngs, options)


class LayerNormLSTM(_Stack):
    """A stack of LSTM layers with layer normalisation in each step. lstm(packed) returns (output, (h_n, c_n)).

    The arguments input_size, hidden_size, num_layers, bias, dropout, bidirectional, learned_initial_state, merge and
    regularization are those of jaxpack.LayerNormLSTM, which says where the norms are.

    Examples:
      >>> from flax import nnx
      >>> lstm = jaxpack.nnx.LayerNormLSTM(2, 4, rngs=nnx.Rngs(0))
      >>> output, (h_n, c_n) = lstm(jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))]))
      >>> output.shape, h_n.shape  # 4 real steps; [num_layers * directions, B, hidden_size]
      ((4, 4), (1, 2, 4))

    Args:
      rngs: the random streams: `params` draws the parameters, `dropout` the masks.
      options: dtype, param_dtype, initialisers (also gate by gate), metadata and deterministic are those of SimpleRNN.
    """

    layer_class = variants.LayerNormLSTM

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        rngs: nnx.Rngs,
        **options: Unpack[Options],
    ) -> None:
        sizes = input_size, hidden_size, num_layers, bias, dropout, bidirectional
        self._set_up(sizes, {}, rngs, options)


class LayerNormGRU(_Stack):
    """A stack of GRU layers with layer normalisation in each step. gru(packed) returns (output, h_n).

    The arguments input_size, hidden_size, num_layers, bias, dropout, bidirectional, learned_initial_state, merge and
    regularization are those of jaxpack.LayerNormGRU, which says where the norms are.

    Examples:
      >>> from flax import nnx
      >>> gru = jaxpack.nnx.LayerNormGRU(2, 4, rngs=nnx.Rngs(0))
      >>> output, h_n = gru(jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))]))
      >>> output.shape, h_n.shape  # 4 real steps; [num_layers * directions, B, hidden_size]
      ((4, 4), (1, 2, 4))

    Args:
      rngs: the random streams: `params` draws the parameters, `dropout` the masks.
      options: dtype, param_dtype, initialisers (also gate by gate), metadata and deterministic are those of SimpleRNN.
    """

    layer_class = variants.LayerNormGRU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        rngs: nnx.Rngs,
        **options: Unpack[Options],
    ) -> None:
        sizes = input_size, hidden_size, num_layers, bias, dropout, bidirectional
        self._set_up(sizes, {}, rngs, options)
