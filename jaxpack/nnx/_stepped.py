"""The layers that run step by step as flax.nnx modules, made from their specifications as those of `_linear`."""

from __future__ import annotations

from jaxpack._stepped.cfc import CfC as _CfC
from jaxpack._stepped.conv import ConvGRU as _ConvGRU
from jaxpack._stepped.conv import ConvLSTM as _ConvLSTM
from jaxpack._stepped.gru_d import GRUD as _GRUD
from jaxpack._stepped.slstm import SLSTM as _SLSTM
from jaxpack._stepped.time_decay import TimeDecay as _TimeDecay
from jaxpack.nnx._linear import _Linear

__all__ = ["GRUD", "SLSTM", "CfC", "ConvGRU", "ConvLSTM", "TimeDecay"]


class ConvLSTM(_Linear):
    """A convolutional LSTM layer. layer(packed) returns (output, (h_n, c_n)).

    The arguments are those of jaxpack.ConvLSTM; rngs, dtype and param_dtype are those of MinGRU.

    Examples:
      >>> from flax import nnx
      >>> layer = jaxpack.nnx.ConvLSTM(2, 4, spatial_shape=(5, 5), rngs=nnx.Rngs(0))
      >>> output, (h_n, c_n) = layer(jaxpack.pack_sequence([np.ones((3, 5, 5, 2)), np.ones((1, 5, 5, 2))]))
      >>> output.shape, h_n.shape
      ((4, 5, 5, 4), (2, 5, 5, 4))
    """

    layer_class = _ConvLSTM


class ConvGRU(_Linear):
    """A convolutional GRU layer. layer(packed) returns (output, h_n).

    The arguments are those of jaxpack.ConvGRU; rngs, dtype and param_dtype are those of MinGRU.

    Examples:
      >>> from flax import nnx
      >>> layer = jaxpack.nnx.ConvGRU(2, 4, spatial_shape=(5,), rngs=nnx.Rngs(0))
      >>> output, h_n = layer(jaxpack.pack_sequence([np.ones((3, 5, 2)), np.ones((1, 5, 2))]))
      >>> output.shape, h_n.shape
      ((4, 5, 4), (2, 5, 4))
    """

    layer_class = _ConvGRU


class SLSTM(_Linear):
    """An sLSTM layer. layer(packed) returns (output, (h, c, n, m)).

    The arguments are those of jaxpack.SLSTM; rngs, dtype and param_dtype are those of MinGRU.

    Examples:
      >>> from flax import nnx
      >>> layer = jaxpack.nnx.SLSTM(2, 8, num_heads=2, rngs=nnx.Rngs(0))
      >>> output, (h, c, n, m) = layer(jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))]))
      >>> output.shape, h.shape
      ((4, 8), (2, 8))
    """

    layer_class = _SLSTM


class GRUD(_Linear):
    """A GRU-D layer, for missing values and uneven steps. layer(packed) returns (output, (h, last, since)).

    The arguments are those of jaxpack.GRUD; rngs, dtype and param_dtype are those of MinGRU.

    Examples:
      >>> from flax import nnx
      >>> layer = jaxpack.nnx.GRUD(2, 4, rngs=nnx.Rngs(0))
      >>> visits = [(np.ones((n, 2)), np.ones((n, 2), bool), np.full(n, 0.5)) for n in (3, 1)]
      >>> output, (h, last, since) = layer(jaxpack.pack_sequence(visits))
      >>> output.shape, h.shape
      ((4, 4), (2, 4))
    """

    layer_class = _GRUD


class CfC(_Linear):
    """A closed-form continuous-time layer, for uneven steps. layer(packed) returns (output, h_n).

    The arguments are those of jaxpack.CfC; rngs, dtype and param_dtype are those of MinGRU.

    Examples:
      >>> from flax import nnx
      >>> layer = jaxpack.nnx.CfC(2, 4, backbone_size=8, rngs=nnx.Rngs(0))
      >>> output, h_n = layer(jaxpack.pack_sequence([(np.ones((n, 2)), np.full(n, 0.5)) for n in (3, 1)]))
      >>> output.shape, h_n.shape
      ((4, 4), (2, 4))
    """

    layer_class = _CfC


class TimeDecay(_Linear):
    """A recurrent layer whose state decays with the time between steps. layer(packed) returns (output, state).

    The arguments are those of jaxpack.TimeDecay; rngs, dtype and param_dtype are those of MinGRU.

    Examples:
      >>> from flax import nnx
      >>> layer = jaxpack.nnx.TimeDecay(jaxpack.GRU(2, 4), rngs=nnx.Rngs(0))
      >>> output, h = layer(jaxpack.pack_sequence([(np.ones((n, 2)), np.full(n, 0.5)) for n in (3, 1)]))
      >>> output.shape, h.shape
      ((4, 4), (2, 4))
    """

    layer_class = _TimeDecay
