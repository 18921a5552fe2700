"""PackedSequence: a batch of sequences of different lengths, laid out under a plan.

Its index maps are given statically by the plan and completed dynamically by the lengths: sequence b of the caller's
batch sits in slot unsorted_indices[b]; step t of slot s is cell step_offsets[slot_starts[s] + t] + slot_rows[s].

Two rules are kept by two functions. `sanitise` replaces what is in slack before a user's function sees it; `seal`
zeroes what came out of slack, and turns sequences that do not fit the plan into NaN. Index leaves are not trusted: a
batch whose lengths and permutations do not belong together is refused where their values are known, and fits nowhere
where they are traced.

Functions that take a packed batch are a check and one program for each plan, outside jit too. They hand the index
leaves on as they are, so that none waits for what another has not yet computed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import operator
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import checkify
from jax.typing import ArrayLike

from jaxpack.arguments import check_lengths_type
from jaxpack.captions import caption, filled_slots, type_of, types_of
from jaxpack.dtypes import canonical
from jaxpack.pictures import html_picture, text_picture
from jaxpack.plan import BucketPlan

PyTree = Any

_PATIENCE = 0.01  # seconds that a check waits for indices which are still being computed


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["data", "lengths", "sorted_indices", "unsorted_indices"],
    meta_fields=["plan"],
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PackedSequence:
    """A batch of B sequences under a static plan. Made by `pack_padded_sequence` or `pack_sequence`.

    Examples:
      >>> packed = jaxpack.pack_sequence([jnp.array([1.0]), jnp.array([2.0, 3.0])])
      >>> packed
      PackedSequence(data=float32[3], lengths=int32[2], plan=BucketPlan(boundaries=(1, 2), rows=(2, 1)))
      >>> packed.data.tolist()  # step by step, the longest first
      [2.0, 1.0, 3.0]

    A pytree whose plan is static: one plan is one compiled program, whatever the lengths. Nothing is validated here,
    since JAX puts tracers and placeholders into pytrees; the functions that take one check it. Differentiate with
    respect to `packed.data`: the other leaves are integers, which `jax.tree.map(jnp.add, packed, packed)` would add up
    too. Write `packed + packed`, and `packed.map(fn, *others)` for functions of several batches.

    Attributes:
      data: [S, *F] for the S = plan.size cells, in time-major bucket order, or a pytree of such arrays. With
        plan_exact it is byte for byte PyTorch's `PackedSequence.data`, but for the order of equal lengths, which
        its sort on CPU does not keep.
      lengths: int32 [B], in the caller's order, as given.
      sorted_indices: int32 [B], the caller's row in each slot, longest first.
      unsorted_indices: int32 [B], the slot of each of the caller's rows.
      plan: the static shape.
    """

    data: PyTree
    lengths: jax.Array
    sorted_indices: jax.Array
    unsorted_indices: jax.Array
    plan: BucketPlan

    @property
    def batch_sizes(self) -> np.ndarray:
        """Rows alive at each step (static), as PyTorch's `batch_sizes`."""
        return self.plan.batch_sizes

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `data`; raises ValueError if data is a pytree of several arrays."""
        return self._only_leaf("shape").shape

    @property
    def dtype(self) -> np.dtype:
        """The dtype of `data`; raises ValueError if data is a pytree of several arrays."""
        return self._only_leaf("dtype").dtype

    @property
    def mask(self) -> jax.Array:
        """bool [S]: True at real cells, False in slack. All cells of a sequence that does not fit count as real.

        Examples:
          >>> jaxpack.pack_sequence([jnp.ones(1), jnp.ones(2)], plan=jaxpack.plan_padded(2, 2)).mask.tolist()
          [True, True, True, False]
        """
        return _mask(self.replace(data=None))

    @property
    def fits(self) -> jax.Array:
        """bool [B]: which of the caller's sequences fit the plan; none, if lengths and indices disagree."""
        return _fits(self.replace(data=None))

    def replace(self, **changes: Any) -> PackedSequence:
        """A copy with other fields, which are taken as they are; for functions of each step see `map`.

        Examples:
          >>> packed = jaxpack.pack_sequence([jnp.ones(1), jnp.ones(2)])
          >>> packed.replace(data=2 * packed.data).data.tolist()
          [2.0, 2.0, 2.0]
        """
        copy = dataclasses.replace(self, **changes)
        if changes.keys() <= {"data"}:
            object.__setattr__(copy, "_checked", self._checked)
        return copy

    def map(self, fn: Callable[..., PyTree], *others: PackedSequence, pass_mask: bool = False) -> PackedSequence:
        """Applies a token-wise function to the data: `packed.map(embedding)`, `packed.map(jax.nn.relu)`.

        Examples:
          >>> packed = jaxpack.pack_sequence([jnp.ones(1), jnp.ones(2)], plan=jaxpack.plan_padded(2, 2))
          >>> packed.map(lambda x: 2 * x).data.tolist()  # 0 in slack
          [2.0, 2.0, 2.0, 0.0]
          >>> packed.map(jnp.subtract, packed).data.tolist()
          [0.0, 0.0, 0.0, 0.0]
          >>> from flax import nnx
          >>> norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
          >>> batch = jaxpack.pack_sequence([jnp.ones((1, 4)), jnp.ones((2, 4))], plan=jaxpack.plan_padded(2, 2))
          >>> batch.map(norm, pass_mask=True).shape  # statistics of the 3 real cells
          (4, 4)

        `fn` is called once, on all cells: data [S, *F] to [S, *G], or a pytree of such arrays. It must treat cells
        independently of each other, for what they share the cells with depends on the plan: in slack `fn` is given
        copies of real cells, so that neither its values nor its gradients meet anything that is not data, and what it
        makes of them is zeroed. A function with statistics over cells, such as a normalisation, asks for the mask.

        Args:
          fn: fn(data, *data_of_others), with `pass_mask` fn(data, *data_of_others, mask=mask).
          others: packed batches of the same plan and lengths.
          pass_mask: whether `fn` is given the mask of real cells, bool, for each array of the data one of its shape:
            what the `mask` of Flax's BatchNorm and the `where` of jnp.mean take. (`jaxpack.mean`, `var` and `std` are
            such statistics.) What normalises each cell by itself, as LayerNorm, GroupNorm and InstanceNorm do, is right
            without: with a mask its mean over no feature of a slack cell is NaN, and so are its gradients.

        Raises:
          TypeError: if one of others is no PackedSequence.
          ValueError: if fn returns arrays without the leading axis of S cells, or plans or concrete lengths differ
            (where traced lengths do, the result is NaN).
        """
        packed = check_packed(self, "map")
        inputs, fits = [_sanitise(packed)], None
        for i, other in enumerate(others):
            other = check_packed(other, f"map(others[{i}])")
            fits = same_sequences(packed, other, "map", ("the batch has", f"others[{i}] has"), fits)
            inputs.append(_sanitise(other))
        options = {"mask": mask_like(packed.mask, packed.data)} if pass_mask else {}
        data = fn(*inputs, **options)
        for leaf in jax.tree.leaves(data):
            if jnp.ndim(leaf) < 1 or jnp.shape(leaf)[0] != self.plan.size:
                raise ValueError(
                    f"map: the function must return one value per cell, a leading axis of {self.plan.size}, "
                    f"got shape {jnp.shape(leaf)}. For values per sequence use jaxpack.segment_sum and the like."
                )
        return packed.replace(data=_seal(packed.replace(data=None), data, fits))

    def astype(self, dtype: Any) -> PackedSequence:
        """A copy whose data has another dtype.

        Examples:
          >>> jaxpack.pack_sequence([jnp.ones(1), jnp.ones(2)]).astype(jnp.bfloat16)
          PackedSequence(data=bfloat16[3], lengths=int32[2], plan=BucketPlan(boundaries=(1, 2), rows=(2, 1)))
        """
        packed = check_packed(self, "astype")
        return packed.replace(data=_cast(packed, dtype))

    def picture(self, *, columns: int = 64, lines: int = 16) -> str:
        """The plan in text with the sequences in it: █ and ▓ are real cells, ░ is slack, ! the room of a misfit.

        Where the lengths have no values, as under jit, it is the plan alone.

        Examples:
          >>> print(jaxpack.pack_sequence([jnp.ones(1), jnp.ones(2)], plan=jaxpack.plan_padded(2, 2)).picture())
          ██
          █░

        Args:
          columns: the widest picture in characters; a longer plan is sampled.
          lines: the highest; a plan of more rows is sampled.
        """
        filled = filled_slots(self.plan, self.lengths)
        return text_picture(self.plan, self.plan.room if filled is None else filled, columns, lines)

    def _repr_html_(self) -> str:
        """The same picture for notebooks, below what the leaves are and which sequences do not fit."""
        filled = filled_slots(self.plan, self.lengths)
        return html_picture(self.plan, filled, caption(self.plan, self.data, self.lengths, filled))

    def __add__(self, other: Any) -> PackedSequence:
        """The sum step by step: with a packed batch of the same sequences, a number, or an array of one step's shape.

        Likewise `-`, `*` and `/`. Raises as `map`, and ValueError where an array is no step's.

        Examples:
          >>> packed = jaxpack.pack_sequence([jnp.ones(1), jnp.ones(2)], plan=jaxpack.plan_padded(2, 2))
          >>> (packed + 2 * packed).data.tolist()
          [3.0, 3.0, 3.0, 0.0]
        """
        return _arithmetic(operator.add, self, other)

    def __radd__(self, other: Any) -> PackedSequence:
        return _arithmetic(operator.add, other, self)

    def __sub__(self, other: Any) -> PackedSequence:
        return _arithmetic(operator.sub, self, other)

    def __rsub__(self, other: Any) -> PackedSequence:
        return _arithmetic(operator.sub, other, self)

    def __mul__(self, other: Any) -> PackedSequence:
        return _arithmetic(operator.mul, self, other)

    def __rmul__(self, other: Any) -> PackedSequence:
        return _arithmetic(operator.mul, other, self)

    def __truediv__(self, other: Any) -> PackedSequence:
        return _arithmetic(operator.truediv, self, other)

    def __rtruediv__(self, other: Any) -> PackedSequence:
        return _arithmetic(operator.truediv, other, self)

    def __neg__(self) -> PackedSequence:
        return self.map(lambda data: jax.tree.map(operator.neg, data))

    # NumPy's arrays then leave an operator to us, where they would apply it entry by entry.
    __array_ufunc__ = None

    # Whether the index leaves were looked at; of the object, so what a transformation rebuilds is looked at again.
    _checked = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Says what to write in place of PyTorch's PackedSequence(fn(packed.data), packed.batch_sizes, ...).

        Of leaves that are text, as nnx.tabulate makes them, it is a dict, for that shows nothing else.
        """
        if all(isinstance(kwargs.get(name), str) for name in _INDICES):
            return {name: leaf for name, leaf in kwargs.items() if name != "plan"}
        if 0 < len(args) + len(kwargs) < len(dataclasses.fields(cls)):
            raise TypeError(
                "a PackedSequence takes data, lengths, sorted_indices, unsorted_indices and plan, and is made by "
                "jaxpack.pack_sequence or pack_padded_sequence. For PyTorch's PackedSequence(fn(packed.data), "
                "packed.batch_sizes) write packed.map(fn), or packed.replace(data=...)."
            )
        return super().__new__(cls)

    def _only_leaf(self, what: str) -> jax.Array:
        leaves = jax.tree.leaves(self.data)
        if len(leaves) != 1:
            raise ValueError(f"data is a pytree of {len(leaves)} arrays, which have no one {what}: ask them by name.")
        return leaves[0]

    def __repr__(self) -> str:
        return f"PackedSequence(data={types_of(self.data)}, lengths={type_of(self.lengths)}, plan={self.plan!r})"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["data", "lengths", "sorted_indices", "unsorted_indices"],
    meta_fields=["plan"],
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Unsorted(PackedSequence):
    """A batch whose rows are in the caller's order, not by length, under a plan whose slots all have the same room."""


def unchecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function without the checks that it holds for `checkify`, so that jax.export can serialise it.

    jax.export.export(jax.jit(jaxpack.unchecked(serve)))(packed).serialize()

    Examples:
      >>> packed = jaxpack.pack_sequence([jnp.ones(1), jnp.ones(2)])
      >>> jax.jit(unchecked(jaxpack.segment_sum))(packed).tolist()
      [1.0, 2.0]

    Under plain jit those checks do nothing, but their trace keeps an export from being written to a file. Sequences
    that do not fit are NaN as ever.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        _, result = checkify.checkify(function, errors=frozenset())(*args, **kwargs)
        return result

    return run


def is_traced(array: object) -> bool:
    """Whether an array's values are unknown now, because a transformation traces the program."""
    return isinstance(array, jax.core.Tracer)


def check_packed(packed: object, function: str) -> PackedSequence:
    """Checks what a public function is given as a PackedSequence, and makes NumPy leaves JAX arrays.

    Raises:
      TypeError: if it is none.
      ValueError: if it holds stacked batches, data of another plan, or index leaves whose values are known and do not
        fit the plan or each other.
    """
    if not isinstance(packed, PackedSequence):
        raise TypeError(
            f"{function} takes a PackedSequence, got {type(packed).__name__}. Pass a padded array through "
            f"jaxpack.pack_padded_sequence, a list of sequences through jaxpack.pack_sequence."
        )
    batch: PackedSequence = packed
    if not batch._checked:
        indices = {name: _as_index(getattr(batch, name), name, function) for name in _INDICES}
        batch = batch.replace(data=jax.tree.map(_as_jax, batch.data), **indices)
        _check_indices(batch, function)
        object.__setattr__(batch, "_checked", True)
    size = batch.plan.size
    for leaf in jax.tree.leaves(batch.data):
        if jnp.ndim(leaf) < 1 or jnp.shape(leaf)[0] != size:
            raise ValueError(
                f"{function}: data must have a leading axis of {size} cells (plan.size), got shape {jnp.shape(leaf)}. "
                f"For stacked batches use jax.vmap."
            )
    return batch


