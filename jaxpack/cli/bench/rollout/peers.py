"""The ways to run a layer over a rollout in `jaxpack bench rollout`: a function for each, from a case to calls.

All get the same weights, inputs and resets, laid out beforehand in their own layout, and begin from zeros. What runs a
rollout as it is has it time first, [T, N], as it is acted. The loss is the sum of the outputs times a fixed cotangent.
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
from jaxpack.cli.bench.calls import Calls, jax_calls, of_cell
from jaxpack.cli.bench.rollout.cases import Rollout
from jaxpack.cli.bench.torch_peers import import_torch, module_calls, tensor
from jaxpack.interop import to_linen
from jaxpack.rollouts import Fragments, run_rollout


def _jaxpack(case: Rollout) -> Calls:
    """Runs the layer with `resets=` on the rollout."""

    def apply(params: Any, data: jax.Array, rest: Any) -> jax.Array:
        return case.layer.apply(params, rest.replace(data=data), resets=rest)[0].data

    return _of_packed(case, apply, _packed(case, case.resets))


def _no_resets(case: Rollout) -> Calls:
    """Runs the layer without resets, and so computes something else."""

    def apply(params: Any, data: jax.Array, rest: Any) -> jax.Array:
        return case.layer.apply(params, rest.replace(data=data))[0].data

    return _of_packed(case, apply, _packed(case, case.resets))._replace(same_weights=False, in_place=None)


def _carried(case: Rollout) -> Calls:
    """Runs `run_rollout`, whose rows go on from a carried state, here zeros."""
    zeros = np.zeros((1, case.batch_size, case.hidden_size), case.dtype)
    carried = (zeros, zeros) if case.cell == "lstm" else zeros

    def apply(params: Any, inputs: jax.Array, rest: Any) -> jax.Array:
        resets, carried = rest
        return run_rollout(case.layer.apply, params, inputs, resets, carried, axis=0, batch_axis=1)[0]

    return _of_rollout(case, apply, (_swapped(case.resets), carried))


def _of_rollout(case: Rollout, apply: Callable[[Any, Any, Any], jax.Array], rest: Any) -> Calls:
    """Makes the calls of a function from a rollout [T, N, F] to outputs [T, N, H]."""
    inputs, cotangent, cells = _swapped(case.inputs), _swapped(case.cotangent), case.padded_plan.size
    calls = jax_calls(apply, case.params, inputs, rest, cotangent, cells, same_weights=True)
    return calls._replace(steps=case.longest, in_place=_swapped)


def _of_packed(case: Rollout, apply: Callable[[Any, Any, Any], jax.Array], rest: Any) -> Calls:
    """Makes the calls of a function from the data of a rollout [T * N, F] to outputs [T * N, H]."""
    data, cotangent = (_packed(case, array).data for array in (case.inputs, case.cotangent))
    calls = jax_calls(apply, case.params, data, rest, cotangent, case.padded_plan.size, same_weights=True)

    def in_place(outputs: Any) -> np.ndarray:
        return _swapped(np.asarray(outputs).reshape(case.longest, case.batch_size, -1))

    return calls._replace(steps=case.longest, in_place=in_place)


def _packed(case: Rollout, array: np.ndarray) -> jaxpack.PackedSequence:
    """Packs an array [N, T, ...] of the rollout under the padded plan, whose cells are [T, N] as it is in memory."""
    lengths = np.full(case.batch_size, case.longest)
    return jaxpack.pack_padded_sequence(array, lengths, batch_first=True, plan=case.padded_plan)


def _fragments(case: Rollout) -> Calls:
    """Runs the layer on fragments of episodes, from packed data to packed outputs."""
    fragments = case.fragments

    def apply(params: Any, data: jax.Array, packed: jaxpack.PackedSequence) -> jax.Array:
        return case.layer.apply(params, packed.replace(data=data))[0].data

    packed, cotangent = (fragments.pack(_swapped(array)) for array in (case.inputs, case.cotangent))
    rest = packed.replace(data=None)
    size = fragments.plan.size
    calls = jax_calls(apply, case.params, packed.data, rest, cotangent.data, size, same_weights=True)

    def in_place(data: jax.Array) -> np.ndarray:
        return _swapped(fragments.restore(packed.replace(data=data)))

    return calls._replace(steps=fragments.plan.num_steps, in_place=in_place)


def _in_out(case: Rollout) -> Calls:
    """Packs the fragments, runs the layer on them and puts its outputs back in place, in one program."""

    def apply(params: Any, inputs: jax.Array, fragments: Fragments) -> jax.Array:
        return fragments.restore(case.layer.apply(params, fragments.pack(inputs))[0])

    plan = case.fragments.plan
    return _of_rollout(case, apply, case.fragments)._replace(cells=plan.size, steps=plan.num_steps)


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
    order, layout = _torch_layout(case)
    data, cotangent = (tensor(case, array).flatten(0, 1)[order] for array in (case.inputs, case.cotangent))

    def in_place(data: Any) -> np.ndarray:
        return data.detach().cpu()[order.argsort()].unflatten(0, case.inputs.shape[:2]).numpy()

    calls = module_calls(case, data, layout, lambda output: output.data, cotangent, case.tokens)
    return calls._replace(steps=int(case.fragment_lengths.max()), in_place=in_place)


def _torch_in_out(case: Rollout) -> Calls:
    """Packs the fragments, runs torch's module and puts its outputs back in place.

    By index_select, whose derivative is one operation: those of pad_sequence and pad_packed_sequence copy the whole
    batch for each fragment and each step.
    """
    order, layout = _torch_layout(case)
    back = order.argsort()

    def packed(rollout: Any) -> Any:
        return layout(rollout.flatten(0, 1).index_select(0, order.to(rollout.device)))

    def in_rows(output: Any) -> Any:
        return output.data.index_select(0, back.to(output.data.device)).unflatten(0, case.inputs.shape[:2])

    arrays = tensor(case, case.inputs), packed, in_rows
    calls = module_calls(case, *arrays, tensor(case, case.cotangent), case.tokens)
    return calls._replace(steps=int(case.fragment_lengths.max()), in_place=lambda array: array.detach().cpu().numpy())


def _torch_layout(case: Rollout) -> tuple[Any, Callable[[Any], Any]]:
    """Returns which step of the rollout [N * T] each packed one is, and what makes a PackedSequence of packed data."""
    torch = import_torch()
    fragments = torch.arange(case.tokens).split(case.fragment_lengths.tolist())
    packed = torch.nn.utils.rnn.pack_sequence(fragments, enforce_sorted=False)

    def layout(data: Any) -> Any:
        indices = (index.to(data.device) for index in (packed.sorted_indices, packed.unsorted_indices))
        return torch.nn.utils.rnn.PackedSequence(data, packed.batch_sizes, *indices)

    return packed.data, layout


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
