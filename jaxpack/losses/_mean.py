"""Mean: a sum, and the sum of weights that divides it."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Hashable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxpack._types import PyTree


@functools.partial(jax.tree_util.register_dataclass, data_fields=["total", "weight"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False)
class Mean:
    """A mean kept as a sum and a sum of weights, so that means of parts add up to the mean of the whole.

    A pytree, so it passes through jit, scan and grad.

    A mean of nothing (weight 0, total 0) has value 0 and gradient 0, so a batch whose rows all have weight 0 changes no
    parameter. A nonzero total with weight 0 has an infinite value, for example
    `jaxpack.metrics.error_rate(["abc"], [""])`: 3 edits for 0 tokens. If a value of 0 could be mistaken for a perfect
    score, check the weight.

    Examples:
      >>> mean = Mean(6.0, 3) + Mean(4.0, 1)
      >>> mean
      Mean(total=10.0, weight=4)
      >>> float(mean.value)  # the mean of their means would be 3
      2.5

      For the gradient of one batch differentiate the value. For a batch that jax.shard_map spreads over devices,
      differentiate the value of `mean_loss(params, shard).psum("data")`:

      >>> def mean_loss(params, batch):
      ...     return Mean(jnp.sum(params * batch), batch.size)
      >>> params, batches = 1.0, (jnp.array([1.0, 3.0]), jnp.array([4.0, 8.0]))
      >>> loss, gradient = jax.value_and_grad(lambda params: mean_loss(params, batches[0]).value)(params)
      >>> float(gradient)
      2.0

      For micro-batches, whose weights are known only at the end, differentiate the totals, which add up, and divide
      once:

      >>> def total(params, batch):
      ...     mean = mean_loss(params, batch)
      ...     return mean.total, mean
      >>> def micro_step(batch):
      ...     gradient, mean = jax.grad(total, has_aux=True)(params, batch)
      ...     return Mean(gradient, mean.weight)
      >>> float(sum(map(micro_step, batches)).value)
      4.0

      The same holds if gradients are summed over devices by hand, in jax.pmap or jax.shard_map(..., check_vma=False):
      `micro_step(shard).psum("data").value`.

    Attributes:
      total: a sum: a number, or a pytree of arrays such as the gradient of one.
      weight: the sum of its weights: the number of tokens or sequences, if all weights are 1.
    """

    total: PyTree = 0.0
    weight: ArrayLike = 0.0

    @property
    def value(self) -> PyTree:
        """total / weight. With weight 0: 0 if total is 0, else inf with the sign of total; gradients are 0."""
        weight = jnp.asarray(self.weight, jnp.result_type(self.weight, float))
        nothing = weight == 0
        divisor = jnp.where(nothing, 1, weight)

        def divide(total: ArrayLike) -> jax.Array:
            total = jnp.asarray(total, jnp.result_type(total, float))
            kept = lax.stop_gradient(total)
            limit = jnp.where(kept > 0, jnp.inf, jnp.where(kept < 0, -jnp.inf, kept))  # 0 and NaN stay
            return jnp.where(nothing, limit, total / divisor).astype(total.dtype)

        return jax.tree.map(divide, self.total)

    def psum(self, axis_name: Hashable) -> Mean:
        """Sums over a mapped axis, such as the devices of jax.shard_map."""
        return lax.psum(self, axis_name)

    def __add__(self, other: Mean) -> Mean:
        if not isinstance(other, Mean):
            return NotImplemented
        return jax.tree.map(operator.add, self, other)

    def __radd__(self, other: int) -> Mean:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # the start of sum()
