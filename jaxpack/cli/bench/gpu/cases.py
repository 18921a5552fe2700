"""The cases of `jaxpack bench gpu`: layers, dtypes, sizes and lengths, the most informative first."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxpack.cli.bench.workloads import Workload, equal_lengths, lognormal_lengths

TINY = 16  # the divisor of all sizes for a try-out on a CPU

# What becomes a CUDA graph. XLA's default turns the body of a loop into one, launched for each step.
GRAPHS: Mapping[str, str] = MappingProxyType(
    {
        "default": "",
        "off": "--xla_gpu_enable_command_buffer=",
        "loops": "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL",  # besides what the default has
    }
)

# Libraries are compiled group by group, and all that are compiled so far are timed after each group. The second takes
# far longer to compile, and may not be ready in the time that a case has.
_GROUPS = (
    ("jaxpack", "torch-packed", "flax.nnx", "jax-cudnn", "jaxpack-padded", "torch-padded", "jaxpack-rows"),
    ("jaxpack-buckets",),
)
_GROUPS_BY_FLAGS = (("jaxpack", "jaxpack-padded", "flax.nnx"),)  # those that XLA's flags affect
PEERS = tuple(itertools.chain(*_GROUPS))

_FEATURES = 128
_DRAWS: Mapping[str, Callable[[np.random.Generator, int], np.ndarray]] = MappingProxyType(
    {
        "lognormal": lognormal_lengths,
        "equal": equal_lengths,
        "bilstm2": lognormal_lengths,
        "long": functools.partial(equal_lengths, length=1024),
    }
)
_SIZES_OF_LONG = MappingProxyType({"batch_size": 16, "hidden_size": 768})


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer and a batch, measured in a process of its own.

    Attributes:
      lengths: "lognormal", "equal", "bilstm2" (log-normal, for two layers in both directions), or "long" (1,024 each).
      cell: "lstm", "gru" or "rnn".
      dtype: "float32" or "bfloat16".
      batch_size, hidden_size: before they are divided.
      graphs: a key of GRAPHS.
      divisor: divides all sizes and lengths.
      groups: the libraries, in the order in which they are compiled.
    """

    lengths: str = "lognormal"
    cell: str = "lstm"
    dtype: str = "float32"
    batch_size: int = 64
    hidden_size: int = 256
    graphs: str = "default"
    divisor: int = 1
    groups: tuple[tuple[str, ...], ...] = _GROUPS

    @property
    def name(self) -> str:
        """The name in reports and in the option --only, such as lognormal-lstm-float32-64x256."""
        sizes = f"{self.batch_size // self.divisor}x{self.hidden_size // self.divisor}"
        graphs = () if self.graphs == "default" else (f"graphs-{self.graphs}",)
        return "-".join((self.lengths, self.cell, self.dtype, sizes, *graphs))

    def workload(self, seed: int) -> Workload:
        """Returns the layer and the batch."""
        lengths = _DRAWS[self.lengths](np.random.default_rng(seed), max(self.batch_size // self.divisor, 1))
        stack: dict[str, Any] = {"num_layers": 2, "bidirectional": True} if self.lengths == "bilstm2" else {}
        return Workload(
            self.name,
            np.maximum(lengths // self.divisor, 1),
            self.cell,
            _FEATURES // self.divisor,
            self.hidden_size // self.divisor,
            seed=seed,
            dtype=self.dtype,
            **stack,
        )

    def environment(self) -> dict[str, str]:
        """Returns the environment of a process that runs the case."""
        flags = f"{os.environ.get('XLA_FLAGS', '')} {GRAPHS[self.graphs]}".strip()
        # JAX and torch share the device: neither may take most of its memory at the start.
        found = {**os.environ, "XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        return found if self.divisor == 1 else {**found, "JAX_PLATFORMS": "cpu"}


# What can differ from the first case, the most informative first.
_CHANGES: Sequence[tuple[str, Any]] = (
    ("hidden_size", 1024),
    ("dtype", "bfloat16"),
    ("lengths", "long"),
    ("batch_size", 256),
    ("lengths", "bilstm2"),
    ("cell", "gru"),
    ("graphs", "loops"),
    ("lengths", "equal"),
    ("cell", "rnn"),
    ("graphs", "off"),
    ("hidden_size", 512),
)


def all_cases(graphs: str | None = None, divisor: int = 1) -> list[Case]:
    """Returns all cases: an LSTM in float32 on log-normal lengths, then those that differ from it in one respect.

    Those that differ in two respects follow, and so on.

    Args:
      graphs: the CUDA graphs of all cases. Default: XLA's own, and two cases with others.
      divisor: divides all sizes and lengths.
    """
    found = [Case(divisor=divisor, **changes) for changes in _combinations() if not (graphs and "graphs" in changes)]
    return found if graphs is None else [dataclasses.replace(case, graphs=graphs) for case in found]


def _combinations() -> Iterator[dict[str, Any]]:
    """Yields the fields of each case that differ from the first, fewest first."""
    fields = {field for field, _ in _CHANGES}
    for count in range(len(fields) + 1):
        for changes in itertools.combinations(_CHANGES, count):
            changed = dict(changes)
            if len(changed) < count or ("graphs" in changed and count > 1):
                continue
            if changed.get("lengths") == "long":
                if changed.keys() & _SIZES_OF_LONG.keys():
                    continue
                changed |= _SIZES_OF_LONG
            if "graphs" in changed:
                changed["groups"] = _GROUPS_BY_FLAGS
            yield changed
