"""jaxpack in flax.nnx: the stacks SimpleRNN, LSTM and GRU, and Flax's RNN and Bidirectional for ragged batches."""

from jaxpack._namespace import publish as _publish
from jaxpack.nnx._deep import DeepRNN
from jaxpack.nnx._linear import LRU, RGLRU, MinGRU, MinLSTM
from jaxpack.nnx._matrix import MLSTM, GatedDeltaNet, Mamba2
from jaxpack.nnx._rnn import RNN, Bidirectional
from jaxpack.nnx._stacks import GRU, LSTM, SimpleRNN
from jaxpack.nnx._stepped import GRUD, SLSTM, CfC, ConvGRU, ConvLSTM, TimeDecay
from jaxpack.nnx._variants import MGU, IndRNN, LayerNormGRU, LayerNormLSTM, PeepholeLSTM

__all__ = [
    "GRU",
    "GRUD",
    "LRU",
    "LSTM",
    "MGU",
    "MLSTM",
    "RGLRU",
    "RNN",
    "SLSTM",
    "Bidirectional",
    "CfC",
    "ConvGRU",
    "ConvLSTM",
    "DeepRNN",
    "GatedDeltaNet",
    "IndRNN",
    "LayerNormGRU",
    "LayerNormLSTM",
    "Mamba2",
    "MinGRU",
    "MinLSTM",
    "PeepholeLSTM",
    "SimpleRNN",
    "TimeDecay",
]

_publish(__name__)
