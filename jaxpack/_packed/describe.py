"""Descriptions of a packed batch whatever its leaves are, because JAX puts any object into a pytree.

Arrays, tracers, shapes, None, objects, stacked or deleted arrays are described by their type; only readable lengths are
read.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpack._checks import is_traced
from jaxpack._packed.gather import Cells
from jaxpack._plans.bucket_plan import BucketPlan, longest_first
from jaxpack._plans.pictures import counted

_MOST, _LONGEST = 8, 80  # the most leaves or misfits in a description, and the most characters of each


class _Brief(str):
    """A string whose repr is the string itself."""

    def __repr__(self) -> str:
        return str(self)


def type_of(leaf: Any) -> str:
    """Writes the type of an array as JAX does, float32[45,12]; other leaves by their repr."""
    if not isinstance(getattr(leaf, "shape", None), tuple) or not hasattr(leaf, "dtype"):
        return repr(leaf)
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def types_of(tree: Any) -> str:
    """Writes a pytree with the types of its leaves: {'gaps': float32[45], 'x': float32[45,12]}."""
    return repr(jax.tree.map(lambda leaf: _Brief(type_of(leaf)), tree))


def filled_slots(plan: BucketPlan, lengths: Any) -> np.ndarray | None:
    """Returns the steps of each slot that lengths fill, [B], negative if they do not fit; None if they have no values.

    Lengths have values if they are an array of integers [B] that is not traced, deleted or on another host.
    """
    if not _have_values(plan, lengths):
        return None
    ranked = -np.sort(-_values(lengths))
    return np.where(ranked <= plan.room, ranked, -1)


def description(packed: Cells, filled: np.ndarray | None) -> list[str]:
    """Returns the lines above a picture of a batch: its arrays, its counts, and the sequences that do not fit.

    Args:
      packed: the batch.
      filled: the result of `filled_slots(packed.plan, packed.lengths)`.
    """
    plan, lengths = packed.plan, packed.lengths
    leaves = jax.tree_util.tree_leaves_with_path(packed.data)
    arrays = _some([f"data{jax.tree_util.keystr(path)} {type_of(leaf)}" for path, leaf in leaves])
    batch, cells = counted(plan.num_sequences, "sequence"), counted(plan.size, "cell")
    lines = [f"PackedSequence: {arrays or 'no data'}"]
    if filled is None:
        return [*lines, f"{batch}, {cells}, {plan.summary}; lengths {_some([type_of(lengths)])}, without values here"]
    tokens = int(filled[filled > 0].sum())
    lines.append(
        f"{batch}, {counted(tokens, 'token')} in {cells} ({tokens / max(plan.size, 1):.1%} real), {plan.summary}"
    )
    slots = np.flatnonzero(filled < 0)
    if len(slots):
        values = _values(lengths)
        rows = longest_first(values)[slots]
        misfits = [f"lengths[{b}] = {values[b]} (room {plan.room[slot]})" for b, slot in zip(rows, slots, strict=True)]
        lines.append(f"Do not fit the plan: {_some(misfits)}")
    return lines


def _values(lengths: Any) -> np.ndarray:
    return np.asarray(lengths).astype(np.int64)


def _have_values(plan: BucketPlan, lengths: Any) -> bool:
    """Returns whether lengths are integers [B] that can be read."""
    if not isinstance(lengths, np.ndarray | jax.Array) or is_traced(lengths):
        return False
    if lengths.shape != (plan.num_sequences,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        return False
    return isinstance(lengths, np.ndarray) or (lengths.is_fully_addressable and not lengths.is_deleted())


def _some(texts: list[str]) -> str:
    """Joins the first of some texts, each cut if it is long."""
    shown = [text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..." for text in texts[:_MOST]]
    more = len(texts) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")