def _check_indices(packed: PackedSequence, function: str) -> None:
    """Raises ValueError unless lengths and permutations are of the plan's size and, if known, belong together."""
    plan, indices = packed.plan, (packed.sorted_indices, packed.unsorted_indices)
    check_lengths_type(packed.lengths.shape, packed.lengths.dtype)
    for name in _INDICES:
        leaf = getattr(packed, name)
        if leaf.shape != (plan.num_sequences,):
            raise ValueError(
                f"{function}: {name} has {leaf.size} entries, but the plan is for {plan.num_sequences} sequences."
            )
    if not known(packed.lengths):
        return
    lengths = np.asarray(packed.lengths)
    plan.check(lengths)
    values = values_of(*indices)
    if values is None:
        return
    order, slots = values
    rows = np.arange(len(order))
    inverse = not len(order) or (min(order.min(), slots.min()) >= 0 and max(order.max(), slots.max()) < len(order))
    if not inverse or (order[slots] != rows).any():
        raise ValueError(
            f"{function}: sorted_indices and unsorted_indices are not inverse permutations. (jax.tree.map works on "
            f"them too.) {_WAY_OUT}"
        )
    ranked = lengths[order]
    if not isinstance(packed, Unsorted) and (ranked[1:] > ranked[:-1]).any():
        raise ValueError(
            f"{function}: sorted_indices do not sort the lengths {lengths.tolist()[:8]}, longest first: the batch was "
            f"packed with others. {_WAY_OUT}"
        )


