"""SingleLayer: the base of single layers of one direction: those linear in their state, and those run step by step.

A layer is a frozen specification. Its parameters are a plain pytree; its state, for all sequences or for one, is a
pytree as well, in the layout that `state_like` gives. A subclass adds its equations: `shapes`, `init`, `state_like`,
`run` for whole sequences, and `step_batch` for one step of decoding. The modules of jaxpack.nnx and jaxpack.linen are
made from the specification alone.
"""

from __future__ import annotations

import abc
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxpack._checks import at_least_one
from jaxpack._dtypes import state_dtype
from jaxpack._layers.params import check_params, check_sharding, floating
from jaxpack._layers.stack import explain_forward_mode
from jaxpack._layers.states import shapes_of
from jaxpack._linear.inputs import Aligned, Lengths, align, clean
from jaxpack._packed.inputs import as_batch
from jaxpack._packed.masks import run_on_valid_steps
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._packed.resets import Entering, check_fresh, check_resets
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree


class Direction(NamedTuple):
    """How a call reads its sequences: the static part of `SingleLayer.run`.

    Attributes:
      reverse: whether each sequence is read from its end.
      forward_mode: whether the call must be differentiable in forward mode.
      planned: whether the plan is a choice; otherwise it only gives the shape of a padded batch.
      state_dtype: the name of the dtype of states, which in mixed precision is wider than that of products.
    """

    reverse: bool
    forward_mode: bool
    planned: bool
    state_dtype: str


