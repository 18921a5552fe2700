"""Specification: the options of a recurrent layer, and its parameters: shapes, initial values, PyTorch's layout.

Parameters are a plain pytree with one dict for each layer and direction, under PyTorch's suffix (`l0`, `l0_reverse`,
`l1`, ...):

    params["l0_reverse"]["weight_hh"]   is PyTorch's   weight_hh_l0_reverse, transposed
"""

from __future__ import annotations

import abc
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxpack._cells.cell import Cell, Params
from jaxpack._checks import at_least_one
from jaxpack._layers import state_dict as state_dicts
from jaxpack._layers.params import Drawing, InitializerByGate, check_params, draw
from jaxpack._layers.regularization import OFF, Regularization
from jaxpack._layers.schemes import ForgetBias
from jaxpack._layers.states import initial_shapes, learned_state
from jaxpack._packed.dropout import check_rate
from jaxpack._packed.merge import check_merge, merged_width

LayerParams = dict[str, Params]


class Specification(abc.ABC):
    """What a stack of layers of one cell is: everything but how it runs."""

    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    dropout: float
    bidirectional: bool
    learned_initial_state: bool = False  # a subclass need not have it, nor the next two
    merge: str | None = "concat"
    regularization: Regularization | None = None

    @property
    @abc.abstractmethod
    def cell(self) -> Cell:
        """The cell that every layer and direction runs."""

    def __post_init__(self) -> None:
        for name in ("input_size", "hidden_size", "num_layers"):
            at_least_one(name, getattr(self, name))
        check_rate("dropout", self.dropout)
        for name in ("bias", "bidirectional", "learned_initial_state"):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}.")
        check_merge(self.merge)
        if self.merge != "concat" and not self.bidirectional:
            raise ValueError(f"merge={self.merge!r} joins the outputs of two directions: set bidirectional=True.")
        if self.merge is None and self.num_layers > 1:
            raise ValueError(
                f"merge=None gives an output for each direction, which no next layer can read, but num_layers is "
                f"{self.num_layers}. Choose another merge, or stack layers of num_layers=1."
            )
        if not isinstance(self.regularization, (Regularization, type(None))):
            raise TypeError(f"regularization must be a jaxpack.Regularization, got {self.regularization!r}.")
        if isinstance(self._regularizers.zoneout, tuple):
            self._regularizers.zoneout_of(self.cell)
        for name, rate in (("dropout", self.dropout), ("hidden_dropout", self._regularizers.hidden_dropout)):
            if rate and self.num_layers == 1:
                warnings.warn(
                    f"{name} acts between layers, so {name}={rate} with num_layers=1 does nothing.",
                    stacklevel=_level_of_user(),
                )

    @property
    def num_directions(self) -> int:
        """2 if bidirectional, else 1."""
        return 2 if self.bidirectional else 1

    @property
    def has_dropout(self) -> bool:
        """Whether training draws random masks, for which it needs a key: of dropout, or of another regulariser."""
        return bool(self._random)

    @property
    def _regularizers(self) -> Regularization:
        return self.regularization or OFF

    @property
    def _random(self) -> dict[str, Any]:
        """The rates of what draws masks, by name."""
        rates = {"dropout": self.dropout} if self.dropout else {}
        rates |= self._regularizers.active
        between = ("dropout", "hidden_dropout")
        return {name: rate for name, rate in rates.items() if self.num_layers > 1 or name not in between}

    @property
    def output_size(self) -> int:
        """The width of the output; of each of two outputs if merge is None."""
        return merged_width([self.cell.output_size] * self.num_directions, self.merge)

    @property
    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """The shape of every parameter, as a pytree with the structure of the parameters."""
        learned = initial_shapes(self.cell.state_sizes) if self.learned_initial_state else {}
        return {group: shapes | learned for group, shapes in self._weight_shapes.items()}

    @property
    def _weight_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """The shapes of the parameters that PyTorch's module has."""
        suffixes = ("", "_reverse")[: self.num_directions]
        return {
            f"l{layer}{suffix}": self.cell.shapes(self.output_size if layer else self.input_size, self.bias)
            for layer in range(self.num_layers)
            for suffix in suffixes
        }

    def init(
        self,
        key: jax.Array,
        dtype: Any = None,
        *,
        kernel_init: InitializerByGate = None,
        recurrent_kernel_init: InitializerByGate = None,
        bias_init: InitializerByGate = None,
        scheme: str = "pytorch",
        forget_bias: ForgetBias = None,
    ) -> LayerParams:
        """Draws parameters, by default as PyTorch does: uniform within 1/sqrt(hidden_size) of 0.

        A learned initial state begins at zero.

        An initialiser is a function of (key, shape, dtype), as in jax.nn.initializers and Flax. It is called for each
        gate with the gate's shape, so orthogonal() is orthogonal gate by gate. A mapping gives initialisers to some
        gates and leaves the others at the default. The gates are i, f, g, o (LSTM) and r, z, n (GRU); the one gate of
        RNN has no name.

        A scheme names the library whose defaults apply to what no initialiser is given for:

        ========= ================================== ============================ ======================
        scheme    weight_ih                          weight_hh                    biases
        ========= ================================== ============================ ======================
        pytorch   uniform within 1/sqrt(H)           the same                     the same
        keras     Glorot uniform                     orthogonal, all gates as one 0; 1 for f of an LSTM
        flax      LeCun normal                       orthogonal, gate by gate     0; 1 for f of Flax's MGU
        haiku     LSTM: truncated normal, deviation  the same; GRU and RNN: of    0; 1 for f of an LSTM
                  1/sqrt(F + H); GRU: LeCun normal;  H in place of F
                  RNN: truncated, 1/sqrt(F)
        ========= ================================== ============================ ======================

        Examples:
          >>> from jax.nn.initializers import ones, orthogonal
          >>> lstm = jaxpack.LSTM(2, 4)
          >>> params = lstm.init(jax.random.key(0), recurrent_kernel_init=orthogonal(), bias_init={"f": ones})
          >>> params["l0"]["bias_ih"][4:8].tolist()  # the second of the gates i, f, g, o
          [1.0, 1.0, 1.0, 1.0]
          >>> bias = lstm.init(jax.random.key(0), scheme="keras", forget_bias=2.0)["l0"]["bias_ih"]
          >>> bias[:8].tolist()
          [0.0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0]

        Args:
          key: a JAX random key.
          dtype: a floating dtype. Default: JAX's (float32, or float64 under x64).
          kernel_init: for weight_ih, each gate [F, H]; a function is also used for the projection weight_hr [H, P].
          recurrent_kernel_init: for weight_hh, each gate [P, H].
          bias_init: for the sum of both biases, each gate [H]: bias_ih is drawn with it, bias_hh starts at 0.
          scheme: "pytorch", "keras", "flax" or "haiku".
          forget_bias: the bias of the gate that keeps the state, in all layers and directions: f of an LSTM, z of a
            GRU, f of an MGU (negative where f is the share of the new state). A number, or a jaxpack.Chrono. Default:
            as bias_init and the scheme say.

        Raises:
          TypeError: if key is not a random key, dtype is not floating, or an initialiser is not a function.
          ValueError: if a mapping names a gate that the cell does not have, a result has another shape, the scheme is
            not known, or forget_bias is given to a layer without biases or without such a gate.
        """
        drawing = Drawing(kernel_init, recurrent_kernel_init, bias_init, scheme, forget_bias)
        return self._with_initial_state(draw(key, self._weight_shapes, self.cell, dtype, drawing))

    def initial_state(self, params: LayerParams, batch_size: int) -> Any:
        """Returns the state with which sequences begin: the learned one, or zeros.

        Examples:
          >>> lstm = jaxpack.LSTM(2, 4, learned_initial_state=True)
          >>> h_0, c_0 = lstm.initial_state(lstm.init(jax.random.key(0)), 3)
          >>> h_0.shape
          (1, 3, 4)

        Args:
          params: the parameters, which determine the dtype.
          batch_size: the number B of sequences.

        Returns:
          h_0, for LSTM (h_0, c_0), in the layout of the final state, [num_layers*D, B, H].

        Raises:
          TypeError, ValueError: if the parameters are not this layer's.
        """
        dtype = check_params(params, self.shapes, self)
        if self.learned_initial_state:
            return self._learned_state(params, batch_size, dtype)
        lead = (self.num_layers * self.num_directions, batch_size)
        return jax.tree.map(lambda size: jnp.zeros((*lead, size), dtype), self.cell.state_sizes)

    def from_torch(self, state_dict: Mapping[str, Any]) -> LayerParams:
        """Returns the parameters in the state dict of the torch.nn module with the same options. Exact.

        A learned initial state, which PyTorch does not have, begins at zero.

        Examples:
          >>> gru = jaxpack.GRU(2, 4)
          >>> state_dict = {
          ...     "weight_ih_l0": np.ones((12, 2), np.float32),
          ...     "weight_hh_l0": np.ones((12, 4), np.float32),
          ...     "bias_ih_l0": np.ones(12, np.float32),
          ...     "bias_hh_l0": np.ones(12, np.float32),
          ... }
          >>> gru.from_torch(state_dict)["l0"]["weight_ih"].shape
          (2, 12)

        Args:
          state_dict: tensors or NumPy arrays under PyTorch's names (weight_ih_l0, bias_hh_l1_reverse, ...).

        Raises:
          KeyError: if keys are missing or not known.
          TypeError: if values are not floating numbers.
          ValueError: if a shape is wrong, or JAX would round a value (float64 without x64).
        """
        return self._with_initial_state(state_dicts.from_state_dict(self._weight_shapes, state_dict))

    def to_torch(self, params: Mapping[str, Mapping[str, ArrayLike]]) -> dict[str, np.ndarray]:
        """Returns the state dict of the torch.nn module with the same options, as NumPy arrays. Exact; gradients too.

        `torch_lstm.load_state_dict({k: torch.from_numpy(v) for k, v in lstm.to_torch(params).items()})` takes it. A
        learned initial state is left out: PyTorch's modules take it as an argument, h_0.

        Examples:
          >>> lstm = jaxpack.LSTM(2, 4)
          >>> state_dict = lstm.to_torch(lstm.init(jax.random.key(0)))
          >>> {name: array.shape for name, array in state_dict.items()}
          {'bias_hh_l0': (16,), 'bias_ih_l0': (16,), 'weight_hh_l0': (16, 4), 'weight_ih_l0': (16, 2)}
        """
        check_params(params, self.shapes, self)
        shapes = self._weight_shapes
        weights = {g: {k: leaf for k, leaf in entries.items() if k in shapes[g]} for g, entries in params.items()}
        return state_dicts.to_state_dict(weights)

    def _learned_state(self, params: LayerParams, batch_size: int, dtype: Any) -> Any:
        ordered = {group: params[group] for group in self.shapes}
        return learned_state(ordered, self.cell.state_sizes, batch_size, dtype)

    def _with_initial_state(self, params: LayerParams) -> LayerParams:
        """Returns the parameters with a learned initial state of zeros, if the layer has one."""
        if self.learned_initial_state:
            dtype = jnp.result_type(*jax.tree.leaves(params))
            zeros = {name: jnp.zeros(shape, dtype) for name, shape in initial_shapes(self.cell.state_sizes).items()}
            params = {group: weights | zeros for group, weights in params.items()}
        return params


def _level_of_user() -> int:
    """Returns the stacklevel with which a warning of our caller names the first frame outside jaxpack, Flax and JAX."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("jaxpack", "flax", "jax"):
        frame, level = frame.f_back, level + 1
    return level
