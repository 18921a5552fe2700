"""jaxpack in flax.nnx: the stacks SimpleRNN, LSTM and GRU, and Flax's RNN and Bidirectional for ragged batches."""

from jaxpack.nnx.rnn import RNN, Bidirectional
from jaxpack.nnx.stacks import GRU, LSTM, SimpleRNN

__all__ = ["GRU", "LSTM", "RNN", "Bidirectional", "SimpleRNN"]
