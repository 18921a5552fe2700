"""Layers with a `step` in `jaxpack bench` as they are written without packing: steps over the padded batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpack._packed.broadcast import expand, tree_where
from jaxpack.cli.bench.calls import Calls, jax_calls
from jaxpack.cli.bench.workloads import Workload


def step_calls(workload: Workload) -> Calls:
    """Makes the calls of a layer's `step` in a scan over the padded batch, which keeps states in padding."""
    layer: Any = workload.layer
    inputs, cotangent, mask, *beside = (
        np.ascontiguousarray(array.swapaxes(0, 1))
        for array in (workload.inputs, workload.cotangent, workload.mask, *workload.beside)
    )

    def apply(params: Any, inputs: jax.Array, rest: tuple[jax.Array, list[jax.Array]]) -> jax.Array:
        mask, beside = rest

        def step(state: Any, cell: tuple[jax.Array, jax.Array, list[jax.Array]]) -> tuple[Any, jax.Array]:
            x, real, more = cell
            after, y = layer.step(params, state, workload.joined(x, more))
            return tree_where(real, after, state), jnp.where(expand(real, y), y, 0)

        like = jax.tree.map(
            lambda leaf: jnp.zeros((workload.batch_size, *leaf.shape), leaf.dtype), layer.state_like(inputs.dtype)
        )
        return lax.scan(step, like, (inputs, mask, beside))[1]

    cells = workload.padded_plan.size
    return jax_calls(apply, workload.params, inputs, (mask, beside), cotangent, cells, same_weights=True)
