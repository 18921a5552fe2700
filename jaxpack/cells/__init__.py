"""The cells, and what an own cell and its layer are built from."""

from jaxpack._cells.cell import Activations, Carry, Cell, Fused, Linearization, Params, total_bias
from jaxpack._cells.gru import GRUCell, gru_cell
from jaxpack._cells.lstm import LSTMCell, lstm_cell
from jaxpack._cells.rnn import RNNCell, rnn_cell
from jaxpack._layers.recurrent_layer import RecurrentLayer
from jaxpack._namespace import publish as _publish

__all__ = [
    "Activations",
    "Carry",
    "Cell",
    "Fused",
    "GRUCell",
    "LSTMCell",
    "Linearization",
    "Params",
    "RNNCell",
    "RecurrentLayer",
    "gru_cell",
    "lstm_cell",
    "rnn_cell",
    "total_bias",
]

_publish(__name__)
