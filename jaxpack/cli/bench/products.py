"""The product limit of `jaxpack bench`: the matrix products that a layer needs at least, each as one large product.

For each layer and direction with weights W [F, G] and U [H, G], and N real steps in all, they are (for linear layers:
of each matrix)

    forward    gates              [x h] [W; U]          [N, F+H] x [F+H, G]
    training   the same, and
               of x and h         dgates [W; U]^T       [N, G] x [G, F+H]
               of W and U         [x h]^T dgates        [F+H, N] x [N, G]

so training has three times the operations of the forward pass. A convolution is the product of all places with all
weights of the kernel. A layer that runs step by step can take no fewer: the
limit leaves out that each step waits for the last one, slack, and everything that is not a product.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax

from jaxpack._layers.recurrent_layer import RecurrentLayer
from jaxpack.cli.bench.calls import PASSES
from jaxpack.cli.bench.stepped_cells import CONVOLUTIONAL
from jaxpack.cli.bench.workloads import Workload

Shape = tuple[int, int, int]  # of a product [n, k] x [k, m]


def product_shapes(workload: Workload) -> dict[str, list[Shape]]:
    """Returns the shapes (n, k, m) of all products by pass."""
    steps = workload.tokens * math.prod(workload.input_shape[:-1])  # of a convolution, places of all images
    forward: list[Shape] = []
    backward: list[Shape] = []
    for rows, columns in _weights(workload):
        forward.append((steps, rows, columns))
        backward += [(steps, columns, rows), (rows, steps, columns)]
    return dict(zip(PASSES, (forward, forward + backward), strict=True))


def _weights(workload: Workload) -> list[tuple[int, int]]:
    """Returns the shapes of the matrices that each step is multiplied with."""
    if isinstance(workload.layer, RecurrentLayer):
        groups = workload.layer.shapes.values()  # IndRNN's recurrent weights [H] are no matrix
        hidden = [group["weight_hh"][0] if len(group["weight_hh"]) == 2 else 0 for group in groups]
        inputs = [group["weight_ih"] for group in groups]
        return [(features + size, gates) for (features, gates), size in zip(inputs, hidden, strict=True)]
    if workload.cell in CONVOLUTIONAL:  # each place is multiplied with all places under the kernel
        return [(math.prod(shape[:-1]), shape[-1]) for shape in workload.layer.shapes.values() if len(shape) > 1]
    leaves = jax.tree_util.tree_leaves_with_path(workload.layer.shapes, is_leaf=lambda node: isinstance(node, tuple))
    matrices = [shape for path, shape in leaves if len(shape) > 1 and path[-1].key != "b"]
    return [shape[-2:] for shape in matrices for _ in range(math.prod(shape[:-2]))]  # blocks are matrices of their own


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
