"""What the drop-in RNN and Bidirectional of both Flax APIs do alike: layouts, directions, and cells that are known.

A call is one or two directions over the same inputs. A cell that is known runs in jaxpack's own recurrence, on
parameters in its layout, two of a kind in one; any other cell in packed_scan, by a scan that lifts it as Flax does.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxpack.cells import Cell, Params, RNNCell
from jaxpack.inputs import batch_shape, lengths_and_plan
from jaxpack.interop.flax import RELUS, SIGMOIDS, TANHS, from_cell
from jaxpack.packed import lay_out, pad_packed_sequence, reverse_sequences
from jaxpack.plan import BucketPlan
from jaxpack.planners import plan_padded
from jaxpack.scan import Scan, scan_packed
from jaxpack.sequence import PackedSequence, PyTree, check_packed, is_traced
from jaxpack.stack import names_forward_mode, run_stack


class Known(NamedTuple):
    """A Flax cell with a recurrence of its own here.

    Attributes:
      cell: the cell of jaxpack with the same equations.
      params: its parameters, taken from those of the Flax cell.
    """

    cell: Cell
    params: Params

    @property
    def dtype(self) -> Any:
        """Of the computation."""
        return self.params["weight_hh"].dtype


class Direction(NamedTuple):
    """One RNN of a call.

    Attributes:
      carry: what it starts with, leaves [*batch, ...].
      known: its cell, if that is known; else `scan` runs it.
      plan: what padded inputs run under; None for no plan.
      reverse: whether to read each sequence from its end.
      keep_order: whether outputs are brought back to the order of the inputs then.
      stacks: whether `scan` gives variables of the cell a time axis, which only a padded batch has.
      as_in_flax: whether Flax's own scan does as well, where all sequences have all steps.
    """

    carry: PyTree
    known: Known | None
    scan: Scan
    plan: BucketPlan | None
    reverse: bool
    keep_order: bool
    stacks: bool
    as_in_flax: bool


class Layout(NamedTuple):
    """How the inputs of a call lie.

    Attributes:
      batch_shape, feature_shape: their axes, in order.
      num_steps: T, or None of packed inputs.
      time_major: whether time comes before the batch axes.
    """

    batch_shape: tuple[int, ...]
    feature_shape: tuple[int, ...]
    num_steps: int | None
    time_major: bool

    @classmethod
    def of(cls, inputs: PackedSequence | jax.Array, time_major: bool, num_feature_axes: int) -> Layout:
        """The layout of packed inputs [S, *F], or padded ones [*batch, T, *F] or, if time_major, [T, *batch, *F].

        Raises:
          ValueError: if the inputs have too few axes.
        """
        shape, packed = inputs.shape, isinstance(inputs, PackedSequence)
        if len(shape) < 1 + num_feature_axes or (packed and len(shape) > 1 + num_feature_axes):
            axes = "[S" if packed else "[time, *batch" if time_major else "[*batch, time"
            features = ", ".join(["feature"] * num_feature_axes)
            raise ValueError(f"inputs must be {axes}, {features}], as the cell asks, got shape {shape}.")
        split = len(shape) - num_feature_axes
        if isinstance(inputs, PackedSequence):
            return cls((inputs.plan.num_sequences,), shape[split:], None, time_major)
        batch_shape, num_steps = (shape[1:split], shape[0]) if time_major else (shape[: split - 1], shape[split - 1])
        return cls(batch_shape, shape[split:], num_steps, time_major)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one step, which Flax's cells make their initial carry for."""
        return self.batch_shape + self.feature_shape

    @property
    def padded_plan(self) -> BucketPlan:
        """The padded batch as a plan."""
        return plan_padded(math.prod(self.batch_shape), max(self.num_steps or 1, 1))

    def flatten(self, carry: PyTree) -> PyTree:
        """A carry [*batch, ...] as [B, ...].

        Raises:
          ValueError: if a leaf has no such axes.
        """
        axes = len(self.batch_shape)

        def flatten(leaf: jax.Array) -> jax.Array:
            if leaf.shape[:axes] != self.batch_shape:
                raise ValueError(
                    f"the carry's leaves must begin with the batch axes {self.batch_shape}, got shape {leaf.shape}. "
                    f"What has no rows belongs in a variable of the cell."
                )
            return leaf.reshape(-1, *leaf.shape[axes:])

        return jax.tree.map(flatten, jax.tree.map(jnp.asarray, carry))

    def unflatten(self, carry: PyTree) -> PyTree:
        """A carry [B, ...] as [*batch, ...]."""
        return jax.tree.map(lambda leaf: leaf.reshape(*self.batch_shape, *leaf.shape[1:]), carry)

    def pack(
        self, inputs: jax.Array, seq_lengths: ArrayLike | None, plan: BucketPlan | None, sort: bool
    ) -> PackedSequence:
        """Padded inputs, packed under the plan, or else the padded one; unsorted only under the latter."""
        assert self.num_steps is not None
        batch_size, num_steps = math.prod(self.batch_shape), self.num_steps
        if self.time_major:
            inputs = jnp.moveaxis(inputs, 0, len(self.batch_shape))
        inputs = inputs.reshape(batch_size, num_steps, *self.feature_shape)
        batch_shape(inputs, "inputs")  # refuses a batch axis that cannot be sorted
        lengths, plan = lengths_and_plan(
            self._flat_lengths(seq_lengths),
            self.padded_plan if plan is None else plan,
            batch_size,
            num_steps,
        )
        return lay_out(inputs, jnp.asarray(lengths, jnp.int32), plan, sort)

    def restore(self, outputs: PackedSequence) -> PyTree:
        """Outputs as the inputs lie."""
        if self.num_steps is None:
            return outputs
        lead = (self.num_steps, *self.batch_shape) if self.time_major else (*self.batch_shape, self.num_steps)
        padded, _ = pad_packed_sequence(outputs, not self.time_major, total_length=self.num_steps)
        return jax.tree.map(lambda leaf: leaf.reshape(*lead, *leaf.shape[2:]), padded)

    def _flat_lengths(self, seq_lengths: ArrayLike | None) -> ArrayLike:
        if seq_lengths is None:
            return np.full(math.prod(self.batch_shape), self.num_steps)
        shape = np.shape(seq_lengths)
        if shape != self.batch_shape:
            raise ValueError(
                f"seq_lengths must have one length for each sequence, shape {self.batch_shape}, got shape {shape}."
            )
        return jnp.ravel(seq_lengths) if is_traced(seq_lengths) else np.ravel(seq_lengths)


