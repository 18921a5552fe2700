"""Layout: the axes of a drop-in's inputs, and the way from them to batches [B, T, *F] and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxpack._checks import concrete_lengths
from jaxpack._packed.inputs import batch_shape, lengths_and_plan, padded_plan
from jaxpack._packed.layout import lay_out, pad
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree

Lengths = ArrayLike | Sequence[int]


class Layout(NamedTuple):
    """The axes of a call's inputs: packed [S, *F], or padded [*batch, T, *F] or [T, *batch, *F].

    Flax allows any number of batch axes. Inside, they are one axis B, and time comes second.

    Attributes:
      batch_shape: the batch axes.
      feature_shape: the feature axes.
      num_steps: T; None if the inputs are packed.
      time_major: True if time comes before the batch axes.
    """

    batch_shape: tuple[int, ...]
    feature_shape: tuple[int, ...]
    num_steps: int | None
    time_major: bool

    @classmethod
    def of(cls, inputs: PackedSequence | jax.Array, time_major: bool, num_feature_axes: int) -> Layout:
        """Returns the layout of inputs whose last `num_feature_axes` axes are features.

        Raises:
          ValueError: if the inputs have too few axes.
        """
        shape, packed = inputs.shape, isinstance(inputs, PackedSequence)
        if len(shape) < 1 + num_feature_axes or (packed and len(shape) > 1 + num_feature_axes):
            axes = "[S" if packed else "[time, *batch" if time_major else "[*batch, time"
            features = ", ".join(["feature"] * num_feature_axes)
            raise ValueError(f"inputs must be {axes}, {features}], which the cell expects, got shape {shape}.")
        split = len(shape) - num_feature_axes
        if isinstance(inputs, PackedSequence):
            return cls((inputs.plan.num_sequences,), shape[split:], None, time_major)
        batch_shape, num_steps = (shape[1:split], shape[0]) if time_major else (shape[: split - 1], shape[split - 1])
        return cls(batch_shape, shape[split:], num_steps, time_major)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one step, from which a Flax cell makes its initial carry."""
        return self.batch_shape + self.feature_shape

    @property
    def step_axes(self) -> tuple[Any, ...]:
        """The axes of padded inputs before those of features."""
        return (self.num_steps, *self.batch_shape) if self.time_major else (*self.batch_shape, self.num_steps)

    @property
    def batch_size(self) -> Any:
        """B, the product of the batch axes."""
        return math.prod(self.batch_shape)

    @property
    def symbolic_axes(self) -> list[Any]:
        """The sizes that are symbols of jax.export."""
        return [size for size in (*self.batch_shape, self.num_steps or 0) if jax.export.is_symbolic_dim(size)]

    @property
    def has_plans(self) -> bool:
        """True if a plan can describe the batch: its sizes are numbers, and it has a sequence."""
        return not self.symbolic_axes and self.batch_size > 0

    @property
    def padded_plan(self) -> BucketPlan:
        """The plan with one bucket that holds the padded batch."""
        return padded_plan(self.batch_size, self.num_steps or 1)

    def check_lengths(self, seq_lengths: Lengths | None, plan: BucketPlan | None) -> tuple[Any, BucketPlan]:
        """Validates lengths and plan; returns int32 lengths [B] and the plan, by default the padded one.

        Raises:
          ValueError, TypeError: if they do not fit the inputs.
        """
        assert self.num_steps is not None
        plan = self.padded_plan if plan is None else plan
        return lengths_and_plan(self.flatten_lengths(seq_lengths), plan, self.batch_size, self.num_steps)

    def pack(self, inputs: PyTree, lengths: jax.Array, plan: BucketPlan, sort: bool) -> PackedSequence:
        """Packs padded inputs, and arrays beside them, under a plan.

        Rows stay in the caller's order (sort=False) only under the padded plan.

        Raises:
          ValueError: if the batch axis is sharded under an explicit mesh, where it cannot be sorted.
        """
        inputs = jax.tree.map(self.flatten_inputs, inputs)
        batch_shape(inputs, "inputs")
        return lay_out(inputs, lengths, plan, sort)

    def restore(self, outputs: PackedSequence) -> PyTree:
        """Returns packed outputs in the layout of the inputs."""
        if self.num_steps is None:
            return outputs
        zeros = jax.tree.map(lambda leaf: np.zeros((), leaf.dtype), outputs.data)
        return self.restore_outputs(pad(outputs, zeros, self.num_steps))

    def flatten_inputs(self, inputs: jax.Array) -> jax.Array:
        """Reshapes padded inputs, or an array with other features, to [B, T, *F]."""
        axes = len(self.batch_shape)
        if self.time_major:
            inputs = jnp.moveaxis(inputs, 0, axes)
        return inputs.reshape(self.batch_size, self.num_steps, *inputs.shape[axes + 1 :])

    def restore_outputs(self, padded: PyTree) -> PyTree:
        """Reshapes outputs [B, T, ...] to the layout of the inputs."""
        if self.time_major:
            padded = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), padded)
        return jax.tree.map(lambda leaf: leaf.reshape(*self.step_axes, *leaf.shape[2:]), padded)

    def flatten_carry(self, carry: PyTree) -> PyTree:
        """Reshapes a carry [*batch, ...] to [B, ...].

        Raises:
          ValueError: if a leaf has other leading axes.
        """
        axes = len(self.batch_shape)

        def flatten(leaf: jax.Array) -> jax.Array:
            if leaf.shape[:axes] != self.batch_shape:
                raise ValueError(
                    f"the carry's leaves must begin with the batch axes {self.batch_shape}, got shape {leaf.shape}. "
                    f"Keep state without a batch axis in a variable of the cell."
                )
            return leaf.reshape(-1, *leaf.shape[axes:])

        return jax.tree.map(flatten, jax.tree.map(jnp.asarray, carry))

    def restore_carry(self, carry: PyTree) -> PyTree:
        """Reshapes a carry [B, ...] to [*batch, ...]."""
        return jax.tree.map(lambda leaf: leaf.reshape(*self.batch_shape, *leaf.shape[1:]), carry)

    def flatten_lengths(self, seq_lengths: Lengths | None) -> Any:
        """Reshapes lengths [*batch] to [B]. The default is T for every sequence.

        Raises:
          ValueError: if their shape is not the batch's.
          TypeError: if they are no array of numbers, but an iterator, say.
        """
        if seq_lengths is None:
            return np.full(self.batch_size, self.num_steps)
        lengths = seq_lengths if isinstance(seq_lengths, jax.Array) else np.asarray(seq_lengths)
        if lengths.dtype == object:
            concrete_lengths(seq_lengths, "seq_lengths")  # raises with the type that was given
        if lengths.shape != self.batch_shape:
            raise ValueError(
                f"seq_lengths must have one length for each sequence, shape {self.batch_shape}, got shape "
                f"{lengths.shape}."
            )
        return lengths if lengths.ndim == 1 else lengths.reshape(-1)