_INDICES = ("lengths", "sorted_indices", "unsorted_indices")
_WAY_OUT = "For arithmetic write packed + other, for functions of data packed.map(fn, *others); else pack anew."


def known(*arrays: Any) -> bool:
    """Whether the values of arrays can be read now, without waiting long for a device.

    A check is not worth the wait for a whole model, whose outcome it is not: what is computed from indices that do not
    belong together is NaN in any case.
    """
    on_device: list[Any] = [array for array in arrays if isinstance(array, jax.Array)]
    if any(is_traced(array) or not array.is_fully_addressable for array in on_device):
        return False
    until = time.monotonic() + _PATIENCE
    while not all(array.is_ready() for array in on_device):
        if time.monotonic() > until:
            return False
        time.sleep(_PATIENCE / 100)
    return True


def values_of(*arrays: Any) -> list[np.ndarray] | None:
    """The values of arrays, if all are `known`: what a check reads, which must not wait for a device."""
    return [np.asarray(array) for array in arrays] if known(*arrays) else None


def host_view(leaf: Any) -> np.ndarray | None:
    """An array's values where they cost nothing: NumPy's, or JAX's of a CPU that are computed already; else None."""
    if isinstance(leaf, np.ndarray):
        return leaf
    if is_traced(leaf) or not isinstance(leaf, jax.Array):
        return None
    array: Any = leaf  # placed on a device by choice it stays there
    free = array.is_fully_addressable and not array.committed and array.is_ready()
    return np.asarray(array) if free and {device.platform for device in array.devices()} == {"cpu"} else None


