"""The libraries that `jaxpack bench` compares: a function for each, from a workload to calls that can be timed.

To add a library, write another function under `@peer(name)`. It imports the library, makes the same layer and returns
`jax_calls(apply, params, inputs, rest, cotangent, cells)`, or its own `Calls`; if it cannot, it raises `Missing`.

All libraries get the same batch, laid out beforehand in their own layout (packed or padded, time or batch first),
weights from the workload's seed, and as loss the sum of the real outputs times a fixed cotangent.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxpack
import jaxpack.nnx
from jaxpack._matrix.layer import MatrixLayer
from jaxpack._stepped.layer import SteppedLayer
from jaxpack.cli.bench import torch_peers
from jaxpack.cli.bench.calls import Calls, Missing, jax_calls, of_cell
from jaxpack.cli.bench.cudnn_peer import cudnn_calls
from jaxpack.cli.bench.device_peer import device_calls
from jaxpack.cli.bench.flax_peers import linen_calls, nnx_calls
from jaxpack.cli.bench.linear_libraries import mamba2_jax_calls, memax_calls, memorax_calls
from jaxpack.cli.bench.linear_peers import associative_scan, masked_scan, padded_calls
from jaxpack.cli.bench.step_peers import step_calls
from jaxpack.cli.bench.stepped_cells import IMAGE
from jaxpack.cli.bench.workloads import Workload

Build = Callable[[Workload], Calls]
PEERS: dict[str, Build] = {}


def peer(name: str) -> Callable[[Build], Build]:
    """Registers a function under its name in the report and the option --peer."""

    def enter(build: Build) -> Build:
        PEERS[name] = build
        return build

    return enter


def _packed(workload: Workload, plan: jaxpack.BucketPlan) -> Calls:
    """Makes the calls of jaxpack from packed data to packed outputs."""

    def pack(array: np.ndarray) -> jaxpack.PackedSequence:
        return jaxpack.pack_padded_sequence(array, workload.lengths, batch_first=True, plan=plan)

    def apply(params: Any, data: jax.Array, rest: tuple[jaxpack.PackedSequence, list[jax.Array]]) -> jax.Array:
        packed, beside = rest
        output, _ = workload.layer.apply(params, packed.replace(data=workload.joined(data, beside)))
        return output.data

    packed, cotangent = pack(workload.inputs), pack(workload.cotangent).data
    rest = packed.replace(data=None), [pack(each).data for each in workload.beside]
    return jax_calls(apply, workload.params, packed.data, rest, cotangent, plan.size, same_weights=True)


@peer("jaxpack")
def _jaxpack(workload: Workload) -> Calls:
    """Runs under the plan that jaxpack.plan_best chooses."""
    return _packed(workload, workload.plan)


@peer("jaxpack-devices")
def _jaxpack_devices(workload: Workload) -> Calls:
    """Runs a shard of the batch on each device, under the plan that jaxpack.sharding.plan_shards chooses."""
    return device_calls(workload)


@peer("jaxpack-buckets")
def _jaxpack_buckets(workload: Workload) -> Calls:
    """Runs under the staircase that jaxpack.plan_buckets chooses."""
    return _packed(workload, _another_plan(workload, jaxpack.plan_buckets(workload.lengths)))


@peer("jaxpack-rows")
def _jaxpack_rows(workload: Workload) -> Calls:
    """Runs under the rows of several sequences that jaxpack.plan_rows chooses."""
    return _packed(workload, _another_plan(workload, jaxpack.plan_rows(workload.lengths)))


def _another_plan(workload: Workload, plan: jaxpack.BucketPlan) -> jaxpack.BucketPlan:
    """Returns the plan; raises Missing if another peer measures it."""
    for name, measured in {"jaxpack": workload.plan, "jaxpack-padded": workload.padded_plan}.items():
        if plan == measured:
            raise Missing(f"is the same plan as {name}")
    return plan


@peer("jaxpack-padded")
def _jaxpack_padded(workload: Workload) -> Calls:
    """Runs under one rectangle, in which every row has the longest length."""
    return _packed(workload, workload.padded_plan)


@peer("jaxpack-in-out")
def _jaxpack_in_out(workload: Workload) -> Calls:
    """Runs under the chosen plan from a padded batch to padded outputs: the time includes packing and padding."""
    return _padded(workload, workload.plan)


@peer("jaxpack-no-plan")
def _jaxpack_no_plan(workload: Workload) -> Calls:
    """Runs without a plan, as one program for all lengths, from a padded batch to padded outputs."""
    return _padded(workload, None)


def _padded(workload: Workload, plan: jaxpack.BucketPlan | None) -> Calls:
    """Makes the calls of jaxpack from a padded batch to padded outputs."""

    def apply(params: Any, inputs: jax.Array, rest: tuple[jax.Array, list[jax.Array]]) -> jax.Array:
        lengths, beside = rest
        output, _ = workload.layer.apply(params, workload.joined(inputs, beside), lengths=lengths, plan=plan)
        return output

    arrays = workload.inputs, (workload.int32_lengths, workload.beside), workload.cotangent
    return jax_calls(apply, workload.params, *arrays, workload.cells_under(plan), same_weights=True)


@peer("flax.nnx")
def _flax_nnx(workload: Workload) -> Calls:
    """Runs flax.nnx.RNN with seq_lengths, and flax.nnx.Bidirectional."""
    return nnx_calls(workload, nnx)


@peer("flax.linen")
def _flax_linen(workload: Workload) -> Calls:
    """Runs flax.linen.RNN with seq_lengths, and flax.linen.Bidirectional."""
    return linen_calls(workload)


@peer("jaxpack.nnx")
def _jaxpack_nnx(workload: Workload) -> Calls:
    """Runs the code of flax.nnx with RNN and Bidirectional of jaxpack.nnx: only the import differs."""
    return nnx_calls(workload, jaxpack.nnx)


@peer("jaxpack.nnx-plan")
def _jaxpack_nnx_plan(workload: Workload) -> Calls:
    """Runs the modules of jaxpack.nnx under the chosen plan."""
    return nnx_calls(workload, jaxpack.nnx, workload.plan)


@peer("own-cell-flax")
def _own_cell_flax(workload: Workload) -> Calls:
    """Runs flax.nnx.RNN with a user-defined LSTM."""
    return nnx_calls(workload, nnx, own_cell=True)


@peer("own-cell-plan")
def _own_cell_plan(workload: Workload) -> Calls:
    """Runs jaxpack.nnx.RNN with the same cell, under the chosen plan."""
    return nnx_calls(workload, jaxpack.nnx, workload.plan, own_cell=True)


@peer("jax-cudnn")
def _jax_cudnn(workload: Workload) -> Calls:
    """Runs jax.experimental.rnn.lstm, which is cuDNN's, on a padded batch with seq_lengths."""
    return cudnn_calls(workload)


