"""PackedSequence: a batch of sequences of different lengths, laid out under a plan; its checks and arithmetic.

The index maps follow from the static plan and the dynamic lengths: sequence b of the caller's batch is in slot
unsorted_indices[b]; step t of slot s is cell step_offsets[slot_starts[s] + t] + slot_rows[s].
"""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxpack._dtypes import as_jax
from jaxpack._packed.broadcast import mask_like
from jaxpack._packed.describe import description, filled_slots, type_of, types_of
from jaxpack._packed.gather import real_cells, slot_fits
from jaxpack._packed.indices import INDEX_NAMES, as_index, check_indices, refuse_spread, same_sequences
from jaxpack._packed.slack import fill_slack, zero_slack
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._plans.pictures import html_picture, text_picture
from jaxpack._types import PyTree


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["data", "lengths", "sorted_indices", "unsorted_indices"],
    meta_fields=["plan"],
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PackedSequence:
    """A batch of B sequences under a static plan, made by `pack_padded_sequence` or `pack_sequence`.

    Examples:
      >>> packed = jaxpack.pack_sequence([jnp.array([1.0]), jnp.array([2.0, 3.0])])
      >>> packed
      PackedSequence(data=float32[3], lengths=int32[2], plan=BucketPlan(boundaries=(1, 2), rows=(2, 1)))
      >>> packed.data.tolist()  # step by step, the longest first
      [2.0, 1.0, 3.0]

    A pytree with a static plan: one plan is one compiled program, for all lengths. The constructor validates nothing,
    because JAX puts tracers and placeholders into pytrees; functions validate the batches that they are given.
    Differentiate with respect to `packed.data`: the other leaves are integers. For the same reason write
    `packed + packed` rather than `jax.tree.map(jnp.add, packed, packed)`, and `packed.map(fn, *others)` for functions
    of several batches.

    Attributes:
      data: [S, *F] for the S = plan.size cells, in time-major bucket order, or a pytree of such arrays. With
        plan_exact it equals PyTorch's `PackedSequence.data` byte for byte, except that PyTorch's sort on CPU does not
        keep the order of equal lengths.
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
        """The rows alive at each step (static), as PyTorch's `batch_sizes`."""
        return self.plan.batch_sizes

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `data`. Raises ValueError if data is a pytree of several arrays."""
        return self._only_leaf("shape").shape

    @property
    def dtype(self) -> np.dtype:
        """The dtype of `data`. Raises ValueError if data is a pytree of several arrays."""
        return self._only_leaf("dtype").dtype

    @property
    def mask(self) -> jax.Array:
        """True at real cells, False in slack: bool [S]. All cells of a sequence that does not fit count as real.

        Examples:
          >>> jaxpack.pack_sequence([jnp.ones(1), jnp.ones(2)], plan=jaxpack.plan_padded(2, 2)).mask.tolist()
          [True, True, True, False]
        """
        return _mask(self.replace(data=None))

    @property
    def fits(self) -> jax.Array:
        """True for sequences that fit: bool [B], in the caller's order; all False if lengths and indices disagree."""
        return _fits(self.replace(data=None))

    def replace(self, **changes: Any) -> PackedSequence:
        """Returns a copy with other fields, which are not changed; to apply a function to each step use `map`.

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
        """Applies a function to the data, step by step: `packed.map(embedding)`, `packed.map(jax.nn.relu)`.

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
        independently of each other, because the number of slack cells depends on the plan. Slack cells are filled with
        copies of real ones (no gradient), so `fn` sees only real data; its outputs there are zeroed. A function with
        statistics over cells, such as a normalisation, needs the mask.

        Args:
          fn: fn(data, *data_of_others), with `pass_mask` fn(data, *data_of_others, mask=mask).
          others: packed batches of the same plan and lengths.
          pass_mask: whether to pass the mask of real cells: for each array of the data a bool array of its shape, as
            the `mask` of Flax's BatchNorm and the `where` of jnp.mean take it. (`jaxpack.mean`, `var` and `std` compute
            such statistics.) Layers that normalise each cell by itself, such as LayerNorm, GroupNorm and InstanceNorm,
            need no mask: with one, the mean over no feature of a slack cell would be NaN, and so would its gradients.

        Raises:
          TypeError: if one of others is not a PackedSequence.
          ValueError: if fn returns arrays without the leading axis of S cells, or plans or concrete lengths differ.
            If traced lengths differ, the result is NaN.
        """
        packed = check_packed(self, "map")
        inputs, fits = [_fill_slack(packed)], None
        for i, other in enumerate(others):
            other = check_packed(other, f"map(others[{i}])")
            fits = same_sequences(packed, other, "map", ("the batch has", f"others[{i}] has"), fits)
            inputs.append(_fill_slack(other))
        options = {"mask": mask_like(packed.mask, packed.data)} if pass_mask else {}
        data = fn(*inputs, **options)
        for leaf in jax.tree.leaves(data):
            if jnp.ndim(leaf) < 1 or jnp.shape(leaf)[0] != self.plan.size:
                raise ValueError(
                    f"map: the function must return one value per cell, a leading axis of {self.plan.size}, "
                    f"got shape {jnp.shape(leaf)}. For values per sequence use jaxpack.segment_sum and the like."
                )
        return packed.replace(data=_zero_slack(packed.replace(data=None), data, fits))

    def astype(self, dtype: Any) -> PackedSequence:
        """Casts the data to another dtype.

        Examples:
          >>> jaxpack.pack_sequence([jnp.ones(1), jnp.ones(2)]).astype(jnp.bfloat16)
          PackedSequence(data=bfloat16[3], lengths=int32[2], plan=BucketPlan(boundaries=(1, 2), rows=(2, 1)))
        """
        packed = check_packed(self, "astype")
        return packed.replace(data=_cast(packed, dtype))

    def picture(self, *, columns: int = 64, lines: int = 16) -> str:
        """Draws the plan with its sequences in text: █ and ▓ are real cells, ░ is slack, ! the room of a misfit.

        If the lengths have no values, as under jit, all cells are drawn as real.

        Examples:
          >>> print(jaxpack.pack_sequence([jnp.ones(1), jnp.ones(2)], plan=jaxpack.plan_padded(2, 2)).picture())
          ██
          █░

        Args:
          columns: the most characters of a line; a longer plan is sampled.
          lines: the most lines; a plan of more rows is sampled.
        """
        return text_picture(self.plan._marks(filled_slots(self.plan, self.lengths), columns, lines))

    def _repr_html_(self) -> str:
        """Draws the same picture for notebooks, below the types of the leaves and the sequences that do not fit."""
        filled = filled_slots(self.plan, self.lengths)
        return html_picture(functools.partial(self.plan._marks, filled), description(self, filled))

    def __add__(self, other: Any) -> PackedSequence:
        """Adds step by step: a packed batch of the same sequences, a number, or an array of the shape of one step.

        `-`, `*` and `/` work likewise. Raises as `map`, and ValueError if an array has another shape.

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

    # NumPy arrays on the left then leave the operator to this class, instead of applying it entry by entry.
    __array_ufunc__ = None

    # Whether the index leaves were checked, for this object only: a batch rebuilt by a transformation is checked again.
    _checked = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuses PyTorch's PackedSequence(fn(packed.data), packed.batch_sizes, ...), naming the alternative.

        With leaves of text, as nnx.tabulate makes them, it returns a dict, the only container that nnx.tabulate shows.
        """
        if all(isinstance(kwargs.get(name), str) for name in INDEX_NAMES):
            return {name: leaf for name, leaf in kwargs.items() if name != "plan"}
        if 0 < len(args) + len(kwargs) < len(dataclasses.fields(cls)):
            raise TypeError(
                "a PackedSequence takes data, lengths, sorted_indices, unsorted_indices and plan, and is made by "
                "jaxpack.pack_sequence or pack_padded_sequence. For PyTorch's PackedSequence(fn(packed.data), "
                "packed.batch_sizes) write packed.map(fn), or packed.replace(data=...)."
            )
        return super().__new__(cls)

    @property
    def _is_sorted(self) -> bool:
        """Whether slots are sorted by length, longest first."""
        return True

    def _only_leaf(self, attribute: str) -> jax.Array:
        leaves = jax.tree.leaves(self.data)
        if len(leaves) != 1:
            raise ValueError(
                f"data is a pytree of {len(leaves)} arrays, which have no one {attribute}: read it from an array of "
                f"packed.data."
            )
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
    """A batch whose slots are in the caller's order, not sorted by length; all slots of its plan have the same room."""

    @property
    def _is_sorted(self) -> bool:
        return False


