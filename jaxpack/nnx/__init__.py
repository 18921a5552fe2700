"""jaxpack in flax.nnx: the stacks SimpleRNN, LSTM and GRU."""

from jaxpack.nnx.stacks import GRU, LSTM, SimpleRNN

__all__ = ["GRU", "LSTM", "SimpleRNN"]
