"""The ways to run a layer over a rollout in `jaxpack bench rollout`: a function for each, from a case to calls.

All get the same weights, inputs and resets, laid out beforehand in their own layout, and begin from zeros. Their loss
is the sum of the outputs times a fixed cotangent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

import jaxpack
from jaxpack._recurrence.derivative import unplanned_cells
from jaxpack.cli.bench.calls import Calls, jax_calls, of_cell
from jaxpack.cli.bench.rollout.cases import Rollout
from jaxpack.cli.bench.torch_peers import import_torch, module_calls, tensor
from jaxpack.interop import to_linen
from jaxpack.rollouts import Fragments, run_rollout


def _jaxpack(case: Rollout) -> Calls:
    """Runs the layer with `resets=` on the rollout [N, T]."""

    def apply(params: Any, inputs: jax.Array, resets: jax.Array) -> jax.Array:
        return case.layer.apply(params, inputs, resets=resets)[0]

    return _of_rows(case, apply, case.resets)


def _no_resets(case: Rollout) -> Calls:
    """Runs the layer without resets, and so computes something else."""

    def apply(params: Any, inputs: jax.Array, rest: None) -> jax.Array:
        return case.layer.apply(params, inputs)[0]

    return _of_rows(case, apply, None)._replace(same_weights=False, in_place=None)


def _carried(case: Rollout) -> Calls:
    """Runs `run_rollout`, whose rows go on from a carried state, here zeros."""
    zeros = np.zeros((1, case.batch_size, case.hidden_size), case.dtype)
    carried = (zeros, zeros) if case.cell == "lstm" else zeros

    def apply(params: Any, inputs: jax.Array, rest: Any) -> jax.Array:
        resets, carried = rest
        return run_rollout(case.layer.apply, params, inputs, resets, carried, batch_axis=1)[0]

    first = np.where(case.resets.any(1), case.resets.argmax(1), case.longest)
    cells = unplanned_cells(np.concatenate([first, case.longest - first]), case.longest)
    return _of_rows(case, apply, (case.resets, carried))._replace(cells=cells, steps=None)


def _of_rows(case: Rollout, apply: Callable[[Any, Any, Any], jax.Array], rest: Any) -> Calls:
    """Makes the calls of a function from a rollout [N, T, F] to outputs [N, T, H]."""
    cells = case.padded_plan.size
    calls = jax_calls(apply, case.params, case.inputs, rest, case.cotangent, cells, same_weights=True)
    return calls._replace(steps=case.longest, in_place=np.asarray)


def _fragments(case: Rollout) -> Calls:
    """Runs the layer on fragments of episodes, from packed data to packed outputs."""
    fragments = case.fragments

    def apply(params: Any, data: jax.Array, packed: jaxpack.PackedSequence) -> jax.Array:
        return case.layer.apply(params, packed.replace(data=data))[0].data

    packed, cotangent = fragments.pack(case.inputs), fragments.pack(case.cotangent).data
    rest = packed.replace(data=None)
    calls = jax_calls(apply, case.params, packed.data, rest, cotangent, fragments.plan.size, same_weights=True)

    def in_place(data: jax.Array) -> np.ndarray:
        return np.asarray(fragments.restore(packed.replace(data=data)))

    return calls._replace(steps=fragments.plan.num_steps, in_place=in_place)


def _in_out(case: Rollout) -> Calls:
    """Packs the fragments, runs the layer on them and puts its outputs back in place, in one program."""

    def apply(params: Any, inputs: jax.Array, fragments: Fragments) -> jax.Array:
        return fragments.restore(case.layer.apply(params, fragments.pack(inputs))[0])

    plan = case.fragments.plan
    return _of_rows(case, apply, case.fragments)._replace(cells=plan.size, steps=plan.num_steps)


class _Resetting(linen.Module):
    """A cell that begins from its initial carry where an episode begins, as recurrent policies are written in Flax."""

    cell: linen.RNNCellBase

    def __call__(self, carry: Any, step: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        """Computes a step from inputs [N, F] and resets [N]."""
        x, reset = step
        initial = self.cell.initialize_carry(jax.random.key(0), x.shape)
        carry = jax.tree.map(lambda fresh, kept: jnp.where(reset[:, None], fresh, kept), initial, carry)
        return self.cell(carry, x)


def _flax_scan(case: Rollout) -> Calls:
    """Runs the idiom of recurrent policies: flax.linen.scan over a cell, time first, with a `where` on the carry."""
    cell = of_cell({"gru": linen.GRUCell, "lstm": linen.OptimizedLSTMCell}, case.cell)(case.hidden_size)
    scanned = linen.scan(_Resetting, variable_broadcast="params", split_rngs={"params": False}, in_axes=0, out_axes=0)

    def apply(params: Any, inputs: jax.Array, resets: jax.Array) -> jax.Array:
        initial = cell.initialize_carry(jax.random.key(0), inputs.shape[1:])
        return scanned(cell).apply({"params": params}, initial, (inputs, resets))[1]

    (params,) = to_linen(case.layer, case.params)
    inputs, resets, cotangent = (_swapped(array) for array in (case.inputs, case.resets, case.cotangent))
    calls = jax_calls(apply, params, inputs, resets, cotangent, case.padded_plan.size, same_weights=True)
    return calls._replace(steps=case.longest, in_place=_swapped)


def _swapped(array: Any) -> np.ndarray:
    """Returns [T, N, ...] from [N, T, ...], or the other way round."""
    return np.ascontiguousarray(np.asarray(array).swapaxes(0, 1))


def _torch_fragments(case: Rollout) -> Calls:
    """Runs torch's module on a PackedSequence of fragments, from packed data to packed outputs."""
    torch = import_torch()
    packed, cotangent = (_torch_packed(case, tensor(case, array)) for array in (case.inputs, case.cotangent))

    def layout(data: Any) -> Any:
        return torch.nn.utils.rnn.PackedSequence(data, *packed[1:])

    def in_place(data: Any) -> np.ndarray:
        fragments = torch.nn.utils.rnn.unpack_sequence(layout(data.detach().cpu()))
        return torch.cat(fragments).reshape(case.batch_size, case.longest, -1).numpy()

    calls = module_calls(case, packed.data, layout, lambda output: output.data, cotangent.data, case.tokens)
    return calls._replace(steps=len(packed.batch_sizes), in_place=in_place)