@peer("associative_scan")
def _associative_scan(workload: Workload) -> Calls:
    """Runs jax.lax.associative_scan on the padded batch, for layers with a linear recurrence."""
    return padded_calls(workload, associative_scan)


@peer("masked_scan")
def _masked_scan(workload: Workload) -> Calls:
    """Runs jax.lax.scan on the padded batch with a mask, for layers with a linear recurrence or a `step`."""
    by_step = isinstance(workload.layer, (MatrixLayer, SteppedLayer))
    return step_calls(workload) if by_step else padded_calls(workload, masked_scan)


@peer("memax")
def _memax(workload: Workload) -> Calls:
    """Runs memax's LRU or GDN on all sequences end to end, with a flag where each begins."""
    return memax_calls(workload)


@peer("memorax")
def _memorax(workload: Workload) -> Calls:
    """Runs memorax's LRU, MinGRU or mLSTM on all sequences end to end, with a flag where each begins."""
    return memorax_calls(workload)


@peer("mamba2-jax")
def _mamba2_jax(workload: Workload) -> Calls:
    """Runs mamba2_jax's mixer on the padded batch, which it does not mask."""
    return mamba2_jax_calls(workload)


@peer("torch-packed")
def _torch_packed(workload: Workload) -> Calls:
    """Runs torch.nn.LSTM, GRU or RNN on a PackedSequence."""
    return torch_peers.packed_calls(workload)


