"""DeepRNN as a flax.linen module, made from its specification.

    stack = jaxpack.linen.DeepRNN([jaxpack.LSTM(12, 64, bidirectional=True), jaxpack.MinGRU(128, 128)])
    variables = stack.init(jax.random.key(0), packed)
    output, states = stack.apply(variables, packed)
    output, states = stack.apply(variables, x, seq_lengths=lengths)

`stack.layer()` is the specification, a jaxpack.DeepRNN, and variables["params"] are its parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from flax.core import unfreeze
from jax.typing import ArrayLike

from jaxpack._deep.composed import Layer
from jaxpack._deep.deep_rnn import DeepRNN as _DeepRNN
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree

__all__ = ["DeepRNN"]


class DeepRNN(nn.Module):
    """A stack of layers of any kinds and widths. stack.apply(variables, packed) returns (output, states).

    The attributes layers, connection, norm, dropout and locked are those of jaxpack.DeepRNN: layers are specifications,
    such as jaxpack.LSTM and jaxpack.Bidirectional, and not modules. They say their input sizes.

    Examples:
      >>> layers = [jaxpack.Bidirectional(jaxpack.GRU(2, 4)), jaxpack.MinGRU(8, 8)]
      >>> stack = jaxpack.linen.DeepRNN(layers, connection=(None, "residual"))
      >>> packed = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])
      >>> output, (both, last) = stack.apply(stack.init(jax.random.key(0), packed), packed)
      >>> output.shape, last.shape
      ((4, 8), (2, 8))

    Attributes:
      dtype: the dtype to compute in. Default: the result type of inputs and parameters.
      param_dtype: the dtype of the parameters. Default: JAX's float.
      deterministic: True to leave out dropout. The attribute or the call must say it if there is dropout.
    """

    layers: Sequence[Layer]
    connection: str | Sequence[str | None] | None = dataclasses.field(default=None, kw_only=True)
    norm: bool = dataclasses.field(default=False, kw_only=True)
    dropout: float = dataclasses.field(default=0.0, kw_only=True)
    locked: bool = dataclasses.field(default=False, kw_only=True)
    dtype: Any = dataclasses.field(default=None, kw_only=True)
    param_dtype: Any = dataclasses.field(default=None, kw_only=True)
    deterministic: bool | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        spec = self.layer()  # validates the options, and makes them hashable
        self.layers, self.connection = spec.layers, spec.connection
        super().__post_init__()

    @nn.nowrap
    def layer(self) -> _DeepRNN:
        """Returns the specification."""
        options: dict[str, Any] = {name: getattr(self, name) for name in ("connection", "norm", "dropout", "locked")}
        return _DeepRNN(self.layers, **options)

    @nn.compact
    def __call__(
        self,
        inputs: Any,
        initial_state: Any = None,
        *,
        seq_lengths: ArrayLike | Sequence[int] | None = None,
        mask: ArrayLike | None = None,
        plan: BucketPlan | None = None,
        resets: PackedSequence | ArrayLike | None = None,
        fresh_state: Any = None,
        deterministic: bool | None = None,
        forward_mode: bool = False,
        return_layer_outputs: bool = False,
    ) -> tuple[Any, ...]:
        """Runs the layers as `jaxpack.DeepRNN.apply` does.

        Args:
          inputs: packed data [S, F]; or padded [B, T, F] with `seq_lengths` or `mask`; or one sequence [T, F].
          initial_state: a tuple with a state for each layer, or None for its default.
          seq_lengths: int [B], for padded inputs. Default: all T.
          mask: bool [B, T], in place of seq_lengths, True at valid steps, which may be anywhere in a row.
          plan: the jaxpack.BucketPlan for padded inputs. Default: no plan, one program for all lengths.
          resets: bool, one a step, laid out as the inputs: True where an episode begins, from the fresh state.
          fresh_state: beside resets, a tuple with the state of each layer with which episodes begin, or None.
          deterministic: True to leave out dropout, whose key comes from the rng "dropout".
          forward_mode: set True to differentiate this call in forward mode.
          return_layer_outputs: set True to return the outputs of all layers as well.

        Returns:
          The output in the layout of the inputs, and the final states; with return_layer_outputs, the outputs of the
          layers come third.

        Raises:
          ValueError: as `jaxpack.DeepRNN.apply` does.
          TypeError: as `jaxpack.DeepRNN.apply` does.
        """
        layer = self.layer()
        active = layer.has_dropout and not nn.merge_param("deterministic", self.deterministic, deterministic)
        return layer.apply(
            self._params(layer),
            inputs,
            initial_state,
            self.make_rng("dropout") if active else None,
            lengths=seq_lengths,
            mask=mask,
            plan=plan,
            resets=resets,
            fresh_state=fresh_state,
            deterministic=not active,
            dtype=self.dtype,
            forward_mode=forward_mode,
            return_layer_outputs=return_layer_outputs,
        )

    @nn.nowrap
    def _params(self, layer: _DeepRNN) -> PyTree:
        """Returns the parameters as the layer takes them, drawn if there are none yet."""
        drawn: dict[str, Any] = {}

        def draw(key: jax.Array, name: str) -> Any:
            if not drawn:
                drawn.update(layer.init(key, self.param_dtype))
            return drawn[name]

        if self.is_initializing() and not self.has_variable("params", "layer_0"):
            for name in layer.shapes:
                self.param(name, draw, name)
        return {name: unfreeze(nn.meta.unbox(self.get_variable("params", name))) for name in layer.shapes}