def check_inputs(
    inputs: PackedSequence | ArrayLike, seq_lengths: ArrayLike | None, plan: BucketPlan | None
) -> PackedSequence | jax.Array:
    """The door: padded inputs as an array, packed ones checked.

    Raises:
      TypeError: if inputs are packed, and seq_lengths or plan are given too.
    """
    if not isinstance(inputs, PackedSequence):
        return jnp.asarray(inputs)
    if seq_lengths is not None or plan is not None:
        raise TypeError("inputs are packed, and carry their lengths and plan: do not give seq_lengths= or plan=.")
    return check_packed(inputs, "RNN")


def recognise(
    cell: Any,
    kinds: Mapping[type, type[Cell]],
    hidden_size: Callable[[Any], int],
    params: Callable[[Any], Mapping[str, Any]],
    dtype: Any,
    carry: PyTree,
) -> Known | None:
    """The cell with jaxpack's equations for it, if it is one of these kinds and computes in the dtype of its carry.

    Of another dtype than its carry, as in mixed precision, Flax's own step runs, with its own roundings.

    Args:
      kinds: from Flax's classes to ours. A subclass may do something else.
      hidden_size: of such a cell.
      params: of such a cell.
      dtype: of the inputs.
    """
    kind = kinds.get(type(cell))
    if kind is None:
        return None
    known: Cell
    if kind is RNNCell:
        nonlinearity = _nonlinearity(cell.activation_fn)
        if nonlinearity is None:
            return None
        known = RNNCell(hidden_size(cell), nonlinearity)
    elif cell.gate_fn in SIGMOIDS and cell.activation_fn in TANHS:
        known = kind(hidden_size(cell))
    else:
        return None
    weights = from_cell(known, params(cell))
    dtype = jnp.result_type(dtype, *weights.values()) if cell.dtype is None else jnp.dtype(cell.dtype)
    if not jnp.issubdtype(dtype, jnp.floating) or any(leaf.dtype != dtype for leaf in jax.tree.leaves(carry)):
        return None
    weights = {name: weight.astype(dtype) for name, weight in weights.items()}
    if getattr(cell, "residual", False):  # W x + b + U h + h = W x + b + (U + 1) h
        weights["weight_hh"] += jnp.eye(known.hidden_size, dtype=dtype)
    return Known(known, weights)


def _nonlinearity(function: Any) -> str | None:
    return next((name for name, known in (("tanh", TANHS), ("relu", RELUS)) if function in known), None)


def check_pair(forward_rnn: Any, backward_rnn: Any, ours: type, needs_ours: bool) -> bool:
    """Whether both RNNs of a Bidirectional are ours, which can share a batch and its steps.

    Raises:
      TypeError: if they are not, and the call has a plan or packed inputs.
    """
    if forward_rnn is backward_rnn:
        warnings.warn("forward_rnn and backward_rnn are the same object, and share their parameters.", stacklevel=4)
    if type(forward_rnn) is ours and type(backward_rnn) is ours:
        return True
    if needs_ours:
        raise TypeError(
            f"a plan and packed inputs need RNNs of jaxpack, got {type(forward_rnn).__module__}."
            f"{type(forward_rnn).__name__} and {type(backward_rnn).__module__}.{type(backward_rnn).__name__}: import "
            f"RNN from where Bidirectional comes from."
        )
    return False


def flax_will_do(
    inputs: PackedSequence | jax.Array, directions: Sequence[Direction], seq_lengths: ArrayLike | None
) -> bool:
    """Whether a call is left to Flax: all sequences have all steps, and its own scan does as well."""
    padded = not isinstance(inputs, PackedSequence)
    return padded and seq_lengths is None and all(each.as_in_flax for each in directions)


