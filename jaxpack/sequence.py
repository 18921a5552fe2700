"""PackedSequence: a batch of sequences of different lengths, laid out under a plan.

Its index maps are given statically by the plan and completed dynamically by the lengths: sequence b of the caller's
batch sits in slot unsorted_indices[b]; step t of slot s is cell step_offsets[slot_starts[s] + t] + slot_rows[s].

Two rules are kept by two functions. `sanitise` replaces what is in slack before a user's function sees it; `seal`
zeroes what came out of slack, and turns sequences that do not fit the plan into NaN.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jax.typing import ArrayLike

from jaxpack.arguments import check_lengths_type
from jaxpack.captions import caption, filled_slots, type_of, types_of
from jaxpack.pictures import html_picture, text_picture
from jaxpack.plan import BucketPlan

PyTree = Any


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
    respect to `packed.data`: the other leaves are integers.

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

    def __new__(cls, *args: Any, **fields: Any) -> Any:
        """A PackedSequence; but a dict of leaves that are text, as nnx.tabulate makes them, which shows only dicts."""
        if isinstance(fields.get("lengths"), str):
            return {name: leaf for name, leaf in fields.items() if name != "plan"}
        return super().__new__(cls)

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
        return jnp.asarray(slot_spans(self)[self.plan.cell_slots] > self.plan.cell_steps)

    @property
    def fits(self) -> jax.Array:
        """bool [B]: which of the caller's sequences fit the plan."""
        return slot_fits(self)[self.unsorted_indices]

    def replace(self, **changes: Any) -> PackedSequence:
        """A copy with other fields, which are taken as they are; for functions of each step see `map`.

        Examples:
          >>> packed = jaxpack.pack_sequence([jnp.ones(1), jnp.ones(2)])
          >>> packed.replace(data=2 * packed.data).data.tolist()
          [2.0, 2.0, 2.0]
        """
        return dataclasses.replace(self, **changes)

    def map(self, fn: Callable[[PyTree], PyTree]) -> PackedSequence:
        """Applies a token-wise function to the data: `packed.map(embedding)`, `packed.map(jax.nn.relu)`.

        Examples:
          >>> packed = jaxpack.pack_sequence([jnp.ones(1), jnp.ones(2)], plan=jaxpack.plan_padded(2, 2))
          >>> packed.map(lambda x: 2 * x).data.tolist()  # 0 in slack
          [2.0, 2.0, 2.0, 0.0]

        `fn` is called once, on all cells: data [S, *F] to [S, *G], or a pytree of such arrays. In slack it is given
        real cells, so that neither its values nor its gradients meet anything that is not data; what it makes of them
        is zeroed.

        Raises:
          ValueError: if fn returns arrays without the leading axis of S cells.
        """
        packed = check_packed(self, "map")
        data = fn(sanitise(packed))
        for leaf in jax.tree.leaves(data):
            if jnp.ndim(leaf) < 1 or jnp.shape(leaf)[0] != self.plan.size:
                raise ValueError(
                    f"map: the function must return one value per cell, a leading axis of {self.plan.size}, "
                    f"got shape {jnp.shape(leaf)}. For values per sequence use jaxpack.segment_sum and its kin."
                )
        return packed.replace(data=seal(packed, data))

    def astype(self, dtype: Any) -> PackedSequence:
        """A copy whose data has another dtype.

        Examples:
          >>> jaxpack.pack_sequence([jnp.ones(1), jnp.ones(2)]).astype(jnp.bfloat16)
          PackedSequence(data=bfloat16[3], lengths=int32[2], plan=BucketPlan(boundaries=(1, 2), rows=(2, 1)))
        """
        packed = check_packed(self, "astype")
        return packed.replace(data=seal(packed, jax.tree.map(lambda leaf: leaf.astype(dtype), packed.data)))

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

    def _only_leaf(self, what: str) -> jax.Array:
        leaves = jax.tree.leaves(self.data)
        if len(leaves) != 1:
            raise ValueError(f"data is a pytree of {len(leaves)} arrays, which have no one {what}: ask them by name.")
        return leaves[0]

    def __repr__(self) -> str:
        return f"PackedSequence(data={types_of(self.data)}, lengths={type_of(self.lengths)}, plan={self.plan!r})"


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
    """The door of every function that takes a PackedSequence: checks it, and makes NumPy leaves JAX arrays.

    Raises:
      TypeError: if it is none.
      ValueError: if it holds stacked batches, data of another plan, or concrete lengths that do not fit.
    """
    if not isinstance(packed, PackedSequence):
        raise TypeError(
            f"{function} takes a PackedSequence, got {type(packed).__name__}. Pass a padded array through "
            f"jaxpack.pack_padded_sequence, a list of sequences through jaxpack.pack_sequence."
        )
    check_lengths_type(jnp.shape(packed.lengths), jnp.result_type(packed.lengths))
    if packed.lengths.shape[0] != packed.plan.num_sequences:
        raise ValueError(
            f"{function}: lengths has {packed.lengths.shape[0]} entries, but the plan is for "
            f"{packed.plan.num_sequences} sequences."
        )
    for leaf in jax.tree.leaves(packed.data):
        if jnp.ndim(leaf) < 1 or jnp.shape(leaf)[0] != packed.plan.size:
            raise ValueError(
                f"{function}: data must have a leading axis of {packed.plan.size} cells (plan.size), got shape "
                f"{jnp.shape(leaf)}. For stacked batches use jax.vmap."
            )
    if not is_traced(packed.lengths):
        packed.plan.check(packed.lengths)
    return jax.tree.map(jnp.asarray, packed)