def _as_index(leaf: Any, name: str, function: str) -> jax.Array:
    """Lengths or indices as int32, which they always are where we made them."""
    array = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"{function}: {name} must be integers, got {type_of(leaf)}. They are made by jaxpack.pack_sequence and "
            f"pack_padded_sequence."
        )
    return array if isinstance(array, jax.Array) and array.dtype == jnp.int32 else jnp.asarray(array, jnp.int32)


def _as_jax(leaf: Any) -> jax.Array:
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(canonical(np.asarray(leaf), "data"))


def slot_lengths(packed: PackedSequence) -> jax.Array:
    """int32 [B]: the length in each slot, longest first."""
    return jnp.asarray(packed.lengths)[packed.sorted_indices]


def slot_fits(packed: PackedSequence) -> jax.Array:
    """bool [B]: which slots hold a sequence that fits them; none, if lengths and indices do not belong together."""
    lengths = slot_lengths(packed)
    return (lengths >= 0) & (lengths <= packed.plan.room) & _consistent(packed)


def _consistent(packed: PackedSequence) -> jax.Array:
    """bool: whether the permutations are inverse to each other, and bring the longest first."""
    order, slots = jnp.asarray(packed.sorted_indices), jnp.asarray(packed.unsorted_indices)
    rows = jnp.arange(len(order), dtype=slots.dtype)
    inverse = (order[slots] == rows) & (slots >= 0) & (slots < len(order))  # then sorted_indices are in range, too
    ranked = jnp.asarray(packed.lengths)[order]
    return inverse.all() & (isinstance(packed, Unsorted) or (ranked[1:] <= ranked[:-1]).all())


def slot_spans(packed: PackedSequence) -> jax.Array:
    """int32 [B]: how many cells of each slot count as real: its length, or all if its sequence does not fit."""
    return jnp.where(slot_fits(packed), slot_lengths(packed), packed.plan.room)


def real_cells(packed: PackedSequence) -> jax.Array:
    """bool [S]: what `PackedSequence.mask` is."""
    return slot_spans(packed)[packed.plan.cell_slots] > packed.plan.cell_steps


