"""The cells: one file a family, with its equations, parameters and step."""

from jaxpack.cells.cell import Carry, Cell, Fused, Linear, Params, Tanh
from jaxpack.cells.gru import GRUCell, gru_cell
from jaxpack.cells.lstm import LSTMCell, lstm_cell
from jaxpack.cells.rnn import RNNCell, check_nonlinearity, rnn_cell

__all__ = [
    "Carry",
    "Cell",
    "Fused",
    "GRUCell",
    "LSTMCell",
    "Linear",
    "Params",
    "RNNCell",
    "Tanh",
    "check_nonlinearity",
    "gru_cell",
    "lstm_cell",
    "rnn_cell",
]
