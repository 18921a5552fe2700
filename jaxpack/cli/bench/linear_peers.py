"""The linear layers in `jaxpack bench` as they are written without packing: scans over the padded batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpack._linear.diagonal import DiagonalLayer
from jaxpack._matrix.layer import MatrixLayer
from jaxpack.cli.bench.calls import Calls, Missing, jax_calls
from jaxpack.cli.bench.workloads import Workload, layer_name

Scan = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # from decays, inputs [T, B, H] and the mask to states


def associative_scan(decay: jax.Array, inputs: jax.Array, mask: jax.Array) -> jax.Array:
    """Composes all steps in a tree, padding included, which comes after each sequence."""

    def compose(early: Any, late: Any) -> Any:
        return late[0] * early[0], late[0] * early[1] + late[1]

    return lax.associative_scan(compose, (decay, inputs))[1]


def masked_scan(decay: jax.Array, inputs: jax.Array, mask: jax.Array) -> jax.Array:
    """Goes step by step, and keeps the state in padding."""

    def step(h: jax.Array, cell: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        a, b, real = cell
        h = jnp.where(real, a * h + b, h)
        return h, h

    return lax.scan(step, jnp.zeros_like(inputs[0]), (decay, inputs, mask))[1]


def padded_calls(workload: Workload, scan: Scan) -> Calls:
    """Makes the calls of a layer's equations around a scan over the padded batch, time first."""
    layer: Any = workload.layer
    if isinstance(layer, MatrixLayer):
        size = math.prod(layer.heads) * workload.padded_plan.size * 4 / 2**30
        raise Missing(f"it would keep a matrix of each head for every step: arrays of {size:.2g} GiB")
    if not isinstance(layer, DiagonalLayer):
        raise Missing(f"it needs a recurrence that is linear in its state, which {layer_name(workload.cell)} is not")
    inputs, cotangent, mask = (
        np.ascontiguousarray(array.swapaxes(0, 1)) for array in (workload.inputs, workload.cotangent, workload.mask)
    )

    def apply(params: Any, inputs: jax.Array, mask: jax.Array) -> jax.Array:
        params = layer.prepare(params)
        x = inputs.reshape(-1, inputs.shape[-1])
        decay, injected = layer.gates(params, x, jnp.zeros(len(x), bool))
        shape = (*mask.shape, injected.shape[-1])
        decay = jnp.broadcast_to(decay, injected.shape).reshape(shape)
        h = scan(decay, injected.reshape(shape), mask[..., None])
        y = layer.readout(params, x, h.reshape(len(x), -1)).reshape(*mask.shape, -1)
        return jnp.where(mask[..., None], y, 0)

    cells = workload.padded_plan.size
    return jax_calls(apply, workload.params, inputs, mask, cotangent, cells, same_weights=True)