def same_sequences(
    packed: PackedSequence, other: PackedSequence, function: str, names: tuple[str, str], also: jax.Array | None = None
) -> jax.Array | None:
    """bool [B]: which slots hold sequences of the same length in both batches; None if all are known to.

    Args:
      names: of the batches, with the verb that errors go on with, such as "labels have".
      also: a further condition on slots, if there is one.

    Raises:
      ValueError: if plans differ, or lengths that are known; under checkify also if traced ones do.
    """
    if other.plan != packed.plan:
        raise ValueError(
            f"{function}: {names[1]} the plan {other.plan}, {names[0]} {packed.plan}. Pack both under one."
        )
    leaves = [(getattr(packed, name), getattr(other, name)) for name in ("lengths", "sorted_indices")]
    if all(ours is theirs for ours, theirs in leaves):
        return also
    values = values_of(*itertools.chain(*leaves))
    if values is not None:
        if any((ours != theirs).any() for ours, theirs in zip(values[::2], values[1::2], strict=True)):
            raise ValueError(
                f"{function}: {names[1]} the lengths {_brief(other.lengths)}, {names[0]} {_brief(packed.lengths)}."
            )
        return also
    same = (other.sorted_indices == packed.sorted_indices) & (slot_lengths(other) == slot_lengths(packed))
    checkify.debug_check(jnp.all(same), f"{function}: {names[1]} other lengths.")
    return same if also is None else same & also


def _brief(lengths: Any) -> str:
    return np.array2string(np.asarray(lengths), threshold=16, edgeitems=8)


def sanitise(packed: PackedSequence) -> PyTree:
    """The data with slack replaced by real cells: each sequence's first, or any sequence's if it has none.

    No constant is a safe stand-in for a user's function (log of 0, 1 / (1 - x) of 1): its gradient would be NaN even
    where a `where` discards its value. Data is; and stop_gradient keeps it out of the gradient.
    """
    plan, mask = packed.plan, real_cells(packed)
    if not plan.size:
        return packed.data
    slots = stand_in_slots(packed)[plan.cell_slots]
    any_real = jnp.any(slot_lengths(packed) > 0)

    def replace(leaf: jax.Array) -> jax.Array:
        real = lax.stop_gradient(leaf)[cells_of(plan, slots, 0)]
        return jnp.where(expand(mask, leaf), leaf, jnp.where(any_real, real, jnp.ones_like(real)))

    return jax.tree.map(replace, packed.data)


def stand_in_slots(packed: PackedSequence) -> jax.Array:
    """int32 [B]: for each slot one that holds a real first step: itself, or the longest if its sequence is empty."""
    lengths = slot_lengths(packed)
    slots = jnp.arange(packed.plan.num_sequences, dtype=jnp.int32)
    return jnp.where(lengths > 0, slots, jnp.argmax(lengths).astype(jnp.int32))


def seal(packed: PackedSequence, cells: PyTree, also: jax.Array | None = None) -> PyTree:
    """Values per cell [S, ...] with slack set to zero and sequences that do not fit set to NaN.

    Args:
      also: bool [B], which slots meet a further condition, if there is one.
    """
    fits = who_fits(packed) if also is None else who_fits(packed) & also
    mask, fits = real_cells(packed), fits[packed.plan.cell_slots]
    return jax.tree.map(lambda leaf: fill_up(leaf, mask, jnp.zeros_like(leaf), fits), cells)


def seal_states(packed: PackedSequence, states: PyTree) -> PyTree:
    """Values per slot [B, ...] brought to the caller's order, those of sequences that do not fit set to NaN."""
    fits = who_fits(packed)
    return jax.tree.map(lambda leaf: poison(leaf, fits)[packed.unsorted_indices], states)


def reversed_cells(packed: PackedSequence) -> jax.Array:
    """int32 [S]: for each cell, the cell that takes its place when valid spans are reversed. A permutation."""
    plan = packed.plan
    lengths = jnp.where(slot_fits(packed), slot_lengths(packed), 0)[plan.cell_slots]
    steps = jnp.where(lengths > plan.cell_steps, lengths - 1 - plan.cell_steps, plan.cell_steps)
    return cells_of(plan, plan.cell_slots, steps)


def cells_of(plan: BucketPlan, slots: ArrayLike, steps: ArrayLike) -> jax.Array:
    """The cell of a step of a slot. Dynamic indices of any one shape; steps must lie within the slot's room."""
    offsets, starts, rows = (jnp.asarray(a) for a in (plan.step_offsets, plan.slot_starts, plan.slot_rows))
    return offsets[starts[slots] + steps] + rows[slots]


