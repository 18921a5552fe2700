"""RNN and Bidirectional of flax.linen for sequences of different lengths: the same modules under another import.

from jaxpack.linen import RNN, Bidirectional
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core.scope import LazyRng, in_filter, intersect_filters, is_filter_empty, subtract_filters, union_filters
from flax.linen import module
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
from jaxpack._flax.known import LINEN_CELLS, KnownCell, recognise
from jaxpack._flax.layout import Layout
from jaxpack._flax.run import run
from jaxpack._packed.broadcast import vary_like
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._packed.scan import Body, Scan
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree


class RNN(nn.RNN):
    """flax.linen.RNN that computes only the steps that sequences have.

    It takes Flax's arguments, holds Flax's variables, and returns what Flax returns, with three exceptions: outputs are
    zero past a length, a sequence of length 0 keeps its initial carry, and padding reaches no gradient. Flax's own
    cells (LSTMCell, OptimizedLSTMCell, GRUCell, SimpleCell) run in jaxpack's recurrence, others in packed_scan. Under
    nn.intercept_methods all cells run as Flax runs them.

    The attributes cell, time_major, return_carry, reverse, keep_order, unroll, variable_axes, variable_broadcast,
    variable_carry and split_rngs are those of flax.linen.RNN. If variable_axes gives collections a time axis, the batch
    runs padded.

    A cell sees several sequences at once, and copies of real steps in slack, so its rows must be independent. A
    BatchNorm inside a cell counts these copies, which makes its statistics depend on the plan. Normalise between RNNs,
    or over features.

    Padded inputs may have symbolic batch and time axes (jax.export.symbolic_shape), or an axis of size 0. Flax's scan
    then runs every step of every row. A plan and packed inputs need sizes that are numbers.

    Examples:
      >>> from flax import linen as nn
      >>> rnn = jaxpack.linen.RNN(nn.OptimizedLSTMCell(4), return_carry=True, plan=jaxpack.plan_rows([3, 1]))
      >>> x = np.ones((2, 3, 2), np.float32)
      >>> variables = rnn.init(jax.random.key(0), x)
      >>> (c, h), outputs = rnn.apply(variables, x, seq_lengths=[3, 1])
      >>> h.shape, outputs.shape, outputs[1, 1:].any().item()  # zero past a length
      ((2, 4), (2, 3, 4), False)

    Attributes:
      plan: the jaxpack.BucketPlan for padded inputs. Default: no plan, one program for all lengths.
    Source: flax.linen.RNN.
    """

    plan: BucketPlan | None = dataclasses.field(default=None, kw_only=True)

    def __call__(
        self,
        inputs: PackedSequence | ArrayLike,
        *,
        initial_carry: PyTree | None = None,
        init_key: jax.Array | None = None,
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
        """Runs the cell over each sequence's own steps.

        The arguments initial_carry, init_key, return_carry, time_major, reverse and keep_order are those of
        flax.linen.RNN.

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
        direction = self._direction(call, initial_carry, init_key, options["reverse"], options["keep_order"])
        if delegate_to_flax(call, [direction]):
            return super().__call__(inputs, initial_carry=direction.carry, **options)
        ((carry, outputs),) = run(call, [direction])
        return (carry, outputs) if options["return_carry"] else outputs

    @nn.nowrap
    def _direction(
        self, call: Call, carry: PyTree | None, init_key: jax.Array | None, reverse: bool, keep_order: bool
    ) -> Direction:
        """Returns this module as one direction of a call."""
        layout, dtype = call.layout, call.inputs.dtype
        if carry is None:
            key = jax.random.key(0) if init_key is None else init_key
            carry = self.cell.initialize_carry(key, layout.input_shape)
        carry = vary_like(carry, (call.inputs, self.cell.variables))
        plan = self.plan if call.plan is None else call.plan
        if self.is_initializing():
            plan = None  # so that a module can be initialised with a batch of any size
            self._create_variables((1, *layout.feature_shape), dtype)
        known = _known(self.cell, dtype, carry) if self._shares_params() else None
        if known is not None and self.is_initializing() and layout.has_plans:
            plan = layout.padded_plan  # one loop to compile, for outputs that are rarely read
        stacks_variables = bool(self.variable_axes)
        works_in_flax = is_filter_empty(self._read_only())
        return Direction(carry, known, self._scan(), plan, reverse, keep_order, stacks_variables, works_in_flax)

    @nn.nowrap
    def _collections(self) -> tuple[Any, Any]:
        """Returns the collections that steps read, and those that they change and hand on."""
        carried = intersect_filters(self.variable_carry, self.cell.scope.mutable)
        return union_filters(self.variable_broadcast, self._read_only()), carried

    @nn.nowrap
    def _read_only(self) -> Any:
        """Returns the carried collections that are immutable in this call, on which Flax's own RNN fails."""
        return subtract_filters(self.variable_carry, self.cell.scope.mutable)

    @nn.nowrap
    def _shares_params(self) -> bool:
        """Returns True if each step reads the same parameters, and no variable has a time axis."""
        return not self.variable_axes and in_filter(self.variable_broadcast, "params")

    @nn.nowrap
    def _create_variables(self, input_shape: tuple[int, ...], dtype: Any) -> None:
        """Creates the cell's variables from one step, as Flax does. Flax's RNN cannot create carried ones."""
        kept = union_filters(self.variable_broadcast, self.variable_carry)
        if not in_filter(kept, "params"):
            return  # each step has its own parameters, so their number is that of the steps
        example = self.cell.initialize_carry(jax.random.key(0), input_shape), jnp.zeros((1, *input_shape), dtype)
        nn.scan(_step, variable_broadcast=kept, split_rngs=self.split_rngs)(self.cell, *example)

    @nn.nowrap
    def _scan(self) -> Scan:
        """Returns lax.scan of the cell. Flax lifts its variables and random keys."""
        keys = _BucketKeys(self.split_rngs)
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
            with keys.next_bucket(self.cell.scope):
                return lifted(self.cell, carry, xs)

        return scan


