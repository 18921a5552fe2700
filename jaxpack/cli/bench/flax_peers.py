"""Flax's RNN and Bidirectional in `jaxpack bench`, and jaxpack's modules with the same names."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

import jaxpack
from jaxpack.cli.bench.calls import Calls, Missing, jax_calls, of_cell
from jaxpack.cli.bench.further_cells import FURTHER_CELLS
from jaxpack.cli.bench.stepped_cells import CONVOLUTIONAL, STEPPED_LAYERS, SteppedCell, side_by_side
from jaxpack.cli.bench.workloads import Workload
from jaxpack.interop import to_linen

_CELLS: Mapping[str, str] = MappingProxyType({"lstm": "OptimizedLSTMCell", "gru": "GRUCell", "rnn": "SimpleCell"})
_LINEN_CELLS: Mapping[str, str] = MappingProxyType({**_CELLS, "convlstm": "ConvLSTMCell"})


class PeepholeCell(nnx.RNNCellBase):
    """A user-defined cell, which no library knows: an LSTM whose gates see the memory (Gers & Schmidhuber 2000)."""

    def __init__(self, in_features: int, hidden_features: int, *, rngs: nnx.Rngs) -> None:
        self.hidden_features = hidden_features
        self.from_x = nnx.Linear(in_features, 4 * hidden_features, rngs=rngs)
        self.from_h = nnx.Linear(hidden_features, 4 * hidden_features, use_bias=False, rngs=rngs)
        self.peepholes = nnx.Param(nnx.initializers.normal(0.1)(rngs.params(), (3, hidden_features)))

    def __call__(self, carry: Any, inputs: jax.Array) -> tuple[Any, jax.Array]:
        """Computes one step."""
        c, h = carry
        i, f, g, o = jnp.split(self.from_x(inputs) + self.from_h(h), 4, axis=-1)
        p_i, p_f, p_o = self.peepholes[...]
        c = nnx.sigmoid(f + p_f * c) * c + nnx.sigmoid(i + p_i * c) * jnp.tanh(g)
        h = nnx.sigmoid(o + p_o * c) * jnp.tanh(c)
        return (c, h), h

    def initialize_carry(self, input_shape: tuple[int, ...], rngs: Any = None, carry_init: Any = None) -> Any:
        """Returns a carry of zeros."""
        zeros = jnp.zeros((*input_shape[:-1], self.hidden_features))
        return zeros, zeros

    @property
    def num_feature_axes(self) -> int:
        """The number of feature axes of inputs."""
        return 1


def nnx_calls(workload: Workload, module: Any, plan: jaxpack.BucketPlan | None = None, own_cell: bool = False) -> Calls:
    """Makes the calls of a stack of RNN or Bidirectional of flax.nnx or jaxpack.nnx, with seq_lengths.

    Args:
      module: flax.nnx or jaxpack.nnx.
      plan: the plan, for jaxpack.nnx.
      own_cell: whether PeepholeCell replaces the LSTM.
    """
    if own_cell and workload.cell != "lstm":
        raise Missing("the user-defined cell is an LSTM")
    options = {} if plan is None else {"plan": plan}
    layers = [
        module.Bidirectional(*rnns) if workload.bidirectional else rnns[0]
        for rnns in ([module.RNN(cell, **options) for cell in cells] for cells in _nnx_cells(workload, own_cell))
    ]
    graphs, params, others = zip(*(nnx.split(layer, nnx.Param, ...) for layer in layers), strict=True)

    def apply(params: Any, inputs: jax.Array, rest: Any) -> jax.Array:
        lengths, beside, others = rest
        outputs = side_by_side(inputs, beside)
        for graph, layer_params, other in zip(graphs, params, others, strict=True):
            merged = nnx.merge(graph, layer_params, other, copy=True)  # variables of this trace, since it counts keys
            outputs = merged(outputs, seq_lengths=lengths)
        return outputs

    cells = workload.padded_plan.size if module is nnx else workload.cells_under(plan)
    rest, same_weights = (workload.int32_lengths, workload.beside, others), workload.cell in STEPPED_LAYERS
    return jax_calls(apply, params, workload.inputs, rest, workload.cotangent, cells, same_weights=same_weights)


def _nnx_cells(workload: Workload, own_cell: bool) -> list[list[nnx.RNNCellBase]]:
    """Makes the cells of flax.nnx of each layer, one for each direction."""
    if workload.cell in STEPPED_LAYERS:
        return [[SteppedCell(workload.cell, workload.layer, workload.params)]]
    kind: Any = PeepholeCell if own_cell else FURTHER_CELLS.get(workload.cell)
    kind = kind or getattr(nnx, of_cell(_CELLS, workload.cell))
    rngs = nnx.Rngs(workload.seed)
    dtypes: dict[str, Any] = {}
    if workload.dtype != "float32":  # in which the default, orthogonal(), cannot be drawn
        dtypes = {"dtype": workload.dtype, "param_dtype": workload.dtype}
        dtypes["recurrent_kernel_init"] = nnx.initializers.lecun_normal()

    return [
        [kind(features, workload.hidden_size, **dtypes, rngs=rngs) for _ in range(workload.layer.num_directions)]
        for features in workload.input_sizes
    ]


def linen_calls(workload: Workload) -> Calls:
    """Makes the calls of a stack of RNN or Bidirectional of flax.linen, with seq_lengths."""
    kind = getattr(linen, of_cell(_LINEN_CELLS, workload.cell))
    kernel: dict[str, Any] = {"kernel_size": workload.layer.kernel_size} if workload.cell in CONVOLUTIONAL else {}

    def layer() -> Any:
        rnns = [linen.RNN(kind(workload.hidden_size, **kernel)) for _ in range(1 + workload.bidirectional)]
        return linen.Bidirectional(*rnns) if workload.bidirectional else rnns[0]

    layers = [layer() for _ in range(workload.num_layers)]
    keys = jax.random.split(jax.random.key(workload.seed), workload.num_layers)
    examples = [jnp.zeros((1, 1, *workload.input_shape[:-1], features)) for features in workload.input_sizes]
    params = [layer.init(key, example) for layer, key, example in zip(layers, keys, examples, strict=True)]
    same_weights = workload.cell in CONVOLUTIONAL
    if same_weights:
        params = [{"params": tree} for tree in to_linen(workload.layer, workload.params)]

    def apply(params: Any, inputs: jax.Array, lengths: jax.Array) -> jax.Array:
        outputs = inputs
        for layer, layer_params in zip(layers, params, strict=True):
            outputs = layer.apply(layer_params, outputs, seq_lengths=lengths)
        return outputs

    arrays = workload.inputs, workload.int32_lengths, workload.cotangent
    return jax_calls(apply, params, *arrays, workload.padded_plan.size, same_weights=same_weights)