def slot_lengths(packed: PackedSequence) -> jax.Array:
    """int32 [B]: the length in each slot, longest first."""
    return jnp.asarray(packed.lengths)[packed.sorted_indices]


def slot_fits(packed: PackedSequence) -> jax.Array:
    """bool [B]: which slots hold a sequence that fits them."""
    lengths = slot_lengths(packed)
    return (lengths >= 0) & (lengths <= packed.plan.room)


def slot_spans(packed: PackedSequence) -> jax.Array:
    """int32 [B]: how many cells of each slot count as real: its length, or all if its sequence does not fit."""
    return jnp.where(slot_fits(packed), slot_lengths(packed), packed.plan.room)


def sanitise(packed: PackedSequence) -> PyTree:
    """The data with slack replaced by real cells: each sequence's first, or any sequence's if it has none.

    No constant is a safe stand-in for a user's function (log of 0, 1 / (1 - x) of 1): its gradient would be NaN even
    where a `where` discards its value. Data is; and stop_gradient keeps it out of the gradient.
    """
    plan, mask = packed.plan, packed.mask
    slots = stand_in_slots(packed)[plan.cell_slots]
    any_real = jnp.any(slot_lengths(packed) > 0)

    def replace(leaf: jax.Array) -> jax.Array:
        real = jax.lax.stop_gradient(leaf)[cells_of(plan, slots, 0)]
        return jnp.where(expand(mask, leaf), leaf, jnp.where(any_real, real, jnp.ones_like(real)))

    return jax.tree.map(replace, packed.data)


def stand_in_slots(packed: PackedSequence) -> jax.Array:
    """int32 [B]: for each slot one that holds a real first step: itself, or the longest if its sequence is empty."""
    lengths = slot_lengths(packed)
    slots = jnp.arange(packed.plan.num_sequences, dtype=jnp.int32)
    return jnp.where(lengths > 0, slots, jnp.argmax(lengths).astype(jnp.int32))


def seal(packed: PackedSequence, cells: PyTree) -> PyTree:
    """Values per cell [S, ...] with slack set to zero and sequences that do not fit set to NaN."""
    mask, fits = packed.mask, who_fits(packed)[packed.plan.cell_slots]
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
        return jax.lax.full_like(leaf, 0, shape=(len(source), *leaf.shape[1:]))
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


def who_fits(packed: PackedSequence) -> jax.Array:
    """bool [B]: which slots hold a sequence that fits. Under checkify a misfit is an error."""
    fits = slot_fits(packed)
    slot = jnp.argmin(fits)
    checkify.debug_check(
        jnp.all(fits),
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
    """NaN in the rows that do not fit, if the dtype has one. A product, so that gradients are NaN there too."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):  # where inf * (1 + 0j) would be inf + nan j
        return jax.lax.complex(poison(leaf.real, fits), poison(leaf.imag, fits))
    return leaf * jnp.where(expand(fits, leaf), 1, jnp.nan).astype(leaf.dtype)


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
