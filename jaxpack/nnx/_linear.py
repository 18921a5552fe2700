"""The linear layers as flax.nnx modules, which are made from their specifications.

    layer = jaxpack.nnx.MinGRU(12, 64, rngs=nnx.Rngs(0))
    output, state = layer(packed)
    output, state = layer(x, seq_lengths=lengths)
    state, y = layer.step(state, x)

`layer.layer` is the specification, jaxpack.MinGRU(12, 64). `layer.params` are its parameters as nnx.Param, with their
structure:

    nnx.update(layer.params, layer.layer.init(key))
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from flax import nnx

from jaxpack._flax import linear
from jaxpack._linear.layer import SingleLayer
from jaxpack._linear.lru import LRU as _LRU
from jaxpack._linear.minimal import MinGRU as _MinGRU
from jaxpack._linear.minimal import MinLSTM as _MinLSTM
from jaxpack._linear.rglru import RGLRU as _RGLRU
from jaxpack._types import PyTree

__all__ = ["LRU", "RGLRU", "MinGRU", "MinLSTM"]


class _Linear(nnx.Module):
    """Base of the modules: a specification with its parameters as nnx.Param. A subclass names `layer_class`."""

    layer_class: ClassVar[type[SingleLayer]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Gives a module the signature of its layer, and rngs and dtypes."""
        super().__init_subclass__(**kwargs)
        fields = inspect.signature(cls.layer_class).parameters.values()
        common = inspect.signature(_Linear.__init__).parameters.values()
        own = [each for each in common if each.kind is each.KEYWORD_ONLY]
        cls.__signature__ = inspect.Signature([*fields, *own])

    def __init__(self, *args: Any, rngs: nnx.Rngs, dtype: Any = None, param_dtype: Any = None, **options: Any) -> None:
        self.layer = self.layer_class(*args, **options)
        self.dtype = dtype
        params = self.layer.init(rngs.params(), param_dtype)
        for name, value in params.items():
            setattr(self, name, nnx.data(jax.tree.map(nnx.Param, value)))

    __call__ = linear.call
    step = linear.step

    @property
    def params(self) -> nnx.Dict:
        """The module's nnx.Param, with the structure of the layer's parameters."""
        return nnx.Dict({name: _as_dict(getattr(self, name)) for name in self.layer.shapes})

    def _parts(self, inputs: Any) -> tuple[SingleLayer, PyTree]:
        """Returns the specification, and its parameters as it takes them."""
        return self.layer, {name: _values_of(getattr(self, name), shape) for name, shape in self.layer.shapes.items()}


def _as_dict(variables: Any) -> Any:
    """Returns nested dicts of variables as nnx.Dict."""
    if not isinstance(variables, Mapping):
        return variables
    return nnx.Dict({name: _as_dict(each) for name, each in variables.items()})


def _values_of(variables: Any, shapes: Any) -> Any:
    """Returns the values of variables, without what nnx.capture and others put beside them."""
    if isinstance(shapes, dict):
        return {name: _values_of(variables[name], shape) for name, shape in shapes.items()}
    return variables[...]


class MinGRU(_Linear):
    """A minimal gated recurrent layer. layer(packed) returns (output, h_n).

    The arguments are those of jaxpack.MinGRU, and those below.

    Examples:
      >>> from flax import nnx
      >>> layer = jaxpack.nnx.MinGRU(2, 4, rngs=nnx.Rngs(0))
      >>> output, h_n = layer(jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))]))
      >>> output.shape, h_n.shape
      ((4, 4), (2, 4))

    Args:
      rngs: the random streams: `params` draws the parameters.
      dtype: the dtype to compute in. Default: the result type of inputs and parameters.
      param_dtype: the dtype of the parameters. Default: JAX's float.
    """

    layer_class = _MinGRU


class MinLSTM(_Linear):
    """A minimal long short-term memory layer. layer(packed) returns (output, h_n).

    The arguments are those of jaxpack.MinLSTM; rngs, dtype and param_dtype are those of MinGRU.

    Examples:
      >>> from flax import nnx
      >>> layer = jaxpack.nnx.MinLSTM(2, 4, rngs=nnx.Rngs(0))
      >>> output, h_n = layer(jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))]))
      >>> output.shape, h_n.shape
      ((4, 4), (2, 4))
    """

    layer_class = _MinLSTM


class LRU(_Linear):
    """A linear recurrent unit. layer(packed) returns (output, h_n).

    The arguments are those of jaxpack.LRU; rngs, dtype and param_dtype are those of MinGRU.

    Examples:
      >>> from flax import nnx
      >>> layer = jaxpack.nnx.LRU(2, 4, r_min=0.9, r_max=0.999, rngs=nnx.Rngs(0))
      >>> output, h_n = layer(jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))]))
      >>> output.shape, h_n.shape  # as wide as the input; real and imaginary parts of h
      ((4, 2), (2, 2, 4))
    """

    layer_class = _LRU


class RGLRU(_Linear):
    """A real-gated linear recurrent unit. layer(packed) returns (output, h_n).

    The arguments are those of jaxpack.RGLRU; rngs, dtype and param_dtype are those of MinGRU.

    Examples:
      >>> from flax import nnx
      >>> layer = jaxpack.nnx.RGLRU(4, 4, num_heads=2, rngs=nnx.Rngs(0))
      >>> output, h_n = layer(jaxpack.pack_sequence([np.ones((3, 4)), np.ones((1, 4))]))
      >>> output.shape, h_n.shape
      ((4, 4), (2, 4))
    """

    layer_class = _RGLRU
