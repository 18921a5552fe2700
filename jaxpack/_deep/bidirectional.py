"""Bidirectional: two layers over the same sequences, one from each end."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.typing import ArrayLike

from jaxpack._deep.batch import Batch
from jaxpack._deep.call import Call, run_composed
from jaxpack._deep.composed import ComposedLayer, Given, Layer, check_part, input_shape, output_shape, run_part, size_of
from jaxpack._layers.recurrent_layer import RecurrentLayer
from jaxpack._packed.merge import check_merge, merge_directions, merged_width
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree


@dataclasses.dataclass(frozen=True)
class Bidirectional(ComposedLayer):
    """Two layers over the same sequences, the second of which reads each from its end. Returns (output, states).

        output_t = merge(forward(x)_t, backward(x)_t)

    The state is a pair, that of each layer: the final one after the last step forward, and after the first backward.

    Examples:
      >>> layer = jaxpack.Bidirectional(jaxpack.MinGRU(2, 4), merge="sum")
      >>> params = layer.init(jax.random.key(0))
      >>> packed = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
      >>> output, (forward, backward) = layer.apply(params, packed)
      >>> output.shape, forward.shape, backward.shape
      ((4, 4), (2, 4), (2, 4))
      >>> jaxpack.Bidirectional(jaxpack.SLSTM(2, 4), jaxpack.GRU(2, 3)).output_size  # side by side
      7

    Args:
      forward: a layer of one direction.
      backward: the layer that reads from the end, with its own parameters. Default: one like the first.
      merge: how outputs are joined: "concat" side by side (convolutional ones by channel), "sum", "mean" or "mul" value
        by value; None for a pair of outputs.

    Raises:
      TypeError: if one is not a layer.
      ValueError: if merge is not known, a layer has two directions already, or shapes do not fit.
    Source: mirrors keras.layers.Bidirectional and flax.linen.Bidirectional.
    """

    forward: Layer
    backward: Layer | None = None
    merge: str | None = "concat"

    def __post_init__(self) -> None:
        check_merge(self.merge)
        if self.backward is None:
            object.__setattr__(self, "backward", self.forward)
        for name, part in self.parts.items():
            check_part(name, part)
            if isinstance(part, Bidirectional) or (isinstance(part, RecurrentLayer) and part.num_directions > 1):
                raise ValueError(f"{name} must read in one direction, but {part} reads in two.")
        taken, given = ([shape(part) for part in self.parts.values()] for shape in (input_shape, output_shape))
        names = f"forward ({type(self.forward).__name__}) and backward ({type(self.backward).__name__})"
        if taken[0] != taken[1]:
            raise ValueError(
                f"{names} read the same sequences, but take {size_of(taken[0])} and {size_of(taken[1])} a step."
            )
        same = given[0][:-1] == given[1][:-1] if self.merge == "concat" else given[0] == given[1]
        if self.merge is not None and not same:
            raise ValueError(
                f'merge="{self.merge}" cannot join the outputs of {names}, {size_of(given[0])} and {size_of(given[1])} '
                f'a step. "concat" takes different widths, merge=None any shapes.'
            )

    @property
    def parts(self) -> dict[str, Any]:
        """Both layers by name."""
        return {"forward": self.forward, "backward": self.backward}

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of one step of the output of one sequence; with merge=None of the forward layer's."""
        shapes = [output_shape(part) for part in self.parts.values()]
        return (*shapes[0][:-1], merged_width([shape[-1] for shape in shapes], self.merge))

    def apply(
        self,
        params: PyTree,
        inputs: Any,
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
    ) -> tuple[Any, tuple[Any, Any]]:
        """Runs both layers.

        Args:
          params: {"forward": ..., "backward": ...}, as `init` returns them.
          inputs: packed data [S, F]; or padded [B, T, F] (batch first), with `lengths` or `mask`; or one sequence
            [T, F]. Where the first layer takes a tuple, a tuple.
          initial_state: a pair, in the layout of the final states. Default: those of the layers.
          dropout_key: a JAX random key. Needed if a layer has dropout, unless deterministic.
          lengths: as in `jaxpack.DeepRNN.apply`, and so are the other arguments.
          mask: bool [B, T], in place of lengths.
          plan: for padded inputs, the static shape to run under.
          resets: bool, one a step, laid out as the inputs: True where an episode begins. The backward layer begins anew
            at an episode's last step.
          fresh_state: beside resets, a pair of the states with which episodes begin.
          deterministic: set True to leave dropout out.
          dtype: a floating dtype to compute in.
          forward_mode: set True to differentiate this call in forward mode.

        Returns:
          A pair (output, final states). The output has the layout of the inputs, with zeros past each length; with
          merge=None it is a pair of outputs. Sequences that do not fit the plan are NaN.

        Raises:
          ValueError: as `jaxpack.DeepRNN.apply` does.
          TypeError: as `jaxpack.DeepRNN.apply` does.
        """
        given = initial_state, dropout_key, lengths, mask, plan, resets, fresh_state
        output, states = run_composed(self, params, inputs, Call(*given, deterministic, dtype, forward_mode))
        return output, states

    def run(self, params: PyTree, batch: Batch, given: Given) -> tuple[Any, ...]:
        """Runs both layers inside a program."""
        results = [
            run_part(part, params[name], batch, given.to_part(i), from_end=name == "backward")
            for i, (name, part) in enumerate(self.parts.items())
        ]
        outputs, finals = zip(*results, strict=True)
        return merge_directions(outputs, self.merge), finals
