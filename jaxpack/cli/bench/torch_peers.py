"""torch's layers in `jaxpack bench`, on packed and padded batches."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxpack.cli.bench.calls import Calls, Missing, num_threads, of_cell
from jaxpack.cli.bench.workloads import Workload


def packed_calls(workload: Workload) -> Calls:
    """Makes the calls of a torch module on a PackedSequence."""
    if not workload.lengths.all():
        raise Missing("torch's pack_padded_sequence refuses lengths of 0")
    torch = import_torch()

    def pack(array: np.ndarray) -> Any:
        lengths = torch.from_numpy(np.asarray(workload.lengths))
        arguments = {"batch_first": True, "enforce_sorted": False}
        return torch.nn.utils.rnn.pack_padded_sequence(tensor(workload, array), lengths, **arguments)

    packed, cotangent = pack(workload.inputs), pack(workload.cotangent).data

    def layout(data: Any) -> Any:
        return torch.nn.utils.rnn.PackedSequence(data, *packed[1:])

    return module_calls(workload, packed.data, layout, lambda output: output.data, cotangent, workload.tokens)


def padded_calls(workload: Workload) -> Calls:
    """Makes the calls of a torch module on a padded batch, time first, without lengths."""
    inputs, cotangent = (
        tensor(workload, np.ascontiguousarray(array.swapaxes(0, 1))) for array in (workload.inputs, workload.cotangent)
    )
    calls = module_calls(workload, inputs, lambda x: x, lambda output: output, cotangent, workload.padded_plan.size)
    return calls._replace(same_weights=not workload.bidirectional)


def module_calls(
    workload: Workload,
    inputs: Any,
    layout: Callable[[Any], Any],
    data: Callable[[Any], Any],
    cotangent: Any,
    cells: int,
) -> Calls:
    """Makes the calls of a torch module; `layout` makes its input from a tensor, `data` a tensor from its output."""
    torch = import_torch()
    device = _device(torch)
    modules = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}
    sizes = workload.features, workload.hidden_size, workload.num_layers
    module = of_cell(modules, workload.cell)(*sizes, bidirectional=workload.bidirectional)
    state = workload.layer.to_torch(workload.params)
    module.to(getattr(torch, workload.dtype)).load_state_dict(
        {name: tensor(workload, array) for name, array in state.items()}
    )
    module, inputs, cotangent = module.to(device), inputs.to(device), cotangent.to(device)
    leaves = [*module.parameters(), inputs.requires_grad_()]

    def wait(result: Any) -> Any:
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    def forward() -> Any:
        with torch.no_grad():
            return wait(data(module(layout(inputs))[0]))

    def training() -> Any:
        loss = (data(module(layout(inputs))[0]) * cotangent).sum(dtype=torch.float32)
        return wait((loss, torch.autograd.grad(loss, leaves)))

    return Calls(forward, training, cells, same_weights=True)


def import_torch() -> Any:
    """Imports torch, and gives it as many threads as XLA has."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(num_threads())
    return torch


def tensor(workload: Workload, array: np.ndarray) -> Any:
    """Returns a tensor of the workload's dtype, of which NumPy has no bfloat16 that torch knows."""
    torch = import_torch()
    return torch.from_numpy(np.asarray(array, np.float32)).to(getattr(torch, workload.dtype))


def _device(torch: Any) -> str:
    """Returns torch's device, which must be JAX's."""
    backend = jax.default_backend()
    if backend == "cpu":
        return "cpu"
    if backend == "gpu" and torch.cuda.is_available():
        return "cuda"
    raise Missing(f"JAX runs on {backend}, which torch {torch.__version__} cannot use here")
