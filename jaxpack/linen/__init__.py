"""jaxpack in flax.linen: the stacks SimpleRNN, LSTM and GRU, and Flax's RNN and Bidirectional for ragged batches."""

from jaxpack._namespace import publish as _publish
from jaxpack.linen._deep import DeepRNN
from jaxpack.linen._linear import LRU, RGLRU, MinGRU, MinLSTM
from jaxpack.linen._matrix import MLSTM, GatedDeltaNet, Mamba2
from jaxpack.linen._rnn import RNN, Bidirectional
from jaxpack.linen._stacks import GRU, LSTM, SimpleRNN
from jaxpack.linen._stepped import GRUD, SLSTM, CfC, ConvGRU, ConvLSTM, TimeDecay
from jaxpack.linen._variants import MGU, IndRNN, LayerNormGRU, LayerNormLSTM, PeepholeLSTM

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
