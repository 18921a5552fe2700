"""The product limit of `jaxpack bench`: the matrix products that a layer needs at least, each as one large product.

For each layer and direction with weights W [F, G] and U [H, G], and N real steps in all, they are

    forward    gates              [x h] [W; U]          [N, F+H] x [F+H, G]
    training   the same, and
               of x and h         dgates [W; U]^T       [N, G] x [G, F+H]
               of W and U         [x h]^T dgates        [F+H, N] x [N, G]

Layers that are linear in their state have the same products of x alone, and LRU of h, after the recurrence. So training
has three times the operations of the forward pass. A layer that runs step by step can take no fewer: the limit leaves
out that each step waits for the last one, slack, and everything that is not a product.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax

from jaxpack._layers.recurrent_layer import RecurrentLayer
from jaxpack._linear.layer import LinearLayer
from jaxpack.cli.bench.calls import PASSES
from jaxpack.cli.bench.workloads import Workload

Shape = tuple[int, int, int]  # of a product [n, k] x [k, m]


def product_shapes(workload: Workload) -> dict[str, list[Shape]]:
    """Returns the shapes (n, k, m) of all products by pass."""
    steps = workload.tokens
    forward: list[Shape] = []
    backward: list[Shape] = []
    for size, gates in _matrices(workload.layer):
        forward.append((steps, size, gates))
        backward += [(steps, gates, size), (size, steps, gates)]
    return dict(zip(PASSES, (forward, forward + backward), strict=True))


def _matrices(layer: RecurrentLayer | LinearLayer) -> list[tuple[int, int]]:
    """Returns the sizes of the matrices that inputs are multiplied by, those of x and h as one."""
    if isinstance(layer, LinearLayer):
        leaves = jax.tree_util.tree_leaves_with_path(layer.shapes, is_leaf=lambda node: isinstance(node, tuple))
        weights = [shape for path, shape in leaves if len(shape) > 1 and path[-1].key != "b"]
        return [(rows, columns) for *blocks, rows, columns in weights for _ in range(math.prod(blocks))]
    pairs = [(weights["weight_ih"], weights["weight_hh"]) for weights in layer.shapes.values()]
    return [(features + hidden, gates) for (features, gates), (hidden, _) in pairs]


def count_flops(shapes: list[Shape]) -> int:
    """Counts floating-point operations: a product and a sum for each of n k m."""
    return sum(2 * n * k * m for n, k, m in shapes)


def useful_flops(workload: Workload) -> dict[str, int]:
    """Counts the floating-point operations in matrix products that real steps need, by pass."""
    return {key: count_flops(shapes) for key, shapes in product_shapes(workload).items()}


def product_runs(workload: Workload) -> dict[str, functools.partial[list[jax.Array]]]:
    """Compiles the products of each pass as one program, whose operands are laid out beforehand."""
    shapes = product_shapes(workload)
    keys = iter(jax.random.split(jax.random.key(workload.seed), 2 * len(shapes["training"])))

    @functools.cache  # one array for all operands of a shape; the program takes each as an argument of its own
    def operand(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, workload.dtype)

    def products(operands: Any) -> list[jax.Array]:
        return [left @ right for left, right in operands]

    runs = {}
    for key in PASSES:
        operands = [(operand(n, k), operand(k, m)) for n, k, m in shapes[key]]
        runs[key] = functools.partial(jax.jit(products).lower(operands).compile(), operands)
    return runs