def _known(cell: Any, dtype: Any, carry: PyTree) -> KnownCell | None:
    """Returns the cell as jaxpack runs it, or None if Flax's own step must run."""
    if type(cell) not in LINEN_CELLS or "params" not in cell.variables or _is_intercepted():
        return None
    return recognise(cell, cell.features, nn.meta.unbox(cell.variables["params"]), dtype, carry)


def _is_intercepted() -> bool:
    """Returns True inside nn.intercept_methods, where every cell must run by its own methods."""
    return bool(module._global_interceptor_stack)


def _step(cell: Any, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
    return cell(carry, x)


class _BucketKeys:
    """Random keys for one bucket after the other. For each of them nn.scan splits keys anew from its first step.

    From the second bucket on, streams whose keys are split over steps get new keys. Streams whose keys all steps
    share get the same keys in every bucket.
    """

    def __init__(self, split_rngs: Mapping[Any, bool]) -> None:
        self.split_rngs = split_rngs
        self.bucket = 0
        self.counters: dict[Any, Any] = {}

    @contextlib.contextmanager
    def next_bucket(self, scope: Any) -> Iterator[None]:
        """Sets the scope's keys during the scan of one bucket."""
        rngs = scope.rngs
        if self.bucket:
            scope.rng_counters.clear()
            scope.rng_counters.update(copy.deepcopy(self.counters))
            scope.rngs = {name: self._key(name, key) for name, key in rngs.items()}
        else:
            self.counters = copy.deepcopy(scope.rng_counters)
        self.bucket += 1
        try:
            yield
        finally:
            scope.rngs = rngs

    def _key(self, name: str, key: Any) -> Any:
        splits = (split for streams, split in self.split_rngs.items() if in_filter(streams, name))
        return LazyRng.create(key, f"bucket {self.bucket}") if next(splits, False) else key


class Bidirectional(nn.Bidirectional):
    """flax.linen.Bidirectional whose directions share the packed batch and, if their cells are known, each step.

    Each RNN is called by itself, as in Flax, where calls of modules are observed: in init, under nn.intercept_methods,
    and with a mutable collection "intermediates".

    The attributes merge_fn, time_major and return_carry are those of flax.linen.Bidirectional.

    Examples:
      >>> from flax import linen as nn
      >>> rnns = [jaxpack.linen.RNN(nn.SimpleCell(4)) for _ in range(2)]
      >>> layer = jaxpack.linen.Bidirectional(*rnns, plan=jaxpack.plan_rows([3, 1]))
      >>> x = np.ones((2, 3, 2), np.float32)
      >>> layer.apply(layer.init(jax.random.key(0), x), x, seq_lengths=[3, 1]).shape
      (2, 3, 8)

    Attributes:
      forward_rnn: a jaxpack.linen.RNN. Another module runs as Flax runs it.
      backward_rnn: likewise.
      plan: the jaxpack.BucketPlan for padded inputs, instead of the RNNs' own plans. Default: theirs.
    Source: flax.linen.Bidirectional.
    """

    plan: BucketPlan | None = dataclasses.field(default=None, kw_only=True)

    def __call__(
        self,
        inputs: PackedSequence | ArrayLike,
        *,
        initial_carry: tuple[PyTree, PyTree] | None = None,
        init_key: jax.Array | None = None,
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
          init_key: as in flax.linen.Bidirectional.

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
            return call_flax(initial_carry=initial_carry, init_key=init_key)
        carries = (None, None) if initial_carry is None else initial_carry
        keys = (None, None) if init_key is None else jax.random.split(init_key)
        each_direction = list(zip(rnns, carries, keys, (False, True), strict=True))
        if self.is_initializing() or self.is_mutable_collection("intermediates") or _is_intercepted():
            steps = {"seq_lengths": seq_lengths, "resets": resets, "mask": mask}
            shared = options | steps | {"return_carry": True, "plan": plan, "forward_mode": forward_mode}
            results = [
                rnn(inputs, initial_carry=carry, init_key=key, reverse=backward, keep_order=backward, **shared)
                for rnn, carry, key, backward in each_direction
            ]
        else:
            layout = Layout.of(inputs, options["time_major"], self.forward_rnn.cell.num_feature_axes)
            begins, valid = check_resets(resets, inputs, layout), check_mask(mask, inputs, seq_lengths, layout)
            call = Call(inputs, layout, seq_lengths, plan, forward_mode, begins, valid)
            directions = [
                rnn._direction(call, carry, key, backward, backward) for rnn, carry, key, backward in each_direction
            ]
            if delegate_to_flax(call, directions):
                return call_flax(initial_carry=tuple(each.carry for each in directions))
            results = run(call, directions)
        carry, outputs = merge(results, self.merge_fn)
        return (carry, outputs) if options["return_carry"] else outputs
