"""SteppedLayer: the base of layers that run step by step, with the derivative that JAX makes of the scan.

    projected = project(x)                        of all cells at once, before the loop
    state', y = advance(state, projected)         of the rows alive at a step, in the loop

States are float32 or wider inside the loop, so that errors of narrow dtypes do not add up over steps.
"""

from __future__ import annotations

import abc
import functools

import jax

from jaxpack._linear.layer import Direction, SingleLayer
from jaxpack._linear.reading import Reading
from jaxpack._linear.solve import wide
from jaxpack._packed.broadcast import vary_like
from jaxpack._packed.gather import real_cells, rearrange, reversed_cells
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._packed.resets import Entering
from jaxpack._packed.scan import Starts, scan_of, scan_slots
from jaxpack._packed.slack import in_caller_order, zero_slack
from jaxpack._types import PyTree


class SteppedLayer(SingleLayer):
    """A layer that runs step by step: the base class of ConvLSTM, ConvGRU, SLSTM, GRUD, CfC and TimeDecay."""

    @property
    def output_size(self) -> int:
        """The width of the output: hidden_size."""
        return self.hidden_size

    def prepare(self, params: PyTree) -> PyTree:
        """Returns what `project` and `advance` take as parameters, computed before the loop; by default the same."""
        return params

    @abc.abstractmethod
    def project(self, params: PyTree, x: jax.Array) -> PyTree:
        """Returns what `advance` needs of the inputs [M, *input_shape], leaves [M, ...]."""

    @abc.abstractmethod
    def advance(self, params: PyTree, state: PyTree, projected: PyTree) -> tuple[PyTree, jax.Array]:
        """Computes one step of M rows.

        Args:
          params: the parameters, prepared: factors of products in the dtype of the computation.
          state: in the layout of `state_like`, leaves [M, ...], in float32 or wider.
          projected: what `project` returns for the inputs of these rows.

        Returns:
          The new state, in the same dtypes, and the outputs [M, *output_shape], of any dtype.
        """

    def run(
        self, params: PyTree, packed: PackedSequence, entering: Entering, resets: jax.Array | None, direction: Direction
    ) -> tuple[jax.Array, PyTree]:
        """Runs the recurrence over a batch, one scan for each bucket of the plan."""
        bare = packed.replace(data=None)
        x, cells = packed.data, reversed_cells(bare) if direction.reverse else None
        resets = Reading.of(bare, resets, direction.reverse).resets
        if cells is not None:
            x, resets = rearrange(x, cells, cells), None if resets is None else rearrange(resets, cells, cells)
        zeros = self._zeros((packed.plan.num_sequences,), x)
        initial = zeros if entering.initial is None else entering.initial
        fresh = initial if entering.fresh is None else entering.fresh
        initial, zeros, fresh = jax.tree.map(wide, vary_like((initial, zeros, fresh), (x, resets)))
        initial, fresh = jax.tree.map(lambda leaf: leaf[packed.sorted_indices], (initial, fresh))
        params = self.prepare(params)
        step = scan_of(functools.partial(self.advance, params))
        starts = Starts(initial, zeros, fresh)  # in slack inputs are zero, so zeros are a safe state there
        final, y = scan_slots(step, starts, self.project(params, x), real_cells(bare), packed.plan, resets)
        y = y.astype(x.dtype)
        if cells is not None:
            y = rearrange(y, cells, cells)
        return zero_slack(bare, y), self._narrowed(in_caller_order(bare, final), direction.state_dtype)

    def step_batch(self, params: PyTree, state: PyTree, x: jax.Array) -> tuple[PyTree, jax.Array]:
        """Computes one step of a batch."""
        state = self._zeros((len(x),), x) if state is None else state
        params = self.prepare(params)
        state, y = self.advance(params, jax.tree.map(wide, state), self.project(params, x))
        return self._narrowed(state, x.dtype), y.astype(x.dtype)

    def _narrowed(self, state: PyTree, dtype: object) -> PyTree:
        """Returns a state in the dtypes that users see."""
        return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), state, self.state_like(dtype))
