"""The cells, and what an own cell and its layer are built from."""

from jaxpack._cells.cell import Carry, Cell, Fused, Linearization, Params, total_bias
from jaxpack._cells.gru import GRUCell, ResetBeforeGRUCell, gru_cell
from jaxpack._cells.ind_rnn import IndRNNCell, ind_rnn_cell
from jaxpack._cells.layer_norm_gru import LayerNormGRUCell, layer_norm_gru_cell
from jaxpack._cells.layer_norm_lstm import LayerNormLSTMCell, layer_norm_lstm_cell
from jaxpack._cells.lstm import LSTMCell, lstm_cell
from jaxpack._cells.mgu import FlaxMGUCell, MGUCell, mgu_cell
from jaxpack._cells.peephole import PeepholeLSTMCell, peephole_lstm_cell
from jaxpack._cells.rnn import RNNCell, rnn_cell
from jaxpack._layers.recurrent_layer import RecurrentLayer
from jaxpack._namespace import publish as _publish

__all__ = [
    "Carry",
    "Cell",
    "FlaxMGUCell",
    "Fused",
    "GRUCell",
    "IndRNNCell",
    "LSTMCell",
    "LayerNormGRUCell",
    "LayerNormLSTMCell",
    "Linearization",
    "MGUCell",
    "Params",
    "PeepholeLSTMCell",
    "RNNCell",
    "RecurrentLayer",
    "ResetBeforeGRUCell",
    "gru_cell",
    "ind_rnn_cell",
    "layer_norm_gru_cell",
    "layer_norm_lstm_cell",
    "lstm_cell",
    "mgu_cell",
    "peephole_lstm_cell",
    "rnn_cell",
    "total_bias",
]

_publish(__name__)