class SingleLayer(abc.ABC):
    """One layer with one direction: the base class of linear and matrix layers, and of those that run step by step."""

    input_size: int
    hidden_size: int

    def __post_init__(self) -> None:
        for name in ("input_size", "hidden_size"):
            at_least_one(name, getattr(self, name))

    @property
    @abc.abstractmethod
    def output_size(self) -> int:
        """The width of the output."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one step of one sequence: (input_size,)."""
        return (self.input_size,)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of one step of the output of one sequence: (output_size,)."""
        return (self.output_size,)

    @property
    @abc.abstractmethod
    def shapes(self) -> dict[str, Any]:
        """The shape of every parameter, as a pytree with the structure of the parameters."""

    @abc.abstractmethod
    def init(self, key: jax.Array, dtype: Any = None) -> PyTree:
        """Draws parameters.

        Args:
          key: a JAX random key.
          dtype: a floating dtype. Default: JAX's (float32, or float64 under x64).

        Raises:
          TypeError: if key is not a random key, or dtype is not floating.
        """

    @abc.abstractmethod
    def state_like(self, dtype: Any) -> PyTree:
        """Returns the state of one sequence, computed in a dtype, as a pytree of jax.ShapeDtypeStruct."""

    @abc.abstractmethod
    def run(
        self, params: PyTree, packed: PackedSequence, entering: Entering, resets: jax.Array | None, direction: Direction
    ) -> tuple[jax.Array, PyTree]:
        """Runs the recurrence over a batch of at least one sequence.

        Args:
          params: the parameters: factors of products in the dtype of the computation, vectors in that of states.
          packed: data [S, *input_shape], in the dtype of the computation; zero in slack, and NaN in sequences that do
            not fit.
          entering: the states with which sequences and episodes begin, leaves [B, ...] in the caller's order.
          resets: bool [S], the first steps of episodes, arbitrary in slack; None if each sequence is one.
          direction: how to read the sequences.

        Returns:
          The outputs [S, *output_shape], zero in slack; and the final state, leaves [B, ...] in the caller's order.
        """

    @abc.abstractmethod
    def step_batch(self, params: PyTree, state: PyTree, x: jax.Array) -> tuple[PyTree, jax.Array]:
        """Runs one step of a batch [B, F], checked and in one dtype; state None for sequences that begin."""

    def initial_state(self, params: PyTree, batch_size: int) -> PyTree:
        """Returns the state with which sequences begin: zeros.

        Examples:
          >>> layer = jaxpack.MinGRU(2, 4)
          >>> layer.initial_state(layer.init(jax.random.key(0)), 3).shape
          (3, 4)

        Args:
          params: the parameters, which determine dtypes.
          batch_size: the number B of sequences.

        Returns:
          In the layout of the final state, leaves [B, ...].

        Raises:
          TypeError, ValueError: if the parameters are not this layer's.
        """
        like = self.state_like(self._checked_dtype(params))
        return jax.tree.map(lambda leaf: jnp.zeros((batch_size, *leaf.shape), leaf.dtype), like)

    def step(self, params: PyTree, state: PyTree, x: ArrayLike) -> tuple[PyTree, jax.Array]:
        """Runs one step, for step-by-step decoding.

        Args:
          params: the parameters.
          state: the state, as `apply` returns it: leaves [B, ...], or without a batch axis. None for the first
            step of a sequence.
          x: [B, F], or [F].

        Returns:
          The new state, and the output [B, O], or [O].

        Raises:
          ValueError: if a shape does not match the layer.
          TypeError: if x, parameters or state are complex.
        """
        dtype = jnp.result_type(x, self._checked_dtype(params), float)
        _check_real("x", dtype)
        x = jnp.asarray(x, dtype)
        rank, sizes = len(self.input_shape), ", ".join(map(str, self.input_shape))
        if x.ndim - rank not in (0, 1) or x.shape[-rank:] != self.input_shape:
            raise ValueError(f"x must be [B, {sizes}] or [{sizes}], got shape {x.shape}.")
        state = self._checked_state("state", state, x.shape[:-rank], dtype)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
        if x.ndim > rank:
            return self.step_batch(params, state, x)
        state, y = self.step_batch(params, jax.tree.map(lambda leaf: leaf[None], state), x[None])
        return jax.tree.map(lambda leaf: leaf[0], state), y[0]

    def apply(
        self,
        params: PyTree,
        inputs: PackedSequence | ArrayLike,
        initial_state: PyTree = None,
        *,
        lengths: Lengths = None,
        mask: ArrayLike | None = None,
        plan: BucketPlan | None = None,
        resets: PackedSequence | ArrayLike | None = None,
        fresh_state: PyTree = None,
        reverse: bool = False,
        dtype: Any = None,
        forward_mode: bool = False,
    ) -> tuple[Any, PyTree]:
        """Runs the layer.

        Examples:
          >>> layer = jaxpack.MinGRU(2, 4)
          >>> params = layer.init(jax.random.key(0))
          >>> packed = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
          >>> output, state = layer.apply(params, packed)
          >>> output.shape, state.shape  # packed as the inputs are; a state for each sequence
          ((4, 4), (2, 4))

        Args:
          params: the parameters, as `init` returns them.
          inputs: packed data [S, F]; or padded [B, T, F] (batch first), with `lengths` or `mask`; or one sequence
            [T, F].
          initial_state: in the layout of the final state. Default: zeros.
          lengths: int [B], for padded inputs; a number for one sequence. They may be traced. Default: all T.
          mask: bool [B, T], in place of lengths, True at valid steps; [T] for one sequence. Padding may be anywhere:
            valid steps run as if they were next to each other, and the output is put back where they were, zero at
            masked steps. A reset at a masked step acts at the next valid one. The mask may be traced.
          plan: for padded inputs, the static shape to run under. Default: no plan, which compiles one program for all
            lengths. On CPUs LRU, MinGRU, MinLSTM and RGLRU then leave out most of the padding as they run. Other
            layers, and other devices, run the padded batch.
          resets: bool, one a step, laid out as the inputs: True where an episode begins, which starts from the fresh
            state. Default: each sequence is one episode.
          fresh_state: beside resets, the state with which episodes begin, in the layout of the initial state. Default:
            the initial state.
          reverse: set True to read each sequence, or each of its episodes, from its end.
          dtype: a floating dtype to compute in. jnp.bfloat16 with float32 parameters is mixed precision: products have
            bfloat16 factors, and the output is bfloat16; rates, biases, states and the sums of gradients are float32.
            Default: the result type of inputs and parameters.
          forward_mode: set True to differentiate this call in forward mode (jax.jvp, jacfwd, linearize).

        Returns:
          A pair (output, final state).

          The output has the layout of the inputs, [..., output_size], with zeros past each length. The final state is
          the one after the step that is read last, leaves [B, ...] in the caller's row order; for one sequence without
          a batch axis. Sequences that do not fit the plan are NaN in both.

        Raises:
          ValueError: if a shape does not match the layer or the batch, a concrete length does not fit, there is a
            fresh state without resets, or a parameter is sharded under an explicit mesh.
          TypeError: if inputs are packed and lengths, mask or plan are given too, both lengths and mask are given,
            parameters have another structure, inputs, parameters or states are complex, mask or resets are not bool, or
            the call is differentiated in forward mode without forward_mode.
        """
        if mask is not None:
            options = {"reverse": reverse, "dtype": dtype, "forward_mode": forward_mode}
            run = functools.partial(self.apply, params, initial_state=initial_state, fresh_state=fresh_state, plan=plan)
            name = f"{type(self).__name__}.apply"
            run = functools.partial(run, **options)
            return run_on_valid_steps(name, run, inputs, mask, lengths, resets, len(self.input_shape))
        params_dtype = self._checked_dtype(params)
        check_sharding(params)
        batch = inputs if isinstance(inputs, PackedSequence) else as_batch(inputs, "inputs")
        alone = not isinstance(batch, PackedSequence) and jnp.ndim(batch) == 1 + len(self.input_shape)
        if alone:
            batch, lengths, resets = self._as_batch_of_one(batch, lengths, plan, resets)
        aligned = align(f"{type(self).__name__}.apply", batch, {"resets": resets}, lengths, plan)
        self._check_cells(aligned)
        data = aligned.packed.data
        dtype = jnp.result_type(data, params_dtype) if dtype is None else floating(dtype)
        wide = state_dtype(dtype, params_dtype)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype if jnp.ndim(leaf) > 1 else wide), params)
        rows = () if alone else (aligned.packed.plan.num_sequences,)
        check_fresh(fresh_state, resets)
        entering = Entering(
            self._checked_state("initial_state", initial_state, rows, wide),
            self._checked_state("fresh_state", fresh_state, rows, wide),
        )
        if alone:
            entering = jax.tree.map(lambda leaf: leaf[None], entering)
        planned = alone or plan is not None or isinstance(batch, PackedSequence)
        direction = Direction(bool(reverse), bool(forward_mode), planned, wide.name)
        with explain_forward_mode(f"{type(self).__name__}.apply", "apply"):
            cells = aligned._replace(length=None)
            outputs, final = _run(self, direction, jnp.dtype(dtype).name, params, cells, entering)
        laid_out: Any = aligned.laid_out(aligned.packed.replace(data=outputs))
        return (laid_out[0], jax.tree.map(lambda leaf: leaf[0], final)) if alone else (laid_out, final)

    def _checked_dtype(self, params: PyTree) -> Any:
        """Checks parameters, and returns their common dtype."""
        dtype = check_params(params, self.shapes, self)
        _check_real("params", dtype)
        return dtype

    def _zeros(self, lead: tuple[int, ...], like: jax.Array) -> PyTree:
        """Returns zeros for a state, made from an array so that they have its sharding."""
        return jax.tree.map(
            lambda leaf: lax.full_like(like, 0, leaf.dtype, (*lead, *leaf.shape)), self.state_like(like.dtype)
        )

    def _as_batch_of_one(self, sequence: Any, lengths: Any, plan: Any, resets: Any) -> tuple[Any, Any, Any]:
        """Returns one sequence [T, F] as a batch, with its length and resets."""
        if plan is not None or np.ndim(0 if lengths is None else lengths) or isinstance(resets, PackedSequence):
            raise ValueError(
                f"inputs of shape {sequence.shape} are one sequence without a batch axis, which takes no plan=, one "
                f"number as lengths= and resets [T]. A batch is [B, T, {', '.join(map(str, self.input_shape))}]."
            )
        if lengths is not None:
            lengths = jnp.reshape(lengths, 1) if isinstance(lengths, jax.Array) else np.reshape(lengths, 1)
        return sequence[None], lengths, None if resets is None else as_batch(resets, "resets")[None]

    def _check_cells(self, aligned: Aligned) -> None:
        """Raises unless inputs and resets are of the right shape and kind."""
        data = aligned.packed.data
        if data.shape[1:] != self.input_shape:
            sizes = ", ".join(map(str, self.input_shape))
            lead = "[S, " if aligned.length is None else "[B, T, "
            shape = data.shape if aligned.length is None else ("B", "T", *data.shape[1:])
            raise ValueError(
                f"inputs must be {lead}{sizes}] (input_size={self.input_size}), got shape "
                f"({', '.join(map(str, shape))})."
            )
        _check_real("inputs", data.dtype)
        check_resets(aligned.others["resets"], ("S",))

    def _checked_state(self, name: str, state: PyTree, rows: tuple[int, ...], dtype: Any) -> PyTree:
        """Returns a given state in the layout and dtypes of the layer; None for None."""
        if state is None:
            return None
        expected = jax.tree.map(lambda leaf: (*rows, *leaf.shape), self.state_like(dtype))
        given = jax.tree.map(jnp.asarray, state)
        if jax.tree.map(jnp.shape, given) != expected:
            raise ValueError(
                f"{name} must have the layout of the final state of {self}, {expected} (B first), got "
                f"{shapes_of(given)}."
            )
        _check_real(name, jnp.result_type(*jax.tree.leaves(given)))
        return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), given, self.state_like(dtype))


def _check_real(what: str, dtype: Any) -> None:
    """Raises TypeError if a dtype is complex."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"{what} must be real, got dtype {dtype}.")


@functools.partial(jax.jit, static_argnames=("layer", "direction", "dtype"))
def _run(
    layer: SingleLayer, direction: Direction, dtype: str, params: PyTree, aligned: Aligned, entering: Entering
) -> tuple[jax.Array, PyTree]:
    """Runs a layer on cells. Jitted, so each plan is one compilation."""
    packed = clean(aligned.packed, aligned.agree, dtype)
    if not packed.plan.size:  # a batch of no sequences
        state = entering.initial
        if state is None:
            state = layer._zeros((0,), packed.data.astype(direction.state_dtype))
        return lax.full_like(packed.data, 0, shape=(0, *layer.output_shape)), state
    return layer.run(params, packed, entering, aligned.others["resets"], direction)
