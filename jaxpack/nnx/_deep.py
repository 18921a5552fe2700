"""DeepRNN as a flax.nnx module: a specification with its parameters, and a stream of keys for dropout.

    stack = jaxpack.nnx.DeepRNN([jaxpack.LSTM(12, 64, bidirectional=True), jaxpack.MinGRU(128, 128)], rngs=nnx.Rngs(0))
    output, states = stack(packed)
    output, states = stack(x, seq_lengths=lengths)

`stack.layer` is the specification, a jaxpack.DeepRNN. `stack.params` are its parameters as nnx.Param.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.typing import ArrayLike

from jaxpack._deep.composed import Layer
from jaxpack._deep.deep_rnn import DeepRNN as _DeepRNN
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack.nnx._linear import _as_dict, _values_of
from jaxpack.nnx._stacks import _key

__all__ = ["DeepRNN"]


class DeepRNN(nnx.Module):
    """A stack of layers of any kinds and widths. stack(packed) returns (output, states).

    The arguments layers, connection, norm, dropout and locked are those of jaxpack.DeepRNN: layers are specifications,
    such as jaxpack.LSTM and jaxpack.Bidirectional, and not modules.

    Examples:
      >>> from flax import nnx
      >>> layers = [jaxpack.Bidirectional(jaxpack.GRU(2, 4)), jaxpack.MinGRU(8, 8)]
      >>> stack = jaxpack.nnx.DeepRNN(layers, connection=(None, "residual"), dropout=0.1, rngs=nnx.Rngs(0))
      >>> output, (both, last) = stack(jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))]))
      >>> output.shape, last.shape
      ((4, 8), (2, 8))

    Args:
      rngs: the random streams: `params` draws the parameters, `dropout` the masks.
      dtype: the dtype to compute in. Default: the result type of inputs and parameters.
      param_dtype: the dtype of the parameters. Default: JAX's float.
      deterministic: True to start in the mode that `eval()` sets, without dropout. Default: False.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        connection: str | Sequence[str | None] | None = None,
        norm: bool = False,
        dropout: float = 0.0,
        locked: bool = False,
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = None,
        deterministic: bool = False,
    ) -> None:
        self.layer = _DeepRNN(layers, connection=connection, norm=norm, dropout=dropout, locked=locked)
        self.dtype = dtype
        for name, value in self.layer.init(rngs.params(), param_dtype).items():
            setattr(self, name, nnx.data(jax.tree.map(nnx.Param, value)))
        self.deterministic = deterministic
        self.rngs = nnx.data(rngs.dropout.fork() if self.layer.has_dropout else None)

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
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
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
          deterministic: True to leave out dropout. Default: as `train()` or `eval()` has set the module.
          forward_mode: set True to differentiate this call in forward mode.
          return_layer_outputs: set True to return the outputs of all layers as well.
          rngs: the source of dropout's key, or a key. Default: the module's own stream.

        Returns:
          The output in the layout of the inputs, and the final states; with return_layer_outputs, the outputs of the
          layers come third.

        Raises:
          ValueError: as `jaxpack.DeepRNN.apply` does.
          TypeError: as `jaxpack.DeepRNN.apply` does.
        """
        deterministic = self.deterministic if deterministic is None else deterministic
        active = self.layer.has_dropout and not deterministic
        shapes = self.layer.shapes
        return self.layer.apply(
            {name: _values_of(getattr(self, name), shape) for name, shape in shapes.items()},
            inputs,
            initial_state,
            _key(self.rngs if rngs is None else rngs) if active else None,
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

    @property
    def params(self) -> nnx.Dict:
        """The module's nnx.Param, with the structure of the layer's parameters."""
        return _as_dict({name: getattr(self, name) for name in self.layer.shapes})

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets the module's mode. nnx.view calls it.

        Args:
          deterministic: True to leave out dropout.
        """
        if deterministic is not None:
            self.deterministic = deterministic
