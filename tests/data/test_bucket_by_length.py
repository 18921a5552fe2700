"""BucketByLength: a program a bucket, batch sizes from a budget with a cap."""

import itertools

import numpy as np
import pytest
from corpora import CORPORA, Sized

from jaxpack import plan_padded
from jaxpack.data import BucketByLength
from jaxpack.data._boundaries import padded_plans, tightest_boundaries


def pad(rooms):
    return plan_padded(len(rooms), max(rooms))


def test_six_programs_fill_95_percent_on_words():
    lengths = CORPORA["words"]()
    statistics = BucketByLength(Sized(lengths), batch_size=64, lengths=lengths).statistics()
    assert statistics.programs <= 6
    assert statistics.efficiency > 0.95
    assert abs(statistics.rank_correlation) < 0.05


def test_a_budget_sets_the_batch_size_of_each_bucket_under_a_cap():
    source = [np.zeros(length) for length in (2, 4, 8) for _ in range(50)]
    sizes = [plan.num_sequences for plan in BucketByLength(source, (2, 4, 8), max_cells=32, planner=pad).plans]
    assert sizes == [16, 8, 4]
    capped = BucketByLength(source, (2, 4, 8), max_cells=32, batch_size=10, planner=pad)
    assert [plan.num_sequences for plan in capped.plans] == [10, 8, 4]
    assert max(plan.size for plan in BucketByLength(source, max_cells=32).plans) <= 32


def test_sequences_go_to_the_first_bucket_that_holds_them():
    source = [np.zeros(length) for length in (1, 2, 3, 4, 4, 2)]
    for batch in BucketByLength(source, (2, 4), batch_size=2):
        shortest, longest = (0, 2) if batch.inputs.plan.max_length == 2 else (3, 4)
        assert all(shortest <= length <= longest for length in batch.inputs.lengths[batch.indices >= 0])


def test_boundaries_take_the_fewest_cells_by_brute_force():
    lengths = np.random.default_rng(0).integers(1, 9, 40)
    chosen = tightest_boundaries(lengths, 3)

    def cells(boundaries):
        return sum(next(boundary for boundary in boundaries if length <= boundary) for length in lengths)

    every = itertools.combinations(range(1, lengths.max()), 2)
    assert cells(chosen) == min(cells((*boundaries, lengths.max())) for boundaries in every)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BucketByLength([[1]], ()), "boundaries must increase"),
        (lambda: BucketByLength([[1]], (4, 2), batch_size=1), "boundaries must increase"),
        (lambda: BucketByLength([[1]]), "pass batch_size, max_cells or both"),
        (lambda: BucketByLength([[1, 2, 3]], max_cells=2), "max_cells = 2 does not hold one sequence of 3"),
        (lambda: BucketByLength([[1]], batch_size=0), "batch_size must be at least 1"),
        (lambda: BucketByLength([[1, 2]], (1,), batch_size=1), "example 0 has 2 steps"),
        (lambda: BucketByLength(iter([[1]]), batch_size=1), "no lengths to make boundaries from"),
        (lambda: padded_plans((4,), None, None), "pass batch_size"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
