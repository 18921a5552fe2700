"""jaxpack in flax.nnx: the stacks SimpleRNN, LSTM and GRU, and Flax's RNN and Bidirectional for ragged batches."""

from jaxpack._namespace import publish as _publish
from jaxpack.nnx._linear import MinGRU, MinLSTM
from jaxpack.nnx._matrix import MLSTM, GatedDeltaNet, Mamba2
from jaxpack.nnx._rnn import RNN, Bidirectional
from jaxpack.nnx._stacks import GRU, LSTM, SimpleRNN

__all__ = [
    "GRU",
    "LSTM",
    "MLSTM",
    "RNN",
    "Bidirectional",
    "GatedDeltaNet",
    "Mamba2",
    "MinGRU",
    "MinLSTM",
    "SimpleRNN",
]

_publish(__name__)
