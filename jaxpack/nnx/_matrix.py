"""The layers of matrix states as flax.nnx modules, which are made from their specifications as those of `_linear`."""

from __future__ import annotations

from jaxpack._matrix.gated_delta_net import GatedDeltaNet as _GatedDeltaNet
from jaxpack._matrix.mamba2 import Mamba2 as _Mamba2
from jaxpack._matrix.mlstm import MLSTM as _MLSTM
from jaxpack.nnx._linear import _Linear

__all__ = ["MLSTM", "GatedDeltaNet", "Mamba2"]


class Mamba2(_Linear):
    """A Mamba-2 layer. layer(packed) returns (output, (conv, ssm)).

    The arguments are those of jaxpack.Mamba2; rngs, dtype and param_dtype are those of MinGRU.

    Examples:
      >>> from flax import nnx
      >>> layer = jaxpack.nnx.Mamba2(4, 8, head_size=4, state_size=3, rngs=nnx.Rngs(0))
      >>> output, (conv, ssm) = layer(jaxpack.pack_sequence([np.ones((3, 4)), np.ones((1, 4))]))
      >>> output.shape, conv.shape, ssm.shape
      ((4, 4), (2, 3, 14), (2, 2, 3, 4))
    """

    layer_class = _Mamba2


class GatedDeltaNet(_Linear):
    """A gated delta network. layer(packed) returns (output, (conv, memory)).

    The arguments are those of jaxpack.GatedDeltaNet; rngs, dtype and param_dtype are those of MinGRU.

    Examples:
      >>> from flax import nnx
      >>> layer = jaxpack.nnx.GatedDeltaNet(4, 8, num_heads=2, key_size=3, rngs=nnx.Rngs(0))
      >>> output, (conv, memory) = layer(jaxpack.pack_sequence([np.ones((3, 4)), np.ones((1, 4))]))
      >>> output.shape, conv.shape, memory.shape
      ((4, 4), (2, 3, 20), (2, 2, 3, 4))
    """

    layer_class = _GatedDeltaNet


class MLSTM(_Linear):
    """An mLSTM layer. layer(packed) returns (output, (conv, (C, n, m))).

    The arguments are those of jaxpack.MLSTM; rngs, dtype and param_dtype are those of MinGRU.

    Examples:
      >>> from flax import nnx
      >>> layer = jaxpack.nnx.MLSTM(4, 8, num_heads=2, rngs=nnx.Rngs(0))
      >>> output, (conv, (memory, normaliser, m)) = layer(jaxpack.pack_sequence([np.ones((3, 4)), np.ones((1, 4))]))
      >>> output.shape, memory.shape
      ((4, 4), (2, 2, 4, 4))
    """

    layer_class = _MLSTM