def run_pair(
    inputs: PackedSequence | jax.Array,
    layout: Layout,
    directions: Sequence[Direction],
    seq_lengths: ArrayLike | None,
    forward_mode: bool,
    merge_fn: Callable[[Any, Any], Any],
) -> tuple[tuple[PyTree, PyTree], PyTree]:
    """`run` for both directions: their carries, and their outputs merged leaf by leaf, of packed ones the data."""
    results = run(inputs, layout, directions, seq_lengths, forward_mode)
    (carry, outputs), (backward_carry, backward) = results
    if isinstance(outputs, PackedSequence):
        merged = outputs.replace(data=jax.tree.map(merge_fn, outputs.data, backward.data))
    else:
        merged = jax.tree.map(merge_fn, outputs, backward)
    return (carry, backward_carry), merged


def run(
    inputs: PackedSequence | jax.Array,
    layout: Layout,
    directions: Sequence[Direction],
    seq_lengths: ArrayLike | None,
    forward_mode: bool,
) -> list[tuple[PyTree, PyTree]]:
    """Runs one or two directions; the second of two reads backwards and keeps the order.

    Returns:
      Of each direction the final carry [*batch, ...], and the outputs laid out as the inputs are, zero past lengths.

    Raises:
      ValueError, TypeError: if lengths, plan or carries do not fit the inputs.
    """
    groups = [directions] if len(directions) == 2 and _alike(*directions) else [[each] for each in directions]
    return [result for group in groups for result in _run_together(inputs, layout, group, seq_lengths, forward_mode)]


def _alike(a: Direction, b: Direction) -> bool:
    """Whether two directions can share each step."""
    if a.known is None or b.known is None:
        return False
    return a.plan == b.plan and a.known.cell == b.known.cell and a.known.dtype == b.known.dtype


def _run_together(
    inputs: PackedSequence | jax.Array,
    layout: Layout,
    group: Sequence[Direction],
    seq_lengths: ArrayLike | None,
    forward_mode: bool,
) -> list[tuple[PyTree, PyTree]]:
    first, backwards = group[0], len(group) == 1 and group[0].reverse
    planned = True
    if isinstance(inputs, PackedSequence):
        packed = _unstacked(inputs, first)
    elif first.known is None:  # rows stay in the caller's order without a plan, as what the cell keeps of them does
        plan = None if first.stacks else first.plan
        packed = layout.pack(inputs, seq_lengths, plan, sort=plan is not None)
    else:
        planned = first.plan is not None or seq_lengths is None
        packed = layout.pack(inputs, seq_lengths, first.plan, sort=True)
    if backwards:
        packed = reverse_sequences(packed)
    carries = [layout.flatten(each.carry) for each in group]
    if first.known is None:
        results = [scan_packed(first.scan, carries[0], packed)]
    else:
        results = _recur([each.known for each in group if each.known], carries, packed, planned, forward_mode)
    if backwards and first.keep_order:
        results = [(carry, reverse_sequences(outputs)) for carry, outputs in results]
    return [(layout.unflatten(carry), layout.restore(outputs)) for carry, outputs in results]


def _unstacked(packed: PackedSequence, direction: Direction) -> PackedSequence:
    if direction.stacks:
        raise ValueError(
            "variables of the cell are given a time axis, which packed inputs do not have: pass a padded batch with "
            "seq_lengths=."
        )
    return packed


def _recur(
    known: Sequence[Known], carries: Sequence[PyTree], packed: PackedSequence, planned: bool, forward_mode: bool
) -> list[tuple[PyTree, PackedSequence]]:
    """The fast recurrence in one direction, or in both."""
    cell = known[0].cell
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(_swap(_checked(cell, carry)) for carry in carries))
    packed = packed.replace(data=packed.data.astype(known[0].dtype))
    params = [each.params for each in known]
    with names_forward_mode("jaxpack's RNN", "rnn"):
        outputs, final = run_stack(cell, len(known), 0.0, params, packed, state, None, planned, forward_mode)
    parts = jnp.split(outputs, len(known), axis=-1)
    return [
        (_swap(jax.tree.map(lambda leaf, i=i: leaf[i], final)), packed.replace(data=part))
        for i, part in enumerate(parts)
    ]


def _swap(state: PyTree) -> PyTree:
    """From Flax's carry (c, h) to (h, c), and back; where it is h alone, h."""
    return state[::-1] if isinstance(state, tuple) else state


def _checked(cell: Cell, carry: PyTree) -> PyTree:
    """The carry [B, ...], if it is the cell's."""
    sizes: Any = cell.state_sizes
    size = jax.tree.leaves(sizes)[0]
    given: Any = jax.tree.structure(carry)
    if given != jax.tree.structure(sizes) or any(leaf.shape[1:] != (size,) for leaf in jax.tree.leaves(carry)):
        expected = f"(c, h), each [*batch, {size}]" if isinstance(sizes, tuple) else f"an array [*batch, {size}]"
        raise ValueError(f"initial_carry must be {expected}, got {jax.tree.map(lambda leaf: leaf.shape[1:], carry)}.")
    return carry
