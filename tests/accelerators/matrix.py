"""Which programs the tests compile, of the 288 that plans, options and targets make.

For an H100 all of them: every layer under every plan, in one direction and both, in float32 and bfloat16, forward and
training. For each TPU every layer under every plan, forward and training, each with one of the four choices of
directions and dtype. They go round, so that each TPU has every pair of choices, and the three together have three of
the four choices for every layer and plan.

Tests compile what has changed, and a part of the rest in turn: `is_on_turn`.
"""

import itertools

from accelerators.cases import DTYPES, GATES, PLANS, Case
from accelerators.targets import GPUS, TPUS

_VARIANTS = [(1, "f32"), (2, "bf16"), (2, "f32"), (1, "bf16")]  # any three neighbours hold both of both
# libtpu 0.0.42, which goes with jaxlib 0.10.2, does not compile this RNN's training ("A cycle is detected"), and 0.0.50
# does. Its rows take bfloat16 instead.
_INSTEAD = {
    ("tpu7x", "RNN", "buckets", 2, "bf16"): (2, "f32"),
    ("tpu7x", "RNN", "rows", 2, "f32"): (2, "bf16"),
}
PEERS = ("autodiff", "flax")


def _both_runs(target: str, layer: str, form: str, directions: int = 1, dtype: str = "f32") -> list[Case]:
    return [Case(target, layer, form, directions, dtype, training) for training in (False, True)]


def _gpu(target: str) -> list[Case]:
    every = itertools.product(GATES, PLANS, (1, 2), DTYPES)
    return [case for choice in every for case in _both_runs(target, *choice)]


def _tpu(target: str, offset: int) -> list[Case]:
    cases = []
    for (row, layer), (column, plan) in itertools.product(enumerate(GATES), enumerate(PLANS)):
        variant = _VARIANTS[(row + column + offset) % len(_VARIANTS)]
        variant = _INSTEAD.get((target, layer, plan, *variant), variant)
        cases += _both_runs(target, layer, plan, *variant)
    return cases


# Programs of jaxpack, then those that stand beside them in the table: one direction in float32.
OURS = [case for target in GPUS for case in _gpu(target)]
OURS += [case for offset, target in enumerate(TPUS) for case in _tpu(target, offset)]
THEIRS = [
    case
    for target, layer, peer in itertools.product(("h100", "v5e"), GATES, PEERS)
    for case in _both_runs(target, layer, peer)
]
CASES = [*OURS, *THEIRS]

TURNS = 5  # odd, since forward and training alternate


def is_on_turn(case: Case, turn: int) -> bool:
    """Whether a case is among those that are compiled on this turn, which is any whole number."""
    return (CASES.index(case) - turn) % TURNS == 0
