"""RNN and Bidirectional of flax.nnx for sequences of different lengths: the same modules under another import.

from jaxpack.nnx import RNN, Bidirectional
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from flax.nnx.nn import dtypes
from jax.typing import ArrayLike

from jaxpack._flax.call import (
    Call,
    Direction,
    check_inputs,
    check_mask,
    check_pair,
    check_resets,
    delegate_to_flax,
    merge,
    resolve_options,
)
from jaxpack._flax.known import NNX_CELLS, KnownCell, recognise
from jaxpack._flax.layout import Layout
from jaxpack._flax.run import run
from jaxpack._packed.broadcast import vary_like
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._packed.scan import Body
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree


class RNN(nnx.RNN):
    """flax.nnx.RNN that computes only the steps that sequences have.

    It takes Flax's arguments, holds Flax's state, and returns what Flax returns, with three exceptions: outputs are
    zero past a length, a sequence of length 0 keeps its initial carry, and padding reaches no gradient. Flax's own
    cells (LSTMCell, OptimizedLSTMCell, GRUCell, SimpleCell) run in jaxpack's recurrence, others in packed_scan.

    The arguments cell, time_major, return_carry, reverse, keep_order, unroll, state_axes, broadcast_rngs and rngs are
    those of flax.nnx.RNN. If state_axes gives state a time axis, the batch runs padded.

    A cell sees several sequences at once, and copies of real steps in slack, so its rows must be independent. A
    BatchNorm inside a cell counts these copies, which makes its statistics depend on the plan. Normalise between RNNs,
    or over features.

    Padded inputs may have symbolic batch and time axes (jax.export.symbolic_shape), or an axis of size 0. Flax's scan
    then runs every step of every row. A plan and packed inputs need sizes that are numbers.

    Examples:
      >>> from flax import nnx
      >>> plan = jaxpack.plan_rows([3, 1])
      >>> rnn = jaxpack.nnx.RNN(nnx.OptimizedLSTMCell(2, 4, rngs=nnx.Rngs(0)), return_carry=True, plan=plan)
      >>> (c, h), outputs = rnn(np.ones((2, 3, 2), np.float32), seq_lengths=[3, 1])
      >>> h.shape, outputs.shape, outputs[1, 1:].any().item()  # zero past a length
      ((2, 4), (2, 3, 4), False)

    Args:
      plan: the jaxpack.BucketPlan for padded inputs. Default: no plan, one program for all lengths.
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
        seq_lengths: ArrayLike | Sequence[int] | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        rngs: Any = None,
        plan: BucketPlan | None = None,
        resets: PackedSequence | ArrayLike | None = None,
        mask: ArrayLike | None = None,
        forward_mode: bool = False,
    ) -> Any:
        """Runs the cell over each sequence's own steps.

        The arguments initial_carry, return_carry, time_major, reverse, keep_order and rngs are those of flax.nnx.RNN.

        Args:
          inputs: [*batch, T, *features]; [T, *batch, *features] if time_major; or packed data [S, *features].
          seq_lengths: int [*batch], for padded inputs. They may be traced. Default: all T.
          plan: the plan of this call, instead of the module's.
          resets: one bool a step, in the layout of the inputs without features: True where an episode begins, whose
            carry is the initial one. Variables of the cell other than the carry are not reset.
          mask: bool, in place of seq_lengths, in the layout of the inputs without features: True at valid steps.
            Padding may be anywhere: valid steps run as if they were next to each other, and outputs are put back where
            they were, zero at masked steps. A reset at a masked step acts at the next valid one.
          forward_mode: Set True to differentiate this call in forward mode (see jaxpack.LSTM.apply).

        Returns:
          The outputs in the layout of the inputs; with return_carry, (carry, outputs).

        Raises:
          ValueError: if inputs have too few axes; if lengths have another shape than the batch, or concrete ones do
            not fit the inputs or the plan; or if the plan is for another batch size, or given for symbolic sizes.
          TypeError: if inputs are packed and seq_lengths, mask or plan are given too, both seq_lengths and mask are
            given, one of inputs and resets is packed and the other padded, or mask or resets are not bool.
        """
        options = resolve_options(
            self, return_carry=return_carry, time_major=time_major, reverse=reverse, keep_order=keep_order
        )
        inputs = check_inputs(inputs, seq_lengths, plan)
        layout = Layout.of(inputs, options["time_major"], self.cell.num_feature_axes)
        begins, valid = check_resets(resets, inputs, layout), check_mask(mask, inputs, seq_lengths, layout)
        call = Call(inputs, layout, seq_lengths, plan, forward_mode, begins, valid)
        direction = self._direction(call, initial_carry, rngs, options["reverse"], options["keep_order"])
        if delegate_to_flax(call, [direction]):
            return super().__call__(inputs, initial_carry=direction.carry, **options)
        with self._fresh_broadcast_keys():
            ((carry, outputs),) = run(call, [direction])
        return (carry, outputs) if options["return_carry"] else outputs

    def _direction(self, call: Call, carry: PyTree | None, rngs: Any, reverse: bool, keep_order: bool) -> Direction:
        """Returns this module as one direction of a call."""
        if carry is None:
            rngs = self.rngs if rngs is None else rngs
            rngs = rngs.carry.fork() if isinstance(rngs, nnx.Rngs) else rngs
            carry = self.cell.initialize_carry(call.layout.input_shape, rngs)
        carry = vary_like(carry, (call.inputs, nnx.state(self.cell, nnx.Param)))
        stacks_variables = any(isinstance(axis, int) for axis in self.state_axes.values())
        known = None if stacks_variables else _known(self.cell, call.inputs.dtype, carry)
        plan = self.plan if call.plan is None else call.plan
        return Direction(carry, known, self._scan, plan, reverse, keep_order, stacks_variables)

    def _fresh_broadcast_keys(self) -> Any:
        """Gives the streams whose keys all steps share new keys for one call."""
        if self.broadcast_rngs is None:
            return contextlib.nullcontext()
        return nnx.split_rngs(self.cell, splits=1, only=self.broadcast_rngs, squeeze=True)

    def _scan(self, body: Body, carry: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
        """Runs lax.scan of the cell. Flax lifts its state and random keys."""
        shared = nnx.All(nnx.RngState, self.broadcast_rngs)
        state_axes = nnx.StateAxes({shared: None, **self.state_axes})
        lifted = nnx.compat.scan(body, in_axes=(state_axes, nnx.Carry, 0), out_axes=(nnx.Carry, 0), unroll=self.unroll)
        return lifted(self.cell, carry, xs)


def _known(cell: Any, dtype: Any, carry: PyTree) -> KnownCell | None:
    """Returns the cell as jaxpack runs it, or None if Flax's own step must run."""
    if type(cell) not in NNX_CELLS:
        return None
    layers = {name: value for name, value in vars(cell).items() if isinstance(value, nnx.Module)}
    if not all(map(_is_plain, layers.values())):
        return None
    tree = {
        name: {"kernel": layer.kernel[...]} | ({} if layer.bias is None else {"bias": layer.bias[...]})
        for name, layer in layers.items()
    }
    return recognise(cell, cell.hidden_features, tree, dtype, carry)


def _is_plain(layer: Any) -> bool:
    """Returns True if a layer in a cell is the one that Flax put there, with the default arithmetic."""
    return (
        type(layer) is nnx.Linear
        and layer.dot_general is jax.lax.dot_general
        and layer.precision is None
        and layer.preferred_element_type is None
        and layer.promote_dtype is dtypes.promote_dtype
    )


class Bidirectional(nnx.Bidirectional):
    """flax.nnx.Bidirectional whose directions share the packed batch and, if their cells are known, each step.

    The arguments merge_fn, time_major, return_carry and rngs are those of flax.nnx.Bidirectional.

    Examples:
      >>> from flax import nnx
      >>> rnns = [jaxpack.nnx.RNN(nnx.SimpleCell(2, 4, rngs=nnx.Rngs(seed))) for seed in (0, 1)]
      >>> layer = jaxpack.nnx.Bidirectional(*rnns, plan=jaxpack.plan_rows([3, 1]))
      >>> layer(np.ones((2, 3, 2), np.float32), seq_lengths=[3, 1]).shape
      (2, 3, 8)

    Args:
      forward_rnn: a jaxpack.nnx.RNN. Another module runs as Flax runs it.
      backward_rnn: likewise.
      plan: the jaxpack.BucketPlan for padded inputs, instead of the RNNs' own plans. Default: theirs.
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
        seq_lengths: ArrayLike | Sequence[int] | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        plan: BucketPlan | None = None,
        resets: PackedSequence | ArrayLike | None = None,
        mask: ArrayLike | None = None,
        forward_mode: bool = False,
    ) -> Any:
        """Runs both directions over each sequence's own steps, and merges their outputs.

        The arguments inputs, seq_lengths, plan, resets, mask, time_major, return_carry and forward_mode are those of
        RNN. As in Flax, reverse and keep_order are not used. The backward direction begins anew at an episode's last
        step.

        Args:
          initial_carry: a pair (forward, backward).
          rngs: as in flax.nnx.Bidirectional.

        Returns:
          The merged outputs in the layout of the inputs; with return_carry, ((forward, backward), outputs).

        Raises:
          ValueError: as RNN does.
          TypeError: as RNN does.
        """
        options = resolve_options(self, return_carry=return_carry, time_major=time_major)
        inputs = check_inputs(inputs, seq_lengths, plan)
        plan = self.plan if plan is None else plan
        call_flax = functools.partial(super().__call__, inputs, seq_lengths=seq_lengths, **options)
        rnns = self.forward_rnn, self.backward_rnn
        if not check_pair(rnns, RNN, inputs, plan, resets, mask):
            return call_flax(initial_carry=initial_carry, rngs=rngs)
        layout = Layout.of(inputs, options["time_major"], self.forward_rnn.cell.num_feature_axes)
        begins, valid = check_resets(resets, inputs, layout), check_mask(mask, inputs, seq_lengths, layout)
        call = Call(inputs, layout, seq_lengths, plan, forward_mode, begins, valid)
        rngs = self.rngs if rngs is None else rngs
        rngs = rngs.carry if isinstance(rngs, nnx.Rngs) else rngs
        carries = (None, None) if initial_carry is None else initial_carry
        directions = [
            rnn._direction(call, carry, rngs, backward, backward)
            for rnn, carry, backward in zip(rnns, carries, (False, True), strict=True)
        ]
        if delegate_to_flax(call, directions):
            return call_flax(initial_carry=tuple(each.carry for each in directions))
        with self.forward_rnn._fresh_broadcast_keys(), self.backward_rnn._fresh_broadcast_keys():
            results = run(call, directions)
        carry, outputs = merge(results, self.merge_fn)
        return (carry, outputs) if options["return_carry"] else outputs
