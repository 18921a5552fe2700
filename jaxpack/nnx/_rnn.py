"""RNN and Bidirectional of flax.nnx, for ragged batches: the same modules under another import.

from jaxpack.nnx import RNN, Bidirectional
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
from flax import nnx
from flax.nnx.nn import dtypes
from jax.typing import ArrayLike

from jaxpack._cells.cell import Cell
from jaxpack._cells.gru import GRUCell
from jaxpack._cells.lstm import LSTMCell
from jaxpack._cells.rnn import RNNCell
from jaxpack._flax import run as dropin
from jaxpack._flax.run import Direction, Layout
from jaxpack._packed.broadcast import vary_like
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._packed.scan import Body
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree

_KINDS: Mapping[type, type[Cell]] = MappingProxyType(
    {nnx.LSTMCell: LSTMCell, nnx.OptimizedLSTMCell: LSTMCell, nnx.GRUCell: GRUCell, nnx.SimpleCell: RNNCell}
)


class RNN(nnx.RNN):
    """flax.nnx.RNN that does the work of real steps only.

    It takes Flax's arguments, holds Flax's state, and returns what Flax returns, but that outputs are zero past a
    length, a sequence of length 0 keeps its initial carry, and nothing in padding reaches a gradient. Cells of Flax's
    own (LSTMCell, OptimizedLSTMCell, GRUCell, SimpleCell) run in jaxpack's recurrence, others in packed_scan.

    cell, time_major, return_carry, reverse, keep_order, unroll, state_axes, broadcast_rngs and rngs are as of
    flax.nnx.RNN. State that state_axes gives a time axis makes it run padded.

    A cell sees several sequences at once, and stand-ins in slack: its rows must be independent. A BatchNorm inside one
    counts the stand-ins, so that its statistics depend on the plan. Normalise between RNNs, or over features.

    Padded inputs may have symbolic batch and time axes (jax.export.symbolic_shape), and no sequences or no steps: every
    step of every row is then run, by Flax's scan. A plan and packed inputs need sizes that are numbers.

    Examples:
      >>> from flax import nnx
      >>> plan = jaxpack.plan_rows([3, 1])
      >>> rnn = jaxpack.nnx.RNN(nnx.OptimizedLSTMCell(2, 4, rngs=nnx.Rngs(0)), return_carry=True, plan=plan)
      >>> (c, h), outputs = rnn(np.ones((2, 3, 2), np.float32), seq_lengths=[3, 1])
      >>> h.shape, outputs.shape, outputs[1, 1:].any().item()  # zero past a length
      ((2, 4), (2, 3, 4), False)

    Args:
      plan: what padded inputs run under, a jaxpack.BucketPlan. Default: no plan, one program for all lengths.
    Source: flax.nnx.RNN.
    """

    def __init__(
        self,
        cell: Any,
        *,
        time_major: bool = False,
        return_carry: bool = False,
        reverse: bool = False,
        keep_order: bool = False,
        unroll: int = 1,
        state_axes: Mapping[str, Any] | None = None,
        broadcast_rngs: Any = None,
        rngs: Any = True,
        plan: BucketPlan | None = None,
    ) -> None:
        super().__init__(
            cell,
            time_major=time_major,
            return_carry=return_carry,
            reverse=reverse,
            keep_order=keep_order,
            unroll=unroll,
            state_axes=state_axes,
            broadcast_rngs=broadcast_rngs,
            rngs=rngs,
        )
        self.plan = plan

    def __call__(
        self,
        inputs: PackedSequence | ArrayLike,
        *,
        initial_carry: PyTree | None = None,
        seq_lengths: ArrayLike | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        rngs: Any = None,
        plan: BucketPlan | None = None,
        forward_mode: bool = False,
    ) -> Any:
        """Runs the cell over each sequence's own steps.

        initial_carry, return_carry, time_major, reverse, keep_order and rngs are as of flax.nnx.RNN.

        Args:
          inputs: [*batch, T, *features]; [T, *batch, *features] if time_major; or packed data [S, *features].
          seq_lengths: int [*batch], for padded inputs. They may be traced. Default: all T.
          plan: in place of the module's own.
          forward_mode: whether jax.jvp, jacfwd or linearize will be taken of a known cell (see jaxpack.LSTM.apply).

        Returns:
          The outputs, laid out as the inputs are; with return_carry, (carry, outputs).

        Raises:
          ValueError: if inputs have too few axes, lengths another shape than the batch, or concrete lengths do not fit
            the inputs or the plan, or the plan is for another batch size or, where sizes are symbolic, for any.
          TypeError: if inputs are packed and seq_lengths or plan are given too.
        """
        return_carry = self.return_carry if return_carry is None else return_carry
        time_major = self.time_major if time_major is None else time_major
        reverse = self.reverse if reverse is None else reverse
        keep_order = self.keep_order if keep_order is None else keep_order
        inputs = dropin.check_inputs(inputs, seq_lengths, plan)
        layout = Layout.of(inputs, time_major, self.cell.num_feature_axes)
        direction = self._direction(inputs, layout, initial_carry, rngs, plan, reverse, keep_order)
        if dropin.flax_will_do(inputs, [direction], seq_lengths):
            return super().__call__(
                inputs,
                initial_carry=direction.carry,
                return_carry=return_carry,
                time_major=time_major,
                reverse=reverse,
                keep_order=keep_order,
            )
        with self._keys_of_a_call():
            ((carry, outputs),) = dropin.run(inputs, layout, [direction], seq_lengths, forward_mode)
        return (carry, outputs) if return_carry else outputs

    def _direction(
        self,
        inputs: PackedSequence | jax.Array,
        layout: Layout,
        carry: PyTree | None,
        rngs: Any,
        plan: BucketPlan | None,
        reverse: bool,
        keep_order: bool,
    ) -> Direction:
        """One direction of a call: the module itself."""
        if carry is None:
            rngs = self.rngs if rngs is None else rngs
            rngs = rngs.carry.fork() if isinstance(rngs, nnx.Rngs) else rngs
            carry = self.cell.initialize_carry(layout.input_shape, rngs)
        carry = vary_like(carry, (inputs, nnx.state(self.cell, nnx.Param)))
        stacks = any(isinstance(axis, int) for axis in self.state_axes.values())
        known = None
        if not stacks and _is_plain(self.cell):
            known = dropin.recognise(self.cell, _KINDS, _hidden_features, _params, inputs.dtype, carry)
        plan = self.plan if plan is None else plan
        as_in_flax = known is None and (plan is None or stacks)
        return Direction(carry, known, self._scan, plan, reverse, keep_order, stacks, as_in_flax)

    def _keys_of_a_call(self) -> Any:
        """For the time of a call, keys of its own in streams whose keys all steps share."""
        if self.broadcast_rngs is None:
            return contextlib.nullcontext()
        return nnx.split_rngs(self.cell, splits=1, only=self.broadcast_rngs, squeeze=True)

    def _scan(self, body: Body, carry: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
        """lax.scan of the cell, lifted: what it does with state and keys is Flax's."""
        shared = nnx.All(nnx.RngState, self.broadcast_rngs)
        state_axes = nnx.StateAxes({shared: None, **self.state_axes})
        lifted = nnx.compat.scan(body, in_axes=(state_axes, nnx.Carry, 0), out_axes=(nnx.Carry, 0), unroll=self.unroll)
        return lifted(self.cell, carry, xs)


