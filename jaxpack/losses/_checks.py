"""Checks of the arguments of losses and metrics: logits, labels and weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxpack._checks import as_int
from jaxpack._dtypes import canonical, without_torch
from jaxpack._packed.packed_sequence import PackedSequence

Weights = ArrayLike | PackedSequence | None


def as_array(values: Any, name: str, function: str, ragged: str) -> jax.Array:
    """Converts a list, a NumPy array or a tensor to a JAX array with the same values.

    Args:
      values: numbers.
      name: the argument in errors.
      function: the function in errors.
      ragged: the advice in the error for a list whose rows have different lengths.

    Raises:
      TypeError: if values are not numbers.
      ValueError: if they are a list whose rows have different lengths, or a value does not fit its dtype in JAX.
    """
    values = without_torch(values)
    if isinstance(values, jax.Array):
        return values
    try:
        array = np.asarray(values)
    except jax.errors.TracerArrayConversionError:  # a list that holds tracers
        return jnp.asarray(values)
    except ValueError as error:
        raise ValueError(f"{function}: {name} is a list whose rows have different lengths. {ragged}") from error
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise TypeError(f"{function}: {name} must be an array of numbers, got {type(values).__name__} {values!r}.")
    return jnp.asarray(canonical(array, f"{function}: {name}"))


def as_labels(labels: Any, name: str, function: str, ragged: str) -> jax.Array:
    """Converts labels as `as_array`; an empty list, which has no dtype, to integers."""
    labels = as_array(labels, name, function, ragged)
    return labels if labels.size else labels.astype(jnp.int32)


def widened(array: jax.Array) -> jax.Array:
    """Casts to 32 bits or more: floats to float32 or float64, narrow integers to int32."""
    if jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(jnp.promote_types(array.dtype, jnp.float32))
    return array.astype(jnp.int32) if array.dtype.itemsize < 4 else array


def outside(labels: Any, num_classes: int) -> Any:
    """Returns which labels (of JAX or NumPy) are not a class; widened first, so that num_classes fits the dtype."""
    labels = labels.astype(np.int64) if isinstance(labels, np.ndarray) else widened(labels)
    return (labels < 0) | (labels >= num_classes)


def refuse(bad: np.ndarray, name: str, values: np.ndarray, rule: str) -> None:
    """Raises ValueError for the first bad value."""
    if bad.any():
        index = tuple(np.argwhere(bad)[0])
        raise ValueError(f"{name} must {rule}, got {name}[{', '.join(map(str, index))}] = {values[index]}.")


def check_classes(
    logits: PackedSequence | jax.Array, labels: PackedSequence | jax.Array, axis: str, function: str
) -> None:
    """Raises unless logits are floating of shape [axis, C] and labels integers of shape [axis]."""
    if len(logits.shape) != 2 or logits.shape[1] < 1 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"{function}: logits must be [{axis}, C] and labels [{axis}], got shapes {logits.shape} and {labels.shape}."
            + _shapes_hint(logits.shape, labels.shape, axis)
        )
    if not (jnp.issubdtype(logits.dtype, jnp.floating) and jnp.issubdtype(labels.dtype, jnp.integer)):
        hint = "" if jnp.issubdtype(labels.dtype, jnp.integer) else " If they are whole numbers: labels.astype(int)."
        raise TypeError(
            f"{function}: logits must be floating and labels integers, got dtypes {logits.dtype} and {labels.dtype}."
            + hint
        )


def _shapes_hint(logits: tuple[int, ...], labels: tuple[int, ...], axis: str) -> str:
    """Returns the advice for shapes that are often given by mistake."""
    if len(logits) < len(labels):
        return " Logits come first: are the two swapped?"
    if labels == (*logits[:1], 1):
        drop = "labels[:, 0]" if axis == "B" else "labels.map(lambda data: data[:, 0])"
        return f" Drop the last axis of the labels: {drop}."
    if logits == labels:
        number = "jnp.argmax(labels, -1)" if axis == "B" else "labels.map(lambda data: jnp.argmax(data, -1))"
        return f" Labels are numbers of classes, not one-hot: {number}."
    if axis == "B" and len(logits) == 3:
        return " For a label per step pack both and call the function of tokens (jaxpack.losses.token_cross_entropy)."
    return ""


def check_weights(weights: Weights, batch_size: int, function: str, per_token: bool = False) -> jax.Array | None:
    """Validates weights [B]; None stands for ones. With per_token, errors say how to give a weight per token."""
    if weights is None:
        return None
    if isinstance(weights, PackedSequence):
        raise TypeError(
            f"{function}: weights must be one per sequence, [{batch_size}], got a PackedSequence. Reduce it to that "
            f"(jaxpack.segment_mean, jaxpack.last)."
        )
    ragged = "Give a number for each sequence."
    hint = ""
    if per_token:
        ragged = "For a weight per token pack them: jaxpack.pack_sequence(weights, plan=logits.plan)."
        hint = (
            " For a weight per token pack them as the logits are: jaxpack.pack_padded_sequence(weights, "
            "logits.lengths, batch_first=True, plan=logits.plan)."
        )
    array = as_array(weights, "weights", function, ragged)
    if array.shape != (batch_size,):
        if array.shape == (batch_size, 1):
            hint = " Drop the last axis: weights[:, 0]."
        raise ValueError(
            f"{function}: weights must be one per sequence, [{batch_size}], got shape {array.shape}.{hint}"
        )
    return _real(array, function)


def check_token_weights(weights: PackedSequence, function: str) -> jax.Array:
    """Validates packed weights; returns them per cell, [S]."""
    if len(weights.shape) != 1:
        hint = " Drop its last axis: weights.map(lambda data: data[:, 0])." if weights.shape[1:] == (1,) else ""
        raise ValueError(
            f"{function}: packed weights must be one per token, data [S], got data of shape {weights.shape}.{hint}"
        )
    return _real(weights.data, function)


def _real(weights: jax.Array, function: str) -> jax.Array:
    if jnp.issubdtype(weights.dtype, jnp.complexfloating):
        raise TypeError(f"{function}: weights must be real, got dtype {weights.dtype}.")
    return weights


def ignored_number(ignore_label: int | None, labels: jax.Array) -> int | None:
    """Validates the label to ignore; returns None if there is none, or if the dtype of the labels cannot hold it.

    Raises:
      TypeError: if ignore_label is not an int.
    """
    if ignore_label is None:
        return None
    number, limits = as_int("ignore_label", ignore_label), jnp.iinfo(labels.dtype)
    return number if limits.min <= number <= limits.max else None
