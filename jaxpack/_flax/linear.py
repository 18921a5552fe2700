"""The methods of the linear layers as Flax modules: a call over whole sequences, and one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax
from jax.typing import ArrayLike

from jaxpack._linear.layer import SingleLayer
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree


class LinearModule(Protocol):
    """What a module of either Flax has."""

    @property
    def dtype(self) -> Any:
        """The dtype to compute in, or None."""

    def _parts(self, inputs: Any) -> tuple[SingleLayer, PyTree]:
        """Returns the specification for these inputs, and its parameters."""


def call(
    self: LinearModule,
    inputs: PackedSequence | ArrayLike,
    initial_state: PyTree = None,
    *,
    seq_lengths: ArrayLike | Sequence[int] | None = None,
    mask: ArrayLike | None = None,
    plan: BucketPlan | None = None,
    resets: PackedSequence | ArrayLike | None = None,
    fresh_state: PyTree = None,
    reverse: bool = False,
    forward_mode: bool = False,
) -> tuple[Any, PyTree]:
    """Runs the layer as `jaxpack.MinGRU.apply` does.

    Args:
      inputs: packed data [S, F]; or padded [B, T, F] with `seq_lengths` or `mask`; or one sequence [T, F].
      initial_state: in the layout of the final state. Default: zeros.
      seq_lengths: int [B], for padded inputs. Default: all T.
      mask: bool [B, T], in place of seq_lengths, True at valid steps, which may be anywhere in a row.
      plan: the jaxpack.BucketPlan for padded inputs. Default: no plan, one program for all lengths.
      resets: bool, one a step, laid out as the inputs: True where an episode begins, from the fresh state.
      fresh_state: beside resets, the state with which episodes begin. Default: the initial state.
      reverse: set True to read each sequence from its end.
      forward_mode: set True to differentiate this call in forward mode.

    Returns:
      The output in the layout of the inputs, and the final state.

    Raises:
      ValueError: as `jaxpack.MinGRU.apply` does.
      TypeError: as `jaxpack.MinGRU.apply` does.
    """
    layer, params = self._parts(inputs)
    return layer.apply(
        params,
        inputs,
        initial_state,
        lengths=seq_lengths,
        mask=mask,
        plan=plan,
        resets=resets,
        fresh_state=fresh_state,
        reverse=reverse,
        dtype=self.dtype,
        forward_mode=forward_mode,
    )


def step(self: LinearModule, state: PyTree, x: ArrayLike) -> tuple[PyTree, jax.Array]:
    """Runs one step, for step-by-step decoding.

    Args:
      state: the state, as a call returns it; None for the first step of a sequence.
      x: [B, F], or [F].

    Returns:
      The new state, and the output [B, O], or [O].
    """
    layer, params = self._parts(x)
    return layer.step(params, state, x)
