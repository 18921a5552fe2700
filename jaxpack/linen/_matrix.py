"""The layers of matrix states as flax.linen modules, which are made from their specifications as those of `_linear`."""

from __future__ import annotations

from jaxpack._matrix.gated_delta_net import GatedDeltaNet as _GatedDeltaNet
from jaxpack._matrix.mamba2 import Mamba2 as _Mamba2
from jaxpack._matrix.mlstm import MLSTM as _MLSTM
from jaxpack.linen._linear import _Linear

__all__ = ["MLSTM", "GatedDeltaNet", "Mamba2"]


class Mamba2(_Linear):
    """A Mamba-2 layer. layer.apply(variables, packed) returns (output, (conv, ssm)).

    The attributes are those of jaxpack.Mamba2, without input_size; dtype and param_dtype are those of MinGRU.

    Examples:
      >>> layer = jaxpack.linen.Mamba2(8, head_size=4, state_size=3)
      >>> packed = jaxpack.pack_sequence([np.ones((3, 4)), np.ones((1, 4))])
      >>> output, (conv, ssm) = layer.apply(layer.init(jax.random.key(0), packed), packed)
      >>> output.shape, conv.shape, ssm.shape
      ((4, 4), (2, 3, 14), (2, 2, 3, 4))
    """

    layer_class = _Mamba2

    hidden_size: int
    head_size: int = 64
    state_size: int = 128
    num_groups: int = 1
    kernel_size: int = 4


class GatedDeltaNet(_Linear):
    """A gated delta network. layer.apply(variables, packed) returns (output, (conv, memory)).

    The attributes are those of jaxpack.GatedDeltaNet, without input_size; dtype and param_dtype are those of MinGRU.

    Examples:
      >>> layer = jaxpack.linen.GatedDeltaNet(8, num_heads=2, key_size=3)
      >>> packed = jaxpack.pack_sequence([np.ones((3, 4)), np.ones((1, 4))])
      >>> output, (conv, memory) = layer.apply(layer.init(jax.random.key(0), packed), packed)
      >>> output.shape, conv.shape, memory.shape
      ((4, 4), (2, 3, 20), (2, 2, 3, 4))
    """

    layer_class = _GatedDeltaNet

    hidden_size: int
    num_heads: int = 4
    key_size: int = 64
    num_key_heads: int | None = None
    kernel_size: int = 4


class MLSTM(_Linear):
    """An mLSTM layer. layer.apply(variables, packed) returns (output, (conv, (C, n, m))).

    The attributes are those of jaxpack.MLSTM, without input_size; dtype and param_dtype are those of MinGRU.

    Examples:
      >>> layer = jaxpack.linen.MLSTM(8, num_heads=2)
      >>> packed = jaxpack.pack_sequence([np.ones((3, 4)), np.ones((1, 4))])
      >>> output, (conv, (memory, normaliser, m)) = layer.apply(layer.init(jax.random.key(0), packed), packed)
      >>> output.shape, memory.shape
      ((4, 4), (2, 2, 4, 4))
    """

    layer_class = _MLSTM

    hidden_size: int
    num_heads: int = 4
    block_size: int = 4
    kernel_size: int = 4
