"""Weights from and to other libraries, one file each. Of these libraries only Flax is imported."""

from jaxpack._namespace import publish as _publish
from jaxpack.interop._flax import from_linen, from_nnx, to_linen, to_nnx
from jaxpack.interop._haiku import from_haiku, to_haiku
from jaxpack.interop._keras import from_keras, to_keras
from jaxpack.interop._safetensors import load_safetensors, save_safetensors

__all__ = [
    "from_haiku",
    "from_keras",
    "from_linen",
    "from_nnx",
    "load_safetensors",
    "save_safetensors",
    "to_haiku",
    "to_keras",
    "to_linen",
    "to_nnx",
]

_publish(__name__)
