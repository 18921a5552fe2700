"""Convolution over the steps of each sequence, with strides and padding at both ends."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxpack._checks import at_least_one
from jaxpack._dtypes import as_jax
from jaxpack._packed.packed_sequence import PackedSequence, check_packed
from jaxpack._packed.slack import zero_slack
from jaxpack._packed.statistics import as_inexact
from jaxpack._packed.windows import Windows, as_padding, checked_batch, entries, real_data, view


def conv(
    packed: PackedSequence,
    kernel: ArrayLike,
    *,
    stride: int = 1,
    padding: str | Sequence[int] = "SAME",
    dilation: int = 1,
) -> PackedSequence:
    """Convolves the steps of each sequence with a kernel, as if the sequence were alone; x is 0 beyond both ends.

    y_t = sum_j kernel[j] * x_(t * stride - before + j * dilation), over K entries

    Examples:
      >>> packed = jaxpack.pack_sequence([[[1.0], [2.0], [3.0]], [[4.0]]], plan=jaxpack.plan_padded(2, 3))
      >>> kernel = [[100.0], [10.0], [1.0]]
      >>> jaxpack.pad_packed_sequence(jaxpack.conv(packed, kernel), True)[0][..., 0].tolist()
      [[12.0, 123.0, 230.0], [40.0, 0.0, 0.0]]
      >>> jaxpack.conv(packed, kernel, stride=2).lengths.tolist()
      [2, 1]
      >>> jaxpack.conv(packed, kernel, padding="VALID").lengths.tolist()  # no window fits into one step
      [1, 0]

    Args:
      packed: data [S, F].
      kernel: [K, F] for a depthwise convolution, [K, F, G] for a full one.
      stride: the number of steps between windows.
      padding: "SAME" for ceil(length / stride) windows, centred; "VALID" for windows within a sequence; or a pair
        (before, after) of zeros beyond the ends, such as (K // 2, K // 2).
      dilation: the number of steps between entries of the kernel.

    Returns:
      data [S', F], or [S', G], under the plan that follows from the old one. A sequence with no window, such as an
      empty one, or with "VALID" one that is shorter than the kernel, becomes empty.

    Raises:
      TypeError: if given a padded array (pass it through pack_padded_sequence first), or an argument of another type.
      ValueError: if a shape does not match, stride or dilation is below 1, or padding is negative.
    Source: jax.lax.conv_general_dilated and flax.linen.Conv on one sequence at a time; torch.nn.Conv1d, whose weight
    [G, F / groups, K] is the kernel with axes reversed. With "SAME" and a stride, the zeros before a sequence depend on
    its length, as in jax.lax; with a pair they do not, as in PyTorch. `causal_conv` sees no later step, and decodes.
    """
    stride, dilation = at_least_one("stride", stride), at_least_one("dilation", dilation)
    pads, kernel = as_padding(padding), as_jax(kernel, "kernel")
    packed = check_packed(packed, "conv")
    shape = jnp.shape(packed.data) if isinstance(packed.data, jax.Array) else ()
    if len(shape) != 2:
        raise ValueError(f"conv takes data with one axis of features, [S, F], got {packed!r}.")
    if kernel.ndim not in (2, 3) or not len(kernel) or kernel.shape[1] != shape[1]:
        raise ValueError(
            f"kernel must be [K, {shape[1]}] (depthwise) or [K, {shape[1]}, G] (full) for inputs of {shape[1]} "
            f"features, got shape {kernel.shape}. The kernel of a torch.nn.Conv1d is its weight with axes reversed."
        )
    return checked_batch(_conv(packed, kernel, Windows(len(kernel), stride, dilation, pads)))


@functools.partial(jax.jit, static_argnames="windows")
def _conv(packed: PackedSequence, kernel: jax.Array, windows: Windows) -> PackedSequence:
    seen = view(packed, windows)
    data = as_inexact(real_data(packed))
    terms = (
        step * entry[None] if entry.ndim == 1 else step @ entry
        for step, entry in zip(entries(seen, data), kernel, strict=True)
    )
    return seen.packed.replace(data=zero_slack(seen.packed, functools.reduce(jnp.add, terms)))