def _is_plain(cell: Any) -> bool:
    """Whether the products in a cell are those that Flax put there, in its own arithmetic."""
    return all(
        type(layer) is nnx.Linear
        and layer.dot_general is jax.lax.dot_general
        and layer.precision is None
        and layer.preferred_element_type is None
        and layer.promote_dtype is dtypes.promote_dtype
        for layer in _layers(cell).values()
    )


def _layers(cell: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(cell).items() if isinstance(value, nnx.Module)}


def _params(cell: Any) -> Mapping[str, Any]:
    return {
        name: {"kernel": layer.kernel[...]} | ({} if layer.bias is None else {"bias": layer.bias[...]})
        for name, layer in _layers(cell).items()
    }


def _hidden_features(cell: Any) -> int:
    return cell.hidden_features


class Bidirectional(nnx.Bidirectional):
    """flax.nnx.Bidirectional, whose directions share the packed batch and, if their cells are known, each step.

    merge_fn, time_major, return_carry and rngs are as of flax.nnx.Bidirectional.

    Examples:
      >>> from flax import nnx
      >>> rnns = [jaxpack.nnx.RNN(nnx.SimpleCell(2, 4, rngs=nnx.Rngs(seed))) for seed in (0, 1)]
      >>> layer = jaxpack.nnx.Bidirectional(*rnns, plan=jaxpack.plan_rows([3, 1]))
      >>> layer(np.ones((2, 3, 2), np.float32), seq_lengths=[3, 1]).shape
      (2, 3, 8)

    Args:
      forward_rnn: a jaxpack.nnx.RNN; another runs as Flax runs it.
      backward_rnn: likewise.
      plan: what padded inputs run under, in place of the RNNs' own plans. Default: theirs.
    Source: flax.nnx.Bidirectional.
    """

    def __init__(
        self,
        forward_rnn: Any,
        backward_rnn: Any,
        *,
        merge_fn: Callable[[Any, Any], Any] = nnx.Bidirectional.merge_fn,
        time_major: bool = False,
        return_carry: bool = False,
        rngs: Any = True,
        plan: BucketPlan | None = None,
    ) -> None:
        super().__init__(
            forward_rnn,
            backward_rnn,
            merge_fn=merge_fn,
            time_major=time_major,
            return_carry=return_carry,
            rngs=rngs,
        )
        self.plan = plan

    def __call__(
        self,
        inputs: PackedSequence | ArrayLike,
        *,
        initial_carry: tuple[PyTree, PyTree] | None = None,
        rngs: Any = None,
        seq_lengths: ArrayLike | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        plan: BucketPlan | None = None,
        forward_mode: bool = False,
    ) -> Any:
        """Runs both directions over each sequence's own steps, and merges their outputs.

        inputs, seq_lengths, plan, time_major, return_carry and forward_mode are as of RNN; reverse and keep_order are
        not used, as in Flax.

        Args:
          initial_carry: a pair, of the forward and the backward direction.
          rngs: as of flax.nnx.Bidirectional.

        Returns:
          The merged outputs, laid out as the inputs are; with return_carry, ((forward, backward), outputs).

        Raises:
          ValueError: as RNN does.
          TypeError: as RNN does.
        """
        return_carry = self.return_carry if return_carry is None else return_carry
        time_major = self.time_major if time_major is None else time_major
        inputs = dropin.check_inputs(inputs, seq_lengths, plan)
        plan = self.plan if plan is None else plan
        as_in_flax = functools.partial(
            super().__call__, inputs, seq_lengths=seq_lengths, return_carry=return_carry, time_major=time_major
        )
        rnns = self.forward_rnn, self.backward_rnn
        if not dropin.check_pair(*rnns, RNN, isinstance(inputs, PackedSequence) or plan is not None):
            return as_in_flax(initial_carry=initial_carry, rngs=rngs)
        layout = Layout.of(inputs, time_major, self.forward_rnn.cell.num_feature_axes)
        rngs = self.rngs if rngs is None else rngs
        rngs = rngs.carry if isinstance(rngs, nnx.Rngs) else rngs
        carries = (None, None) if initial_carry is None else initial_carry
        directions = [
            rnn._direction(inputs, layout, carry, rngs, plan, backward, backward)
            for rnn, carry, backward in zip(rnns, carries, (False, True), strict=True)
        ]
        if dropin.flax_will_do(inputs, directions, seq_lengths):
            return as_in_flax(initial_carry=tuple(each.carry for each in directions))
        with self.forward_rnn._keys_of_a_call(), self.backward_rnn._keys_of_a_call():
            results = dropin.run(inputs, layout, directions, seq_lengths, forward_mode)
        carry, outputs = dropin.merge(results, self.merge_fn)
        return (carry, outputs) if return_carry else outputs
