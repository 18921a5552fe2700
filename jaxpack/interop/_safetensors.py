"""Weights in safetensors files, under PyTorch's names and in its layouts. Nothing is ever unpickled.

The extra `interop` brings the safetensors package.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from jax.tree_util import keystr

from jaxpack._extras import import_extra
from jaxpack._layers.recurrent_layer import RecurrentLayer
from jaxpack._layers.specification import LayerParams
from jaxpack.interop._weights import check_layer, to_exact_numpy, to_numpy

_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_DTYPES = ("F64", "F32", "F16", "BF16")


def save_safetensors(path: str | os.PathLike[str], layer: RecurrentLayer, params: LayerParams) -> None:
    """Writes a layer's parameters to a file, as safetensors.torch.load_file reads them. Exact.

    Examples:
      >>> import os, tempfile
      >>> gru = jaxpack.GRU(2, 4)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_safetensors(f"{folder}/gru.safetensors", gru, gru.init(jax.random.key(0)))
      ...     os.listdir(folder)
      ['gru.safetensors']

    Args:
      path: the file, usually named *.safetensors.
      layer: a jaxpack.RNN, LSTM or GRU.
      params: its parameters.

    Raises:
      ImportError: if safetensors is not installed.
      ValueError: if the path names a pickle.
      TypeError: if layer is not a layer spec, or params are not the layer's, or are traced.
    """
    check_layer(layer)
    path = pathlib.Path(path)
    if path.suffix.lower() in _PICKLES:
        raise ValueError(f"{path} would be taken for a pickle, which it is not. Name it {path.stem}.safetensors.")
    package = import_extra("safetensors.numpy", "interop", "safetensors files")
    arrays = jax.tree_util.tree_map_with_path(lambda key, value: to_numpy(value, f"params{keystr(key)}"), params)
    package.save_file(layer.to_torch(arrays), path, metadata={"format": "pt"})


def load_safetensors(path: str | os.PathLike[str], layer: RecurrentLayer, *, prefix: str = "") -> LayerParams:
    """Returns a layer's parameters from a file that holds them under PyTorch's names. Exact.

    Examples:
      >>> import tempfile
      >>> gru = jaxpack.GRU(2, 4)
      >>> params = gru.init(jax.random.key(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_safetensors(f"{folder}/gru.safetensors", gru, params)
      ...     again = load_safetensors(f"{folder}/gru.safetensors", gru)
      >>> jax.tree.all(jax.tree.map(jnp.array_equal, again, params))
      True

    Args:
      path: a safetensors file.
      layer: a jaxpack.RNN, LSTM or GRU.
      prefix: the start of the names, for a module inside a larger one. Only names that begin with it are read.

    Raises:
      ImportError: if safetensors is not installed.
      KeyError: naming the keys that are missing or not known.
      ValueError: if the path names a pickle, or the file is not a safetensors file; if a shape is wrong, or JAX would
        round a weight.
      TypeError: if layer is not a layer spec, or a tensor's dtype is not floating.
    """
    check_layer(layer)
    path = pathlib.Path(path)
    if path.suffix.lower() in _PICKLES:
        raise ValueError(
            f"{path} is a pickle, which can run any code while it is loaded, so jaxpack reads none. If you trust it, "
            f"convert it once: safetensors.torch.save_file(torch.load({str(path)!r}, weights_only=True), "
            f"'{path.stem}.safetensors')."
        )
    package = import_extra("safetensors", "interop", "safetensors files")
    try:
        with package.safe_open(path, framework="np") as file:
            names = list(file.keys())
            _check_prefix(path, layer, prefix, names)
            state_dict = {k[len(prefix) :]: _read(file, k, path) for k in names if k.startswith(prefix)}
    except package.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}.") from error
    return layer.from_torch(state_dict)


def _check_prefix(path: pathlib.Path, layer: RecurrentLayer, prefix: str, names: Sequence[str]) -> None:
    """Raises KeyError, with the prefixes in the file, if the layer is not under this one."""
    first = "weight_ih_l0"
    if prefix + first in names:
        return
    prefixes = sorted(name.removesuffix(first) for name in names if name.endswith(first))
    way_out = f"Pass prefix= one of {prefixes}." if prefixes else f"It holds {sorted(names)[:8]}."
    raise KeyError(f"{path} has no {prefix + first!r}, which {layer} begins with. {way_out}")


def _read(file: Any, name: str, path: pathlib.Path) -> Any:
    dtype = file.get_slice(name).get_dtype()
    if dtype not in _DTYPES:
        raise TypeError(f"{path}: {name} has dtype {dtype}, but must have one of {', '.join(_DTYPES)}.")
    return to_exact_numpy(file.get_tensor(name), f"{path}: {name}")