def rearrange(leaf: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """Moves entries of the leading axis, each to at most one place: row i of the result is leaf[source[i]].

    Args:
      leaf: [N, ...].
      source: int [M], which entry of the leaf each row of the result is; N or more for none, which makes it 0.
      target: int [N], the inverse: the row of the result that each entry goes to; M or more for none.

    The derivative is written as a scatter, whose transpose is a gather, where JAX would transpose the gather to a
    scatter, which a CPU does row by row (training from padded inputs to padded outputs took 10 to 20 % longer).
    """
    if not (len(source) and len(target)):  # nothing to move, and nothing that JAX could index
        return lax.full_like(leaf, 0, shape=(len(source), *leaf.shape[1:]))
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf.at[source].get(mode="fill", fill_value=0)
    return _rearrange(leaf, source, target)


@jax.custom_jvp
def _rearrange(leaf: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    return leaf.at[source].get(mode="fill", fill_value=0)


@_rearrange.defjvp
def _rearrange_jvp(primals: tuple[jax.Array, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    leaf, source, target = primals
    result = _rearrange(leaf, source, target)
    zeros = jnp.zeros_like(result)
    return result, zeros.at[target].set(tangents[0], mode="drop", unique_indices=True)


def expand(mask: Any, like: Any) -> Any:
    """A mask over leading axes, shaped to broadcast against an array with further ones."""
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


def vary_like(tree: PyTree, like: PyTree) -> PyTree:
    """The arrays of a tree, varying over the axes of a mesh that those of another vary over inside jax.shard_map.

    A loop's carry must vary as what the loop makes of it, which constants such as jnp.zeros do not.
    """
    sources = [leaf for leaf in jax.tree.leaves(like) if is_traced(leaf) and _is_number(leaf)]
    if not sources:
        return tree
    zero = functools.reduce(jnp.add, (lax.full_like(leaf, 0, jnp.int32, ()) for leaf in sources))

    def vary(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        moved = leaf + zero.astype(leaf.dtype) if _is_number(leaf) else leaf
        return leaf if jax.typeof(moved) == jax.typeof(leaf) else moved

    return jax.tree.map(vary, tree)


def mask_like(mask: jax.Array, tree: PyTree) -> PyTree:
    """The mask of rows or cells for each array of a tree, in its shape."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(expand(mask, leaf), leaf.shape), tree)


def _is_number(leaf: Any) -> bool:
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def who_fits(packed: PackedSequence) -> jax.Array:
    """bool [B]: which slots hold a sequence that fits. Under checkify a misfit is an error."""
    fits = slot_fits(packed)
    if not len(fits):
        return fits
    consistent = _consistent(packed)
    checkify.debug_check(
        consistent,
        f"lengths, sorted_indices and unsorted_indices do not belong together: {_WAY_OUT}",
    )
    slot = jnp.argmin(fits)
    checkify.debug_check(
        jnp.all(fits) | ~consistent,
        "lengths[{row}] = {length} does not fit the plan: its row has room for {room} steps (a negative length was "
        "below 0, or longer than its padded batch). Use a plan that covers it (jaxpack.plan_buckets(lengths)) or "
        "truncate the sequence.",
        row=packed.sorted_indices[slot],
        length=slot_lengths(packed)[slot],
        room=jnp.asarray(packed.plan.room)[slot],
    )
    return fits


def fill_up(leaf: jax.Array, taken: jax.Array, filling: jax.Array, fits: jax.Array) -> jax.Array:
    """The leaf where taken, else the filling; and NaN in the rows that do not fit, which count as taken all over.

    The product that makes NaN comes before the choice. After it, XLA may write its factor out as an array as large as
    the leaf, to multiply a loss with it.
    """
    return jnp.where(expand(taken, leaf), poison(leaf, fits), filling)


def poison(leaf: jax.Array, fits: jax.Array) -> jax.Array:
    """NaN in the rows that do not fit, if the dtype has one.

    A product, so that gradients are NaN there too; and a choice, for XLA takes the product of NaN and a bool, as 0 or
    1, to be 0 where the bool is False.
    """
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):  # where inf * (1 + 0j) would be inf + nan j
        return lax.complex(poison(leaf.real, fits), poison(leaf.imag, fits))
    fits = expand(fits, leaf)
    return jnp.where(fits, leaf * jnp.where(fits, 1, jnp.nan).astype(leaf.dtype), jnp.nan)


@jax.jit
def _mask(packed: PackedSequence) -> jax.Array:
    return real_cells(packed)


@jax.jit
def _fits(packed: PackedSequence) -> jax.Array:
    return slot_fits(packed)[packed.unsorted_indices]


@jax.jit
def _sanitise(packed: PackedSequence) -> PyTree:
    return sanitise(packed)


@jax.jit
def _seal(packed: PackedSequence, cells: PyTree, also: jax.Array | None) -> PyTree:
    return seal(packed, cells, also)


@functools.partial(jax.jit, static_argnames="dtype")
def _cast(packed: PackedSequence, dtype: Any) -> PyTree:
    return seal(packed, jax.tree.map(lambda leaf: leaf.astype(dtype), packed.data))


def _arithmetic(operation: Callable[[Any, Any], Any], left: Any, right: Any) -> PackedSequence:
    """left operation right, of which one at least is packed."""
    sides = []
    for side in (left, right):
        if isinstance(side, PackedSequence):
            side = check_packed(side, operation.__name__)
        elif not isinstance(side, (int, float, complex, np.generic, np.ndarray, jax.Array)):
            return NotImplemented
        sides.append(side)
    packed, constant = sides if isinstance(sides[0], PackedSequence) else sides[::-1]
    if isinstance(constant, PackedSequence):
        also = same_sequences(packed, constant, operation.__name__, ("the left has", "the right has"))
    else:
        _check_constant(packed, constant)
        also = None
    return packed.replace(data=_operate(operation, *sides, also))


@functools.partial(jax.jit, static_argnames="operation")
def _operate(operation: Callable[[Any, Any], Any], left: Any, right: Any, also: jax.Array | None) -> PyTree:
    """The cells of `_arithmetic`."""
    if isinstance(left, PackedSequence) and isinstance(right, PackedSequence):
        return seal(left, jax.tree.map(operation, sanitise(left), sanitise(right)), also)
    packed, constant = (left, right) if isinstance(left, PackedSequence) else (right, left)

    def apply(leaf: jax.Array) -> jax.Array:
        lead = (1,) * (leaf.ndim - jnp.ndim(constant)) if jnp.ndim(constant) else ()
        value = jnp.reshape(constant, lead + jnp.shape(constant))
        return operation(leaf, value) if packed is left else operation(value, leaf)

    return seal(packed, jax.tree.map(apply, sanitise(packed)))


def _check_constant(packed: PackedSequence, constant: Any) -> None:
    """Raises ValueError unless an array broadcasts to the shape of one step."""
    shape = jnp.shape(constant)
    for leaf in jax.tree.leaves(packed.data):
        step = leaf.shape[1:]
        if len(shape) > len(step) or any(n not in (1, m) for n, m in zip(shape[::-1], step[::-1], strict=False)):
            raise ValueError(
                f"an array that is combined with packed data must broadcast to the shape of one step, {step}, got "
                f"shape {shape}. For a value of each sequence at all its steps use jaxpack.broadcast_to_steps."
            )


def _serialize_plan(auxdata: Any) -> bytes:
    """A PackedSequence's static part, for jax.export."""
    (plan,) = auxdata
    return json.dumps(dataclasses.asdict(plan)).encode()


def _deserialize_plan(data: bytes) -> Any:
    return (BucketPlan(**json.loads(data)),)


jax.export.register_pytree_node_serialization(
    PackedSequence,
    serialized_name="jaxpack.PackedSequence",
    serialize_auxdata=_serialize_plan,
    deserialize_auxdata=_deserialize_plan,
)
