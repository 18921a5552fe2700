"""What every cell is: a frozen spec with parameter shapes, state sizes, and two pure functions.

A cell's step is split in two: `project` holds what depends on the input alone, which can be one large matrix product
for all cells of a plan, and `step` what depends on the carry. Parameters of one layer and direction are a dict of
PyTorch's names and roles, stored input-major, G gates of H hidden units side by side:

    weight_ih [F, G*H]   weight_hh [H, G*H]   bias_ih [G*H]   bias_hh [G*H]
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A recurrent cell of `hidden_size` units."""

    hidden_size: int

    num_gates: ClassVar[int]

    @property
    def output_size(self) -> int:
        """The width of h, which is the output."""
        return self.hidden_size

    @property
    def state_sizes(self) -> Any:
        """The carry's structure, with widths in place of arrays."""
        return self.output_size

    def shapes(self, input_size: int, bias: bool) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        width = self.num_gates * self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (input_size, width),
            "weight_hh": (self.output_size, width),
        }
        return shapes | ({"bias_ih": (width,), "bias_hh": (width,)} if bias else {})

    def project(self, params: Params, x: jax.Array) -> jax.Array:
        """What the gates get from the input: [..., F] -> [..., G*H]."""
        raise NotImplementedError

    def step(self, params: Params, carry: Any, projected: jax.Array) -> tuple[Any, jax.Array]:
        """One step from the projected input: carry, [..., G*H] -> carry, h."""
        raise NotImplementedError


def step_from_input(cell: Cell, params: Params, carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
    """One step of a cell from the input itself, with shapes checked: the body of lstm_cell and its kin.

    Raises:
      ValueError: if the input's or the carry's last axis does not match the parameters.
      TypeError: if the carry has not the cell's structure.
    """
    x = jnp.asarray(x)
    features = params["weight_ih"].shape[0]
    if x.ndim < 1 or x.shape[-1] != features:
        raise ValueError(f"x must have {features} features in its last axis, as weight_ih has, got shape {x.shape}.")
    given: Any = jax.tree.structure(carry)
    if given != jax.tree.structure(cell.state_sizes):
        raise TypeError(f"the carry must be {_in_words(cell.state_sizes)}, got the structure {given}.")
    for leaf, size in zip(jax.tree.leaves(carry), jax.tree.leaves(cell.state_sizes), strict=True):
        if jnp.shape(leaf)[-1:] != (size,):
            raise ValueError(f"the carry's last axis must have size {size}, got shape {jnp.shape(leaf)}.")
        if jnp.shape(leaf)[:-1] != x.shape[:-1]:
            raise ValueError(f"the carry's batch axes must be those of x, {x.shape}, got shape {jnp.shape(leaf)}.")
    return cell.step(params, carry, cell.project(params, x))


def _in_words(state_sizes: Any) -> str:
    return "a pair (h, c) of arrays" if isinstance(state_sizes, tuple) else "an array h"
