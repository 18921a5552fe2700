"""What users pass in, checked at the door: padded batches, lengths, and the plan they go under."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxpack.plan import BucketPlan, check_lengths_type, concrete_lengths
from jaxpack.planners import plan_exact
from jaxpack.sequence import PyTree, is_traced


def as_batch(batch: PyTree, name: str) -> PyTree:
    """Arrays from what a user passed: nested lists of numbers are one array, any other pytree one of arrays."""
    leaves = jax.tree.leaves(batch)
    if not leaves:
        raise ValueError(f"{name} is empty.")
    if any(np.ndim(leaf) == 0 for leaf in leaves):
        return jnp.asarray(batch)
    return jax.tree.map(jnp.asarray, batch)


def batch_shape(batch: PyTree, name: str) -> tuple[int, int]:
    """(B, T) of a batch-first padded pytree.

    Raises:
      ValueError: if a leaf has no two leading axes, the leaves disagree in them, or the batch axis is sharded under
        an explicit mesh.
    """
    leaves = jax.tree.leaves(batch)
    for leaf in leaves:
        if leaf.ndim < 2:
            raise ValueError(f"{name} must have a batch and a time axis, [B, T, ...], got shape {leaf.shape}.")
        if leaf.shape[:2] != leaves[0].shape[:2]:
            raise ValueError(
                f"{name}: all arrays must have the same batch and time axes, got [B, T] = {leaves[0].shape[:2]} and "
                f"{leaf.shape[:2]}."
            )
        _check_sharding(leaf, name)
    return leaves[0].shape[0], leaves[0].shape[1]


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
    lengths: ArrayLike | Sequence[int], plan: BucketPlan | None, batch_size: int, max_length: int
) -> tuple[np.ndarray | jax.Array, BucketPlan]:
    """Checks lengths against the batch and the plan, which is exact by default."""
    if plan is not None and not isinstance(plan, BucketPlan):
        raise TypeError(f"plan must be a jaxpack.BucketPlan, got {type(plan).__name__}.")
    if isinstance(lengths, jax.core.Tracer):
        if plan is None:
            raise TypeError(
                "lengths are traced, so the plan must be given: pack_padded_sequence(..., plan=plan) with a plan made "
                "outside jit, such as jaxpack.plan_buckets(lengths) or jaxpack.plan_padded(batch_size, max_length)."
            )
        check_batch_size(lengths, plan, batch_size)
        return _traced_lengths(lengths, plan, max_length), plan
    concrete = concrete_lengths(lengths)
    check_batch_size(concrete, plan, batch_size)
    check_longest(concrete, max_length)
    if plan is not None:
        plan.check(concrete)
        return concrete, plan
    if not concrete.size or concrete.min() == 0:
        raise ValueError(
            "Length of all samples has to be greater than 0, but found an element in 'lengths' that is <= 0. "
            "With a plan (plan=jaxpack.plan_buckets(lengths)) empty sequences are legal."
        )
    return concrete, plan_exact(concrete)


def _traced_lengths(lengths: jax.Array, plan: BucketPlan, max_length: int) -> jax.Array:
    """Traced lengths as int32, in which a misfit stays one."""
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"traced lengths must be integers, got dtype {lengths.dtype}.")
    limits = jnp.iinfo(jnp.int32)
    if jnp.iinfo(lengths.dtype).max > limits.max:
        lengths = jnp.clip(lengths, max(limits.min, jnp.iinfo(lengths.dtype).min), limits.max)
    lengths = lengths.astype(jnp.int32)
    if max_length < plan.max_length:
        # The plan alone could not tell that such a length is a misfit; a negative one stays one in every operation.
        lengths = jnp.where(lengths > max_length, -lengths, lengths)
    return lengths


def check_batch_size(lengths: np.ndarray | jax.Array, plan: BucketPlan | None, batch_size: int) -> None:
    """Raises ValueError unless there is one length per sequence of the batch, and as many in the plan."""
    check_lengths_type(lengths.shape, lengths.dtype)
    if lengths.shape[0] != batch_size:
        raise ValueError(
            f"Expected `len(lengths)` to be equal to batch_size, but got {lengths.shape[0]} lengths for a batch of "
            f"{batch_size}. (Is batch_first right?)"
        )
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
    """Lengths for a function whose result's shapes they are; raises TypeError if they are traced."""
    if is_traced(lengths):
        raise TypeError(
            f"{function} needs concrete lengths, for they are the shapes of its result: call it outside jit. Inside, "
            f"jaxpack.pad_packed_sequence keeps static shapes."
        )
    return concrete_lengths(lengths)
