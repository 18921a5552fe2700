"""Functions that shorten sequences: every k-th step, several steps side by side, and their sum, mean or maximum."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxpack._checks import at_least_one
from jaxpack._packed.broadcast import expand
from jaxpack._packed.packed_sequence import PackedSequence, check_packed
from jaxpack._packed.slack import zero_slack
from jaxpack._packed.statistics import as_inexact, is_inexact, sum_dtype
from jaxpack._packed.windows import View, Windows, as_windows, checked_batch, entries, real_data, view


def subsample(packed: PackedSequence, stride: int) -> PackedSequence:
    """Takes the first of every `stride` steps of each sequence.

    Examples:
      >>> packed = jaxpack.pack_sequence([[1, 2, 3, 4, 5], [6]])
      >>> [each.tolist() for each in jaxpack.unpack_sequence(jaxpack.subsample(packed, 2))]
      [[1, 3, 5], [6]]

    Args:
      packed: data [S, *F], or a pytree of such arrays.
      stride: the number of steps of which one is taken.

    Returns:
      data [S', *F], ceil(length / stride) steps of each sequence, under the plan that follows from the old one.

    Raises:
      TypeError: if given a padded array (pass it through pack_padded_sequence first), or stride is not an int.
      ValueError: if stride is below 1.
    Source: x[::stride] for each sequence.
    """
    windows = Windows(1, at_least_one("stride", stride))
    return checked_batch(_pool(check_packed(packed, "subsample"), windows, _first))


def stack_steps(
    packed: PackedSequence, size: int, *, stride: int | None = None, ceil_mode: bool = False
) -> PackedSequence:
    """Stacks every `size` consecutive steps side by side: frame stacking, and the pyramid of Listen, Attend and Spell.

    Examples:
      >>> packed = jaxpack.pack_sequence([[[1], [2], [3], [4], [5]], [[6]]], plan=jaxpack.plan_padded(2, 5))
      >>> stacked = jaxpack.stack_steps(packed, 2)
      >>> stacked.lengths.tolist(), jaxpack.pad_packed_sequence(stacked, True)[0].tolist()
      ([2, 0], [[[1, 2], [3, 4]], [[0, 0], [0, 0]]])
      >>> jaxpack.pad_packed_sequence(jaxpack.stack_steps(packed, 2, ceil_mode=True), True)[0].tolist()
      [[[1, 2], [3, 4], [5, 0]], [[6, 0], [0, 0], [0, 0]]]

    Args:
      packed: data [S, *F], or a pytree of such arrays.
      size: the number K of steps side by side.
      stride: the number of steps between the first of one stack and the first of the next. Default: size.
      ceil_mode: whether the last steps of a sequence, too few for a stack, form one with zeros. Default: they are
        dropped, so that a sequence shorter than size becomes empty.

    Returns:
      data [S', ..., K * F], the earliest step first; [S', K] if steps have no features. The plan follows from the old
      one.

    Raises:
      TypeError: if given a padded array (pass it through pack_padded_sequence first), or an argument of another type.
      ValueError: if size or stride is below 1.
    Source: Chan et al., Listen, Attend and Spell, ICASSP 2016, section 3.1; Sak et al., Fast and accurate recurrent
    neural network acoustic models for speech recognition, Interspeech 2015, section 3.
    """
    windows = as_windows(size, stride, ceil_mode=ceil_mode)
    return checked_batch(_pool(check_packed(packed, "stack_steps"), windows, _side_by_side))


def sum_pool(
    packed: PackedSequence,
    size: int,
    *,
    stride: int | None = None,
    padding: str | Sequence[int] = "VALID",
    ceil_mode: bool = False,
) -> PackedSequence:
    """Sums over windows of consecutive steps of each sequence. Arguments, shapes and errors as `avg_pool`.

    Examples:
      >>> packed = jaxpack.pack_sequence([[1, 2, 3, 4, 5], [6]])
      >>> [each.tolist() for each in jaxpack.unpack_sequence(jaxpack.sum_pool(packed, 2, ceil_mode=True))]
      [[3, 7, 5], [6]]
    """
    windows = as_windows(size, stride, padding, ceil_mode)
    return checked_batch(_pool(check_packed(packed, "sum_pool"), windows, _sum))


def avg_pool(
    packed: PackedSequence,
    size: int,
    *,
    stride: int | None = None,
    padding: str | Sequence[int] = "VALID",
    ceil_mode: bool = False,
) -> PackedSequence:
    """Computes the mean over windows of consecutive steps of each sequence.

    Examples:
      >>> packed = jaxpack.pack_sequence([[1, 2, 3, 4, 5], [6]])
      >>> [each.tolist() for each in jaxpack.unpack_sequence(jaxpack.avg_pool(packed, 2, ceil_mode=True))]
      [[1.5, 3.5, 5.0], [6.0]]

    Args:
      packed: data [S, *F], or a pytree of such arrays.
      size: the number of steps in a window.
      stride: the number of steps between windows. Default: size.
      padding: "VALID" for windows within a sequence; "SAME" for ceil(length / stride) windows, centred; or a pair
        (before, after) of steps, below size, by which windows may reach beyond the ends.
      ceil_mode: whether a last window may be incomplete. Default: steps after the last whole window are dropped, so
        that a sequence shorter than a window becomes empty.

    Returns:
      data [S', *F], under the plan that follows from the old one. Steps outside of a sequence count for nothing: the
      mean is over the real steps of a window. Integers give floats.

    Raises:
      TypeError: if given a padded array (pass it through pack_padded_sequence first), or an argument of another type.
      ValueError: if size or stride is below 1, or padding is negative or not below size.
    Source: torch.nn.functional.avg_pool1d with count_include_pad=False, and flax.linen.avg_pool.
    """
    windows = as_windows(size, stride, padding, ceil_mode)
    return checked_batch(_pool(check_packed(packed, "avg_pool"), windows, _mean))


def max_pool(
    packed: PackedSequence,
    size: int,
    *,
    stride: int | None = None,
    padding: str | Sequence[int] = "VALID",
    ceil_mode: bool = False,
) -> PackedSequence:
    """Takes the maximum over windows of consecutive steps of each sequence. Arguments, shapes and errors as `avg_pool`.

    Equal maxima share the gradient, as those of jnp.max. Integers stay integers.

    Examples:
      >>> packed = jaxpack.pack_sequence([[1, 2, 3, 4, 5], [-6]])
      >>> [each.tolist() for each in jaxpack.unpack_sequence(jaxpack.max_pool(packed, 3, stride=2, padding="SAME"))]
      [[2, 4, 5], [-6]]
    """
    windows = as_windows(size, stride, padding, ceil_mode)
    return checked_batch(_pool(check_packed(packed, "max_pool"), windows, _max))


@functools.partial(jax.jit, static_argnames=("windows", "reduce"))
def _pool(
    packed: PackedSequence, windows: Windows, reduce: Callable[[View, list[jax.Array]], jax.Array]
) -> PackedSequence:
    """Reduces each window of each array to one step: reduce(view, entries [S', *F] of the windows)."""
    seen = view(packed, windows)
    data = jax.tree.map(lambda leaf: reduce(seen, entries(seen, leaf)), real_data(packed))
    return seen.packed.replace(data=zero_slack(seen.packed, data))


def _first(seen: View, steps: list[jax.Array]) -> jax.Array:
    return steps[0]


def _side_by_side(seen: View, steps: list[jax.Array]) -> jax.Array:
    return jnp.stack(steps, -1) if steps[0].ndim == 1 else jnp.concatenate(steps, -1)


def _total(steps: list[jax.Array]) -> jax.Array:
    """Sums in float32 or wider, or in the integer dtype of jnp.sum."""
    dtype = sum_dtype(steps[0])
    if is_inexact(steps[0]):
        dtype = jnp.promote_types(dtype, jnp.float32)
    return functools.reduce(jnp.add, (step.astype(dtype) for step in steps))


def _sum(seen: View, steps: list[jax.Array]) -> jax.Array:
    return _total(steps).astype(sum_dtype(steps[0]))


def _mean(seen: View, steps: list[jax.Array]) -> jax.Array:
    steps = [as_inexact(step) for step in steps]
    total = _total(steps)
    counts = functools.reduce(jnp.add, (tap.real.astype(total.dtype) for tap in seen.taps))
    return (total / expand(jnp.maximum(counts, 1), total)).astype(steps[0].dtype)


def _max(seen: View, steps: list[jax.Array]) -> jax.Array:
    dtype = steps[0].dtype
    if jnp.issubdtype(dtype, jnp.bool_):
        return functools.reduce(jnp.logical_or, steps)  # False outside of sequences
    lowest = -jnp.inf if is_inexact(steps[0]) else jnp.iinfo(dtype).min
    held = [
        jnp.where(expand(tap.real, step), step, jnp.asarray(lowest, dtype))
        for tap, step in zip(seen.taps, steps, strict=True)
    ]
    return jnp.max(jnp.stack(held), 0)
