"""The accelerators to compile for, each described by numbers in place of a device."""

import functools
import importlib.util

from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

# What XLA asks of a GPU before it compiles: the data sheet of an H100 SXM with 80 GB, CUDA 12.9, cuDNN 9.10.
_H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
runtime_version { major: 12 minor: 9 }
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84978434048
  driver_version: "12.9.0"
  runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}
"""
GPUS = {"h100": _H100}
TPUS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}  # a topology of one host each
TARGETS = (*GPUS, *TPUS)
_COMPILERS = {"cuda": "jax_plugins.xla_cuda12", "tpu": "libtpu"}


def platform(target: str) -> str:
    """Returns the platform of a target, as JAX names it."""
    return "cuda" if target in GPUS else "tpu"


def description(target: str) -> str:
    """Returns what a compiler is told of a target."""
    return (GPUS | TPUS)[target]


def missing(target: str) -> str:
    """Returns why nothing can be compiled for a target here; an empty string if it can."""
    module = _COMPILERS[platform(target)]
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of the package around it
        found = None
    return "" if found else f"{module} is not installed: pip install --group accel"


@functools.cache
def device(target: str) -> SingleDeviceSharding:
    """Returns the placement on one device of a target, for abstract arguments."""
    if target in GPUS:
        described = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=GPUS[target], topology="1x1x1"
        )
    else:
        described = topologies.get_topology_desc(TPUS[target], "tpu")
    return SingleDeviceSharding(described.devices[0])
