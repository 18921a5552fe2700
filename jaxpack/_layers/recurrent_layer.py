"""RecurrentLayer: the base of RNN, LSTM and GRU, which adds everything but the cell.

The backward direction reverses the valid span of each sequence, runs the same left-aligned recurrence, and reverses
the outputs back.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxpack._layers.call import Call, lay_out_with, pad_steps
from jaxpack._layers.params import check_params, check_sharding, floating
from jaxpack._layers.specification import LayerParams, Specification
from jaxpack._layers.stack import Stack, explain_forward_mode, run_stack
from jaxpack._layers.states import checked_state, first_of_state, shapes_of, zero_state
from jaxpack._packed.inputs import as_batch, batch_plan, batch_shape, lengths_and_plan, padded_plan
from jaxpack._packed.masks import run_on_valid_steps
from jaxpack._packed.merge import merge_directions
from jaxpack._packed.packed_sequence import PackedSequence, check_packed
from jaxpack._packed.resets import Resets, check_fresh, packed_resets, padded_resets
from jaxpack._plans.bucket_plan import BucketPlan


class RecurrentLayer(Specification):
    """A stack of layers of one cell, in one or both directions: the base class of RNN, LSTM, GRU and own layers.

    A subclass is a frozen dataclass with the fields input_size, hidden_size, num_layers, bias, dropout, bidirectional
    and, if it has them, learned_initial_state and regularization, in any order and with any further ones, and the
    property `cell`.

    Examples:
      >>> isinstance(jaxpack.GRU(2, 4), RecurrentLayer)
      True
    """

    def apply(
        self,
        params: LayerParams,
        inputs: PackedSequence | ArrayLike,
        initial_state: Any = None,
        dropout_key: jax.Array | None = None,
        *,
        lengths: ArrayLike | Sequence[int] | None = None,
        mask: ArrayLike | None = None,
        plan: BucketPlan | None = None,
        resets: PackedSequence | ArrayLike | None = None,
        fresh_state: Any = None,
        deterministic: bool = False,
        dtype: Any = None,
        forward_mode: bool = False,
        return_all_states: bool = False,
        return_sequences: bool = True,
    ) -> tuple[Any, ...]:
        """Runs the layer.

        Examples:
          >>> rnn = jaxpack.RNN(2, 4)
          >>> params = rnn.init(jax.random.key(0))
          >>> output, h_n = rnn.apply(params, np.ones((2, 3, 2)), lengths=[3, 1], plan=jaxpack.plan_rows([3, 1]))
          >>> output.shape, h_n.shape  # padded as the inputs are; [num_layers * directions, B, hidden_size]
          ((2, 3, 4), (1, 2, 4))

        Args:
          params: the parameters, as `init` and `from_torch` return them.
          inputs: packed data [S, F]; or padded [B, T, F] (batch first), with `lengths` or `mask`; or one sequence
            [T, F].
          initial_state: h_0, for LSTM (h_0, c_0), in the layout of the final state. Default: the learned one, or zeros.
          dropout_key: a JAX random key. Needed if there is dropout or another regulariser, unless deterministic.
          lengths: int [B], for padded inputs; a number for one sequence. They may be traced. Default: all T.
          mask: bool [B, T], in place of lengths, True at valid steps; [T] for one sequence. Padding may be anywhere:
            valid steps run as if they were next to each other, and the output is put back where they were, zero at
            masked steps. A reset at a masked step acts at the next valid one. The mask may be traced.
          plan: for padded inputs, the static shape to run under. Default: no plan, which compiles one program for all
            lengths, whose loops follow the lengths as it runs (on GPUs: the padded plan).
          resets: one bool a step, laid out as the inputs: packed, [B, T] or [T]. True says that an episode begins at
            this step, from the fresh state of its sequence. A backward direction begins anew at an episode's last step.
            They may be traced. Default: each sequence is one episode.
          fresh_state: beside resets, the state with which episodes begin, in the layout of the initial state. Default:
            the initial state.
          deterministic: set True to evaluate: no dropout, and the mean of zoneout.
          dtype: a floating dtype to compute in, to which inputs, parameters and states are cast. Default: the result
            type of inputs and parameters. jnp.bfloat16 (or float16) with float32 parameters is mixed precision:
            products have bfloat16 factors, and the output is bfloat16; gates, states and the sums of gradients are
            float32.
          forward_mode: set True to differentiate this call in forward mode (jax.jvp, jacfwd, linearize). It then runs
            a plain scan, which trains more slowly. jax.hessian and forward over reverse do not need it.
          return_all_states: set True to return the state after each step as well.
          return_sequences: set False to return, in place of the output of each step, that of the last layer after each
            sequence's own last step, `final_output(state)`. The outputs of the last layer are then not kept in memory,
            except for a derivative.

        Returns:
          A pair (output, final state); with return_all_states (output, final state, states).

          The output has the layout of the inputs, [..., D*H] for D directions of width H, with zeros past each length;
          if `merge` is not "concat", [..., H], and for None a pair of these. Without return_sequences it is [B, D*H].
          The final state is h_n [num_layers*D, B, H], for LSTM (h_n, c_n), in the caller's row order, after the last
          step of each sequence (its first, for the backward direction). For one sequence it has no batch axis.
          Sequences that do not fit the plan are NaN in both.

          The states are h, for LSTM (h, c), after each step of each layer and direction, [..., num_layers*D, H] in the
          layout of the output (a PackedSequence if inputs are packed), with zeros past each length.

        Raises:
          ValueError: if a shape does not match the layer or the batch, a concrete length does not fit, dropout is on
            and there is no key, resets are not of the same sequences, there is a fresh state without resets, a
            parameter is sharded under an explicit mesh, or return_all_states is set without return_sequences.
          TypeError: if inputs are packed and lengths, mask or plan are given too, both lengths and mask are given, one
            of inputs and resets is packed and the other padded, mask or resets are not bool, parameters have another
            structure, dtype is not floating, or the call is differentiated in forward mode without forward_mode.
        Source: torch.nn.RNN, LSTM and GRU.
        """
        name = f"{type(self).__name__}.apply"
        returns = bool(return_all_states), bool(return_sequences)
        if returns == (True, False):
            raise ValueError("return_all_states=True returns each step's states: leave return_sequences at True.")
        if mask is not None:
            options = {"deterministic": deterministic, "dtype": dtype, "forward_mode": forward_mode}
            outputs = {"return_all_states": return_all_states, "return_sequences": return_sequences}
            run = functools.partial(self.apply, params, initial_state=initial_state, dropout_key=dropout_key, plan=plan)
            run = functools.partial(run, fresh_state=fresh_state, **options, **outputs)
            return run_on_valid_steps(name, run, inputs, mask, lengths, resets, by_step=return_sequences)
        key = self._active_dropout_key(dropout_key, deterministic)
        params_dtype = check_params(params, self.shapes, self)
        check_sharding(params)
        if dtype is not None:
            dtype = floating(dtype)
        check_fresh(fresh_state, resets)
        states = initial_state, fresh_state
        call = Call(params_dtype, dtype, key, *states, lengths, plan, forward_mode, *returns)
        if isinstance(inputs, PackedSequence):
            if lengths is not None or plan is not None:
                raise TypeError("inputs are packed, and carry their lengths and plan: do not give lengths= or plan=.")
            packed = check_packed(inputs, name)
            return self._apply_packed(params, packed, call, packed_resets(name, packed, resets))
        batch = as_batch(inputs, "inputs")
        if not isinstance(batch, jax.Array) or batch.ndim not in (2, 3):
            raise ValueError(
                f"inputs must be a PackedSequence, [B, T, {self.input_size}] or one sequence [T, {self.input_size}], "
                f"got {shapes_of(batch)}. Pass a list of sequences through jaxpack.pack_sequence."
            )
        self._check_features(batch)
        begins = padded_resets(name, resets, batch.shape[:-1])
        apply = self._apply_unbatched if batch.ndim == 2 else self._apply_padded
        return apply(params, batch, call, begins)

    def final_output(self, state: Any) -> Any:
        """Returns the last layer's output after each sequence's own last step, both directions joined as `merge` says.

        final_output(h_n) = [h_n[-2] h_n[-1]] if bidirectional, else h_n[-1]

        The backward direction ends at a sequence's first step, where it has read everything; `last(output)` takes it
        at the last step, where it has read one. With one direction the two agree, except for sequences of length 0,
        whose final output is their initial state.

        Examples:
          >>> lstm = jaxpack.LSTM(2, 4, num_layers=2, bidirectional=True)
          >>> params = lstm.init(jax.random.key(0))
          >>> output, state = lstm.apply(params, np.ones((3, 5, 2)), lengths=[5, 3, 1])
          >>> lstm.final_output(state).shape
          (3, 8)

        Args:
          state: the final state as `apply` returns it: h_n [num_layers*D, B, H], for LSTM (h_n, c_n). For one sequence
            it has no batch axis.

        Returns:
          [B, D*H], in the caller's row order; [D*H] for one sequence. If `merge` is not "concat", [B, H], and for None
          a pair of these.

        Raises:
          ValueError: if the state does not have this layer's layout.
        Source: Keras's Bidirectional(LSTM(n))(x), where return_sequences=False.
        """
        h_n = first_of_state(state, self.cell.state_sizes, self.num_layers * self.num_directions, str(self))
        return merge_directions(list(h_n[-self.num_directions :]), self.merge)

    def _apply_packed(
        self, params: LayerParams, packed: PackedSequence, call: Call, resets: Resets | None
    ) -> tuple[Any, ...]:
        data = packed.data
        if len(jax.tree.leaves(data)) != 1 or not hasattr(data, "ndim"):
            raise ValueError(f"inputs must have one array of data [S, {self.input_size}], got a pytree: {packed!r}.")
        self._check_features(data, packed=True)
        dtype, batch_size = call.state_dtype_with(data), packed.plan.num_sequences
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
        if call.initial_state is not None:
            state = self._checked_state("initial_state", call.initial_state, batch_size, dtype)
        elif self.learned_initial_state:
            state = self._learned_state(params, batch_size, dtype)
        else:  # of width 1: nothing is differentiated by it
            lead = (self.num_layers * self.num_directions, batch_size)
            state = zero_state(jax.tree.map(lambda _: 1, self.cell.state_sizes), lead, data, dtype)
        fresh = call.fresh_state
        fresh = None if fresh is None else self._checked_state("fresh_state", fresh, batch_size, dtype)
        packed = packed.replace(data=data.astype(call.dtype_with(data)))
        ordered = [params[group] for group in self.shapes]
        stack = Stack(
            self.cell,
            self.num_directions,
            self.merge,
            float(self.dropout),
            call.planned,
            call.forward_mode,
            call.return_all_states,
            not call.return_sequences,
            regularization=self._regularizers,
        )
        with explain_forward_mode(f"{type(self).__name__}.apply", "apply"):
            outputs, final, *states = run_stack(stack, ordered, packed, state, call.dropout_key, resets, fresh)
        if not call.return_sequences:
            final_output = self.final_output(final)
            return jax.tree.map(lambda leaf: leaf.astype(packed.data.dtype), final_output), final
        return packed.replace(data=outputs), final, *(packed.replace(data=each) for each in states)

    def _apply_padded(
        self, params: LayerParams, batch: jax.Array, call: Call, resets: jax.Array | None
    ) -> tuple[Any, ...]:
        batch_size, max_length = batch_shape(batch, "inputs")
        lengths = np.full(batch_size, max_length) if call.lengths is None else call.lengths
        plan, sort = call.plan, call.planned or not batch.size
        if plan is None:
            plan = padded_plan(batch_size, max_length) if sort else batch_plan(batch_size, max_length)
        checked = lengths_and_plan(lengths, plan, batch_size, max_length)
        packed, cells = lay_out_with(batch, resets, *checked, sort)
        output, final, *after = self._apply_packed(params, packed, call, cells)
        if not call.return_sequences:
            return output, final
        return pad_steps(output, max_length), final, *(pad_steps(each, max_length) for each in after)

    def _apply_unbatched(
        self, params: LayerParams, sequence: jax.Array, call: Call, resets: jax.Array | None
    ) -> tuple[Any, ...]:
        """Runs one sequence [T, F] as a batch of one, under a plan, so that its loops stay static under jax.vmap."""
        lengths, max_length = call.lengths, len(sequence)
        if call.plan is not None or np.ndim(0 if lengths is None else lengths):
            raise ValueError(
                f"inputs of shape {sequence.shape} are one sequence without a batch axis, which takes no plan= and one "
                f"number as lengths=. A batch is [B, T, {self.input_size}]."
            )
        dtype, batched = call.state_dtype_with(sequence), {}
        for name in ("initial_state", "fresh_state"):
            if getattr(call, name) is not None:
                state = self._checked_state(name, getattr(call, name), None, dtype)
                batched[name] = jax.tree.map(lambda leaf: leaf[:, None], state)
        lengths = max_length if lengths is None else lengths
        lengths = jnp.reshape(lengths, 1) if isinstance(lengths, jax.Array) else np.reshape(lengths, 1)
        lengths, plan = lengths_and_plan(lengths, padded_plan(1, max_length), 1, max_length)
        packed, cells = lay_out_with(sequence[None], None if resets is None else resets[None], lengths, plan)
        output, final, *states = self._apply_packed(params, packed, call._replace(plan=plan, **batched), cells)
        outputs = [pad_steps(each, max_length) for each in (output, *states)] if call.return_sequences else [output]
        output, *states = jax.tree.map(lambda leaf: leaf[0], outputs)
        return output, jax.tree.map(lambda leaf: leaf[:, 0], final), *states

    def _check_features(self, array: jax.Array, packed: bool = False) -> None:
        if (packed and array.ndim != 2) or array.shape[-1] != self.input_size:
            expected = f"[S, {self.input_size}]" if packed else f"{self.input_size} features in the last axis"
            raise ValueError(f"inputs must have {expected} (input_size={self.input_size}), got shape {array.shape}.")
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise TypeError(f"inputs must be real, got dtype {array.dtype}.")

    def _checked_state(self, name: str, state: Any, batch_size: int | None, dtype: Any) -> Any:
        """Returns a given state in a dtype; of one sequence if batch_size is None."""
        rows = () if batch_size is None else (batch_size,)
        return checked_state(name, state, self.cell.state_sizes, (self.num_layers * self.num_directions, *rows), dtype)

    def _active_dropout_key(self, key: jax.Array | None, deterministic: bool) -> jax.Array | None:
        if deterministic or not self.has_dropout:
            return None
        if key is None:
            rates = [f"{name}={rate}" for name, rate in self._random.items()]
            raise ValueError(
                f"{', '.join(rates)} {'is' if len(rates) == 1 else 'are'} on, but there is no dropout_key. Pass "
                f"dropout_key=jax.random.key(...) to train, or deterministic=True to evaluate."
            )
        return key
