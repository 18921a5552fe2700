"""What users pass to losses and metrics, checked: labels, lengths, weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jax.typing import ArrayLike

from jaxpack.sequence import PackedSequence, is_traced, slot_lengths


def widened(array: jax.Array) -> jax.Array:
    """In 32 bits or more: floats as float32 or float64, integers as integers."""
    least = jnp.float32 if jnp.issubdtype(array.dtype, jnp.floating) else jnp.int32
    return array.astype(jnp.promote_types(array.dtype, least))


def outside(labels: jax.Array, num_classes: int) -> jax.Array:
    """Which labels are no class. Widened first, for a narrow integer may not hold num_classes."""
    labels = widened(labels)
    return (labels < 0) | (labels >= num_classes)


def refuse(bad: jax.Array, name: str, values: jax.Array, rule: str) -> None:
    """Raises ValueError at the first bad value, if values are known; under checkify a bad value is an error."""
    checkify.debug_check(~jnp.any(bad), f"{name} must {rule}.")
    if not is_traced(bad) and np.any(bad):
        index = tuple(np.argwhere(bad)[0])
        raise ValueError(f"{name} must {rule}, got {name}[{', '.join(map(str, index))}] = {values[index]}.")


def same_lengths(logits: PackedSequence, labels: PackedSequence, function: str) -> jax.Array:
    """bool [B]: which slots hold sequences of the same length in both; raises ValueError if that is known to fail."""
    if labels.plan != logits.plan:
        raise ValueError(f"{function}: labels have the plan {labels.plan}, logits have {logits.plan}. Pack both alike.")
    known = not (is_traced(labels.lengths) or is_traced(logits.lengths))
    if known and (np.asarray(labels.lengths) != np.asarray(logits.lengths)).any():
        raise ValueError(f"{function}: labels have the lengths {labels.lengths}, logits have {logits.lengths}.")
    same = (labels.sorted_indices == logits.sorted_indices) & (slot_lengths(labels) == slot_lengths(logits))
    checkify.debug_check(jnp.all(same), f"{function}: logits and labels have different lengths.")
    return same


def check_classes(
    logits: PackedSequence | jax.Array, labels: PackedSequence | jax.Array, axis: str, function: str
) -> None:
    """Raises unless shapes and dtypes are those of logits [axis, C] and labels [axis]."""
    if len(logits.shape) != 2 or logits.shape[1] < 1 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"{function}: logits must be [{axis}, C] and labels [{axis}], got shapes {logits.shape} and {labels.shape}."
        )
    if not (jnp.issubdtype(logits.dtype, jnp.floating) and jnp.issubdtype(labels.dtype, jnp.integer)):
        raise TypeError(
            f"{function}: logits must be floating and labels integers, got dtypes {logits.dtype} and {labels.dtype}."
        )


def check_weights(weights: ArrayLike | None, batch_size: int, dtype: Any, function: str) -> jax.Array:
    """[B] weights of this dtype, ones by default."""
    weights = jnp.ones(batch_size, dtype) if weights is None else jnp.asarray(weights)
    if weights.shape != (batch_size,):
        raise ValueError(f"{function}: weights must be one per sequence, [{batch_size}], got shape {weights.shape}.")
    if jnp.issubdtype(weights.dtype, jnp.complexfloating):
        raise TypeError(f"{function}: weights must be real, got dtype {weights.dtype}.")
    return weights.astype(dtype)
