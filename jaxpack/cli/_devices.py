"""The option `--cpu-devices`: a CPU used as several devices, each of which runs a shard of every batch."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import jax
import numpy as np
import typer

AXIS = "data"  # of the mesh

CpuDevices = Annotated[
    int,
    typer.Option("--cpu-devices", min=1, metavar="N", help="Use the CPU as N devices, each with a shard of a batch."),
]


def cpu_mesh(count: int, batch_size: int, way_out: str) -> Any:
    """Starts JAX on the CPU as so many devices, and returns a mesh of them; None for one device.

    Args:
      count: the number of devices.
      batch_size: the sequences of a batch.
      way_out: which batch sizes the command allows, for the error.

    Raises:
      typer.BadParameter: if the devices do not divide the batch, or JAX runs with fewer devices already.
    """
    if count == 1:
        return None
    if batch_size % count:
        raise typer.BadParameter(
            f"{count} devices cannot have equal shards of a batch of {batch_size} sequences. {way_out}",
            param_hint="'--cpu-devices'",
        )
    with contextlib.suppress(RuntimeError):  # JAX has started, perhaps with enough devices
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.local_devices(backend="cpu")
    if len(devices) < count:
        raise typer.BadParameter(
            f"JAX runs with {len(devices)} CPU devices in this process already. Start another process, without "
            f"--xla_force_host_platform_device_count in XLA_FLAGS.",
            param_hint="'--cpu-devices'",
        )
    return jax.sharding.Mesh(np.array(devices[:count]), (AXIS,))
