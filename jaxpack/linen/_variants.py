"""MGU, IndRNN, PeepholeLSTM, LayerNormLSTM and LayerNormGRU as flax.linen modules."""

from __future__ import annotations

import dataclasses

from jaxpack._layers import variants
from jaxpack.linen._stacks import _Stack

__all__ = ["MGU", "IndRNN", "LayerNormGRU", "LayerNormLSTM", "PeepholeLSTM"]


class _Variant(_Stack):
    """Base of these stacks: the attributes that all of them have."""

    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    dropout: float = 0.0
    bidirectional: bool = False


class MGU(_Variant):
    """A stack of layers of minimal gated units. mgu.apply(variables, packed) returns (output, h_n).

    The attributes hidden_size, num_layers, bias, dropout, bidirectional, reset, learned_initial_state, merge and
    regularization are those of jaxpack.MGU. dtype, param_dtype, initialisers (also gate by gate) and deterministic are
    those of SimpleRNN.

    Examples:
      >>> mgu = jaxpack.linen.MGU(4)
      >>> packed = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
      >>> output, h_n = mgu.apply(mgu.init(jax.random.key(0), packed), packed)
      >>> output.shape, h_n.shape  # 4 real steps; [num_layers * directions, B, hidden_size]
      ((4, 4), (1, 2, 4))
    """

    layer_class = variants.MGU

    reset: str | None = dataclasses.field(default="before", kw_only=True)


class IndRNN(_Variant):
    """A stack of layers of independently recurrent units. rnn.apply(variables, packed) returns (output, h_n).

    The attributes hidden_size, num_layers, bias, dropout, bidirectional, nonlinearity, learned_initial_state, merge and
    regularization are those of jaxpack.IndRNN. dtype, param_dtype, initialisers and deterministic are those of
    SimpleRNN.

    Examples:
      >>> rnn = jaxpack.linen.IndRNN(4, num_layers=2)
      >>> packed = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
      >>> output, h_n = rnn.apply(rnn.init(jax.random.key(0), packed), packed)
      >>> output.shape, h_n.shape  # 4 real steps; [num_layers * directions, B, hidden_size]
      ((4, 4), (2, 2, 4))
    """

    layer_class = variants.IndRNN

    nonlinearity: str = dataclasses.field(default="relu", kw_only=True)


class PeepholeLSTM(_Variant):
    """A stack of LSTM layers whose gates see the memory. lstm.apply(variables, packed) returns (output, (h_n, c_n)).

    The attributes hidden_size, num_layers, bias, dropout, bidirectional, learned_initial_state, merge and
    regularization are those of jaxpack.PeepholeLSTM. dtype, param_dtype, initialisers (also gate by gate) and
    deterministic are those of SimpleRNN.

    Examples:
      >>> lstm = jaxpack.linen.PeepholeLSTM(4)
      >>> packed = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
      >>> output, (h_n, c_n) = lstm.apply(lstm.init(jax.random.key(0), packed), packed)
      >>> output.shape, h_n.shape  # 4 real steps; [num_layers * directions, B, hidden_size]
      ((4, 4), (1, 2, 4))
    """

    layer_class = variants.PeepholeLSTM


class LayerNormLSTM(_Variant):
    """A stack of LSTM layers with layer normalisation in each step.

    lstm.apply(variables, packed) returns (output, (h_n, c_n)). The attributes hidden_size, num_layers, bias, dropout,
    bidirectional, learned_initial_state, merge and regularization are those of jaxpack.LayerNormLSTM, which says where
    the norms are. dtype, param_dtype, initialisers (also gate by gate) and deterministic are those of SimpleRNN.

    Examples:
      >>> lstm = jaxpack.linen.LayerNormLSTM(4)
      >>> packed = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
      >>> output, (h_n, c_n) = lstm.apply(lstm.init(jax.random.key(0), packed), packed)
      >>> output.shape, h_n.shape  # 4 real steps; [num_layers * directions, B, hidden_size]
      ((4, 4), (1, 2, 4))
    """

    layer_class = variants.LayerNormLSTM


class LayerNormGRU(_Variant):
    """A stack of GRU layers with layer normalisation in each step. gru.apply(variables, packed) returns (output, h_n).

    The attributes hidden_size, num_layers, bias, dropout, bidirectional, learned_initial_state, merge and
    regularization are those of jaxpack.LayerNormGRU, which says where the norms are. dtype, param_dtype, initialisers
    (also gate by gate) and deterministic are those of SimpleRNN.

    Examples:
      >>> gru = jaxpack.linen.LayerNormGRU(4)
      >>> packed = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
      >>> output, h_n = gru.apply(gru.init(jax.random.key(0), packed), packed)
      >>> output.shape, h_n.shape  # 4 real steps; [num_layers * directions, B, hidden_size]
      ((4, 4), (1, 2, 4))
    """

    layer_class = variants.LayerNormGRU
