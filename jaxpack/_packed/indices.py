"""Checks of index leaves (lengths and permutations), and reads of arrays that do not wait for a device."""

from __future__ import annotations

import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpack._checks import check_lengths_type, check_not_negative, is_traced
from jaxpack._packed.describe import type_of
from jaxpack._packed.gather import PACK_ANEW, Indexed, slot_lengths
from jaxpack._traced_checks import checked

INDEX_NAMES = ("lengths", "sorted_indices", "unsorted_indices")

_PATIENCE = 0.01  # seconds that a check waits for arrays that are still being computed


def as_index(leaf: Any, name: str, function: str) -> jax.Array:
    """Returns lengths or indices as int32; those that jaxpack made are int32 already."""
    array = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"{function}: {name} must be integers, got {type_of(leaf)}. They are made by jaxpack.pack_sequence and "
            f"pack_padded_sequence."
        )
    return array if isinstance(array, jax.Array) and array.dtype == jnp.int32 else jnp.asarray(array, jnp.int32)


def refuse_spread(array: jax.Array, function: str) -> None:
    """Raises ValueError if a batch is spread over an axis of an explicit mesh, also by jax.vmap.

    There the rows of one batch cannot be sorted, and shards that jax.vmap maps over can be neither indices nor written
    to buffers. A mapped function does not see the sharding of the axis mapped over, so this tries both with an entry.
    """
    mesh = getattr(getattr(jax.typeof(array), "sharding", None), "mesh", None)
    if mesh is None or jax.sharding.AxisType.Explicit not in mesh.axis_types or not array.size:
        return
    try:
        entry = lax.slice(array, (0,) * array.ndim, (1,) * array.ndim)
        lax.dynamic_update_slice(jnp.zeros(entry.shape, entry.dtype), entry, (0,) * array.ndim)
        jnp.zeros(1).at[(entry != entry).ravel().astype(jnp.int32)].get(mode="clip")
    except Exception as error:
        if type(error).__name__ != "ShardingTypeError":  # JAX does not export it
            raise
        raise ValueError(
            f"{function}: the batch is spread over an axis of an explicit mesh. Run the function on each shard, with "
            f"jaxpack.sharding.sum_shards or map_shards in place of jax.vmap, or under jax.sharding.auto_axes; or give "
            f"the mesh automatic axes (jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,)))."
        ) from error


def check_indices(packed: Indexed, function: str) -> None:
    """Raises ValueError unless lengths and permutations have the plan's size and, if their values are known, agree."""
    plan, indices = packed.plan, (packed.sorted_indices, packed.unsorted_indices)
    check_lengths_type(packed.lengths.shape, packed.lengths.dtype)
    for name in INDEX_NAMES:
        leaf = getattr(packed, name)
        if leaf.shape != (plan.num_sequences,):
            raise ValueError(
                f"{function}: {name} has {leaf.size} entries, but the plan is for {plan.num_sequences} sequences."
            )
    if not known(packed.lengths):
        return
    lengths = np.asarray(packed.lengths)
    check_not_negative(lengths)
    plan._check(lengths)
    values = values_of(*indices)
    if values is None:
        return
    order, slots = values
    rows = np.arange(len(order))
    inverse = not len(order) or (min(order.min(), slots.min()) >= 0 and max(order.max(), slots.max()) < len(order))
    if not inverse or (order[slots] != rows).any():
        raise ValueError(
            f"{function}: sorted_indices and unsorted_indices are not inverse permutations. (jax.tree.map works on "
            f"them too.) {PACK_ANEW}"
        )
    ranked = lengths[order]
    if packed._is_sorted and (ranked[1:] > ranked[:-1]).any():
        raise ValueError(
            f"{function}: sorted_indices do not sort the lengths {lengths.tolist()[:8]}, longest first: the batch was "
            f"packed with others. {PACK_ANEW}"
        )


def same_sequences(
    packed: Indexed, other: Indexed, function: str, names: tuple[str, str], also: jax.Array | None = None
) -> jax.Array | None:
    """Compares two batches: returns which slots hold sequences of the same length in both, bool [B]; None if all do.

    Args:
      packed: a batch.
      other: another one.
      function: the name of the function in errors.
      names: the batches in errors, each with its verb, such as "labels have".
      also: a further condition on slots, combined with the result.

    Raises:
      ValueError: if plans differ, or known lengths do; under checkify also if traced lengths differ.
    """
    if other.plan != packed.plan:
        raise ValueError(
            f"{function}: {names[1]} the plan {other.plan}, {names[0]} {packed.plan}. Pack both under one."
        )
    leaves = [(getattr(packed, name), getattr(other, name)) for name in ("lengths", "sorted_indices")]
    if all(ours is theirs for ours, theirs in leaves):
        return also
    values = values_of(*itertools.chain(*leaves))
    if values is not None:
        if any((ours != theirs).any() for ours, theirs in zip(values[::2], values[1::2], strict=True)):
            raise ValueError(
                f"{function}: {names[1]} the lengths {_brief(other.lengths)}, {names[0]} {_brief(packed.lengths)}."
            )
        return also
    same = (other.sorted_indices == packed.sorted_indices) & (slot_lengths(other) == slot_lengths(packed))
    same = checked(same, jnp.all(same), f"{function}: {names[1]} other lengths.")
    return same if also is None else same & also


def _brief(lengths: Any) -> str:
    return np.array2string(np.asarray(lengths), threshold=16, edgeitems=8)


def known(*arrays: Any) -> bool:
    """Returns whether the values of arrays can be read now, without a long wait for a device.

    A check does not wait for the model that computes its arrays: results from indices that do not agree are NaN anyway.
    """
    on_device: list[Any] = [array for array in arrays if isinstance(array, jax.Array)]
    if any(is_traced(array) or not array.is_fully_addressable for array in on_device):
        return False
    until = time.monotonic() + _PATIENCE
    while not all(array.is_ready() for array in on_device):
        if time.monotonic() > until:
            return False
        time.sleep(_PATIENCE / 100)
    return True


def values_of(*arrays: Any) -> list[np.ndarray] | None:
    """Returns the values of arrays if all are `known`, else None. Checks read values only through this function."""
    return [np.asarray(array) for array in arrays] if known(*arrays) else None


def host_view(leaf: Any) -> np.ndarray | None:
    """Returns the values of an array if they are in host memory (NumPy, or JAX on a CPU and computed); else None."""
    if isinstance(leaf, np.ndarray):
        return leaf
    if is_traced(leaf) or not isinstance(leaf, jax.Array):
        return None
    array: Any = leaf
    # A committed array stays on the device that the user chose.
    free = array.is_fully_addressable and not array.committed and array.is_ready()
    return np.asarray(array) if free and {device.platform for device in array.devices()} == {"cpu"} else None
