"""Which programs the tests compile, of the 288 that plans, options and targets make.

For an H100 all of them: every layer under every plan, in one direction and both, in float32 and bfloat16, forward and
training. For each TPU every layer under every plan, forward and training, each with one of the four choices of
directions and dtype. They go round, so that each TPU has every pair of choices, and the three together have three of
the four choices for every layer and plan.
"""

import itertools

from accelerators.cases import DTYPES, GATES, PLANS, Case
from accelerators.targets import GPUS, TPUS

_VARIANTS = [(1, "f32"), (2, "bf16"), (2, "f32"), (1, "bf16")]  # any three neighbours hold both of both
PEERS = ("autodiff", "flax")


def _both_runs(target: str, layer: str, form: str, directions: int = 1, dtype: str = "f32") -> list[Case]:
    return [Case(target, layer, form, directions, dtype, training) for training in (False, True)]


def _gpu(target: str) -> list[Case]:
    every = itertools.product(GATES, PLANS, (1, 2), DTYPES)
    return [case for choice in every for case in _both_runs(target, *choice)]


def _tpu(target: str, offset: int) -> list[Case]:
    every = itertools.product(enumerate(GATES), enumerate(PLANS))
    return [
        case
        for (row, layer), (column, plan) in every
        for case in _both_runs(target, layer, plan, *_VARIANTS[(row + column + offset) % len(_VARIANTS)])
    ]


# Programs of jaxpack, then those that stand beside them in the table: one direction in float32.
OURS = [case for target in GPUS for case in _gpu(target)]
OURS += [case for offset, target in enumerate(TPUS) for case in _tpu(target, offset)]
THEIRS = [
    case
    for target, layer, peer in itertools.product(("h100", "v5e"), GATES, PEERS)
    for case in _both_runs(target, layer, peer)
]
CASES = [*OURS, *THEIRS]
