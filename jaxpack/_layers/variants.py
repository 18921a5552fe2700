"""MGU, IndRNN, PeepholeLSTM, LayerNormLSTM and LayerNormGRU: layers of further cells of the literature."""

from __future__ import annotations

import dataclasses

from jaxpack._cells.cell import Cell
from jaxpack._cells.ind_rnn import IndRNNCell
from jaxpack._cells.layer_norm_gru import LayerNormGRUCell
from jaxpack._cells.layer_norm_lstm import LayerNormLSTMCell
from jaxpack._cells.mgu import mgu_of
from jaxpack._cells.peephole import PeepholeLSTMCell
from jaxpack._cells.rnn import check_nonlinearity
from jaxpack._layers.recurrent_layer import RecurrentLayer
from jaxpack._layers.regularization import Regularization


@dataclasses.dataclass(frozen=True)
class _Variant(RecurrentLayer):
    """The options that all of these layers share."""

    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    dropout: float = 0.0
    bidirectional: bool = False
    learned_initial_state: bool = dataclasses.field(default=False, kw_only=True)
    regularization: Regularization | None = dataclasses.field(default=None, kw_only=True)
    merge: str | None = dataclasses.field(default="concat", kw_only=True)


@dataclasses.dataclass(frozen=True)
class MGU(_Variant):
    """A stack of layers of minimal gated units, which have one gate. Returns (output, h_n).

    The arguments input_size, hidden_size, num_layers, bias, dropout, bidirectional, learned_initial_state, merge and
    regularization are those of jaxpack.GRU.

    Examples:
      >>> packed = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
      >>> mgu = jaxpack.MGU(input_size=2, hidden_size=4)
      >>> output, h_n = mgu.apply(mgu.init(jax.random.key(0)), packed)
      >>> output.shape, h_n.shape  # 4 real steps; [num_layers * directions, B, hidden_size]
      ((4, 4), (1, 2, 4))

    Args:
      reset: what the gate f multiplies beside the state. "before", the paper's choice, is h before the product with
        W_hn, and f is the share of the new state. "after" is the product, and f is the share of the old state, as in
        flax.linen.MGUCell. With None f only mixes the two states, as in flax.linen.MGUCell(reset_gate=False).

    Raises:
      TypeError: if an argument has another type.
      ValueError: if an argument is out of range.
    Source: Zhou et al. 2016, "Minimal gated unit for recurrent neural networks".
    """

    reset: str | None = dataclasses.field(default="before", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        mgu_of(self.hidden_size, self.reset)

    @property
    def cell(self) -> Cell:
        """The cell that every layer and direction runs."""
        return mgu_of(self.hidden_size, self.reset)


@dataclasses.dataclass(frozen=True)
class IndRNN(_Variant):
    """A stack of layers of independently recurrent units, each of which sees its own past alone. Returns (output, h_n).

    A step has no product with h, only one weight for each unit, so stacks of several layers mix units between layers.
    The arguments input_size, hidden_size, num_layers, bias, dropout, bidirectional, learned_initial_state, merge and
    regularization are those of jaxpack.RNN.

    Examples:
      >>> packed = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
      >>> rnn = jaxpack.IndRNN(input_size=2, hidden_size=4, num_layers=2)
      >>> params = rnn.init(jax.random.key(0))  # recurrent weights between 0 and 1
      >>> output, h_n = rnn.apply(params, packed)
      >>> params["l0"]["weight_hh"].shape, output.shape, h_n.shape
      ((4,), (4, 4), (2, 2, 4))

    Args:
      nonlinearity: "relu", the paper's choice, or "tanh".

    Raises:
      TypeError: if an argument has another type.
      ValueError: if an argument is out of range.
    Source: Li et al. 2018, "Independently recurrent neural network (IndRNN)".
    """

    nonlinearity: str = dataclasses.field(default="relu", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_nonlinearity(self.nonlinearity)

    @property
    def cell(self) -> IndRNNCell:
        """The cell that every layer and direction runs."""
        return IndRNNCell(self.hidden_size, self.nonlinearity)


@dataclasses.dataclass(frozen=True)
class PeepholeLSTM(_Variant):
    """A stack of LSTM layers whose gates see the memory. Returns (output, (h_n, c_n)).

    The gates i and f see the memory before the step, and o the memory after it, each by one weight for each unit. The
    arguments input_size, hidden_size, num_layers, bias, dropout, bidirectional, learned_initial_state, merge and
    regularization are those of jaxpack.LSTM.

    Examples:
      >>> packed = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
      >>> lstm = jaxpack.PeepholeLSTM(input_size=2, hidden_size=4)
      >>> params = lstm.init(jax.random.key(0))
      >>> output, (h_n, c_n) = lstm.apply(params, packed)
      >>> params["l0"]["weight_ch"].shape, output.shape, c_n.shape  # the peepholes of i, f and o side by side
      ((12,), (4, 4), (1, 2, 4))

    Raises:
      TypeError: if an argument has another type.
      ValueError: if an argument is out of range.
    Source: Gers & Schmidhuber 2000, "Recurrent nets that time and count".
    """

    @property
    def cell(self) -> PeepholeLSTMCell:
        """The cell that every layer and direction runs."""
        return PeepholeLSTMCell(self.hidden_size)


@dataclasses.dataclass(frozen=True)
class LayerNormLSTM(_Variant):
    """A stack of LSTM layers with layer normalisation in each step. Returns (output, (h_n, c_n)).

    There are three norms: of the input's product and of h's product, each over all four gates together, and of the
    memory on its way to h. The memory that is handed on is not normalised. The arguments input_size, hidden_size,
    num_layers, bias, dropout, bidirectional, learned_initial_state, merge and regularization are those of jaxpack.LSTM.
    Biases are the shifts of the norms.

    Examples:
      >>> packed = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
      >>> lstm = jaxpack.LayerNormLSTM(input_size=2, hidden_size=4)
      >>> params = lstm.init(jax.random.key(0))  # scales of 1 and biases of 0
      >>> output, (h_n, c_n) = lstm.apply(params, packed)
      >>> params["l0"]["scale_hh"].shape, output.shape, c_n.shape
      ((16,), (4, 4), (1, 2, 4))

    Raises:
      TypeError: if an argument has another type.
      ValueError: if an argument is out of range.
    Source: Ba, Kiros & Hinton 2016, "Layer normalization".
    """

    @property
    def cell(self) -> LayerNormLSTMCell:
        """The cell that every layer and direction runs."""
        return LayerNormLSTMCell(self.hidden_size)


@dataclasses.dataclass(frozen=True)
class LayerNormGRU(_Variant):
    """A stack of GRU layers with layer normalisation in each step. Returns (output, h_n).

    There are four norms: of the input's and of h's products of the gates r and z, each over both gates together, and of
    those of n. r multiplies the normalised product of h. The arguments input_size, hidden_size, num_layers, bias,
    dropout, bidirectional, learned_initial_state, merge and regularization are those of jaxpack.GRU. Biases are the
    shifts of the norms.

    Examples:
      >>> packed = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
      >>> gru = jaxpack.LayerNormGRU(input_size=2, hidden_size=4)
      >>> params = gru.init(jax.random.key(0))  # scales of 1 and biases of 0
      >>> output, h_n = gru.apply(params, packed)
      >>> params["l0"]["scale_hh"].shape, output.shape, h_n.shape
      ((12,), (4, 4), (1, 2, 4))

    Raises:
      TypeError: if an argument has another type.
      ValueError: if an argument is out of range.
    Source: Ba, Kiros & Hinton 2016, "Layer normalization".
    """

    @property
    def cell(self) -> LayerNormGRUCell:
        """The cell that every layer and direction runs."""
        return LayerNormGRUCell(self.hidden_size)
