"""What layers launch on GPUs and TPUs, from programs that are compiled for them without one.

A program is lowered, and compiled if the committed table is not of the same lowered program. So that the table is held
too, one in `matrix.TURNS` of the others is compiled as well. Which ones changes with the table.

Run them on every core with `pytest tests/accelerators --dist loadgroup`: the tests of a program then share a process.
"""

import functools
import itertools
from collections.abc import Iterable

import jaxlib
import pytest

from accelerators import counts as counting
from accelerators import table
from accelerators.cases import DTYPES, GATES, PLANS, Case
from accelerators.counts import Counts, count, renewed
from accelerators.matrix import CASES, OURS, THEIRS, TURNS, is_on_turn
from accelerators.targets import GPUS, TARGETS, missing

pytestmark = pytest.mark.optimized
RECORDED = table.read()


@functools.cache
def counts_of(case: Case) -> Counts:
    """Returns the counts of a program as it is now.

    Under another jaxlib than the table's, which knows none of its programs, those that are not on turn are skipped.
    """
    if is_on_turn(case, RECORDED.turn):
        return count(case)
    if RECORDED.jaxlib != jaxlib.__version__:
        pytest.skip(f"the table is of jaxlib {RECORDED.jaxlib}, and another program's turn to be compiled for this one")
    return renewed(case, RECORDED.counts.get(case.name))


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
    counts = counts_of(case)
    assert counts.loops > 0
    assert counts.unknown_trips == 0


@each([case for case in OURS if case.training])
def test_no_weight_gradient_is_taken_in_a_loop(case):
    assert counts_of(case).weight_gradients == 0


@each([case for case in OURS if case.target in GPUS])
def test_the_body_of_every_innermost_loop_is_one_cuda_graph(case):
    counts = counts_of(case)
    assert counts.graphs == counts.innermost > 0


@each(CASES)
def test_counts_are_those_of_the_table(case):
    if RECORDED.jaxlib != jaxlib.__version__:
        pytest.skip(f"the table is of jaxlib {RECORDED.jaxlib}, and this is {jaxlib.__version__}")
    assert case.name in RECORDED.counts, "not counted yet: python -m accelerators.table --changed"
    counts, expected = counts_of(case), RECORDED.counts[case.name]
    assert counts.temporaries == pytest.approx(expected.temporaries, rel=0.03)
    assert counts.cycles == pytest.approx(expected.cycles, rel=0.03)
    exactly = [name for name in counts._fields if name not in ("temporaries", "cycles", "seconds", "digest")]
    assert [getattr(counts, name) for name in exactly] == [getattr(expected, name) for name in exactly]


@each([case for case in THEIRS if case.training])
def test_plain_autodiff_takes_weight_gradients_in_its_loop(case):
    assert counts_of(case).weight_gradients > 0


def test_the_table_has_every_program_and_each_keeps_the_promises():
    assert list(RECORDED.counts) == [case.name for case in CASES]
    for case in OURS:
        counts = RECORDED.counts[case.name]
        assert (counts.unknown_trips, counts.weight_gradients) == (0, 0)
        assert counts.graphs == (counts.innermost if case.target in GPUS else 0)


@each([Case("h100", "GRU", "padded", training=True, resets=True)])
def test_with_resets_a_step_takes_a_fifth_of_the_kernels_of_a_plain_scan(case):
    ours, theirs = count(case), count(case._replace(form="autodiff"))
    assert 5 * sum(ours.kernels) <= sum(theirs.kernels)
    assert ours.graphs == ours.innermost


def test_the_guide_has_the_tables():
    assert table.page_with(RECORDED) == table.PAGE.read_text()


def test_every_program_has_its_turn_and_a_turn_has_every_layer_plan_and_target():
    turns = [[case for case in CASES if is_on_turn(case, turn)] for turn in range(TURNS)]
    assert sorted(itertools.chain(*turns)) == sorted(CASES)
    for cases in turns:
        ours = [case for case in cases if case.form in PLANS]
        assert {case.target for case in cases} == set(TARGETS)
        assert {(case.layer, case.form) for case in ours} == set(itertools.product(GATES, PLANS))
        passes = {(case.target in GPUS, case.training) for case in ours}
        assert passes == set(itertools.product((True, False), repeat=2))


def test_only_a_program_that_is_not_as_it_was_is_compiled(monkeypatch):
    case, recorded = CASES[0], RECORDED.counts[CASES[0].name]
    monkeypatch.setattr(counting, "lower", lambda case: None)
    monkeypatch.setattr(counting, "count", lambda case: "compiled")
    monkeypatch.setattr(counting, "digest", lambda case, lowered: recorded.digest)
    assert renewed(case, recorded) == recorded
    assert renewed(case, None) == renewed(case, recorded._replace(digest="of another program")) == "compiled"


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
