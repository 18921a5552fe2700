"""jaxpack in flax.linen: the stacks SimpleRNN, LSTM and GRU, and Flax's RNN and Bidirectional for ragged batches."""

from jaxpack.linen.rnn import RNN, Bidirectional
from jaxpack.linen.stacks import GRU, LSTM, SimpleRNN

__all__ = ["GRU", "LSTM", "RNN", "Bidirectional", "SimpleRNN"]
