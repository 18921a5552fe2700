"""Captions: what a packed batch says of itself, whatever its leaves are, for JAX puts anything there.

Arrays, tracers, shapes, None, objects, stacked or deleted arrays: each is named by its type, none is asked for more.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpack._plans.bucket_plan import BucketPlan, longest_first
from jaxpack._plans.pictures import counted

_MOST, _LONGEST = 8, 80  # leaves or misfits that a caption names, and characters of each


class _Brief(str):
    """A string whose repr is itself."""

    def __repr__(self) -> str:
        return str(self)


def type_of(leaf: Any) -> str:
    """An array as JAX writes its type, float32[45,12]; what is no array by its repr."""
    if not isinstance(getattr(leaf, "shape", None), tuple) or not hasattr(leaf, "dtype"):
        return repr(leaf)
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def types_of(tree: Any) -> str:
    """A pytree with the types of its leaves: {'gaps': float32[45], 'x': float32[45,12]}."""
    return repr(jax.tree.map(lambda leaf: _Brief(type_of(leaf)), tree))


def filled_slots(plan: BucketPlan, lengths: Any) -> np.ndarray | None:
    """Steps of each slot that lengths fill, [B], negative where they do not fit; None if they have no values now.

    They have none unless they are an array of integers of the plan's shape, neither traced nor deleted nor elsewhere.
    """
    if not _have_values(plan, lengths):
        return None
    ranked = -np.sort(-_values(lengths))
    return np.where(ranked <= plan.room, ranked, -1)


def caption(plan: BucketPlan, data: Any, lengths: Any, filled: np.ndarray | None) -> list[str]:
    """The lines above a picture of a packed batch: its arrays, its counts, and the sequences that do not fit.

    Args:
      plan, data, lengths: of a PackedSequence.
      filled: what `filled_slots(plan, lengths)` returned.
    """
    leaves = jax.tree_util.tree_leaves_with_path(data)
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
    """Whether lengths are integers [B] that can be read."""
    if not isinstance(lengths, np.ndarray | jax.Array) or isinstance(lengths, jax.core.Tracer):
        return False
    if lengths.shape != (plan.num_sequences,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        return False
    return isinstance(lengths, np.ndarray) or (lengths.is_fully_addressable and not lengths.is_deleted())


def _some(texts: list[str]) -> str:
    """The first of some texts, each cut if it is long."""
    shown = [text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..." for text in texts[:_MOST]]
    more = len(texts) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")