def check_packed(packed: object, function: str) -> PackedSequence:
    """Validates the packed batch that a public function is given, and converts NumPy leaves to JAX arrays.

    Index leaves are checked once per object; `replace(data=...)` keeps that knowledge.

    Raises:
      TypeError: if it is not a PackedSequence.
      ValueError: if it holds stacked batches, or data of another plan, or if known index leaves do not fit the plan or
        each other.
    """
    if not isinstance(packed, PackedSequence):
        raise TypeError(
            f"{function} takes a PackedSequence, got {type(packed).__name__}. Pass a padded array through "
            f"jaxpack.pack_padded_sequence, a list of sequences through jaxpack.pack_sequence."
        )
    batch: PackedSequence = packed
    if not batch._checked:
        indices = {name: as_index(getattr(batch, name), name, function) for name in INDEX_NAMES}
        batch = batch.replace(data=jax.tree.map(functools.partial(as_jax, name="data"), batch.data), **indices)
        refuse_spread(batch.lengths, function)
        check_indices(batch, function)
        object.__setattr__(batch, "_checked", True)
    size = batch.plan.size
    for leaf in jax.tree.leaves(batch.data):
        if jnp.ndim(leaf) < 1 or jnp.shape(leaf)[0] != size:
            raise ValueError(
                f"{function}: data must have a leading axis of {size} cells (plan.size), got shape {jnp.shape(leaf)}. "
                f"For stacked batches use jax.vmap."
            )
    return batch


