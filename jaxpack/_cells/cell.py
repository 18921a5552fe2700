"""What every cell is: a frozen spec with parameter shapes, state sizes, its step, and the parts of its backward pass.

Parameters of one layer and direction are a dict under PyTorch's names, stored input-major, gates of H hidden units
side by side:

    weight_ih [F, gates*H]   weight_hh [P, gates*H]   bias_ih [gates*H]   bias_hh [gates*H]

A recurrence runs on `Fused` weights, made from them once before its loops. A step is split in `project`, which depends
on the input alone and is one matrix product for many cells, and `step`, with one product for all gates.

Backwards, a chunk of steps is linearised around what the forward pass computed, so that little is left to do step by
step. With d = dh + dy the cotangent of h, from later steps and from the output, and dc that of a memory c:

    dc' = dc + reads * d                    what c is owed before its step
    da  = gates * (d or dc', gate by gate)  of the gates' pre-activations
    dh  = da_h w_h^T + passes * d           of h one step earlier
    dc  = forget * dc'                      of c one step earlier
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

Params = dict[str, jax.Array]
Carry = tuple[jax.Array, ...]  # (h,), or (h, c) with a memory c

# recall(decay, inject) gives c before each step of a chunk, where c' = decay * c + inject. All [M, H].
Recall = Callable[[jax.Array, jax.Array], jax.Array]
# select(new, old) keeps the old where a step is slack. The cell applies it: h can then follow from the selected c.
Select = Callable[[jax.Array, jax.Array], jax.Array]
Tanh = Callable[[jax.Array], jax.Array]  # which platforms compute in their own way


def always_new(new: jax.Array, old: jax.Array) -> jax.Array:
    """The `Select` of a step in which every row is real."""
    return new


class Fused(NamedTuple):
    """One direction's weights as the loops want them: G gate columns in the cell's own order and scale.

    Attributes:
      w_x: [F, X], from the input to the first X gate columns.
      w_h: [P, Y], from h to the last Y gate columns.
      bias: [G].
      w_out: [H, P], from the cell's output to h, or None if h is the cell's output.
    """

    w_x: jax.Array
    w_h: jax.Array
    bias: jax.Array
    w_out: jax.Array | None = None


class Linear(NamedTuple):
    """Steps linearised around the values of the forward pass: what the file's equations multiply with.

    Attributes:
      gates: [M, G].
      passes: [M, 1] or [M, P].
      reads, forget: [M, H], None without a memory c.
      out: [M, H], the cell's output before w_out; None without w_out.
    """

    gates: jax.Array
    passes: jax.Array
    reads: jax.Array | None = None
    forget: jax.Array | None = None
    out: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
    """A recurrent cell of `hidden_size` units."""

    hidden_size: int

    gates: ClassVar[tuple[str, ...]]  # in the order in which the parameters hold them

    @property
    def output_size(self) -> int:
        """The width P of h, which is the output."""
        return self.hidden_size

    @property
    def state_sizes(self) -> Any:
        """The state's structure as users see it, h or (h, c), with widths in place of arrays."""
        return self.output_size

    def shapes(self, input_size: int, bias: bool) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        width = len(self.gates) * self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (input_size, width),
            "weight_hh": (self.output_size, width),
        }
        return shapes | ({"bias_ih": (width,), "bias_hh": (width,)} if bias else {})

    def fuse(self, params: Params) -> Fused:
        """The weights as the loops want them. Differentiable."""
        raise NotImplementedError

    def project(self, fused: Fused, x: jax.Array) -> jax.Array:
        """What the gates get from the input, but for the bias: [..., F] -> [..., X]."""
        return x @ fused.w_x

    def step(
        self, fused: Fused, carry: Carry, projected: jax.Array, select: Select = always_new, tanh: Tanh = jnp.tanh
    ) -> Carry:
        """One step from the projected input: each leaf of the carry is select(new, old)."""
        raise NotImplementedError

    def linearise(self, fused: Fused, x: jax.Array, h: jax.Array, next_h: jax.Array, recall: Recall) -> Linear:
        """A chunk of steps, from their inputs [M, F], h before them and after them [M, P], and the memory recalled."""
        raise NotImplementedError

    def pull_back(
        self, transposed: Fused, at: Linear, d: jax.Array, dc: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """da and the earlier dc of one step, from d and dc, by the file's equations and transposed weights."""
        raise NotImplementedError


def step_from_input(cell: Cell, params: Params, state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
    """One step of a cell from the input itself, with shapes checked: the body of lstm_cell and its kin.

    Raises:
      ValueError: if the input's or the state's axes do not match the parameters or each other.
      TypeError: if the state has not the cell's structure.
    """
    x = jnp.asarray(x)
    features = params["weight_ih"].shape[0]
    if x.ndim < 1 or x.shape[-1] != features:
        raise ValueError(f"x must have {features} features in its last axis, as weight_ih has, got shape {x.shape}.")
    structure: Any = jax.tree.structure(cell.state_sizes)
    given: Any = jax.tree.structure(state)
    if given != structure:
        raise TypeError(f"the carry must be {_in_words(cell.state_sizes)}, got the structure {given}.")
    carry = tuple(jax.tree.leaves(state))
    for leaf, size in zip(carry, jax.tree.leaves(cell.state_sizes), strict=True):
        if jnp.shape(leaf)[-1:] != (size,):
            raise ValueError(f"the carry's last axis must have size {size}, got shape {jnp.shape(leaf)}.")
        if jnp.shape(leaf)[:-1] != x.shape[:-1]:
            raise ValueError(f"the carry's batch axes must be those of x, {x.shape}, got shape {jnp.shape(leaf)}.")
    fused = cell.fuse(params)
    carry = cell.step(fused, carry, cell.project(fused, x))
    return jax.tree.unflatten(structure, carry), carry[0]


def total_bias(params: Params) -> jax.Array:
    """b_ih + b_hh, or zeros without biases."""
    if "bias_ih" in params:
        return params["bias_ih"] + params["bias_hh"]
    return jnp.zeros_like(params["weight_ih"][0])


def beside(vector: jax.Array, like: jax.Array) -> jax.Array:
    """A vector [G] shaped to be added to an array [..., G], which jax.numpy_rank_promotion("raise") asks for."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def _in_words(state_sizes: Any) -> str:
    return "a pair (h, c) of arrays" if isinstance(state_sizes, tuple) else "an array h"
