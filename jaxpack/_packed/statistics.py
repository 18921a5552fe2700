"""Statistics over all real steps of a batch (mean, var, std), and the sums that they share with reductions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpack._packed.broadcast import expand
from jaxpack._packed.gather import real_cells, slot_lengths, slot_spans
from jaxpack._packed.maps import by_cell, spread
from jaxpack._packed.packed_sequence import PackedSequence, check_packed
from jaxpack._packed.slack import checked_slot_fits, poison
from jaxpack._types import PyTree


def mean(packed: PackedSequence) -> PyTree:
    """Computes the mean over all real steps of all sequences, feature by feature; 0 if there are no steps.

    Examples:
      >>> packed = jaxpack.pack_sequence([[1, 2, 3], [6]], plan=jaxpack.plan_padded(2, 3))
      >>> float(jaxpack.mean(packed))  # jnp.mean(packed.data) would count the slack
      3.0

    Args:
      packed: data [S, *F].

    Returns:
      [*F], the same under every plan; NaN if a sequence does not fit. Integers give floats.

    Raises:
      TypeError: if given a padded array (pass it through pack_padded_sequence first).
    """
    return _mean(check_packed(packed, "mean"))


@jax.jit
def _mean(packed: PackedSequence) -> PyTree:
    return _of_batch(packed, lambda leaf: _total_mean(packed, leaf))


def var(packed: PackedSequence) -> PyTree:
    """Computes the (population) variance over all real steps of all sequences, as jnp.var. As `mean`.

    Examples:
      >>> float(jaxpack.var(jaxpack.pack_sequence([[1, 2, 3], [6]], plan=jaxpack.plan_padded(2, 3))))
      3.5
    """
    return _var(check_packed(packed, "var"))


@jax.jit
def _var(packed: PackedSequence) -> PyTree:
    return _of_batch(packed, lambda leaf: _total_var(packed, leaf))


def std(packed: PackedSequence) -> PyTree:
    """Computes the standard deviation over all real steps of all sequences. As `var`; the gradient at 0 is 0.

    Examples:
      >>> packed = jaxpack.pack_sequence([[1.0, 3.0, 3.0], [1.0]])
      >>> float(jaxpack.std(packed))
      1.0
      >>> ((packed - jaxpack.mean(packed)) / jaxpack.std(packed)).data.tolist()  # standardised, step by step
      [-1.0, -1.0, 1.0, 1.0]
    """
    return _std(check_packed(packed, "std"))


@jax.jit
def _std(packed: PackedSequence) -> PyTree:
    return _of_batch(packed, lambda leaf: square_root(_total_var(packed, leaf)))


def _of_batch(packed: PackedSequence, reduce: Callable[[jax.Array], jax.Array]) -> PyTree:
    """Applies a reduction over all real cells to each array; the results are NaN if a sequence does not fit."""
    fits = jnp.all(checked_slot_fits(packed))
    return jax.tree.map(lambda leaf: poison(reduce(as_inexact(leaf)), fits), packed.data)


def _total_mean(packed: PackedSequence, leaf: jax.Array) -> jax.Array:
    """Computes the mean over all real cells of an inexact leaf."""
    total = real_values(packed, leaf).sum(0)
    return (total / jnp.maximum(slot_spans(packed).sum(), 1).astype(total.dtype)).astype(leaf.dtype)


def _total_var(packed: PackedSequence, leaf: jax.Array) -> jax.Array:
    """Computes the variance over all real cells of an inexact leaf."""
    wide = real_values(packed, leaf)
    apart = wide - _total_mean(packed, wide)[None]
    return _total_mean(packed, squared_magnitude(apart)).astype(squared_magnitude(leaf).dtype)


def slot_sums(packed: PackedSequence, leaf: jax.Array) -> jax.Array:
    """Sums over the real cells of each slot, in float32 or wider, or in the integer dtype of jnp.sum."""
    plan = packed.plan
    values, slots = real_values(packed, leaf), by_cell(plan).slots
    return jax.ops.segment_sum(values, slots, plan.num_sequences, mode="promise_in_bounds")


def real_values(packed: PackedSequence, leaf: jax.Array) -> jax.Array:
    """Returns the leaf with slack set to 0, in the dtype for sums."""
    real = jnp.where(expand(real_cells(packed), leaf), leaf, jnp.zeros_like(leaf))
    return real.astype(jnp.promote_types(sum_dtype(leaf), jnp.float32) if is_inexact(leaf) else sum_dtype(leaf))


def slot_means(packed: PackedSequence, leaf: jax.Array) -> jax.Array:
    """Computes the mean over the real cells of each slot of an inexact leaf, in float32 or wider."""
    total, counts = slot_sums(packed, leaf), jnp.maximum(slot_lengths(packed), 1)
    return total / expand(counts, total).astype(total.dtype)


def slot_variances(packed: PackedSequence, leaf: jax.Array) -> jax.Array:
    """Computes the variance over the real cells of each slot."""
    leaf = as_inexact(leaf)
    apart = real_values(packed, leaf) - spread(packed.plan, slot_means(packed, leaf))
    return slot_means(packed, squared_magnitude(apart)).astype(squared_magnitude(leaf).dtype)


def squared_magnitude(x: jax.Array) -> jax.Array:
    """Computes |x|²."""
    return x.real**2 + x.imag**2 if jnp.issubdtype(x.dtype, jnp.complexfloating) else x**2


def square_root(x: jax.Array) -> jax.Array:
    """Computes the square root, with derivative 0 at 0."""
    return jnp.where(x == 0, 0, jnp.sqrt(jnp.where(x == 0, 1, x)))


def sum_dtype(leaf: jax.Array) -> Any:
    """Returns the dtype of jnp.sum(leaf), which is wider for narrow integers and bools."""
    return jax.eval_shape(jnp.sum, leaf).dtype


def as_inexact(leaf: jax.Array) -> jax.Array:
    """Casts integers to floats."""
    return leaf.astype(jnp.result_type(leaf, float))


def is_inexact(leaf: jax.Array) -> bool:
    """Returns whether an array holds floats or complex numbers."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)
