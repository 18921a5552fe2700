"""Results of a served function: their form, checked once, and the split of a batch's results by sequence."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree


def form_of(output: PyTree, plan: BucketPlan) -> Any:
    """Returns the form of one sequence's result, from the shapes and dtypes of a batch's.

    Raises:
      ValueError: if the output holds no array, or one without a row for each sequence.
    """
    leaves, structure = jax.tree.flatten(output, is_leaf=_is_packed)
    if not leaves:
        raise ValueError("the function must return at least one array or PackedSequence, got none.")
    return structure, tuple(_leaf_form(leaf, plan.num_sequences) for leaf in leaves)


def check_forms(forms: dict[BucketPlan, Any]) -> None:
    """Raises ValueError, with two plans and their forms, unless results have the same form under every plan."""
    (first, expected), *others = forms.items()
    for plan, form in others:
        if form != expected:
            raise ValueError(
                f"a sequence's result must not depend on the plan, but under {first} its form is {expected}, under "
                f"{plan} it is {form}. Return values per step as a PackedSequence, not padded."
            )


def results_of(output: PyTree, count: int) -> list[PyTree]:
    """Returns copies of the results of the first `count` sequences of a batch, from NumPy leaves."""
    leaves, structure = jax.tree.flatten(output, is_leaf=_is_packed)
    columns = [_sequences(leaf, count) if _is_packed(leaf) else [row.copy() for row in leaf[:count]] for leaf in leaves]
    return [jax.tree.unflatten(structure, row) for row in zip(*columns, strict=True)]


def _is_packed(node: object) -> bool:
    return isinstance(node, PackedSequence)


def _leaf_form(leaf: Any, batch_size: int) -> Any:
    if _is_packed(leaf):
        found, parts, structure = leaf.plan.num_sequences, jax.tree.leaves(leaf.data), jax.tree.structure(leaf.data)
        kind = f"PackedSequence of {structure}"
    else:
        found, parts, kind = leaf.shape[0] if leaf.shape else None, [leaf], "array"
    if found != batch_size:
        raise ValueError(
            f"the function must return arrays with a row for each of the plan's {batch_size} sequences, or "
            f"PackedSequences with as many, but one of its results is {leaf}. From final states [num_layers, B, H] "
            f"take one layer's (h_n[-1]), or move B to the front (jnp.moveaxis(h_n, 1, 0))."
        )
    return kind, tuple((*map(str, part.shape[1:]), str(part.dtype)) for part in parts)


def _sequences(packed: PackedSequence, count: int) -> list[PyTree]:
    """Returns the first sequences [L, *F] of a packed batch, in the caller's order."""
    plan, slots = packed.plan, packed.unsorted_indices[:count]
    steps = [start + np.arange(n) for start, n in zip(plan.slot_starts[slots], packed.lengths[:count], strict=True)]
    cells = [plan.step_offsets[at] + row for at, row in zip(steps, plan.slot_rows[slots], strict=True)]
    return [jax.tree.map(lambda leaf, at=at: leaf[at], packed.data) for at in cells]
