"""The layers that run step by step as flax.linen modules, made from their specifications as those of `_linear`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn

from jaxpack._layers.recurrent_layer import RecurrentLayer
from jaxpack._linear.layer import SingleLayer
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._stepped.cfc import CfC as _CfC
from jaxpack._stepped.conv import ConvGRU as _ConvGRU
from jaxpack._stepped.conv import ConvLSTM as _ConvLSTM
from jaxpack._stepped.gru_d import GRUD as _GRUD
from jaxpack._stepped.slstm import SLSTM as _SLSTM
from jaxpack._stepped.time_decay import TimeDecay as _TimeDecay
from jaxpack._types import PyTree
from jaxpack.linen._linear import _Linear

__all__ = ["GRUD", "SLSTM", "CfC", "ConvGRU", "ConvLSTM", "TimeDecay"]


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


class _Timed(_Linear):
    """Base of the modules whose inputs are a tuple, x first."""

    @nn.nowrap
    def _parts(self, inputs: Any) -> tuple[SingleLayer, PyTree]:
        """Returns the specification for these inputs, and its parameters."""
        return super()._parts(jax.tree.leaves(inputs.data if isinstance(inputs, PackedSequence) else inputs)[0])


class GRUD(_Timed):
    """A GRU-D layer, for missing values. layer.apply(variables, packed) returns (output, (h, last, since)).

    The attributes are those of jaxpack.GRUD, without input_size; dtype and param_dtype are those of MinGRU.

    Examples:
      >>> layer = jaxpack.linen.GRUD(4)
      >>> visits = [(np.ones((n, 2)), np.ones((n, 2), bool), np.full(n, 0.5)) for n in (3, 1)]
      >>> packed = jaxpack.pack_sequence(visits)
      >>> output, (h, last, since) = layer.apply(layer.init(jax.random.key(0), packed), packed)
      >>> output.shape, h.shape
      ((4, 4), (2, 4))
    """

    layer_class = _GRUD

    hidden_size: int


class CfC(_Timed):
    """A closed-form continuous-time layer, for uneven steps. layer.apply(variables, packed) returns (output, h_n).

    The attributes are those of jaxpack.CfC, without input_size; dtype and param_dtype are those of MinGRU.

    Examples:
      >>> layer = jaxpack.linen.CfC(4, backbone_size=8)
      >>> packed = jaxpack.pack_sequence([(np.ones((n, 2)), np.full(n, 0.5)) for n in (3, 1)])
      >>> output, h_n = layer.apply(layer.init(jax.random.key(0), packed), packed)
      >>> output.shape, h_n.shape
      ((4, 4), (2, 4))
    """

    layer_class = _CfC

    hidden_size: int
    backbone_size: int = 128
    mode: str = "gated"


class TimeDecay(_Timed):
    """A layer whose state decays with the time between steps. layer.apply(variables, packed) returns (output, state).

    The attributes are those of jaxpack.TimeDecay; dtype and param_dtype are those of MinGRU.

    Examples:
      >>> layer = jaxpack.linen.TimeDecay(jaxpack.GRU(2, 4))
      >>> packed = jaxpack.pack_sequence([(np.ones((n, 2)), np.full(n, 0.5)) for n in (3, 1)])
      >>> output, h = layer.apply(layer.init(jax.random.key(0), packed), packed)
      >>> output.shape, h.shape
      ((4, 4), (2, 4))
    """

    layer_class = _TimeDecay

    base: RecurrentLayer

    @nn.nowrap
    def layer(self, input_size: int) -> SingleLayer:
        """Returns the specification, which has its own input size."""
        return _TimeDecay(self.base)
