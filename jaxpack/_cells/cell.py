"""The base of every cell: a frozen specification with parameter shapes, state sizes, a step, and its derivative.

The parameters of one layer and direction are a dict under PyTorch's names, stored input-major, with the gates of H
hidden units side by side:

    weight_ih [F, gates*H]   weight_hh [P, gates*H]   bias_ih [gates*H]   bias_hh [gates*H]

A recurrence runs on `Fused` weights, which are made from them once, before its loops. A step has three parts: `project`
depends on the input alone and is one matrix product for many cells; `activate` has one product for all gates; `advance`
computes the next carry from the gates. Where the carry has a memory c, it is linear in c given the gates,
c' = decay * c + inject, so that it can be computed again without a product.

The backward pass linearizes steps around the values of the forward pass, so that each sequential step costs one
product. With d = dh + dy, the cotangent of h' from later steps and from the output, and dc that of a memory c':

    dc  = dc + dh_dc * d                      the cotangent of c', now with the part that reaches it through h'
    da  = da_gates * (d or dc, gate by gate)  the cotangent of the gates' pre-activations
    dh  = da_h w_h^T + dh_dh * d              the cotangent of h, one step earlier
    dc  = dc_dc * dc                          the cotangent of c, one step earlier

A cell that needs more than one product in a step, or weights that are no matrices, keeps them in `Fused.more`, and
overrides `step_back` and `more_gradients`; `ResetBeforeGRUCell` is an example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxpack._types import PyTree

Params = dict[str, jax.Array]
Carry = tuple[jax.Array, ...]  # (h,), or (h, c) with a memory c

C = TypeVar("C", bound="Cell")


class Fused(NamedTuple):
    """One direction's weights as the loops use them: G gate columns in an order and a scale that the cell chooses.

    Examples:
      >>> cell, params = jaxpack.RNN(2, 4).cell, jaxpack.RNN(2, 4).init(jax.random.key(0))
      >>> cell.fuse(params["l0"]).w_h.shape
      (4, 4)

    Attributes:
      w_x: [F, X], from the input to the first X gate columns.
      w_h: [P, Y], from h to the last Y gate columns, or None if h reaches them through `more` alone.
      bias: [G].
      w_out: [H, P], from the cell's output to h, or None if h is the cell's output.
      more: any further weights, which the cell alone uses: vectors, and matrices of a second product.
    """

    w_x: jax.Array
    w_h: Any
    bias: jax.Array
    w_out: jax.Array | None = None
    more: PyTree = ()


class Linearization(NamedTuple):
    """The partial derivatives of M steps at the values of the forward pass, as `jaxpack.cells.Cell` combines them.

    Examples:
      >>> slope = jnp.ones((3, 4))  # 3 steps of an RNN with 4 units, whose nonlinearity is linear here
      >>> Linearization(da_gates=slope, dh_dh=jnp.zeros((3, 1))).dh_dc is None
      True

    Attributes:
      da_gates: [M, G], of h' or c', whichever a gate acts on, with respect to each gate's pre-activation.
      dh_dh: [M, 1] or [M, P], of h' with respect to h, past the gates.
      dh_dc: [M, H], of h' (before w_out) with respect to c'; None without a memory c.
      dc_dc: [M, H], of c' with respect to c, past the gates; None without a memory c.
      out: [M, H], the cell's output before w_out; None without w_out.
      more: any further arrays [M, ...] that the cell's own `step_back` reads. They are zero in slack.
    """

    da_gates: jax.Array
    dh_dh: jax.Array
    dh_dc: jax.Array | None = None
    dc_dc: jax.Array | None = None
    out: jax.Array | None = None
    more: PyTree = None


@dataclasses.dataclass(frozen=True)
class Cell:
    """A recurrent cell of `hidden_size` units: the base class of RNNCell, LSTMCell, GRUCell and own cells.

    Examples:
      >>> cell = jaxpack.LSTM(2, 4).cell
      >>> cell.shapes(2, bias=False), cell.state_sizes
      ({'weight_ih': (2, 16), 'weight_hh': (4, 16)}, (4, 4))
    """

    hidden_size: int

    gates: ClassVar[tuple[str, ...]]  # in the order in which the parameters hold them
    reads_activations: ClassVar[bool] = True  # whether linearize does; otherwise none are kept for it
    gates_read_memory: ClassVar[bool] = False  # whether activate_from does; the activations are always kept then
    gates_apart: ClassVar[bool] = False  # whether what linearize reads and returns of h is all past the gates
    # The gate that keeps the state: its name, and 1, or -1 if it is the share of the new state. None without one.
    forget_gate: ClassVar[tuple[str, int] | None] = None
    # How parameters are drawn by default, functions of (key, shape, dtype); the others as PyTorch draws them.
    initializers: ClassVar[Mapping[str, Callable[..., Any]]] = MappingProxyType({})

    @property
    def output_size(self) -> int:
        """The width P of h, which is the output."""
        return self.hidden_size

    @property
    def state_sizes(self) -> Any:
        """The state's structure as users see it, h or (h, c), with widths in place of arrays."""
        return self.output_size

    def shapes(self, input_size: int, bias: bool) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every parameter."""
        width = len(self.gates) * self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (input_size, width),
            "weight_hh": (self.output_size, width),
        }
        return shapes | ({"bias_ih": (width,), "bias_hh": (width,)} if bias else {})

    def on(self: C, platform: str) -> C:
        """Returns the cell that computes the same in the way that suits a platform: "cpu", "gpu" or "tpu"."""
        return self

    def fuse(self, params: Params) -> Fused:
        """Returns the weights as the loops use them. Differentiable."""
        raise NotImplementedError

    def project(self, fused: Fused, x: jax.Array) -> jax.Array:
        """Returns the input's share of the gates' pre-activations, without the bias: [..., F] -> [..., X]."""
        return x @ fused.w_x

    def activate(self, fused: Fused, projected: jax.Array, h: jax.Array) -> PyTree:
        """Returns the gates after their nonlinearities, arrays [..., A], from projected [..., X] and h [..., P]."""
        raise NotImplementedError

    def activate_from(self, fused: Fused, projected: jax.Array, carry: Carry) -> PyTree:
        """Returns what `activate` does. A cell whose gates read the memory overrides it."""
        return self.activate(fused, projected, carry[0])

    def advance(self, fused: Fused, activations: PyTree, carry: Carry) -> Carry:
        """Returns the next carry."""
        raise NotImplementedError

    def update(self, activations: PyTree) -> tuple[jax.Array, jax.Array]:
        """Returns decay and inject [..., H] of the memory: c' = decay * c + inject. For cells with a memory."""
        raise NotImplementedError

    def step(self, fused: Fused, carry: Carry, projected: jax.Array) -> Carry:
        """Runs a whole step: `activate_from`, then `advance`."""
        return self.advance(fused, self.activate_from(fused, projected, carry), carry)

    def linearize(self, fused: Fused, activations: PyTree, before: Carry, after: Carry) -> Linearization:
        """Returns the derivatives of M steps.

        Args:
          fused: the weights.
          activations: of the steps, as `activate` returned them, kept or computed again.
          before, after: the carry before and after each step, leaves [M, ...].
        """
        raise NotImplementedError

    def pull_back(
        self, transposed: Fused, at: Linearization, d: jax.Array, dc: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns da and the earlier dc of one step from d and dc, as the equations above say.

        Args:
          transposed: the transposed weights.
          at: the derivatives of this step.
          d, dc: the cotangents of h' and c'.
        """
        raise NotImplementedError

    def step_back(
        self, transposed: Fused, at: Linearization, d: jax.Array, dc: jax.Array | None
    ) -> tuple[jax.Array, Carry]:
        """Runs one step of the backward recurrence: `pull_back`, then the product with the recurrent weights.

        Args:
          transposed, at, d, dc: as in `pull_back`.

        Returns:
          da, and the cotangent of the earlier carry.
        """
        da, earlier_dc = self.pull_back(transposed, at, d, dc)
        if transposed.w_h is None:
            dh = at.dh_dh * d
        else:
            dh = times(da[..., -transposed.w_h.shape[0] :], transposed.w_h) + at.dh_dh * d
        return da, (dh,) if earlier_dc is None else (dh, earlier_dc)

    def pull_back_projected(self, fused: Fused, x: jax.Array, da: jax.Array) -> jax.Array:
        """Returns the cotangent of x @ w_x [M, X] from da; of more than this product, where `project` has more."""
        return da[:, : fused.w_x.shape[1]]

    def more_gradients(
        self, fused: Fused, x: jax.Array, activations: PyTree, before: Carry, after: Carry, da: jax.Array
    ) -> PyTree:
        """Returns the share of M steps in the cotangent of `fused.more`, for a cell that has any.

        Args:
          fused: the weights.
          x: the inputs [M, F].
          activations, before, after: as in `linearize`, zero where da is.
          da: from `step_back`, [M, G]; zero in slack.
        """
        return ()


def step_from_input(cell: Cell, params: Params, state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
    """Runs one step of a cell on an input, with shapes checked: the body of `lstm_cell`, `gru_cell` and `rnn_cell`.

    Raises:
      ValueError: if the input's or the state's axes do not match the parameters or each other.
      TypeError: if the state does not have the cell's structure.
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
    """Returns b_ih + b_hh, or zeros for a layer without biases.

    Examples:
      >>> total_bias({"weight_ih": jnp.zeros((2, 3)), "bias_ih": jnp.ones(3), "bias_hh": jnp.ones(3)}).tolist()
      [2.0, 2.0, 2.0]
    """
    if "bias_ih" in params:
        return params["bias_ih"] + params["bias_hh"]
    return jnp.zeros_like(params["weight_ih"][0])


def times(factor: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns a product in the dtype of the weights, which in mixed precision is narrower than the factor's."""
    return factor.astype(weights.dtype) @ weights


def transpose(matrix: jax.Array) -> jax.Array:
    """Returns a transposed copy, since a product that transposes on the fly is slower."""
    return lax.optimization_barrier(matrix.T)


def expand_leading(vector: jax.Array, like: jax.Array) -> jax.Array:
    """Returns a vector [G] with the rank of an array [..., G], as jax.numpy_rank_promotion("raise") asks for."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def _in_words(state_sizes: Any) -> str:
    return "a pair (h, c) of arrays" if isinstance(state_sizes, tuple) else "an array h"
