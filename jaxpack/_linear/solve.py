"""solve: a first-order linear recurrence over the rows of blocks of cells, in a sequential and a parallel form.

    h_t = b_t                    where the state starts anew
    h_t = a_t * h_{t-1} + b_t    elsewhere

Slack starts anew, too, with b = 0: then h is 0 there, and nothing passes through it. Starting anew is a selection, not
a product with a = 0, so that NaN in one sequence does not reach the next one in its row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._packed.broadcast import expand
from jaxpack._plans.bucket_plan import BucketPlan


class Block(NamedTuple):
    """Cells [offset, offset + steps * rows), step by step."""

    offset: int
    steps: int
    rows: int

    def of(self, leaf: jax.Array) -> jax.Array:
        """Returns the block's cells of an array [S, ...] as [steps, rows, ...]."""
        part = lax.slice_in_dim(leaf, self.offset, self.offset + self.steps * self.rows)
        return part.reshape(self.steps, self.rows, *leaf.shape[1:])


def blocks_of(plan: BucketPlan) -> tuple[Block, ...]:
    """Returns a block for each bucket of a plan."""
    return tuple(Block(bucket.offset, bucket.steps, bucket.rows) for bucket in plan.buckets)


class Form(NamedTuple):
    """The static part of a recurrence.

    Attributes:
      blocks: the blocks of all cells; rows do not increase from one to the next.
      reverse: whether rows are read from their end.
      parallel: whether to run the parallel form; None for the form that suits the platform.
    """

    blocks: tuple[Block, ...]
    reverse: bool = False
    parallel: bool | None = None

    def order(self, carry: jax.Array) -> Iterator[tuple[int, Block, jax.Array]]:
        """Yields the blocks in the order in which they are read, each with a carry of zeros for its rows."""
        indexed = list(enumerate(self.blocks))
        for k, block in reversed(indexed) if self.reverse else indexed:
            yield k, block, lax.full_like(carry, 0, shape=(block.rows, *carry.shape[1:]))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def solve(form: Form, decay: jax.Array, inputs: jax.Array, fresh: jax.Array, carry: jax.Array) -> jax.Array:
    """Runs the recurrence.

    Its derivative is the same recurrence, so the backward pass is the recurrence in the other direction. It needs a and
    h, and nothing else is saved.

    Args:
      form: the static part.
      decay: a [S, *F], 0 where fresh; or [1, *F], which all cells share. Axes of F may be 1.
      inputs: b [S, *F], of the same dtype; 0 in slack.
      fresh: bool [S], where the state starts anew.
      carry: [rows, *F], the state before the first block that is read.

    Returns:
      h [S, *F].
    """
    return _linear(form, decay, inputs, fresh, carry)


@solve.defjvp
def _solve_jvp(form: Form, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (decay, inputs, fresh, carry), (ddecay, dinputs, _, dcarry) = primals, tangents
    h = solve(form, decay, inputs, fresh, carry)
    before = jnp.where(expand(fresh, h), 0, previous(form, h, carry))
    # Transposed, the checkpoint saves a, and not the products of a that the parallel form computes.
    linear = jax.checkpoint(functools.partial(_linear, form))
    return h, linear(decay, ddecay * before + dinputs, fresh, dcarry)


def previous(form: Form, h: jax.Array, carry: jax.Array) -> jax.Array:
    """Returns the state before each cell [S, *F], which is arbitrary where a row has no cell before."""
    parts: list[Any] = [None] * len(form.blocks)
    earlier = carry
    for k, block, zeros in form.order(carry):
        earlier = with_rows(earlier, zeros)
        here = block.of(h)
        shifted = [here[1:], earlier[None]] if form.reverse else [earlier[None], here[:-1]]
        parts[k] = jnp.concatenate(shifted).reshape(-1, *h.shape[1:])
        earlier = here[0] if form.reverse else here[-1]
    return jnp.concatenate(parts)


def _linear(form: Form, decay: jax.Array, inputs: jax.Array, fresh: jax.Array, carry: jax.Array) -> jax.Array:
    """Computes `solve`, by operations that JAX can transpose with respect to inputs and carry."""
    if form.parallel is None:
        return lax.platform_dependent(
            decay,
            inputs,
            fresh,
            carry,
            cpu=functools.partial(_linear, form._replace(parallel=False)),
            default=functools.partial(_linear, form._replace(parallel=True)),
        )
    run = _parallel if form.parallel else _sequential
    parts: list[Any] = [None] * len(form.blocks)
    for k, block, zeros in form.order(carry):
        a = decay if len(decay) == 1 else block.of(decay)
        h = run(a, block.of(inputs), block.of(fresh), with_rows(carry, zeros), form.reverse)
        parts[k] = h.reshape(-1, *h.shape[2:])
        carry = h[0] if form.reverse else h[-1]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def with_rows(carry: jax.Array, zeros: jax.Array) -> jax.Array:
    """Returns a carry with as many rows as there are zeros."""
    rows = len(zeros)
    return carry[:rows] if len(carry) >= rows else jnp.concatenate([carry, zeros[len(carry) :]])


def _sequential(decay: jax.Array, inputs: jax.Array, fresh: jax.Array, carry: jax.Array, reverse: bool) -> jax.Array:
    """Goes over the steps of one block [T, R, *F]. Half-precision states are kept in float32 from step to step."""
    dtype = accumulator(inputs.dtype)
    shared = decay if decay.ndim < inputs.ndim else None

    def step(h: jax.Array, cell: Any) -> tuple[jax.Array, jax.Array]:
        a, b, new = cell
        a = (a if shared is None else shared).astype(dtype)
        h = jnp.where(expand(new, h), 0, a * h) + b.astype(dtype)
        return h, h.astype(inputs.dtype)

    cells = (decay if shared is None else None), inputs, fresh
    return lax.scan(step, carry.astype(dtype), cells, reverse=reverse)[1]


def _parallel(decay: jax.Array, inputs: jax.Array, fresh: jax.Array, carry: jax.Array, reverse: bool) -> jax.Array:
    """Composes the steps of one block [T, R, *F] in a tree (Blelloch 1990), each with whether it starts anew.

    Steps among which one starts anew have a = 0 together, also if one of them has NaN: a is a factor in the transpose.
    """
    dtype = accumulator(inputs.dtype)
    decay = decay if decay.ndim == inputs.ndim else decay[None]
    a, b = (jnp.broadcast_to(leaf, inputs.shape).astype(dtype) for leaf in (decay, inputs))
    new = expand(fresh, inputs)
    first = -1 if reverse else 0
    b = b.at[first].add(jnp.where(new[first], 0, a[first] * carry.astype(dtype)))

    def compose(early: Any, late: Any) -> Any:
        (a1, b1, new1), (a2, b2, new2) = early, late
        new = new1 | new2
        return jnp.where(new, 0, a1 * a2), jnp.where(new2, 0, a2 * b1) + b2, new

    return lax.associative_scan(compose, (a, b, new), reverse=reverse)[1].astype(inputs.dtype)


def accumulator(dtype: Any) -> Any:
    """Returns the dtype in which a state is kept from step to step: float32 for half precision."""
    return jnp.promote_types(dtype, jnp.float32)


def wide(array: jax.Array) -> jax.Array:
    """Casts to the dtype in which a state is kept: float32, unless the array's is wider."""
    return array.astype(accumulator(array.dtype))