@jax.jit
def _mask(packed: PackedSequence) -> jax.Array:
    return real_cells(packed)


@jax.jit
def _fits(packed: PackedSequence) -> jax.Array:
    return slot_fits(packed)[packed.unsorted_indices]


@jax.jit
def _fill_slack(packed: PackedSequence) -> PyTree:
    return fill_slack(packed)


@jax.jit
def _zero_slack(packed: PackedSequence, cells: PyTree, also: jax.Array | None) -> PyTree:
    return zero_slack(packed, cells, also)


@functools.partial(jax.jit, static_argnames="dtype")
def _cast(packed: PackedSequence, dtype: Any) -> PyTree:
    return zero_slack(packed, jax.tree.map(lambda leaf: leaf.astype(dtype), packed.data))


def _arithmetic(operation: Callable[[Any, Any], Any], left: Any, right: Any) -> PackedSequence:
    """Computes left operation right, at least one of which is packed."""
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
    """Computes the data of `_arithmetic`."""
    if isinstance(left, PackedSequence) and isinstance(right, PackedSequence):
        return zero_slack(left, jax.tree.map(operation, fill_slack(left), fill_slack(right)), also)
    packed, constant = (left, right) if isinstance(left, PackedSequence) else (right, left)

    def apply(leaf: jax.Array) -> jax.Array:
        lead = (1,) * (leaf.ndim - jnp.ndim(constant)) if jnp.ndim(constant) else ()
        value = jnp.reshape(constant, lead + jnp.shape(constant))
        return operation(leaf, value) if packed is left else operation(value, leaf)

    return zero_slack(packed, jax.tree.map(apply, fill_slack(packed)))


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
    """Serialises the static part of a PackedSequence for jax.export."""
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
