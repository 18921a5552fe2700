"""The linear layers as flax.linen modules, which are made from their specifications.

    layer = jaxpack.linen.MinGRU(64)
    variables = layer.init(jax.random.key(0), packed)
    output, state = layer.apply(variables, packed)
    output, state = layer.apply(variables, x, seq_lengths=lengths)
    state, y = layer.apply(variables, state, x, method="step")

`layer.layer(12)` is the specification, jaxpack.MinGRU(12, 64), and variables["params"] are its parameters.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import unfreeze

from jaxpack._flax import linear
from jaxpack._linear.layer import SingleLayer
from jaxpack._linear.lru import LRU as _LRU
from jaxpack._linear.minimal import MinGRU as _MinGRU
from jaxpack._linear.minimal import MinLSTM as _MinLSTM
from jaxpack._linear.rglru import RGLRU as _RGLRU
from jaxpack._packed.inputs import as_batch
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._types import PyTree

__all__ = ["LRU", "RGLRU", "MinGRU", "MinLSTM"]


class _Linear(nn.Module):
    """Base of the modules. A subclass has the options of its `layer_class`, except input_size."""

    dtype: Any = dataclasses.field(default=None, kw_only=True)
    param_dtype: Any = dataclasses.field(default=None, kw_only=True)

    layer_class: ClassVar[Any]

    @nn.nowrap
    def layer(self, input_size: int) -> SingleLayer:
        """Returns the specification for inputs of this size."""
        names = [field.name for field in dataclasses.fields(self.layer_class) if field.name != "input_size"]
        return self.layer_class(input_size, **{name: getattr(self, name) for name in names})

    __call__ = nn.compact(linear.call)
    step = nn.compact(linear.step)

    @nn.nowrap
    def _parts(self, inputs: Any) -> tuple[SingleLayer, PyTree]:
        """Returns the specification for inputs [..., F], and its parameters, drawn if there are none yet."""
        data = inputs.data if isinstance(inputs, PackedSequence) else as_batch(inputs, "inputs")
        size = max((1, *jnp.shape(jax.tree.leaves(data)[0]))[-1], 1)  # 1 without features, which the layer refuses
        layer = self.layer(size)
        drawn: dict[str, Any] = {}

        def draw(key: jax.Array, name: str) -> Any:
            if not drawn:
                drawn.update(layer.init(key, self.param_dtype))
            return drawn[name]

        if self.is_initializing() and not self.has_variable("params", next(iter(layer.shapes))):
            for name in layer.shapes:
                self.param(name, draw, name)
        return layer, {name: unfreeze(nn.meta.unbox(self.get_variable("params", name))) for name in layer.shapes}


class MinGRU(_Linear):
    """A minimal gated recurrent layer. layer.apply(variables, packed) returns (output, h_n).

    The attributes are those of jaxpack.MinGRU, without input_size, and those below.

    Examples:
      >>> layer = jaxpack.linen.MinGRU(4)
      >>> packed = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
      >>> output, h_n = layer.apply(layer.init(jax.random.key(0), packed), packed)
      >>> output.shape, h_n.shape
      ((4, 4), (2, 4))

    Attributes:
      dtype: the dtype to compute in. Default: the result type of inputs and parameters.
      param_dtype: the dtype of the parameters. Default: JAX's float.
    """

    layer_class = _MinGRU

    hidden_size: int
    candidate: str = "identity"
    bias: bool = True


class MinLSTM(_Linear):
    """A minimal long short-term memory layer. layer.apply(variables, packed) returns (output, h_n).

    The attributes are those of jaxpack.MinLSTM, without input_size; dtype and param_dtype are those of MinGRU.

    Examples:
      >>> layer = jaxpack.linen.MinLSTM(4)
      >>> packed = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
      >>> output, h_n = layer.apply(layer.init(jax.random.key(0), packed), packed)
      >>> output.shape, h_n.shape
      ((4, 4), (2, 4))
    """

    layer_class = _MinLSTM

    hidden_size: int
    candidate: str = "identity"
    bias: bool = True


class LRU(_Linear):
    """A linear recurrent unit. layer.apply(variables, packed) returns (output, h_n).

    The attributes are those of jaxpack.LRU, without input_size; dtype and param_dtype are those of MinGRU.

    Examples:
      >>> layer = jaxpack.linen.LRU(4, r_min=0.9, r_max=0.999)
      >>> packed = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
      >>> output, h_n = layer.apply(layer.init(jax.random.key(0), packed), packed)
      >>> output.shape, h_n.shape  # as wide as the input; real and imaginary parts of h
      ((4, 2), (2, 2, 4))
    """

    layer_class = _LRU

    hidden_size: int
    r_min: float = 0.0
    r_max: float = 1.0
    max_phase: float = 2 * math.pi


class RGLRU(_Linear):
    """A real-gated linear recurrent unit. layer.apply(variables, packed) returns (output, h_n).

    The attributes are those of jaxpack.RGLRU, without input_size; dtype and param_dtype are those of MinGRU.

    Examples:
      >>> layer = jaxpack.linen.RGLRU(4, num_heads=2)
      >>> packed = jaxpack.pack_sequence([np.ones((3, 4)), np.ones((1, 4))])
      >>> output, h_n = layer.apply(layer.init(jax.random.key(0), packed), packed)
      >>> output.shape, h_n.shape
      ((4, 4), (2, 4))
    """

    layer_class = _RGLRU

    hidden_size: int
    num_heads: int = 1
    scale_first: bool = True
