"""What the drop-in RNN and Bidirectional of both Flax APIs do alike: layouts, directions, and cells that are known.

A call is one or two directions over the same inputs. A cell that is known runs in jaxpack's own recurrence, on
parameters in its layout, two of a kind in one; any other cell in packed_scan, by a scan that lifts it as Flax does.
A padded batch whose sizes no plan has, none or symbolic, is scanned as it is.

Arguments are checked once, when the call comes in. A known cell is then one program, in which lengths are traced, so
that a call outside jit neither checks them again nor waits for results.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxpack._cells.cell import Cell, Params
from jaxpack._cells.rnn import RNNCell
from jaxpack._checks import concrete_lengths, is_traced
from jaxpack._layers.stack import names_forward_mode, run_stack
from jaxpack._packed.broadcast import expand, tree_where, vary_like
from jaxpack._packed.convert import pad_packed_sequence, reverse_sequences
from jaxpack._packed.inputs import batch_shape, lengths_and_plan, padded_plan
from jaxpack._packed.layout import lay_out
from jaxpack._packed.packed_sequence import PackedSequence, check_packed
from jaxpack._packed.scan import Scan, scan_packed
from jaxpack._packed.slack import poison, select_or_poison
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree
from jaxpack.interop._flax import RELUS, SIGMOIDS, TANHS, from_cell


class Known(NamedTuple):
    """A Flax cell with a recurrence of its own here.

    Attributes:
      cell: the cell of jaxpack with the same equations.
      tree: the parameters of the Flax cell, arrays in nested mappings.
      dtype: of the computation.
      residual: whether the cell adds h to its preactivation.
    """

    cell: Cell
    tree: Mapping[str, Any]
    dtype: Any
    residual: bool

    def params(self) -> Params:
        """The parameters of `cell` that compute the same."""
        weights = {name: weight.astype(self.dtype) for name, weight in from_cell(self.cell, self.tree).items()}
        if self.residual:  # W x + b + U h + h = W x + b + (U + 1) h
            weights["weight_hh"] += jnp.eye(self.cell.hidden_size, dtype=self.dtype)
        return weights


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
    def batch_size(self) -> Any:
        """B, of all batch axes together."""
        return math.prod(self.batch_shape)

    @property
    def symbolic_axes(self) -> list[Any]:
        """The sizes that are symbols of jax.export."""
        return [size for size in (*self.batch_shape, self.num_steps or 0) if jax.export.is_symbolic_dim(size)]

    @property
    def has_plans(self) -> bool:
        """Whether there are plans of this size: it is known, and not a batch of none."""
        return not self.symbolic_axes and self.batch_size > 0

    @property
    def padded_plan(self) -> BucketPlan:
        """The padded batch as a plan."""
        return padded_plan(self.batch_size, self.num_steps or 1)

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

    def check_lengths(self, seq_lengths: ArrayLike | None, plan: BucketPlan | None) -> tuple[Any, BucketPlan]:
        """int32 lengths [B], and the plan to pack under, by default the padded one.

        Raises:
          ValueError, TypeError: if they do not fit the inputs.
        """
        assert self.num_steps is not None
        plan = self.padded_plan if plan is None else plan
        return lengths_and_plan(self.flat_lengths(seq_lengths), plan, self.batch_size, self.num_steps)

    def pack(self, inputs: jax.Array, lengths: jax.Array, plan: BucketPlan, sort: bool) -> PackedSequence:
        """Padded inputs, packed under the plan; unsorted only under the padded one.

        Raises:
          ValueError: if the batch axis is sharded so that it cannot be sorted.
        """
        inputs = self.flat(inputs)
        batch_shape(inputs, "inputs")
        return lay_out(inputs, lengths, plan, sort)

    def restore(self, outputs: PackedSequence) -> PyTree:
        """Outputs as the inputs lie."""
        if self.num_steps is None:
            return outputs
        padded, _ = pad_packed_sequence(outputs, batch_first=True, total_length=self.num_steps)
        return self.unflat(padded)

    def unflat(self, padded: PyTree) -> PyTree:
        """Outputs [B, T, ...] as the inputs lie."""
        if self.time_major:
            padded = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), padded)
        lead = (self.num_steps, *self.batch_shape) if self.time_major else (*self.batch_shape, self.num_steps)
        return jax.tree.map(lambda leaf: leaf.reshape(*lead, *leaf.shape[2:]), padded)

    def flat(self, inputs: jax.Array) -> jax.Array:
        """Padded inputs as [B, T, *F]."""
        if self.time_major:
            inputs = jnp.moveaxis(inputs, 0, len(self.batch_shape))
        return inputs.reshape(self.batch_size, self.num_steps, *self.feature_shape)

    def flat_lengths(self, seq_lengths: ArrayLike | None) -> Any:
        """Lengths [B] as they are given, by default all T.

        Raises:
          ValueError: if they have another shape than the batch.
          TypeError: if they are no array, but an iterator, say.
        """
        if seq_lengths is None:
            return np.full(self.batch_size, self.num_steps)
        lengths = seq_lengths if isinstance(seq_lengths, jax.Array) else np.asarray(seq_lengths)
        if lengths.dtype == object:
            concrete_lengths(seq_lengths, "seq_lengths")  # which says what they are
        if lengths.shape != self.batch_shape:
            raise ValueError(
                f"seq_lengths must have one length for each sequence, shape {self.batch_shape}, got shape "
                f"{lengths.shape}."
            )
        return lengths if lengths.ndim == 1 else lengths.reshape(-1)


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
    tree = params(cell)
    dtype = jnp.result_type(dtype, *jax.tree.leaves(tree)) if cell.dtype is None else jnp.dtype(cell.dtype)
    if not jnp.issubdtype(dtype, jnp.floating) or any(leaf.dtype != dtype for leaf in jax.tree.leaves(carry)):
        return None
    return Known(known, tree, dtype, getattr(cell, "residual", False))


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


def merge(
    results: Sequence[tuple[PyTree, PyTree]], merge_fn: Callable[[Any, Any], Any]
) -> tuple[tuple[PyTree, PyTree], PyTree]:
    """The carries of both directions, and their outputs merged leaf by leaf, of packed ones the data."""
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
    if not isinstance(inputs, PackedSequence) and not layout.has_plans:
        return [_scan_padded(inputs, layout, each, seq_lengths) for each in directions]
    checked = functools.cache(functools.partial(layout.check_lengths, seq_lengths))
    groups = [directions] if len(directions) == 2 and _alike(*directions) else [[each] for each in directions]
    results: list[tuple[PyTree, PyTree]] = []
    for group in groups:
        first = group[0]
        lengths, plan = _lengths_and_plan(inputs, first, checked)
        reverse = len(group) == 1 and first.reverse
        how = _How(
            layout=layout,
            plan=plan,
            planned=isinstance(inputs, PackedSequence) or first.plan is not None or seq_lengths is None,
            sort=first.known is not None or (first.plan is not None and not first.stacks),
            reverse=reverse,
            restore_order=reverse and first.keep_order,
            forward_mode=forward_mode,
        )
        carries = [layout.flatten(each.carry) for each in group]
        if first.known is None:
            results.append(_scan(how, first.scan, carries[0], inputs, lengths))
        else:
            results += _recur([each.known for each in group if each.known], carries, how, inputs, lengths)
    if isinstance(inputs, PackedSequence):  # with the index arrays that were given, which nobody waits for
        results = [(carry, inputs.replace(data=outputs.data)) for carry, outputs in results]
    return results


class _How(NamedTuple):
    """What is static in a call of one group of directions, which share their steps.

    Attributes:
      plan: what it runs under.
      planned: whether that is a choice, or no more than the padded batch's shape.
      sort: whether the longest sequence comes first. Else rows stay in the caller's order, as what a cell keeps does.
      reverse: whether it reads each sequence from its end.
      restore_order: whether outputs are brought back to the order of the inputs then.
    """

    layout: Layout
    plan: BucketPlan
    planned: bool
    sort: bool
    reverse: bool
    restore_order: bool
    forward_mode: bool

    def enter(self, inputs: PackedSequence | jax.Array, lengths: jax.Array | None) -> PackedSequence:
        """The inputs packed, as the recurrence reads them."""
        packed = inputs
        if not isinstance(packed, PackedSequence):
            assert lengths is not None
            packed = self.layout.pack(packed, lengths, self.plan, self.sort)
        return reverse_sequences(packed) if self.reverse else packed

    def leave(self, outputs: PackedSequence) -> PyTree:
        """Outputs as the inputs lie."""
        return self.layout.restore(reverse_sequences(outputs) if self.restore_order else outputs)


_enter = jax.jit(_How.enter, static_argnums=0)
_leave = jax.jit(_How.leave, static_argnums=0)


def _alike(a: Direction, b: Direction) -> bool:
    """Whether two directions can share each step."""
    if a.known is None or b.known is None:
        return False
    return a.plan == b.plan and a.known.cell == b.known.cell and a.known.dtype == b.known.dtype


def _lengths_and_plan(
    inputs: PackedSequence | jax.Array, direction: Direction, checked: Callable[[BucketPlan | None], Any]
) -> tuple[Any, BucketPlan]:
    """The lengths of padded inputs, None of packed ones, which hold them; and the plan to run under."""
    if not isinstance(inputs, PackedSequence):
        return checked(None if direction.stacks else direction.plan)
    if direction.stacks:
        raise ValueError(
            "variables of the cell are given a time axis, which packed inputs do not have: pass a padded batch with "
            "seq_lengths=."
        )
    return None, inputs.plan


def _scan(
    how: _How, scan: Scan, carry: PyTree, inputs: PackedSequence | jax.Array, lengths: jax.Array | None
) -> tuple[PyTree, PyTree]:
    """One direction of any cell. Its state is Flax's to lift, so the program is three, and the scan's own."""
    carry, outputs = scan_packed(scan, carry, _enter(how, inputs, lengths))
    return how.layout.unflatten(carry), _leave(how, outputs)


def _recur(
    known: Sequence[Known],
    carries: Sequence[PyTree],
    how: _How,
    inputs: PackedSequence | jax.Array,
    lengths: jax.Array | None,
) -> list[tuple[PyTree, PyTree]]:
    """The fast recurrence in one direction, or in both."""
    kind = _Kind(known[0].cell, known[0].dtype, tuple(each.residual for each in known))
    states = [_swap(_checked(kind.cell, carry)) for carry in carries]
    with names_forward_mode("jaxpack's RNN", "rnn"):
        return run_known(how, kind, [each.tree for each in known], states, inputs, lengths)


class _Kind(NamedTuple):
    """What is static in known cells, one of each direction."""

    cell: Cell
    dtype: Any
    residual: tuple[bool, ...]

    def params(self, trees: Sequence[Mapping[str, Any]]) -> list[Params]:
        """The parameters of `cell` from those of the Flax cells."""
        return [
            Known(self.cell, tree, self.dtype, residual).params()
            for tree, residual in zip(trees, self.residual, strict=True)
        ]


@functools.partial(jax.jit, static_argnames=("how", "kind"))
def run_known(
    how: _How,
    kind: _Kind,
    trees: Sequence[Mapping[str, Any]],
    states: Sequence[PyTree],
    inputs: PackedSequence | jax.Array,
    lengths: jax.Array | None,
) -> list[tuple[PyTree, PyTree]]:
    """A call of known cells, from their parameters in Flax and inputs as given to outputs as they lie: one program."""
    params, packed = kind.params(trees), how.enter(inputs, lengths)
    packed = packed.replace(data=packed.data.astype(kind.dtype))
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    outputs, final = run_stack(kind.cell, len(params), 0.0, params, packed, state, None, how.planned, how.forward_mode)
    finals = [how.layout.unflatten(_swap(jax.tree.map(lambda leaf, i=i: leaf[i], final))) for i in range(len(params))]
    parts = jnp.split(outputs, len(params), axis=-1)
    return [(state, how.leave(packed.replace(data=part))) for state, part in zip(finals, parts, strict=True)]


def _scan_padded(
    inputs: jax.Array, layout: Layout, direction: Direction, seq_lengths: ArrayLike | None
) -> tuple[PyTree, PyTree]:
    """One direction over a padded batch as it lies, every step of every row, for sizes that no plan has.

    Raises:
      ValueError: if there is a plan.
      TypeError: if lengths are no integers.
    """
    if direction.plan is not None and not direction.stacks:
        if not layout.symbolic_axes:
            layout.check_lengths(seq_lengths, direction.plan)  # which says that no plan is for a batch of none
        raise ValueError(
            f"the inputs' shape {inputs.shape} is symbolic in {', '.join(map(str, layout.symbolic_axes))}, where a "
            f"plan's sizes are numbers. Export without a plan, or a program for each plan, with its sizes."
        )
    batch_size, num_steps = layout.batch_size, layout.num_steps
    x = jnp.swapaxes(layout.flat(inputs), 0, 1)  # [T, B, *F]
    steps = jnp.arange(num_steps, dtype=jnp.int32)[:, None]
    fits, spans = _fits_and_spans(layout, seq_lengths)
    real = steps < spans
    flipped = jnp.where(real, spans - 1 - steps, steps)

    def flip(leaf: jax.Array) -> jax.Array:
        return jnp.take_along_axis(leaf, expand(flipped, leaf), axis=0)

    x = flip(x) if direction.reverse else x
    carry = vary_like(layout.flatten(direction.carry), (x, spans))
    safe = carry
    if layout.symbolic_axes:  # slack holds another step that is real, as in packed_scan
        rows = jnp.where(spans[0] > 0, jnp.arange(batch_size), jnp.argmax(spans[0]))
        stand_in = jnp.where(jnp.any(real), lax.stop_gradient(x[:1, rows]), jnp.ones_like(x[:1]))
        x = jnp.where(expand(real, x), x, stand_in)
        safe = jax.tree.map(lambda leaf: lax.stop_gradient(leaf[rows]), carry)

    def masked(step: Callable[[PyTree, PyTree], Any], carry: PyTree, cell: tuple[jax.Array, jax.Array]) -> Any:
        x, real = cell
        stepped, y = step(tree_where(real, carry, safe), x)
        return tree_where(real, stepped, carry), y

    carry, outputs = direction.scan(masked, carry, (x, real))
    if direction.reverse and direction.keep_order:
        outputs = jax.tree.map(flip, outputs)
    outputs = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), outputs)
    outputs = jax.tree.map(lambda leaf: select_or_poison(leaf, real.T, jnp.zeros_like(leaf), fits), outputs)
    carry = jax.tree.map(lambda leaf: poison(leaf, fits), carry)
    return layout.unflatten(carry), layout.unflat(outputs)


def _fits_and_spans(layout: Layout, seq_lengths: ArrayLike | None) -> tuple[jax.Array, jax.Array]:
    """bool [B], which lengths fit the padded batch, and int32 [1, B], how many steps count as real: all, if not.

    Raises:
      TypeError: if lengths are no integers.
    """
    num_steps = jnp.asarray(layout.num_steps, jnp.int32)
    if seq_lengths is None:
        lengths = jnp.broadcast_to(num_steps, (layout.batch_size,))
    else:
        lengths = layout.flat_lengths(seq_lengths)
        lengths = lengths if is_traced(lengths) else jnp.asarray(concrete_lengths(lengths), jnp.int32)
        if not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise TypeError(f"traced lengths must be integers, got dtype {lengths.dtype}.")
    fits = (lengths >= 0) & (lengths <= num_steps)
    return fits, jnp.where(fits, lengths, num_steps).astype(jnp.int32)[None]


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
