"""One call of a layer: its options, and its way from padded arrays to cells and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxpack._dtypes import state_dtype
from jaxpack._packed.layout import lay_out, pad
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._packed.resets import Resets, packed_beside
from jaxpack._plans.bucket_plan import BucketPlan


class Call(NamedTuple):
    """The options of one call of `apply`.

    Attributes:
      params_dtype: the common dtype of the parameters.
      dtype: the dtype to compute in; None for the result type of data and parameters.
      dropout_key: a random key; None for no dropout.
      initial_state, fresh_state, lengths, plan, forward_mode, return_all_states, return_sequences: as in `apply`.
    """

    params_dtype: Any
    dtype: Any
    dropout_key: jax.Array | None
    initial_state: Any
    fresh_state: Any
    lengths: ArrayLike | Sequence[int] | None
    plan: BucketPlan | None
    forward_mode: bool
    return_all_states: bool
    return_sequences: bool

    @property
    def planned(self) -> bool:
        """Whether the plan is a choice. Lengths alone run without one."""
        return self.plan is not None or self.lengths is None

    def dtype_with(self, data: jax.Array) -> Any:
        """Returns the dtype of products and outputs."""
        return jnp.result_type(data, self.params_dtype) if self.dtype is None else self.dtype

    def state_dtype_with(self, data: jax.Array) -> Any:
        """Returns the dtype of states and gates."""
        return state_dtype(self.dtype_with(data), self.params_dtype)


def lay_out_with(
    batch: jax.Array, resets: jax.Array | None, lengths: Any, plan: BucketPlan, sort: bool = True
) -> tuple[PackedSequence, Resets | None]:
    """Packs a padded batch [B, T, F] and its resets [B, T]."""
    return packed_beside(lay_out((batch, resets), lengths, plan, sort))


def pad_steps(packed: PackedSequence, length: int) -> Any:
    """Returns what packed sequences have at each step as arrays [B, T, ...]."""
    return pad(packed, jax.tree.map(lambda _: 0, packed.data), length)
