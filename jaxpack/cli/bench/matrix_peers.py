"""The layers of matrix states in `jaxpack bench` as they are written without packing: steps over the padded batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpack._packed.broadcast import tree_where
from jaxpack.cli.bench.calls import Calls, jax_calls
from jaxpack.cli.bench.workloads import Workload


def step_calls(workload: Workload) -> Calls:
    """Makes the calls of a layer's `step` in a scan over the padded batch, which keeps states in padding."""
    layer: Any = workload.layer
    inputs, cotangent, mask = (
        np.ascontiguousarray(array.swapaxes(0, 1)) for array in (workload.inputs, workload.cotangent, workload.mask)
    )

    def apply(params: Any, inputs: jax.Array, mask: jax.Array) -> jax.Array:
        def step(state: Any, cell: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
            x, real = cell
            after, y = layer.step(params, state, x)
            return tree_where(real, after, state), jnp.where(real[:, None], y, 0)

        like = jax.tree.map(
            lambda leaf: jnp.zeros((workload.batch_size, *leaf.shape), leaf.dtype), layer.state_like(inputs.dtype)
        )
        return lax.scan(step, like, (inputs, mask))[1]

    cells = workload.padded_plan.size
    return jax_calls(apply, workload.params, inputs, mask, cotangent, cells, same_weights=True)