def _torch_in_out(case: Rollout) -> Calls:
    """Splits the rollout, pads and packs the fragments, runs torch's module and puts its outputs back in place."""
    torch = import_torch()
    lengths = case.fragment_lengths
    real = torch.from_numpy(np.arange(lengths.max()) < lengths[:, None])

    def in_rows(output: Any) -> Any:
        padded, _ = torch.nn.utils.rnn.pad_packed_sequence(output, batch_first=True)
        return padded[real.to(padded.device)].reshape(case.batch_size, case.longest, -1)

    arrays = tensor(case, case.inputs), lambda rollout: _torch_packed(case, rollout), in_rows
    calls = module_calls(case, *arrays, tensor(case, case.cotangent), case.tokens)
    return calls._replace(steps=int(lengths.max()), in_place=lambda array: array.detach().cpu().numpy())


def _torch_packed(case: Rollout, rollout: Any) -> Any:
    """Splits a tensor [N, T, F] into fragments, which are contiguous in it, pads and packs them."""
    torch = import_torch()
    lengths = torch.from_numpy(case.fragment_lengths.astype(np.int64))
    padded = torch.nn.utils.rnn.pad_sequence(rollout.flatten(0, 1).split(lengths.tolist()), batch_first=True)
    return torch.nn.utils.rnn.pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)


PEERS: Mapping[str, Callable[[Rollout], Calls]] = MappingProxyType(
    {
        "jaxpack": _jaxpack,
        "jaxpack-no-resets": _no_resets,
        "jaxpack-carried": _carried,
        "jaxpack-fragments": _fragments,
        "jaxpack-in-out": _in_out,
        "flax-scan": _flax_scan,
        "torch-fragments": _torch_fragments,
        "torch-in-out": _torch_in_out,
    }
)
