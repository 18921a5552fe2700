"""The layers that run step by step as flax.linen modules, made from their specifications as those of `_linear`."""

from __future__ import annotations

from collections.abc import Sequence

from jaxpack._stepped.conv import ConvGRU as _ConvGRU
from jaxpack._stepped.conv import ConvLSTM as _ConvLSTM
from jaxpack._stepped.slstm import SLSTM as _SLSTM
from jaxpack.linen._linear import _Linear

__all__ = ["SLSTM", "ConvGRU", "ConvLSTM"]


class ConvLSTM(_Linear):
    """A convolutional LSTM layer. layer.apply(variables, packed) returns (output, (h_n, c_n)).

    The attributes are those of jaxpack.ConvLSTM, without input_size; dtype and param_dtype are those of MinGRU.

    Examples:
      >>> layer = jaxpack.linen.ConvLSTM(4, spatial_shape=(5, 5))
      >>> packed = jaxpack.pack_sequence([np.ones((3, 5, 5, 2)), np.ones((1, 5, 5, 2))])
      >>> output, (h_n, c_n) = layer.apply(layer.init(jax.random.key(0), packed), packed)
      >>> output.shape, h_n.shape
      ((4, 5, 5, 4), (2, 5, 5, 4))
    """

    layer_class = _ConvLSTM

    hidden_size: int
    spatial_shape: Sequence[int]
    kernel_size: int | Sequence[int] = 3
    bias: bool = True


class ConvGRU(_Linear):
    """A convolutional GRU layer. layer.apply(variables, packed) returns (output, h_n).

    The attributes are those of jaxpack.ConvGRU, without input_size; dtype and param_dtype are those of MinGRU.

    Examples:
      >>> layer = jaxpack.linen.ConvGRU(4, spatial_shape=(5,))
      >>> packed = jaxpack.pack_sequence([np.ones((3, 5, 2)), np.ones((1, 5, 2))])
      >>> output, h_n = layer.apply(layer.init(jax.random.key(0), packed), packed)
      >>> output.shape, h_n.shape
      ((4, 5, 4), (2, 5, 4))
    """

    layer_class = _ConvGRU

    hidden_size: int
    spatial_shape: Sequence[int]
    kernel_size: int | Sequence[int] = 3
    bias: bool = True


class SLSTM(_Linear):
    """An sLSTM layer. layer.apply(variables, packed) returns (output, (h, c, n, m)).

    The attributes are those of jaxpack.SLSTM, without input_size; dtype and param_dtype are those of MinGRU.

    Examples:
      >>> layer = jaxpack.linen.SLSTM(8, num_heads=2)
      >>> packed = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
      >>> output, (h, c, n, m) = layer.apply(layer.init(jax.random.key(0), packed), packed)
      >>> output.shape, h.shape
      ((4, 8), (2, 8))
    """

    layer_class = _SLSTM

    hidden_size: int
    num_heads: int = 4
    forget_gate: str = "sigmoid"
