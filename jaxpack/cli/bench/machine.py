"""The machine that `jaxpack bench` runs on: its description, its load, and its page faults."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Iterator, Sequence
from typing import Any

import jax

import jaxpack
from jaxpack.cli.bench.calls import num_threads

_PACKAGES = (
    "jaxpack",
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "torch",
    "dm-haiku",
    "keras",
    "memax",
    "memorax",
    "mamba2-jax",
)


def load() -> float | None:
    """Returns how many processes ran or waited, on average over the last minute; None where that is unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def machine(packages: Sequence[str] = _PACKAGES) -> dict[str, Any]:
    """Describes the machine, with the versions of these packages."""
    device = jax.devices()[0]
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "devices": jax.local_device_count(),
        "platform_version": device.client.platform_version,
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES"),
        "xla_flags": os.environ.get("XLA_FLAGS"),
    }


@contextlib.contextmanager
def compilation_cache_off() -> Iterator[None]:
    """A context without programs that an earlier process compiled, so that compilation is measured."""
    name = "jax_enable_compilation_cache"
    before = getattr(jax.config, name)
    jax.config.update(name, False)
    try:
        yield
    finally:
        jax.config.update(name, before)


def page_faults() -> int:
    """Counts the page faults of this process so far; 0 where the system does not report them."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _cpu_model() -> str:
    """Returns the processor's name, as far as the system reports it."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    if package == "jaxpack":
        return jaxpack.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
