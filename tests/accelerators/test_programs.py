"""What layers launch on GPUs and TPUs, from programs that are compiled for them without one.

Run them on every core with `pytest tests/accelerators --dist loadgroup`: the tests of a program then share a process.
"""

import itertools
from collections.abc import Iterable

import jaxlib
import pytest

from accelerators import table
from accelerators.cases import DTYPES, GATES, PLANS, Case
from accelerators.counts import count
from accelerators.matrix import CASES, OURS, THEIRS
from accelerators.targets import GPUS, TARGETS, missing

pytestmark = pytest.mark.optimized


def each(cases):
    """Parametrizes by programs. Those whose compiler is not installed are skipped."""
    marked = [
        pytest.param(
            case,
            id=case.name,
            marks=[
                pytest.mark.xdist_group(case.name),
                pytest.mark.skipif(bool(missing(case.target)), reason=missing(case.target)),
            ],
        )
        for case in cases
    ]
    return pytest.mark.parametrize("case", marked)


@each(OURS)
def test_every_loop_has_a_trip_count_that_the_compiler_knows(case):
    counts = count(case)
    assert counts.loops > 0
    assert counts.unknown_trips == 0


@each([case for case in OURS if case.training])
def test_no_weight_gradient_is_taken_in_a_loop(case):
    assert count(case).weight_gradients == 0


@each([case for case in OURS if case.target in GPUS])
def test_the_body_of_every_innermost_loop_is_one_cuda_graph(case):
    counts = count(case)
    assert counts.graphs == counts.innermost > 0


@each(CASES)
def test_counts_are_those_of_the_table(case):
    recorded = table.read()
    if recorded.jaxlib != jaxlib.__version__:
        pytest.skip(f"the table is of jaxlib {recorded.jaxlib}, and this is {jaxlib.__version__}")
    if case.name not in recorded.counts:
        pytest.skip("not counted yet: python -m accelerators.table --missing")
    counts, expected = count(case), recorded.counts[case.name]
    assert counts.temporaries == pytest.approx(expected.temporaries, rel=0.03)
    assert counts.cycles == pytest.approx(expected.cycles, rel=0.03)
    exactly = [name for name in counts._fields if name not in ("temporaries", "cycles", "seconds")]
    assert [getattr(counts, name) for name in exactly] == [getattr(expected, name) for name in exactly]


@each([case for case in THEIRS if case.training])
def test_plain_autodiff_takes_weight_gradients_in_its_loop(case):
    assert count(case).weight_gradients > 0


@each([Case("h100", "GRU", "padded", training=True, resets=True)])
def test_with_resets_a_step_takes_a_fifth_of_the_kernels_of_a_plain_scan(case):
    ours, theirs = count(case), count(case._replace(form="autodiff"))
    assert 5 * sum(ours.kernels) <= sum(theirs.kernels)
    assert ours.graphs == ours.innermost


def test_the_guide_has_the_tables():
    assert table.page_with(table.read()) == table.PAGE.read_text()


@pytest.mark.parametrize("target", TARGETS)
def test_every_pair_of_choices_is_compiled(target):
    choices: dict[str, Iterable] = {
        "layer": GATES,
        "form": PLANS,
        "directions": (1, 2),
        "dtype": DTYPES,
        "training": (False, True),
    }
    for one, other in itertools.combinations(choices, 2):
        compiled = {(getattr(case, one), getattr(case, other)) for case in OURS if case.target == target}
        assert compiled == set(itertools.product(choices[one], choices[other]))


def test_an_h100_gets_everything():
    every = itertools.product(["h100"], GATES, PLANS, (1, 2), DTYPES, (False, True))
    assert {case for case in OURS if case.target == "h100"} == set(itertools.starmap(Case, every))
