"""linear_attention and gated_delta_rule: recurrences of matrix states as functions of packed or padded arrays."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxpack._dtypes import as_jax
from jaxpack._linear.inputs import Aligned, Lengths, align, clean
from jaxpack._matrix.chunks import Rule, chunk_size, scan_chunks
from jaxpack._matrix.layer import Heads
from jaxpack._matrix.rules import delta_rule
from jaxpack._matrix.rules import linear_attention as linear_rule
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._packed.resets import Entering
from jaxpack._packed.slack import zero_slack
from jaxpack._plans.bucket_plan import BucketPlan


def linear_attention(
    query: PackedSequence | ArrayLike,
    key: PackedSequence | ArrayLike,
    value: PackedSequence | ArrayLike,
    log_decay: PackedSequence | ArrayLike | None = None,
    initial_state: ArrayLike | None = None,
    *,
    lengths: Lengths = None,
    mask: ArrayLike | None = None,
    plan: BucketPlan | None = None,
) -> tuple[Any, jax.Array]:
    """Runs gated linear attention over the steps of each sequence, with a matrix as the state of each head.

        S_t = exp(log_decay_t) S_{t-1} + k_t v_tᵀ;  y_t = S_tᵀ q_t

    Examples:
      >>> packed = jaxpack.pack_sequence([jnp.ones((3, 1, 2)), jnp.ones((1, 1, 2))])  # one head of size 2
      >>> output, state = jaxpack.linear_attention(packed, packed, packed)
      >>> [each[:, 0].tolist() for each in jaxpack.unpack_sequence(output)]
      [[[2.0, 2.0], [4.0, 4.0], [6.0, 6.0]], [[2.0, 2.0]]]
      >>> state.shape
      (2, 1, 2, 2)

    Steps are computed a chunk at a time, in matrix products, and the backward pass saves one state a chunk. Decays stay
    logarithms until they are summed, in float32 or wider, so no gate overflows; nor do the states, which have that
    dtype too.

    Args:
      query: packed data [S, G, K], G heads of size K; or padded [B, T, G, K] (batch first), with `lengths` or `mask`.
      key: like the query.
      value: [S, H, V] or [B, T, H, V]. G divides H: H / G heads in a row share a key and a query.
      log_decay: [S, H] or [B, T, H] for a decay of each head, [..., H, K] for one of each of its keys. Default: zeros.
      initial_state: [B, H, K, V], in the caller's row order. Default: zeros.
      lengths: int [B], for padded inputs. They may be traced. Default: all T.
      mask: bool [B, T], in place of lengths, True at valid steps. Padding may be anywhere; outputs there are 0. It may
        be traced.
      plan: for padded inputs, the static shape to run under. Default: the padded batch.

    Returns:
      The outputs, laid out as the value, and the state of each sequence after its last step [B, H, K, V]. Sequences
      that do not fit are NaN in both.

    Raises:
      TypeError: if some arguments are packed and others padded, lengths, mask or plan are given beside packed ones,
        both lengths and mask are given, the mask is not bool, or an argument is complex.
      ValueError: if sequences or shapes differ, or heads do not divide.
    Source: Katharopoulos et al. 2020, "Transformers are RNNs"; Yang et al. 2023, "Gated linear attention"; Dao & Gu
    2024, "Transformers are SSMs".
    """
    given = {"query": query, "key": key, "log_decay": log_decay}
    aligned = align("linear_attention", value, given, lengths, plan, mask)
    return _call("linear_attention", linear_rule, aligned, initial_state)


def gated_delta_rule(
    query: PackedSequence | ArrayLike,
    key: PackedSequence | ArrayLike,
    value: PackedSequence | ArrayLike,
    beta: PackedSequence | ArrayLike,
    log_decay: PackedSequence | ArrayLike | None = None,
    initial_state: ArrayLike | None = None,
    *,
    lengths: Lengths = None,
    mask: ArrayLike | None = None,
    plan: BucketPlan | None = None,
) -> tuple[Any, jax.Array]:
    """Runs the gated delta rule over the steps of each sequence: a state that replaces what it holds for a key.

        S_t = exp(log_decay_t) (I - beta_t k_t k_tᵀ) S_{t-1} + beta_t k_t v_tᵀ;  y_t = S_tᵀ q_t

    Keys of length 1 and a beta from 0 to 2 keep the state bounded.

    Examples:
      >>> key = jnp.array([1.0, 0.0])
      >>> packed = jaxpack.pack_sequence([jnp.stack([key, key])[:, None]])  # one head, the same key twice
      >>> value, beta = packed.map(lambda k: jnp.array([[[5.0]], [[7.0]]])), packed.map(lambda k: jnp.ones((2, 1)))
      >>> output, state = jaxpack.gated_delta_rule(packed, packed, value, beta)
      >>> output.data.ravel().tolist()  # the second value replaces the first
      [5.0, 7.0]

    Args:
      query, key, value, initial_state, lengths, mask, plan: as in `linear_attention`.
      beta: [S, H] or [B, T, H], how much of a value to replace.
      log_decay: [S, H] or [B, T, H]. Default: zeros.

    Returns:
      As `linear_attention`.

    Raises:
      TypeError: as `linear_attention` does.
      ValueError: as `linear_attention` does.
    Source: Schlag et al. 2021, "Linear transformers are secretly fast weight programmers"; Yang et al. 2024, "Gated
    delta networks".
    """
    given = {"query": query, "key": key, "beta": beta, "log_decay": log_decay}
    aligned = align("gated_delta_rule", value, given, lengths, plan, mask)
    return _call("gated_delta_rule", delta_rule, aligned, initial_state)


def _call(name: str, rule: Rule, aligned: Aligned, initial_state: Any) -> tuple[Any, jax.Array]:
    """Validates the shapes and dtypes of a function's arguments and runs its rule."""
    heads = _heads_of(name, rule, aligned)
    given = {"value": aligned.packed.data} | aligned.others
    if initial_state is not None:
        given["initial_state"] = initial_state = as_jax(initial_state, "initial_state")
    for each, array in given.items():
        if array is not None and jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise TypeError(f"{name}: {each} must be real, got dtype {array.dtype}.")
    size = aligned.packed.plan.num_sequences
    if initial_state is not None:
        expected = (size, heads.num_heads, heads.key_size, heads.value_size)
        if initial_state.shape != expected:
            raise ValueError(
                f"{name}: initial_state must be [B, H, K, V] = {list(expected)}, got shape {list(initial_state.shape)}."
            )
    output, state = _run(rule, heads, aligned.as_cells, initial_state)
    return aligned.laid_out(aligned.packed.replace(data=output)), state


