"""PyTorch's six functions between padded batches, lists of sequences and packed batches; and reverse_sequences.

Names, argument order, results and the meaning of errors are those of torch.nn.utils.rnn. The differences: a packed
result takes a `plan=`, `enforce_sorted` is off by default, and `sorted_indices` are always present.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxpack._checks import as_int, check_not_negative
from jaxpack._packed.host_layout import HostLayout
from jaxpack._packed.indices import known
from jaxpack._packed.inputs import (
    as_sequences,
    check_batch_size,
    check_longest,
    lengths_and_plan,
    lengths_as_shapes,
    padded_batch,
    refuse_traced_shapes,
)
from jaxpack._packed.layout import lay_out, pad, reverse
from jaxpack._packed.lists import on_host, pad_arrays, ramps, split, take_steps
from jaxpack._packed.packed_sequence import PackedSequence, check_packed
from jaxpack._packed.padding import padding_like
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree


def pack_padded_sequence(
    input: PyTree,
    lengths: ArrayLike | Sequence[int],
    batch_first: bool = False,
    enforce_sorted: bool = False,
    *,
    plan: BucketPlan | None = None,
) -> PackedSequence:
    """Packs a padded batch.

    Examples:
      >>> packed = jaxpack.pack_padded_sequence([[1, 2, 3], [3, 4, 0]], [3, 2], batch_first=True)
      >>> packed.data.tolist()
      [1, 3, 2, 4, 3]

    Args:
      input: [T, B, *F] or, if batch_first, [B, T, *F]; or a pytree of such arrays. Values past a length, NaN included,
        are dropped.
      lengths: [B] whole numbers. With a plan they may be traced, and 0 is legal.
      batch_first: whether the batch axis comes before time.
      enforce_sorted: whether to raise unless (concrete) lengths are sorted, longest first, as PyTorch does by default.
      plan: the static shape. Default: plan_exact(lengths), which under jit compiles a program per batch.

    Returns:
      data [plan.size, *F]; steps beyond the plan's are dropped.

    Raises:
      ValueError: if shapes disagree, or concrete lengths are negative, above T, do not fit the plan or, without a plan,
        are 0. Traced lengths of this kind make their sequences NaN.
      TypeError: if lengths are not integers, or are traced without a plan.
    Source: torch.nn.utils.rnn.pack_padded_sequence, whose enforce_sorted defaults to True.
    """
    batch, batch_size, max_length = padded_batch(input, batch_first, "input")
    lengths, plan = lengths_and_plan(lengths, plan, batch_size, max_length, "input")
    _check_sorted(lengths, enforce_sorted)
    return lay_out(batch, lengths, plan)


def pad_packed_sequence(
    sequence: PackedSequence,
    batch_first: bool = False,
    padding_value: ArrayLike = 0.0,
    total_length: int | None = None,
) -> tuple[PyTree, jax.Array]:
    """Pads a packed batch: the inverse of `pack_padded_sequence`.

    Examples:
      >>> padded, lengths = jaxpack.pad_packed_sequence(jaxpack.pack_sequence([[1, 2, 3], [4]]), batch_first=True)
      >>> padded.tolist(), lengths.tolist()
      ([[1, 2, 3], [4, 0, 0]], [3, 1])

    Args:
      sequence: data [S, *F].
      batch_first: whether the batch axis comes before time in the result.
      padding_value: the value past each length.
      total_length: the number of steps T of the result. Default: plan.max_length, inside and outside jit alike.

    Returns:
      [T, B, *F] or, if batch_first, [B, T, *F], rows in the caller's order; and the lengths [B].

    Raises:
      TypeError: if sequence is not a PackedSequence.
      ValueError: if a concrete length is above total_length (a traced one makes its sequence NaN), or the dtype of the
        data cannot hold padding_value (NaN among integers).
    Source: torch.nn.utils.rnn.pad_packed_sequence.
    """
    sequence = check_packed(sequence, "pad_packed_sequence")
    length = sequence.plan.max_length if total_length is None else as_int("total_length", total_length)
    if total_length is not None and length < sequence.plan.max_length and known(sequence.lengths):
        longest = int(np.asarray(sequence.lengths).max(initial=0))
        if longest > length:
            raise ValueError(
                f"Expected total_length to be at least the length of the longest sequence in input, but got "
                f"total_length={length} and max sequence length being {longest}."
            )
    if length < 0:
        raise ValueError(f"total_length must be 0 or more, got {length}.")
    padding = jax.tree.map(lambda leaf: padding_like(leaf, padding_value), sequence.data)
    return pad(sequence, padding, length, batch_first), sequence.lengths


def pack_sequence(
    sequences: Iterable[PyTree], enforce_sorted: bool = False, *, plan: BucketPlan | None = None
) -> PackedSequence:
    """Packs a list of sequences [L_i, *F] of different lengths, or of pytrees of such arrays.

    Examples:
      >>> jaxpack.pack_sequence([[1, 2, 3], [4]]).data.tolist()
      [1, 4, 2, 3]

    Raises as `pack_padded_sequence`.
    Source: torch.nn.utils.rnn.pack_sequence, whose enforce_sorted defaults to True.
    """
    arrays, lengths = as_sequences(sequences)
    # The padded shape follows from the plan, so that one plan is one program.
    steps = lengths.max() if plan is None else max(lengths.max(), plan.max_length)
    checked, plan = lengths_and_plan(lengths, plan, len(lengths), int(steps), "sequences")
    _check_sorted(checked, enforce_sorted)
    arrays = on_host(arrays)
    if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(arrays)):
        layout = HostLayout.of(checked, plan)
        return jax.device_put(layout.packed(jax.tree.map(lambda *each: layout.spread(np.concatenate(each)), *arrays)))
    return lay_out(pad_arrays(arrays, lengths, int(steps), 0, "right"), checked, plan)


def unpack_sequence(packed_sequences: PackedSequence) -> list[PyTree]:
    """Unpacks a list of sequences [L_i, *F], in the caller's order: the inverse of `pack_sequence`.

    Examples:
      >>> packed = jaxpack.pack_sequence([[1, 2, 3], [4]])
      >>> [sequence.tolist() for sequence in jaxpack.unpack_sequence(packed)]
      [[1, 2, 3], [4]]

    Raises:
      TypeError: if packed_sequences is not a PackedSequence, or lengths, which become shapes, are traced.
    Source: torch.nn.utils.rnn.unpack_sequence.
    """
    packed_sequences = check_packed(packed_sequences, "unpack_sequence")
    refuse_traced_shapes(packed_sequences.lengths, "unpack_sequence")
    lengths = np.asarray(packed_sequences.lengths)
    check_not_negative(lengths)  # check_packed did not wait for lengths that were still being computed
    cells = HostLayout.of(lengths, packed_sequences.plan).cells
    return split(take_steps(packed_sequences.data, cells), lengths)


def pad_sequence(
    sequences: Iterable[PyTree],
    batch_first: bool = False,
    padding_value: ArrayLike = 0.0,
    padding_side: str = "right",
) -> PyTree:
    """Pads a list of sequences [L_i, *F] to the longest.

    Examples:
      >>> jaxpack.pad_sequence([[1, 2], [3]], batch_first=True).tolist()
      [[1, 2], [3, 0]]

    Args:
      sequences: arrays (or pytrees of arrays) that agree in all but their first axis.
      batch_first: whether the result is [B, T, *F] rather than [T, B, *F].
      padding_value: the value past the end (or before the start) of shorter sequences.
      padding_side: "right" or "left".

    Raises:
      ValueError: if there is no sequence, their features disagree, or padding_side is neither.
      TypeError: if sequences is not a list.
    Source: torch.nn.utils.rnn.pad_sequence.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f'padding_side must be "left" or "right", got {padding_side!r}.')
    arrays, lengths = as_sequences(sequences)
    batch = pad_arrays(arrays, lengths, int(lengths.max()), padding_value, padding_side)
    return batch if batch_first else jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), batch)


