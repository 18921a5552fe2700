"""MatrixLayer: the base of layers of a short causal convolution and a recurrence with a matrix for each head.

    inputs -> project -> convolve -> activate -> a rule over chunks -> read out

A subclass states what happens step by step; this base adds time: the convolution's last inputs and the matrices make up
the state, and one step of decoding is a chunk of one step.
"""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpack._linear.layer import Direction, SingleLayer
from jaxpack._linear.reading import Reading
from jaxpack._linear.solve import wide
from jaxpack._matrix.chunks import Chunk, Rule, chunk_size, scan_chunks
from jaxpack._packed.conv import convolve
from jaxpack._packed.gather import rearrange, reversed_cells
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._packed.resets import Entering
from jaxpack._packed.slack import zero_slack
from jaxpack._types import PyTree


class Heads(NamedTuple):
    """The axes of a layer's heads: G groups of P heads, and the state [K, V] of each."""

    groups: int
    per_group: int
    key_size: int
    value_size: int

    @property
    def num_heads(self) -> int:
        """The number of heads."""
        return self.groups * self.per_group


class MatrixLayer(SingleLayer):
    """A layer with a short convolution and matrix states: the base class of Mamba2, GatedDeltaNet and MLSTM."""

    kernel_size: int

    @property
    def output_size(self) -> int:
        """The width of the output: input_size."""
        return self.input_size

    @property
    @abc.abstractmethod
    def heads(self) -> Heads:
        """The axes of the heads."""

    @property
    @abc.abstractmethod
    def rule(self) -> Rule:
        """The recurrence, one of `jaxpack._matrix.rules`."""

    @property
    @abc.abstractmethod
    def conv_size(self) -> int:
        """The number of features that are convolved."""

    @abc.abstractmethod
    def kernel(self, params: PyTree) -> tuple[jax.Array, jax.Array | None]:
        """Returns the kernel [kernel_size, conv_size] of the convolution, and its bias if there is one."""

    @abc.abstractmethod
    def project(self, params: PyTree, x: jax.Array) -> tuple[jax.Array, PyTree]:
        """Returns what is convolved [M, conv_size], and what `operands` needs besides, from M inputs [M, F]."""

    @abc.abstractmethod
    def operands(self, params: PyTree, convolved: jax.Array, kept: PyTree) -> tuple[dict[str, jax.Array], PyTree]:
        """Returns the arrays that the rule reads, leaves [M, G, ...], and what `readout` needs besides."""

    @abc.abstractmethod
    def readout(self, params: PyTree, y: jax.Array, kept: PyTree) -> jax.Array:
        """Returns the outputs [M, F] from those of the rule, [M, G, P, V]."""

    def matrices_like(self, dtype: Any) -> PyTree:
        """Returns the matrices of one sequence as users have them: [heads, K, V], as jax.ShapeDtypeStruct."""
        _, _, key_size, value_size = self.heads
        return jax.ShapeDtypeStruct((self.heads.num_heads, key_size, value_size), dtype)

    def enter(self, matrices: PyTree) -> PyTree:
        """Returns the rule's state, leaves [B, G, P, ...], from matrices as users have them."""
        return matrices.reshape(-1, *self.heads)

    def leave(self, state: PyTree) -> PyTree:
        """Returns matrices as users have them from the rule's state."""
        return state.reshape(-1, self.heads.num_heads, *state.shape[3:])

    def state_like(self, dtype: Any) -> PyTree:
        """Returns the state of one sequence: the convolution's last inputs, and the matrices."""
        return jax.ShapeDtypeStruct((self.kernel_size - 1, self.conv_size), dtype), self.matrices_like(dtype)

    def run(
        self, params: PyTree, packed: PackedSequence, entering: Entering, resets: jax.Array | None, direction: Direction
    ) -> tuple[jax.Array, PyTree]:
        """Runs the recurrence over a batch, a chunk of steps at a time."""
        bare = packed.replace(data=None)
        x, cells = packed.data, reversed_cells(bare) if direction.reverse else None
        starts = Reading.of(bare, resets, direction.reverse).resets
        if cells is not None:
            x, starts = rearrange(x, cells, cells), None if starts is None else rearrange(starts, cells, cells)
        initial = self._zeros((packed.plan.num_sequences,), x) if entering.initial is None else entering.initial
        matrices = Entering(self._entered(initial), self._entered(entering.fresh))
        convolving, kept = self.project(params, x)
        kernel, bias = self.kernel(params)
        # None for zeros: slices, not gathers.
        carries = Entering(*(None if state is None else state[0].astype(convolving.dtype) for state in entering))
        convolved, carry = convolve(packed.replace(data=convolving), kernel, carries, starts=starts)
        if bias is not None:
            convolved = (convolved + bias[None]).astype(convolved.dtype)
        operands, kept = self.operands(params, convolved, kept)
        size = chunk_size(packed.plan, self.heads.key_size, self.heads.value_size)
        y, final = scan_chunks(self.rule, bare, operands, matrices, starts, size)
        outputs = self.readout(params, y, kept).astype(x.dtype)
        if cells is not None:
            outputs = rearrange(outputs, cells, cells)
        narrow = direction.state_dtype
        return zero_slack(bare, outputs), (carry.astype(narrow), self._narrowed(final, narrow))

    def step_batch(self, params: PyTree, state: PyTree, x: jax.Array) -> tuple[PyTree, jax.Array]:
        """Runs a chunk of one step."""
        carry, matrices = self._zeros((len(x),), x) if state is None else state
        matrices = jax.tree.map(wide, matrices)
        entering, kept = self.project(params, x)
        kernel, bias = self.kernel(params)
        window = jnp.concatenate([carry, entering.astype(carry.dtype)[:, None]], 1)
        convolved = (window * kernel[None]).sum(1)
        operands, kept = self.operands(params, convolved if bias is None else convolved + bias[None], kept)
        chunk = Chunk({name: leaf[:, None] for name, leaf in operands.items()}, jnp.ones((len(x), 1), bool), None)
        before = self.enter(matrices)
        after, y = self.rule(before, before, chunk)
        state = window[:, 1:], self._narrowed(after, x.dtype)
        return state, self.readout(params, y[:, 0], kept).astype(x.dtype)

    def _entered(self, state: PyTree) -> PyTree:
        """Returns the rule's state, in float32 or wider, from one as users have it; None for None."""
        return None if state is None else self.enter(jax.tree.map(wide, state[1]))

    def _narrowed(self, state: PyTree, dtype: Any) -> PyTree:
        """Returns the rule's state, which is in float32 or wider, as users have it."""
        return jax.tree.map(lambda leaf: leaf.astype(dtype), self.leave(state))
