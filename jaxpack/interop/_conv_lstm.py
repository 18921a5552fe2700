"""Weights from and to the convolutional LSTMs of Flax, Keras and Haiku.

All of them have a kernel for x and one for h, [*sizes, F, 4H], with the gates side by side:

    linen.ConvLSTMCell          ih, hh, each with a bias                      i, g, f, o    adds 1 to f
    hk.Conv1DLSTM, 2D, 3D       input_to_hidden, hidden_to_hidden, the same   i, g, f, o    adds 1 to f
    keras.layers.ConvLSTM1D...  kernel, recurrent_kernel, bias                i, f, c, o    as in jaxpack

jaxpack.ConvLSTM has one bias, the sum of the two and the 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpack._layers.params import check_params
from jaxpack._stepped.conv import ConvLSTM
from jaxpack.interop._weights import check_count, is_nonlinearity, name_entries, to_exact_numpy, to_numpy

_GATES = ("i", "f", "g", "o")
_GATES_OF_FLAX = ("i", "g", "f", "o")  # and of Haiku
_KERAS_OPTIONS: Mapping[str, Any] = {"padding": "same", "data_format": "channels_last"}


def one_entry(entries: Any, name: str) -> tuple[str, Any]:
    """Returns the only entry of an argument, since the layer is no stack, with its name in errors."""
    found = name_entries(entries, name)
    check_count(len(found), 1, name, "layer")
    return found[0]


def from_two_convolutions(
    layer: ConvLSTM, of_x: Mapping[str, Any], of_h: Mapping[str, Any], where: str
) -> dict[str, jax.Array]:
    """Returns parameters from the two convolutions of Flax or Haiku, {kernel, bias} or {w, b}, or without a bias."""
    both = [{key: to_exact_numpy(value, f"{where}: {key}") for key, value in part.items()} for part in (of_x, of_h)]
    kernels = [part["kernel" if "kernel" in part else "w"] for part in both]
    forget = np.repeat([float(gate == "f") for gate in _GATES_OF_FLAX], layer.hidden_size)
    total, *biases = (
        forget,
        *(part[key].astype(float) for part in reversed(both) for key in ("bias", "b") if key in part),
    )
    for bias in biases:  # that of h first: where `to_two_convolutions` wrote -1, the sum is exact
        total = total + bias
    return _params(layer, kernels, total.astype(kernels[0].dtype), _GATES_OF_FLAX, where)


def to_two_convolutions(layer: ConvLSTM, params: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns (kernel, bias) of the convolutions of x and of h. The second bias takes the 1 off that Flax adds to f."""
    (of_x, of_h), bias = _weights(layer, params, _GATES_OF_FLAX)
    forget = np.repeat([float(gate == "f") for gate in _GATES_OF_FLAX], layer.hidden_size)
    return [(of_x, bias), (of_h, -forget.astype(bias.dtype))]


def from_keras_layer(layer: ConvLSTM, keras_layer: Any, where: str) -> dict[str, jax.Array]:
    """Returns parameters from a keras.layers.ConvLSTM1D, 2D or 3D."""
    _check_keras(layer, keras_layer, where)
    arrays = [to_exact_numpy(array, f"{where}: weight {i}") for i, array in enumerate(keras_layer.get_weights())]
    if not arrays:
        raise ValueError(f"{where} has no weights yet: build it first, by calling it on inputs.")
    bias = arrays[2] if len(arrays) == 3 else np.zeros_like(arrays[0], shape=arrays[0].shape[-1])
    return _params(layer, arrays[:2], bias, _GATES, where)


def to_keras_layer(layer: ConvLSTM, params: Any) -> list[np.ndarray]:
    """Returns the arrays that `set_weights` of a keras.layers.ConvLSTM1D, 2D or 3D takes."""
    kernels, bias = _weights(layer, params, _GATES)
    return [*kernels, bias] if layer.bias else kernels


def _check_keras(layer: ConvLSTM, keras_layer: Any, where: str) -> None:
    """Raises TypeError or ValueError unless a Keras layer computes what the layer does."""
    rank, kind = len(layer.spatial_shape), type(keras_layer).__name__
    if kind != f"ConvLSTM{rank}D" or not hasattr(keras_layer, "get_config"):
        raise TypeError(f"{where} must be a keras.layers.ConvLSTM{rank}D for {layer}, got {kind}.")
    config, ones = keras_layer.get_config(), (1,) * rank
    needed = {
        **_KERAS_OPTIONS,
        "filters": layer.hidden_size,
        "kernel_size": layer.kernel_size,
        "strides": ones,
        "dilation_rate": ones,
    }
    for option, value in needed.items():
        given = tuple(config[option]) if isinstance(value, tuple) else config[option]
        if given != value:
            raise ValueError(f"{where} has {option}={given!r}, but {layer} needs {option}={value!r}.")
    for option, name in {"activation": "tanh", "recurrent_activation": "sigmoid"}.items():
        if config[option] != name and not is_nonlinearity(getattr(keras_layer, option), name):
            raise ValueError(
                f"{where} has {option}={config[option]!r}, but {layer} has {name}. Weights cannot make up for another "
                f"function: rebuild the Keras layer, and train it again."
            )


def _params(
    layer: ConvLSTM, kernels: Sequence[np.ndarray], bias: np.ndarray, gates: Sequence[str], where: str
) -> dict[str, jax.Array]:
    """Returns parameters from kernels and a bias with the gates in another order, checked."""
    given = {"weight_ih": kernels[0], "weight_hh": kernels[1], "bias": bias}
    for name, shape in (layer.shapes | {"bias": (4 * layer.hidden_size,)}).items():
        if given[name].shape != shape:
            raise ValueError(f"{where}: {name} must have shape {shape} for {layer}, got {given[name].shape}.")
    if not layer.bias and given.pop("bias").any():
        raise ValueError(
            f"{where} has biases up to {np.abs(bias.astype(float)).max():.3g}, with the 1 that Flax and Haiku add to "
            f"f, and {layer} has none. Use bias=True (its default)."
        )
    return {name: jnp.asarray(_reordered(array, gates, _GATES)) for name, array in given.items()}


def _weights(layer: ConvLSTM, params: Any, gates: Sequence[str]) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns both kernels, and the bias or zeros, with the gates in another order."""
    shapes: Any = layer.shapes
    check_params(params, shapes, layer)
    arrays = {name: _reordered(to_numpy(value, f"params[{name!r}]"), _GATES, gates) for name, value in params.items()}
    kernels = [arrays["weight_ih"], arrays["weight_hh"]]
    return kernels, arrays.get("bias", np.zeros_like(kernels[0], shape=kernels[0].shape[-1]))


def _reordered(array: np.ndarray, order: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    parts = dict(zip(order, np.split(array, len(order), axis=-1), strict=True))
    return np.concatenate([parts[gate] for gate in wanted], axis=-1)