def unpad_sequence(
    padded_sequences: PyTree, lengths: ArrayLike | Sequence[int], batch_first: bool = False
) -> list[PyTree]:
    """Splits a padded batch into a list of sequences [L_i, *F]: the inverse of `pad_sequence`.

    Examples:
      >>> [sequence.tolist() for sequence in jaxpack.unpad_sequence([[1, 2], [3, 0]], [2, 1], batch_first=True)]
      [[1, 2], [3]]

    Raises:
      ValueError: if shapes disagree or a length is negative or above T.
      TypeError: if lengths, which become shapes, are traced, or are not integers.
    Source: torch.nn.utils.rnn.unpad_sequence.
    """
    batch, batch_size, max_length = padded_batch(padded_sequences, batch_first, "padded_sequences")
    array = lengths_as_shapes(lengths, "unpad_sequence")
    check_batch_size(array, None, batch_size, "padded_sequences")
    check_longest(array, max_length)
    rows = np.repeat(np.arange(batch_size), array)
    return split(take_steps(batch, (rows, ramps(array))), array)


def reverse_sequences(packed: PackedSequence) -> PackedSequence:
    """Reverses the steps of each sequence in place; applied twice it is the identity.

    Examples:
      >>> reverse = jaxpack.reverse_sequences(jaxpack.pack_sequence([[1, 2, 3], [4]]))
      >>> [sequence.tolist() for sequence in jaxpack.unpack_sequence(reverse)]
      [[3, 2, 1], [4]]

    Raises:
      TypeError: if given a padded array (pass it through pack_padded_sequence first).
    Source: tf.reverse_sequence, flax.linen.recurrent.flip_sequences.
    """
    packed = check_packed(packed, "reverse_sequences")
    return packed.replace(data=reverse(packed))


def _check_sorted(lengths: np.ndarray | jax.Array, enforce_sorted: bool) -> None:
    if enforce_sorted and isinstance(lengths, np.ndarray) and (np.diff(lengths) > 0).any():
        raise ValueError(
            "`lengths` array must be sorted in decreasing order when `enforce_sorted` is True. You can pass "
            "`enforce_sorted=False` to pack_padded_sequence and/or pack_sequence to sidestep this requirement."
        )
