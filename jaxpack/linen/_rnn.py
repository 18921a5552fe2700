"""RNN and Bidirectional of flax.linen, for ragged batches: the same modules under another import.

from jaxpack.linen import RNN, Bidirectional
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core.scope import LazyRng, in_filter, intersect_filters, is_filter_empty, subtract_filters, union_filters
from flax.linen import module
from jax.typing import ArrayLike

from jaxpack._cells.cell import Cell
from jaxpack._cells.gru import GRUCell
from jaxpack._cells.lstm import LSTMCell
from jaxpack._cells.rnn import RNNCell
from jaxpack._flax import run as dropin
from jaxpack._flax.run import Direction, Layout
from jaxpack._packed.broadcast import vary_like
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._packed.scan import Body, Scan
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree

_KINDS: Mapping[type, type[Cell]] = MappingProxyType(
    {nn.LSTMCell: LSTMCell, nn.OptimizedLSTMCell: LSTMCell, nn.GRUCell: GRUCell, nn.SimpleCell: RNNCell}
)


class RNN(nn.RNN):
    """flax.linen.RNN that does the work of real steps only.

    It takes Flax's arguments, holds Flax's variables, and returns what Flax returns, but that outputs are zero past a
    length, a sequence of length 0 keeps its initial carry, and nothing in padding reaches a gradient. Cells of Flax's
    own (LSTMCell, OptimizedLSTMCell, GRUCell, SimpleCell) run in jaxpack's recurrence, others in packed_scan;
    under nn.intercept_methods all run as Flax runs them.

    cell, time_major, return_carry, reverse, keep_order, unroll, variable_axes, variable_broadcast, variable_carry and
    split_rngs are as of flax.linen.RNN. Collections that variable_axes gives a time axis make it run padded.

    A cell sees several sequences at once, and stand-ins in slack: its rows must be independent. A BatchNorm inside one
    counts the stand-ins, so that its statistics depend on the plan. Normalise between RNNs, or over features.

    Padded inputs may have symbolic batch and time axes (jax.export.symbolic_shape), and no sequences or no steps: every
    step of every row is then run, by Flax's scan. A plan and packed inputs need sizes that are numbers.

    Examples:
      >>> from flax import linen as nn
      >>> rnn = jaxpack.linen.RNN(nn.OptimizedLSTMCell(4), return_carry=True, plan=jaxpack.plan_rows([3, 1]))
      >>> x = np.ones((2, 3, 2), np.float32)
      >>> variables = rnn.init(jax.random.key(0), x)
      >>> (c, h), outputs = rnn.apply(variables, x, seq_lengths=[3, 1])
      >>> h.shape, outputs.shape, outputs[1, 1:].any().item()  # zero past a length
      ((2, 4), (2, 3, 4), False)

    Attributes:
      plan: what padded inputs run under, a jaxpack.BucketPlan. Default: no plan, one program for all lengths.
    Source: flax.linen.RNN.
    """

    plan: BucketPlan | None = dataclasses.field(default=None, kw_only=True)

    def __call__(
        self,
        inputs: PackedSequence | ArrayLike,
        *,
        initial_carry: PyTree | None = None,
        init_key: jax.Array | None = None,
        seq_lengths: ArrayLike | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        plan: BucketPlan | None = None,
        forward_mode: bool = False,
    ) -> Any:
        """Runs the cell over each sequence's own steps.

        initial_carry, init_key, return_carry, time_major, reverse and keep_order are as of flax.linen.RNN.

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
        direction = self._direction(inputs, layout, initial_carry, init_key, plan, reverse, keep_order)
        if dropin.flax_will_do(inputs, [direction], seq_lengths):
            return super().__call__(
                inputs,
                initial_carry=direction.carry,
                return_carry=return_carry,
                time_major=time_major,
                reverse=reverse,
                keep_order=keep_order,
            )
        ((carry, outputs),) = dropin.run(inputs, layout, [direction], seq_lengths, forward_mode)
        return (carry, outputs) if return_carry else outputs

    @nn.nowrap
    def _direction(
        self,
        inputs: PackedSequence | jax.Array,
        layout: Layout,
        carry: PyTree | None,
        init_key: jax.Array | None,
        plan: BucketPlan | None,
        reverse: bool,
        keep_order: bool,
    ) -> Direction:
        """One direction of a call: the module itself."""
        if carry is None:
            key = jax.random.key(0) if init_key is None else init_key
            carry = self.cell.initialize_carry(key, layout.input_shape)
        carry = vary_like(carry, (inputs, self.cell.variables))
        plan = self.plan if plan is None else plan
        if self.is_initializing():
            plan = None  # so that a module can be initialised with a batch of any size
            self._create_variables((1, *layout.feature_shape), inputs.dtype)
        known = None
        if self._shares_params() and "params" in self.cell.variables and not _is_intercepted():
            known = dropin.recognise(self.cell, _KINDS, _features, _params, inputs.dtype, carry)
        if known is not None and self.is_initializing() and layout.has_plans:
            plan = layout.padded_plan  # one loop to compile, for outputs that few read
        stacks = bool(self.variable_axes)
        as_in_flax = known is None and (plan is None or stacks) and is_filter_empty(self._read_only())
        return Direction(carry, known, self._scan(), plan, reverse, keep_order, stacks, as_in_flax)

    @nn.nowrap
    def _collections(self) -> tuple[Any, Any]:
        """What steps read, and what they hand on: of the collections to carry those that may change in this call."""
        carried = intersect_filters(self.variable_carry, self.cell.scope.mutable)
        return union_filters(self.variable_broadcast, self._read_only()), carried

    @nn.nowrap
    def _read_only(self) -> Any:
        """The collections to carry that may not change in this call, on which Flax's own RNN fails."""
        return subtract_filters(self.variable_carry, self.cell.scope.mutable)

    @nn.nowrap
    def _shares_params(self) -> bool:
        """Whether each step reads the same parameters, and nothing else."""
        return not self.variable_axes and in_filter(self.variable_broadcast, "params")

    @nn.nowrap
    def _create_variables(self, input_shape: tuple[int, ...], dtype: Any) -> None:
        """The cell's variables as Flax makes them, from one step; carried ones too, which Flax's RNN cannot make."""
        kept = union_filters(self.variable_broadcast, self.variable_carry)
        if not in_filter(kept, "params"):
            return  # each step has its own, which are as many as the steps
        example = self.cell.initialize_carry(jax.random.key(0), input_shape), jnp.zeros((1, *input_shape), dtype)
        nn.scan(_step, variable_broadcast=kept, split_rngs=self.split_rngs)(self.cell, *example)

    @nn.nowrap
    def _scan(self) -> Scan:
        """lax.scan of the cell, lifted: what it does with variables and keys is Flax's."""
        keys = _Keys(self.split_rngs)
        broadcast, carried = self._collections()

        def scan(body: Body, carry: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
            lifted = nn.scan(
                body,
                unroll=self.unroll,
                variable_axes=self.variable_axes,
                variable_broadcast=broadcast,
                variable_carry=carried,
                split_rngs=self.split_rngs,
            )
            with keys.of_next_bucket(self.cell.scope):
                return lifted(self.cell, carry, xs)

        return scan


def _is_intercepted() -> bool:
    """Whether nn.intercept_methods is on: cells then run by their own methods, whatever they compute."""
    return bool(module._global_interceptor_stack)


def _step(cell: Any, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
    return cell(carry, x)


class _Keys:
    """Random keys for bucket after bucket, for each of which nn.scan splits anew from the first step.

    Streams whose keys are split over steps get other ones for each further bucket; the others the same in all.
    """

    def __init__(self, split_rngs: Mapping[Any, bool]) -> None:
        self.split_rngs = split_rngs
        self.bucket = 0
        self.counters: dict[Any, Any] = {}

    @contextlib.contextmanager
    def of_next_bucket(self, scope: Any) -> Iterator[None]:
        """For the time of one bucket's scan."""
        rngs = scope.rngs
        if self.bucket:
            scope.rng_counters.clear()
            scope.rng_counters.update(copy.deepcopy(self.counters))
            scope.rngs = {name: self._of_bucket(name, key) for name, key in rngs.items()}
        else:
            self.counters = copy.deepcopy(scope.rng_counters)
        self.bucket += 1
        try:
            yield
        finally:
            scope.rngs = rngs

    def _of_bucket(self, name: str, key: Any) -> Any:
        splits = (split for streams, split in self.split_rngs.items() if in_filter(streams, name))
        return LazyRng.create(key, f"bucket {self.bucket}") if next(splits, False) else key


def _features(cell: Any) -> int:
    return cell.features


def _params(cell: Any) -> Mapping[str, Any]:
    return nn.meta.unbox(cell.variables["params"])


class Bidirectional(nn.Bidirectional):
    """flax.linen.Bidirectional, whose directions share the packed batch and, if their cells are known, each step.

    Where others look on (init, a mutable collection "intermediates", nn.intercept_methods), each RNN is called by
    itself, as in Flax.

    merge_fn, time_major and return_carry are as of flax.linen.Bidirectional.

    Examples:
      >>> from flax import linen as nn
      >>> rnns = [jaxpack.linen.RNN(nn.SimpleCell(4)) for _ in range(2)]
      >>> layer = jaxpack.linen.Bidirectional(*rnns, plan=jaxpack.plan_rows([3, 1]))
      >>> x = np.ones((2, 3, 2), np.float32)
      >>> layer.apply(layer.init(jax.random.key(0), x), x, seq_lengths=[3, 1]).shape
      (2, 3, 8)

    Attributes:
      forward_rnn: a jaxpack.linen.RNN; another runs as Flax runs it.
      backward_rnn: likewise.
      plan: what padded inputs run under, in place of the RNNs' own plans. Default: theirs.
    Source: flax.linen.Bidirectional.
    """

    plan: BucketPlan | None = dataclasses.field(default=None, kw_only=True)

    def __call__(
        self,
        inputs: PackedSequence | ArrayLike,
        *,
        initial_carry: tuple[PyTree, PyTree] | None = None,
        init_key: jax.Array | None = None,
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
          init_key: as of flax.linen.Bidirectional.

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
            return as_in_flax(initial_carry=initial_carry, init_key=init_key)
        carries = (None, None) if initial_carry is None else initial_carry
        keys = (None, None) if init_key is None else jax.random.split(init_key)
        if self.is_initializing() or self.is_mutable_collection("intermediates") or _is_intercepted():
            options = {"seq_lengths": seq_lengths, "return_carry": True, "time_major": time_major, "plan": plan}
            options["forward_mode"] = forward_mode
            results = [
                rnn(inputs, initial_carry=carry, init_key=key, reverse=back, keep_order=back, **options)
                for rnn, carry, key, back in zip(rnns, carries, keys, (False, True), strict=True)
            ]
            carry, outputs = dropin.merge(results, self.merge_fn)
            return (carry, outputs) if return_carry else outputs
        layout = Layout.of(inputs, time_major, self.forward_rnn.cell.num_feature_axes)
        directions = [
            rnn._direction(inputs, layout, carry, key, plan, backward, backward)
            for rnn, carry, key, backward in zip(rnns, carries, keys, (False, True), strict=True)
        ]
        if dropin.flax_will_do(inputs, directions, seq_lengths):
            return as_in_flax(initial_carry=tuple(each.carry for each in directions))
        carry, outputs = dropin.merge(dropin.run(inputs, layout, directions, seq_lengths, forward_mode), self.merge_fn)
        return (carry, outputs) if return_carry else outputs
