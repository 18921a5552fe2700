"""Drives known cells over a plan: both directions of a layer in one scan.

The input's part of the gates is one matrix product over all cells of the plan, before the scan. Both directions are
left-aligned under the same staircase (the backward one reads reversed spans), so one scan runs them side by side,
which halves the steps that must follow one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpack.cells import Cell, Params
from jaxpack.plan import BucketPlan
from jaxpack.scan import scan_slots


def recur(
    cell: Cell,
    params: Sequence[Params],
    inputs: Sequence[jax.Array],
    carries: Sequence[Any],
    mask: jax.Array,
    plan: BucketPlan,
) -> tuple[Sequence[Any], Sequence[jax.Array]]:
    """Runs one cell per direction over a plan.

    Args:
      params, inputs, carries: per direction its parameters, its inputs [S, F] (slack finite) and its initial carry
        [B, ...] per slot.
      mask: bool [S], True at real cells.

    Returns:
      Per direction the final carry per slot, and the outputs [S, H], arbitrary in slack.
    """

    def step(carries: tuple[Any, ...], gates: tuple[jax.Array, ...]) -> tuple[tuple[Any, ...], tuple[jax.Array, ...]]:
        stepped = [cell.step(p, carry, gate) for p, carry, gate in zip(params, carries, gates, strict=True)]
        return tuple(carry for carry, _ in stepped), tuple(y for _, y in stepped)

    projected = tuple(cell.project(p, x) for p, x in zip(params, inputs, strict=True))
    zeros = jax.tree.map(jnp.zeros_like, tuple(carries))
    return scan_slots(step, tuple(carries), zeros, projected, mask, plan)