def _heads_of(name: str, rule: Rule, aligned: Aligned) -> Heads:
    """Returns the axes of the heads. Raises ValueError if shapes do not match."""
    value, key = aligned.packed.data.shape[1:], aligned.others["key"].shape[1:]
    shapes = {"query": aligned.others["query"].shape[1:], "key": key, "value": value}
    if any(len(shape) != 2 for shape in shapes.values()) or shapes["query"] != key:
        raise ValueError(
            f"{name}: query, key and value must be [heads, size] at each step, and query as key, got "
            f"{', '.join(f'{each} {list(shape)}' for each, shape in shapes.items())}."
        )
    (groups, key_size), (count, value_size) = key, value
    if not groups or count % groups:
        raise ValueError(
            f"{name}: the {groups} heads of query and key do not divide the {count} of value. Each serves the same "
            f"number of heads."
        )
    by_head = {"log_decay": [(count,), (count, key_size)][: 2 if rule is linear_rule else 1], "beta": [(count,)]}
    for each, allowed in by_head.items():
        found = aligned.others.get(each)
        if found is not None and found.shape[1:] not in allowed:
            raise ValueError(
                f"{name}: {each} must be {' or '.join(str(list(shape)) for shape in allowed)} at each step, got "
                f"{list(found.shape[1:])}."
            )
    return Heads(groups, count // groups, key_size, value_size)


@functools.partial(jax.jit, static_argnames=("rule", "heads"))
def _run(rule: Rule, heads: Heads, aligned: Aligned, initial: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Computes the outputs [S, H, V] and the final state [B, H, K, V]."""
    bare, given = aligned.packed.replace(data=None), dict(aligned.others)
    dtype = jnp.result_type(aligned.packed.data, given["query"], given["key"], float)
    wide = jnp.promote_types(dtype, jnp.float32)
    packed = clean(aligned.packed, aligned.agree, dtype)
    value = packed.data
    rows, count = packed.plan.num_sequences, heads.num_heads
    state = (rows, count, heads.key_size, heads.value_size)
    initial = lax.full_like(value, 0, wide, state) if initial is None else initial.astype(wide)
    if not packed.plan.size:  # a batch of no sequences
        return value, initial
    cells = (len(value), heads.groups, heads.per_group)
    decay = given.pop("log_decay")
    decay = lax.full_like(value, 0, wide, (len(value), count)) if decay is None else decay
    given |= {"value": value.reshape(*cells, -1), "log_decay": decay.reshape(*cells, -1)}
    if "beta" in given:
        given["beta"] = given["beta"].reshape(cells)
    size = chunk_size(packed.plan, heads.key_size, heads.value_size, per_key=decay.ndim == 3)
    output, final = scan_chunks(rule, bare, given, Entering(initial.reshape(rows, *heads)), None, size)
    return zero_slack(bare, output.reshape(value.shape), aligned.agree), final.reshape(state)
