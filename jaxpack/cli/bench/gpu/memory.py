"""The device memory of a call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """Returns the most device memory that a run takes at once beyond what was in use before: temporaries and results.

    It adds up JAX's allocator and torch's, of which a run uses one. None where JAX's device does not count memory, as
    on CPUs, and where there is too little of it to measure.
    """
    device = jax.local_devices()[0]
    if not device.memory_stats():
        return None
    torch: Any = sys.modules.get("torch")
    cuda = torch.cuda if torch is not None and torch.cuda.is_initialized() else None
    try:
        ballast = _ballast(device)
        before, torch_before = device.memory_stats()["bytes_in_use"], 0
        if cuda is not None:
            cuda.reset_peak_memory_stats()
            torch_before = cuda.memory_allocated()
        jax.block_until_ready(run())
    except jax.errors.JaxRuntimeError:  # out of memory
        return None
    found = device.memory_stats()["peak_bytes_in_use"] - before
    ballast.delete()
    return found if cuda is None else found + cuda.max_memory_allocated() - torch_before


def _ballast(device: jax.Device) -> jax.Array:
    """Fills the device's memory up to the earlier peak. JAX cannot reset it, and a lower one would not be seen."""
    stats = device.memory_stats()
    hidden = stats["peak_bytes_in_use"] - stats["bytes_in_use"]
    return jax.block_until_ready(jax.device_put(jnp.zeros(max(hidden, 1), jnp.uint8), device))
