"""RNN, LSTM and GRU: the recurrent layers, in one or both directions, over packed and padded batches."""

from __future__ import annotations

import dataclasses

from jaxpack._cells.cell import Cell
from jaxpack._cells.gru import GRUCell, ResetBeforeGRUCell
from jaxpack._cells.lstm import LSTMCell
from jaxpack._cells.rnn import RNNCell, check_nonlinearity
from jaxpack._checks import as_int
from jaxpack._layers.recurrent_layer import RecurrentLayer
from jaxpack._layers.regularization import Regularization


@dataclasses.dataclass(frozen=True)
class RNN(RecurrentLayer):
    """A stack of simple (Elman) recurrent layers. Returns (output, h_n).

    Examples:
      >>> packed = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
      >>> rnn = jaxpack.RNN(input_size=2, hidden_size=4, nonlinearity="relu")
      >>> params = rnn.init(jax.random.key(0))
      >>> output, h_n = rnn.apply(params, packed)
      >>> output.shape, h_n.shape  # 4 real steps; [num_layers * directions, B, hidden_size]
      ((4, 4), (1, 2, 4))

    Args:
      input_size: the number of features of each step, at least 1.
      hidden_size: the width of h, at least 1.
      num_layers: the number of stacked layers, at least 1.
      nonlinearity: "tanh" or "relu".
      bias: whether gates have biases (two, as in PyTorch).
      dropout: the probability of zeroing each output between layers, in [0, 1], drawn anew at each step. Masks follow
        the sequence's row, not the plan.
      bidirectional: whether a second direction reads each sequence backwards. `final_output(state)` has both
        directions after they have read the whole sequence; `last(output)` has the backward one after one step.
      learned_initial_state: whether the initial state is a parameter of each layer and direction, h_0 [H] (for LSTM
        h_0 and c_0), which all sequences begin with. An initial state given to `apply` comes first.
      regularization: further regularisers, a jaxpack.Regularization. Default: none.
      merge: how the outputs of both directions become one, also between layers: "concat" (side by side, [..., 2H]),
        "sum", "mean" or "mul" ([..., H]), or None for a pair of outputs, of a single layer.

    Raises:
      TypeError: if an argument has another type.
      ValueError: if an argument is out of range.
    Source: torch.nn.RNN.
    """

    input_size: int
    hidden_size: int
    num_layers: int = 1
    nonlinearity: str = "tanh"
    bias: bool = True
    dropout: float = 0.0
    bidirectional: bool = False
    learned_initial_state: bool = dataclasses.field(default=False, kw_only=True)
    regularization: Regularization | None = dataclasses.field(default=None, kw_only=True)
    merge: str | None = dataclasses.field(default="concat", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_nonlinearity(self.nonlinearity)

    @property
    def cell(self) -> RNNCell:
        """The cell that every layer and direction runs."""
        return RNNCell(self.hidden_size, self.nonlinearity)


@dataclasses.dataclass(frozen=True)
class LSTM(RecurrentLayer):
    """A stack of long short-term memory layers. Returns (output, (h_n, c_n)).

    Examples:
      >>> packed = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
      >>> lstm = jaxpack.LSTM(input_size=2, hidden_size=4, bidirectional=True)
      >>> params = lstm.init(jax.random.key(0))
      >>> output, (h_n, c_n) = lstm.apply(params, packed)
      >>> output.shape, h_n.shape  # both directions side by side, and one after the other
      ((4, 8), (2, 2, 4))

    Args:
      input_size: the number of features of each step, at least 1.
      hidden_size: the width of h, at least 1.
      num_layers: the number of stacked layers, at least 1.
      bias: whether gates have biases (two, as in PyTorch).
      dropout: the probability of zeroing each output between layers, in [0, 1], drawn anew at each step. Masks follow
        the sequence's row, not the plan.
      bidirectional: whether a second direction reads each sequence backwards. `final_output(state)` has both
        directions after they have read the whole sequence; `last(output)` has the backward one after one step.
      learned_initial_state: whether the initial state is a parameter of each layer and direction, h_0 [H] (for LSTM
        h_0 and c_0), which all sequences begin with. An initial state given to `apply` comes first.
      regularization: further regularisers, a jaxpack.Regularization. Default: none.
      merge: how the outputs of both directions become one, also between layers: "concat" (side by side, [..., 2H]),
        "sum", "mean" or "mul" ([..., H]), or None for a pair of outputs, of a single layer.
      proj_size: if above 0, h is projected to that width, which must be below hidden_size.

    Raises:
      TypeError: if an argument has another type.
      ValueError: if an argument is out of range.
    Source: torch.nn.LSTM.
    """

    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    dropout: float = 0.0
    bidirectional: bool = False
    proj_size: int = 0
    learned_initial_state: bool = dataclasses.field(default=False, kw_only=True)
    regularization: Regularization | None = dataclasses.field(default=None, kw_only=True)
    merge: str | None = dataclasses.field(default="concat", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= as_int("proj_size", self.proj_size) < self.hidden_size:
            raise ValueError(
                f"proj_size must be 0 (none) or above and below hidden_size={self.hidden_size}, got {self.proj_size}."
            )

    @property
    def cell(self) -> LSTMCell:
        """The cell that every layer and direction runs."""
        return LSTMCell(self.hidden_size, self.proj_size)


@dataclasses.dataclass(frozen=True)
class GRU(RecurrentLayer):
    """A stack of gated recurrent layers. Returns (output, h_n).

    Examples:
      >>> packed = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
      >>> gru = jaxpack.GRU(input_size=2, hidden_size=4)
      >>> params = gru.init(jax.random.key(0))
      >>> output, h_n = gru.apply(params, packed)
      >>> output.shape, h_n.shape  # 4 real steps; [num_layers * directions, B, hidden_size]
      ((4, 4), (1, 2, 4))

    Args:
      input_size: the number of features of each step, at least 1.
      hidden_size: the width of h, at least 1.
      num_layers: the number of stacked layers, at least 1.
      bias: whether gates have biases (two, as in PyTorch).
      dropout: the probability of zeroing each output between layers, in [0, 1], drawn anew at each step. Masks follow
        the sequence's row, not the plan.
      bidirectional: whether a second direction reads each sequence backwards. `final_output(state)` has both
        directions after they have read the whole sequence; `last(output)` has the backward one after one step.
      learned_initial_state: whether the initial state is a parameter of each layer and direction, h_0 [H] (for LSTM
        h_0 and c_0), which all sequences begin with. An initial state given to `apply` comes first.
      regularization: further regularisers, a jaxpack.Regularization. Default: none.
      merge: how the outputs of both directions become one, also between layers: "concat" (side by side, [..., 2H]),
        "sum", "mean" or "mul" ([..., H]), or None for a pair of outputs, of a single layer.
      reset_after: whether the gate r multiplies the recurrent product, as in PyTorch, or h before it, as in the paper
        (Cho et al. 2014), Haiku, and Keras with reset_after=False. That takes a second product in each step. The
        parameters have the same shapes, and no parameters make the two equal: torch.nn.GRU has only the first.

    Raises:
      TypeError: if an argument has another type.
      ValueError: if an argument is out of range.
    Source: torch.nn.GRU, and keras.layers.GRU for reset_after.
    """

    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    dropout: float = 0.0
    bidirectional: bool = False
    learned_initial_state: bool = dataclasses.field(default=False, kw_only=True)
    regularization: Regularization | None = dataclasses.field(default=None, kw_only=True)
    merge: str | None = dataclasses.field(default="concat", kw_only=True)
    reset_after: bool = dataclasses.field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.reset_after, bool):
            raise TypeError(f"reset_after must be a bool, got {self.reset_after!r}.")

    @property
    def cell(self) -> Cell:
        """The cell that every layer and direction runs."""
        return (GRUCell if self.reset_after else ResetBeforeGRUCell)(self.hidden_size)
