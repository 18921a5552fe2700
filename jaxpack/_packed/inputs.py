"""Checks of padded batches, lists of sequences, lengths and plans that users pass in."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxpack._checks import check_lengths_type, concrete_lengths, is_traced
from jaxpack._dtypes import as_jax, canonical, cast, common_dtype, without_torch
from jaxpack._packed.indices import known, refuse_spread
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._plans.planners import exact_plan
from jaxpack._types import PyTree


def as_batch(batch: PyTree, name: str) -> PyTree:
    """Converts a batch to arrays: nested lists of numbers to one array, any other pytree leaf by leaf."""
    leaves = jax.tree.leaves(batch)
    if not leaves:
        raise ValueError(f"{name} holds no array, got {batch!r}.")
    if any(np.ndim(leaf) == 0 for leaf in leaves):
        try:
            batch = jnp.asarray(batch) if any(isinstance(leaf, jax.Array) for leaf in leaves) else np.asarray(batch)
        except ValueError as error:
            raise ValueError(
                f"{name} is a nested list whose rows have different lengths. Pass a list of sequences to "
                f"jaxpack.pack_sequence, or pad it with jaxpack.pad_sequence."
            ) from error
    return jax.tree.map(functools.partial(as_jax, name=name), batch)


def as_sequences(sequences: Iterable[PyTree]) -> tuple[list[PyTree], np.ndarray]:
    """Converts a list of sequences to arrays (or pytrees of them) and lengths [B]; NumPy arrays stay in NumPy.

    Raises:
      TypeError: if it is not a list.
      ValueError: if it is empty, or the sequences differ in their structure or features.
    """
    if isinstance(sequences, (str, Mapping, PackedSequence)) or not isinstance(sequences, Iterable):
        raise TypeError(f"sequences must be a list of arrays, got {type(sequences).__name__}.")
    # Other iterables may yield every sequence in the same memory.
    kept = isinstance(sequences, (list, tuple, np.ndarray, jax.Array))
    arrays = [_as_sequence(each) if kept else jax.tree.map(_copied, _as_sequence(each)) for each in sequences]
    if not arrays:
        raise ValueError("sequences is empty: at least one is needed.")
    if all(map(_is_sequence, arrays)) and len({(array.shape[1:], array.dtype) for array in arrays}) == 1:
        arrays = [canonical(array, f"sequences[{i}]") for i, array in enumerate(arrays)]
        return arrays, np.array([len(array) for array in arrays])
    model = next((array for array in arrays if array is not None), np.zeros(0, np.float32))
    arrays = [jax.tree.map(lambda leaf: leaf[:0], model) if array is None else array for array in arrays]
    lengths = np.array([_length_like(model, array, i) for i, array in enumerate(arrays)])
    return _of_one_dtype(arrays), lengths


def _as_sequence(sequence: PyTree) -> PyTree:
    """Converts a sequence to arrays; None for an empty list, which takes the features of the other sequences."""
    if _is_sequence(sequence):
        return sequence
    leaves = jax.tree.leaves(sequence)
    if not leaves:
        return None
    if any(np.ndim(leaf) == 0 for leaf in leaves):
        return np.asarray(sequence)
    return jax.tree.map(without_torch, sequence)


def _copied(leaf: Any) -> Any:
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def _is_sequence(sequence: PyTree) -> bool:
    """Returns whether a sequence is one NumPy array with a time axis, which needs no conversion."""
    return type(sequence) is np.ndarray and sequence.ndim > 0


def _of_one_dtype(arrays: list[PyTree]) -> list[PyTree]:
    """Casts sequences, leaf by leaf, to their common dtype."""
    dtypes = jax.tree.map(lambda *leaves: common_dtype(leaf.dtype for leaf in leaves), *arrays)

    def convert(leaf: Any, dtype: np.dtype, i: int) -> Any:
        return leaf.astype(dtype) if isinstance(leaf, jax.Array) else cast(leaf, dtype, f"sequences[{i}]")

    return [jax.tree.map(functools.partial(convert, i=i), array, dtypes) for i, array in enumerate(arrays)]


def _length_like(model: PyTree, array: PyTree, i: int) -> int:
    """Returns the length of a sequence, which must have the structure and features of another."""
    expected: Any = jax.tree.structure(model)
    found: Any = jax.tree.structure(array)
    if found != expected:
        raise ValueError(f"sequences[{i}] has the structure {found}, others {expected}.")
    leaves = jax.tree.leaves(array)
    shapes = [leaf.shape for leaf in leaves]
    if any(len(shape) < 1 for shape in shapes):
        raise ValueError(f"sequences[{i}] must have a leading time axis, got shapes {shapes}.")
    if len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            f"the arrays of sequences[{i}] must have the same number of steps, got shapes {shapes}. Pack arrays of "
            f"another length separately."
        )
    for leaf, other in zip(leaves, jax.tree.leaves(model), strict=True):
        if leaf.shape[1:] != other.shape[1:]:
            raise ValueError(f"sequences[{i}] has features of shape {leaf.shape[1:]}, others {other.shape[1:]}.")
    return leaves[0].shape[0]


def padded_batch(batch: PyTree, batch_first: bool, name: str) -> tuple[PyTree, int, int]:
    """Converts a padded pytree to arrays [B, T, *F]; returns them with B and T. Raises as `batch_shape`."""
    batch = as_batch(batch, name)
    _check_rank(batch, name)
    if not batch_first:
        batch = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), batch)
    return batch, *batch_shape(batch, name)


def _check_rank(batch: PyTree, name: str) -> None:
    for leaf in jax.tree.leaves(batch):
        if leaf.ndim < 2:
            raise ValueError(f"{name} must have a batch and a time axis, [B, T, ...], got shape {leaf.shape}.")


def batch_shape(batch: PyTree, name: str) -> tuple[int, int]:
    """Returns (B, T) of a batch-first padded pytree.

    Raises:
      ValueError: if a leaf has fewer than two axes, the leaves disagree in the first two, one of those is symbolic, or
        the batch axis is sharded under an explicit mesh.
    """
    _check_rank(batch, name)
    leaves = jax.tree.leaves(batch)
    for leaf in leaves:
        if leaf.shape[:2] != leaves[0].shape[:2]:
            raise ValueError(
                f"{name}: all arrays must have the same batch and time axes, got [B, T] = {leaves[0].shape[:2]} and "
                f"{leaf.shape[:2]}."
            )
        _check_sharding(leaf, name)
        refuse_spread(leaf, name)
    for axis, size in zip(("batch", "time"), leaves[0].shape, strict=False):
        if jax.export.is_symbolic_dim(size):
            raise ValueError(
                f"{name} has a symbolic {axis} axis, {size}, but a plan has static shapes. Export a program for each "
                f"shape or plan, as jaxpack.serving.Server does; or take RNN(cell) and Bidirectional of jaxpack.nnx or "
                f"jaxpack.linen, which run symbolic sizes without a plan."
            )
    return leaves[0].shape[0], leaves[0].shape[1]


def padded_plan(batch_size: int, max_length: int) -> BucketPlan:
    """Returns the plan of a padded batch, also of a batch of no sequences or no steps."""
    return BucketPlan((max(max_length, 1),), (batch_size,))


@functools.lru_cache(maxsize=256)
def batch_plan(batch_size: int, max_length: int) -> BucketPlan:
    """Returns the plan whose cells are a padded batch [B, T] as it is in memory: one row with a slot for each sequence.

    Args:
      batch_size, max_length: B and T, at least 1.
    """
    size = batch_size * max_length
    return BucketPlan((size,), (1,), (tuple(range(0, size, max_length)),))


def _check_sharding(leaf: jax.Array, name: str) -> None:
    sharding = getattr(jax.typeof(leaf), "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding) or not len(sharding.spec) or sharding.spec[0] is None:
        return
    axis = sharding.spec[0]
    axes = axis if isinstance(axis, tuple) else (axis,)
    types = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    if any(types.get(a) == jax.sharding.AxisType.Explicit for a in axes):
        raise ValueError(
            f"{name} is sharded over its batch axis (mesh axis {axis!r}) under an explicit mesh, where rows cannot be "
            f"sorted. Pack inside jax.shard_map, with a plan for each shard, or under jax.sharding.auto_axes."
        )


def lengths_and_plan(
    lengths: ArrayLike | Sequence[int], plan: BucketPlan | None, batch_size: int, max_length: int, name: str = "inputs"
) -> tuple[np.ndarray | jax.Array, BucketPlan]:
    """Validates lengths against the batch and the plan; returns them as int32, with the plan, exact by default."""
    if plan is not None and not isinstance(plan, BucketPlan):
        raise TypeError(f"plan must be a jaxpack.BucketPlan, got {type(plan).__name__}.")
    if isinstance(lengths, jax.Array) and (is_traced(lengths) or (plan is not None and not known(lengths))):
        if plan is None:
            raise TypeError(
                "lengths are traced, so the plan must be given: pack_padded_sequence(..., plan=plan) with a plan made "
                "outside jit, such as jaxpack.plan_buckets(lengths) or jaxpack.plan_padded(batch_size, max_length)."
            )
        check_lengths_type(lengths.shape, lengths.dtype)
        check_batch_size(lengths, plan, batch_size, name)
        return _traced_lengths(lengths, plan, max_length), plan
    concrete = concrete_lengths(lengths)
    check_batch_size(concrete, plan, batch_size, name)
    check_longest(concrete, max_length)
    if plan is not None:
        plan._check(concrete)
        return concrete.astype(np.int32), plan
    if not batch_size:
        return concrete.astype(np.int32), padded_plan(0, max_length)
    if concrete.min() == 0:
        raise ValueError(
            "Length of all samples has to be greater than 0, but found an element in 'lengths' that is <= 0. "
            "With a plan (plan=jaxpack.plan_buckets(lengths)) empty sequences are legal."
        )
    return concrete.astype(np.int32), exact_plan(concrete)


def _traced_lengths(lengths: jax.Array, plan: BucketPlan, max_length: int) -> jax.Array:
    """Casts traced lengths to int32 such that a sequence that does not fit still does not."""
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"traced lengths must be integers, got dtype {lengths.dtype}.")
    limits = jnp.iinfo(jnp.int32)
    if jnp.iinfo(lengths.dtype).max > limits.max:
        lengths = jnp.clip(lengths, max(limits.min, jnp.iinfo(lengths.dtype).min), limits.max)
    lengths = lengths.astype(jnp.int32)
    if max_length < plan.max_length:
        # The plan has room for these lengths, but the batch does not: negative lengths fit nowhere.
        lengths = jnp.where(lengths > max_length, -lengths, lengths)
    return lengths


def check_batch_size(
    lengths: np.ndarray | jax.Array, plan: BucketPlan | None, batch_size: int, name: str = "inputs"
) -> None:
    """Raises ValueError unless lengths, a vector, and the plan have one entry per sequence of the batch."""
    if lengths.shape[0] != batch_size:
        given = f"got {lengths.shape[0]} lengths for a batch of {batch_size}."
        if name == "inputs":  # the argument of layers, which are batch first
            raise ValueError(f"lengths must have one entry for each sequence of inputs, {given}")
        raise ValueError(f"Expected `len(lengths)` to be equal to batch_size, but {given} (Is batch_first right?)")
    if plan is not None and plan.num_sequences != batch_size:
        way_out = "append sequences of length 0" if batch_size < plan.num_sequences else "use a larger plan"
        raise ValueError(f"the plan is for {plan.num_sequences} sequences, but the batch has {batch_size}: {way_out}.")


def check_longest(lengths: np.ndarray, max_length: int) -> None:
    """Raises ValueError if a length is above the batch's T."""
    if lengths.size and lengths.max() > max_length:
        row = int(np.argmax(lengths))
        raise ValueError(
            f"lengths[{row}] = {lengths[row]} is longer than the padded batch, which has {max_length} steps."
        )


def lengths_as_shapes(lengths: ArrayLike | Sequence[int], function: str) -> np.ndarray:
    """Validates lengths that become shapes of a result. Raises TypeError if they are traced."""
    refuse_traced_shapes(lengths, function)
    return concrete_lengths(lengths)


def refuse_traced_shapes(lengths: object, function: str) -> None:
    """Raises TypeError if lengths that become shapes of a result are traced."""
    if is_traced(lengths):
        raise TypeError(
            f"{function} needs concrete lengths, because they are shapes of its result: call it outside jit. Inside, "
            f"jaxpack.pad_packed_sequence keeps static shapes."
        )
