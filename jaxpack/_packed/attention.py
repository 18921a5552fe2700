"""Attention within each sequence of a packed batch, and rotary position embeddings."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxpack._dtypes import as_jax
from jaxpack._packed.broadcast import expand
from jaxpack._packed.gather import real_cells, slot_fits
from jaxpack._packed.indices import same_sequences
from jaxpack._packed.maps import by_cell, spread
from jaxpack._packed.packed_sequence import PackedSequence, check_packed
from jaxpack._packed.rows import into_rows, out_of_rows, segment_ids
from jaxpack._packed.slack import zero_slack
from jaxpack._packed.statistics import as_inexact


def attention(
    query: PackedSequence,
    key: PackedSequence,
    value: PackedSequence,
    *,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    scale: float | None = None,
    implementation: Literal["xla", "cudnn"] | None = None,
) -> PackedSequence:
    """Computes scaled dot-product attention of each sequence over itself.

    y_t = sum_s softmax_s(q_t · k_s * scale) v_s, over steps s of the same sequence

    Examples:
      >>> packed = jaxpack.pack_sequence([jnp.ones((3, 2, 4)), jnp.ones((1, 2, 4))])  # 2 heads of size 4
      >>> jaxpack.attention(packed, packed, packed, is_causal=True).shape
      (4, 2, 4)

    The batch is laid out by `to_rows`, and the mask keeps sequences of a row apart. Scores are [R, heads, T, T], so
    short rows cost less: choose T with the plan. JAX computes the softmax in float32, for float64 data too.

    Args:
      query: data [S, N, H], N heads of size H.
      key: data [S, K, H] of the same sequences; K divides N (grouped-query attention).
      value: data [S, K, H].
      is_causal: whether a step sees only itself and earlier ones.
      local_window_size: how many steps before and after itself a step sees: a number, or a pair (before, after). With
        is_causal, none after.
      scale: the factor of the scores. Default: 1 / sqrt(H).
      implementation: as in jax.nn.dot_product_attention: "xla", "cudnn" (on GPUs), or None to let JAX choose.

    Returns:
      data [S, N, H], packed like the query.

    Raises:
      TypeError: if an argument is not a PackedSequence.
      ValueError: if the sequences differ, heads do not divide, or shapes do not match.
    Source: jax.nn.dot_product_attention; Vaswani et al. 2017, "Attention is all you need".
    """
    query, key, value = (check_packed(packed, "attention") for packed in (query, key, value))
    same = same_sequences(query, key, "attention", ("query has", "key has"))
    same = same_sequences(query, value, "attention", ("query has", "value has"), same)
    shapes = [jnp.shape(packed.data) for packed in (query, key, value)]
    if any(len(shape) != 3 for shape in shapes):
        raise ValueError(f"attention takes data [S, heads, head size], got shapes {', '.join(map(str, shapes))}.")
    if shapes[1] != shapes[2] or shapes[0][2] != shapes[1][2]:
        raise ValueError(
            f"attention: key and value must have the same heads, of the query's size, got query {list(shapes[0])}, "
            f"key {list(shapes[1])}, value {list(shapes[2])}."
        )
    if not shapes[1][1] or shapes[0][1] % shapes[1][1]:
        raise ValueError(
            f"attention: the {shapes[1][1]} heads of key and value do not divide the {shapes[0][1]} of the query. "
            f"Each serves the same number of query heads."
        )
    window = tuple(local_window_size) if isinstance(local_window_size, (tuple, list)) else local_window_size
    options = is_causal, window, scale, implementation
    return query.replace(data=_attention(query, key.data, value.data, same, options))


@functools.partial(jax.jit, static_argnames="options")
def _attention(
    query: PackedSequence, key: jax.Array, value: jax.Array, same: jax.Array | None, options: tuple
) -> jax.Array:
    plan, is_causal, window, scale, implementation = query.plan, *options
    dtype = as_inexact(jnp.zeros((), jnp.result_type(query.data, key, value))).dtype
    if not query.data.size:
        return query.data.astype(dtype)
    # A sequence that does not fit is zero here, and NaN afterwards: 0 * NaN would reach the others in its row.
    kept = real_cells(query) & spread(plan, slot_fits(query))

    def rows_of(data: jax.Array) -> jax.Array:
        return into_rows(plan, jnp.where(expand(kept, data), data, 0).astype(dtype))

    ids = into_rows(plan, jnp.where(real_cells(query), segment_ids(plan), 0))
    output = jax.nn.dot_product_attention(
        rows_of(query.data),
        rows_of(key),
        rows_of(value),
        mask=(ids[:, :, None] == ids[:, None, :])[:, None],  # slack sees slack, so that no row of scores is empty
        scale=scale,
        is_causal=is_causal,
        local_window_size=window,
        implementation=implementation,
    )
    return zero_slack(query, out_of_rows(plan, output), same)


def rotary(
    packed: PackedSequence, *, base: float = 10_000.0, offset: ArrayLike | Sequence[int] | None = None
) -> PackedSequence:
    """Rotates features by an angle that grows with the step, counted in each sequence: rotary position embeddings.

    With x = [x_1 x_2] in halves, t the step, and the angles θ_i = t * base^(-i / (H / 2)):

    y = [x_1 cos θ - x_2 sin θ,  x_2 cos θ + x_1 sin θ]

    Examples:
      >>> packed = jaxpack.pack_sequence([jnp.ones((2, 2)), jnp.ones((1, 2))])
      >>> print(jaxpack.rotary(packed).data.round(1))  # the first step of each sequence keeps its values
      [[ 1.   1. ]
       [ 1.   1. ]
       [-0.3  1.4]]

    Args:
      packed: data [S, ..., H] with H even: queries or keys [S, heads, H].
      base: the base of the geometric series of wavelengths.
      offset: int [B], the number of steps before each sequence's first: those decoded already. Default: 0.

    Returns:
      data of the same shape, packed like the input.

    Raises:
      TypeError: if given a padded array (pass it through pack_padded_sequence first).
      ValueError: if H is odd, or offset is not [B].
    Source: Su et al. 2021, "RoFormer", with features paired by halves, as in GPT-NeoX, Llama and FLA.
    """
    packed = check_packed(packed, "rotary")
    shape = jnp.shape(packed.data)
    if len(shape) < 2 or shape[-1] % 2:
        raise ValueError(f"rotary takes data [S, ..., H] with an even number of features H, got shape {shape}.")
    if offset is not None:
        offset = as_jax(offset, "offset")
        if offset.shape != (packed.plan.num_sequences,):
            raise ValueError(
                f"rotary: offset must have one entry for each of {packed.plan.num_sequences} sequences, got shape "
                f"{offset.shape}."
            )
    return packed.replace(data=_rotary(packed, offset, float(base)))


@functools.partial(jax.jit, static_argnames="base")
def _rotary(packed: PackedSequence, offset: jax.Array | None, base: float) -> jax.Array:
    plan, data = packed.plan, as_inexact(packed.data)
    steps = by_cell(plan).steps
    if offset is not None and len(offset):
        steps = steps + spread(plan, offset[packed.sorted_indices])
    wide = jnp.promote_types(data.dtype, jnp.float32)
    half = data.shape[-1] // 2
    rates = base ** (-jnp.arange(half, dtype=wide) / half)
    angles = steps.astype(wide)[:, None] * rates[None]
    angles = angles.reshape(len(angles), *(1,) * (data.ndim - 2), half)
    first, second = data[..., :half].astype(wide), data[..., half:].astype(wide)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return zero_slack(packed, turned.astype(data.dtype))