@peer("torch-padded")
def _torch_padded(workload: Workload) -> Calls:
    """Runs torch.nn.LSTM, GRU or RNN on a padded batch, time first, without lengths, which torch does not take here.

    So its backward direction reads the padding before the sequence. That takes as long, but gives other outputs.
    """
    return torch_peers.padded_calls(workload)


@peer("haiku")
def _haiku(workload: Workload) -> Calls:
    """Runs haiku.dynamic_unroll over the padded batch; the backward direction reverses each sequence before it."""
    if workload.cell == "rnn":
        raise Missing("haiku.VanillaRNN is a relu, not a tanh")
    hk = importlib.import_module("haiku")
    conv_lstm = functools.partial(hk.Conv2DLSTM, IMAGE, kernel_shape=3)
    kind = of_cell({"lstm": hk.LSTM, "gru": hk.GRU, "grubefore": hk.GRU, "convlstm": conv_lstm}, workload.cell)

    def unroll(inputs: jax.Array) -> jax.Array:
        cell = kind(workload.hidden_size)
        outputs, _ = hk.dynamic_unroll(cell, inputs, cell.initial_state(inputs.shape[0]), time_major=False)
        return outputs

    def stack(inputs: jax.Array, lengths: jax.Array) -> jax.Array:
        steps = jnp.arange(workload.longest)
        real = steps < lengths[:, None]
        mirrored = jnp.where(real, lengths[:, None] - 1 - steps, steps)[..., None]
        outputs = inputs
        for _ in range(workload.num_layers):
            directions = [unroll(outputs)]
            if workload.bidirectional:
                backward = unroll(jnp.take_along_axis(outputs, mirrored, axis=1))
                directions.append(jnp.take_along_axis(backward, mirrored, axis=1))
            outputs = jnp.concatenate(directions, axis=-1)
        return outputs

    transformed = hk.without_apply_rng(hk.transform(stack))
    arrays = workload.inputs, workload.int32_lengths, workload.cotangent
    params = transformed.init(jax.random.key(workload.seed), *arrays[:2])
    return jax_calls(transformed.apply, params, *arrays, workload.padded_plan.size)


@peer("keras")
def _keras(workload: Workload) -> Calls:
    """Runs keras.layers.LSTM, GRU or SimpleRNN with a mask, on Keras's JAX backend."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = importlib.import_module("keras")
    if keras.backend.backend() != "jax":
        raise Missing(f"its backend is {keras.backend.backend()}: set KERAS_BACKEND=jax")
    cells = {
        "lstm": keras.layers.LSTM,
        "gru": keras.layers.GRU,
        "grubefore": functools.partial(keras.layers.GRU, reset_after=False),
        "rnn": keras.layers.SimpleRNN,
    }
    kind = of_cell(cells, workload.cell)
    keras.utils.set_random_seed(workload.seed)

    def layer(features: int) -> Any:
        made = kind(workload.hidden_size, return_sequences=True)
        made = keras.layers.Bidirectional(made) if workload.bidirectional else made
        made.build((workload.batch_size, workload.longest, features))
        return made

    layers = [layer(features) for features in workload.input_sizes]
    states = [[variable.value for variable in layer.non_trainable_variables] for layer in layers]

    def apply(params: Any, inputs: jax.Array, mask: jax.Array) -> jax.Array:
        outputs = inputs
        for layer, layer_params, state in zip(layers, params, states, strict=True):
            outputs, _ = layer.stateless_call(layer_params, state, outputs, mask=mask)
        return outputs

    params = [[variable.value for variable in layer.trainable_variables] for layer in layers]
    return jax_calls(apply, params, workload.inputs, workload.mask, workload.cotangent, workload.padded_plan.size)
