"""Linear layers of other libraries in `jaxpack bench`: memax, memorax and mamba2-jax.

memax and memorax can begin anew within a sequence, so they get all sequences end to end, without padding. mamba2-jax
gets the padded batch.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpack.cli.bench.calls import Calls, Missing, jax_calls
from jaxpack.cli.bench.workloads import Workload, layer_name

_MEMAX, _MEMORAX, _MAMBA2_JAX = ("lru", "gateddeltanet"), ("lru", "mingru", "mlstm"), ("mamba2",)


def memax_calls(workload: Workload) -> Calls:
    """Makes the calls of memax's LRU, or of a GDN for each head, whose outputs are summed.

    A GDN (gated delta net) is not the layer of its paper: it has neither convolutions nor an output gate, and in memax
    0.1.1 it multiplies the axis of values, not that of keys, with I - β k kᵀ. So its weights are its own.
    """
    _check_cell(workload, _MEMAX)
    importlib.import_module("memax")
    equinox = importlib.import_module("equinox")
    key = jax.random.key(workload.seed)
    if workload.cell == "lru":
        lru = importlib.import_module("memax.equinox.semigroups.lru").LRU
        layer = lru(workload.hidden_size, workload.features, key=key)
        names = list(workload.params)
        layer = equinox.tree_at(
            lambda layer: [getattr(layer, name) for name in names], layer, [workload.params[name] for name in names]
        )
        layers = jax.tree.map(lambda leaf: leaf[None] if equinox.is_array(leaf) else leaf, layer)
    else:
        gdn = importlib.import_module("memax.equinox.semigroups.gdn").GDN
        heads = workload.layer.heads
        keys = jax.random.split(key, heads.num_heads)
        layers = equinox.filter_vmap(lambda key: gdn(workload.features, heads.value_size, key))(keys)
    params, static = equinox.partition(layers, equinox.is_inexact_array)

    def apply(params: Any, inputs: jax.Array, starts: jax.Array) -> jax.Array:
        def head(params: Any) -> jax.Array:
            layer = equinox.combine(params, static)
            return layer(layer.initialize_carry(), (inputs, starts))[1]

        with _unchecked_shapes():
            return jax.vmap(head)(params).sum(0)

    arrays = end_to_end(workload)
    return jax_calls(apply, params, *arrays, workload.tokens, same_weights=workload.cell == "lru")


@contextlib.contextmanager
def _unchecked_shapes() -> Iterator[None]:
    """Switches jaxtyping off: memax 0.1.1 annotates the outputs of LRU as being as wide as its state."""
    config = importlib.import_module("jaxtyping").config
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", before)


def memorax_calls(workload: Workload) -> Calls:
    """Makes the calls of memorax's LRUCell, MinGRUCell or mLSTMCell.

    MinGRUCell has the positive candidate and no bias, and mLSTMCell has no convolution: their weights are their own.
    """
    _check_cell(workload, _MEMORAX)
    models = importlib.import_module("memorax.networks.sequence_models")
    features, hidden = workload.features, workload.hidden_size
    cells = {
        "lru": lambda: models.LRUCell(features=features, hidden_dim=hidden),
        "mingru": lambda: models.MinGRUCell(features=hidden),
        "mlstm": lambda: models.mLSTMCell(
            features=features, hidden_dim=hidden, num_heads=workload.layer.heads.num_heads
        ),
    }
    module = models.Memoroid(cell=cells[workload.cell]())
    inputs, starts, cotangent = (array[None] for array in end_to_end(workload))
    if workload.cell == "lru":
        renamed = {"B_re": "B_real", "B_im": "B_imag", "C_re": "C_real", "C_im": "C_imag"}
        params = {"params": {"cell": {renamed.get(name, name): leaf for name, leaf in workload.params.items()}}}
    else:
        params = module.init(jax.random.key(workload.seed), inputs[:, :1], starts[:, :1])

    def apply(params: Any, inputs: jax.Array, starts: jax.Array) -> jax.Array:
        return module.apply(params, inputs, starts)[1]

    return jax_calls(apply, params, inputs, starts, cotangent, workload.tokens, same_weights=workload.cell == "lru")


def mamba2_jax_calls(workload: Workload) -> Calls:
    """Makes the calls of mamba2_jax's Mamba2Mixer over the padded batch, with the workload's weights."""
    _check_cell(workload, _MAMBA2_JAX)
    mamba2_jax = importlib.import_module("mamba2_jax")
    layer = workload.layer
    if workload.hidden_size % workload.features:
        raise Missing("its hidden size is a multiple of the number of features")
    config = mamba2_jax.Mamba2Config(
        hidden_size=workload.features,
        expand=workload.hidden_size // workload.features,
        head_dim=layer.head_size,
        state_size=layer.state_size,
        conv_kernel=layer.kernel_size,
    )
    mixer = mamba2_jax.Mamba2Mixer(config, layer_idx=0, rngs=nnx.Rngs(workload.seed))
    for variable, value in _mixer_weights(mixer, workload.params):
        variable[...] = value
    graph, params, others = nnx.split(mixer, nnx.Param, ...)

    def apply(params: Any, inputs: jax.Array, rest: Any) -> jax.Array:
        mask, others = rest
        return jnp.where(mask[..., None], nnx.merge(graph, params, others)(inputs)[0], 0)

    arrays = workload.inputs, (workload.mask, others), workload.cotangent
    return jax_calls(apply, params, *arrays, workload.padded_plan.size, same_weights=True)


def _mixer_weights(mixer: Any, params: Mapping[str, jax.Array]) -> Iterator[tuple[Any, jax.Array]]:
    """Yields the variables of a Mamba2Mixer, each with its value in the parameters of jaxpack.Mamba2."""
    yield mixer.in_proj.kernel, params["in_proj"]
    yield mixer.conv1d.conv.kernel, params["conv_kernel"][:, None]
    yield mixer.conv1d.conv.bias, params["conv_bias"]
    yield mixer.norm.weight, params["norm"]
    yield mixer.out_proj.kernel, params["out_proj"]
    for name in ("dt_bias", "A_log", "D"):
        yield getattr(mixer, name), params[name]


def end_to_end(workload: Workload) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the real steps of all sequences [N, F], where sequences begin, bool [N], and the cotangent [N, O]."""
    starts = np.zeros(workload.mask.shape, bool)
    starts[:, 0] = True
    return workload.inputs[workload.mask], starts[workload.mask], workload.cotangent[workload.mask]


def _check_cell(workload: Workload, cells: tuple[str, ...]) -> None:
    """Raises Missing unless the workload's layer is measured in a library."""
    if workload.cell not in cells or workload.dtype != "float32":
        raise Missing(f"it is measured for {', '.join(map(layer_name, cells))} in float32 alone")
