"""Plans for a corpus: their promises agree with simulations."""

import fractions
import itertools
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpack import BucketPlan, plan_buckets, plan_padded
from jaxpack.data import SlotFilling, _chances, coverage, plan_cover, plan_family

corpora = st.lists(st.integers(0, 12), min_size=1, max_size=40)


def gamma(size=2000):
    return np.maximum(1, np.random.default_rng(0).gamma(3, 8, size)).astype(int)


def share_missed(plan, lengths, batch_size, draws, rng):
    """Simulates how often a batch drawn without replacement does not fit."""
    batches = np.stack([rng.permutation(lengths)[:batch_size] for _ in range(draws)])
    longest_first = -np.sort(-batches, axis=1)
    return (longest_first > plan.room[: longest_first.shape[1]]).any(axis=1).mean()


@given(corpora, st.integers(1, 6))
def test_the_fewest_batches_of_any_slots_fit_the_plan_of_quantiles(lengths, batch_size):
    plan = plan_cover(lengths, batch_size)
    statistics = SlotFilling([np.zeros(length) for length in lengths], plan).statistics()
    assert plan.num_sequences == batch_size
    assert statistics.batches == -(-len(lengths) // batch_size)
    assert statistics.efficiency == pytest.approx(coverage(lengths, plan).efficiency)


@given(corpora.filter(any), st.integers(1, 6), st.data())
def test_no_plan_of_as_many_slots_beats_the_slot_bound_in_the_fewest_batches(lengths, batch_size, data):
    batches = -(-len(lengths) // batch_size)
    rooms = data.draw(st.lists(st.integers(1, 12), min_size=batch_size, max_size=batch_size))
    plan = plan_buckets(rooms, 12)
    expected = coverage(lengths, plan)
    if expected.efficiency * batches * plan.size == pytest.approx(sum(lengths)):
        assert expected.efficiency <= expected.slot_bound + 1e-12
    longest_first = sorted((max(1, length) for length in lengths), reverse=True)
    assert expected.slot_bound == pytest.approx(
        sum(lengths) / (batches * sum((longest_first + [1] * 99)[i * batches] for i in range(batch_size)))
    )


def test_a_plan_that_takes_more_batches_may_beat_the_slot_bound():
    expected = coverage([4, 4, 4], BucketPlan(boundaries=(1, 4), rows=(2, 1)))  # three batches of 5 cells, not two of 8
    assert (expected.efficiency, expected.slot_bound) == pytest.approx((0.8, 0.75))


@given(st.lists(st.integers(0, 4), min_size=2, max_size=8), st.integers(1, 4), st.data())
def test_miss_is_the_share_of_all_batches_that_do_not_fit(lengths, batch_size, data):
    plan = plan_buckets(data.draw(st.lists(st.integers(1, 4), min_size=batch_size, max_size=batch_size)), 9)
    drawn = list(itertools.combinations(lengths, min(batch_size, len(lengths))))
    missed = np.mean([not plan.fits(list(batch)) for batch in drawn])
    assert coverage(lengths, plan).miss == pytest.approx(missed, abs=1e-9)


@pytest.mark.parametrize("miss", [0.3, 0.01])
def test_random_batches_miss_as_often_as_said(miss):
    lengths, rng = gamma(), np.random.default_rng(1)
    plan = plan_cover(lengths, 32, miss=miss)
    expected = coverage(lengths, plan)
    assert 0.3 * miss < expected.miss <= miss
    draws = 4000
    spread = 4 * np.sqrt(expected.miss * (1 - expected.miss) / draws)
    assert abs(share_missed(plan, lengths, 32, draws, rng) - expected.miss) < spread
    assert expected.random_efficiency == pytest.approx(32 * lengths.mean() / plan.size)


def test_a_few_plans_take_fewer_cells_than_one_and_every_batch_fits_one():
    lengths, rng = gamma(), np.random.default_rng(2)

    def cells(plans):
        batches = [rng.choice(lengths, 16, replace=False) for _ in range(300)]
        return np.mean([next(plan.size for plan in plans if plan.fits(batch)) for batch in batches])

    families = [plan_family(lengths, 16, count) for count in (1, 2, 3)]
    assert families[0] == (plan_padded(16, lengths.max()),)
    assert [len(family) for family in families] == [1, 2, 3]
    assert cells(families[2]) < cells(families[1]) < 0.6 * cells(families[0])
    sizes = [plan.size for plan in families[2]]
    assert sizes == sorted(sizes)


def test_corpus_of_one_length_is_covered_by_the_padded_plan():
    for plan in (plan_cover([5] * 9, 3), plan_cover([5] * 9, 3, miss=0.1), *plan_family([5] * 9, 3)):
        assert plan.room.tolist() == [5, 5, 5]
        assert plan.size == 15


def test_the_largest_batch_within_a_budget_of_cells():
    lengths = gamma()
    plan = plan_cover(lengths, max_cells=2000)
    assert 0.9 * 2000 < plan.size <= 2000
    assert plan.size < plan_cover(lengths, plan.num_sequences + 4).size
    assert plan_cover([7, 3], max_cells=7).room.tolist() == [7]


def test_rows_and_few_buckets_come_within_one_percent_of_the_slot_bound():
    expected = coverage(gamma(), plan_cover(gamma(), 64))
    assert expected.efficiency > 0.99 * expected.slot_bound
    stairs = plan_cover(gamma(), 64, planner=plan_buckets)
    assert not stairs.starts
    assert coverage(gamma(), stairs).efficiency < expected.efficiency


def test_a_plan_too_short_for_the_corpus_has_no_efficiency_but_a_miss_probability():
    expected = coverage([4, 4, 9], BucketPlan((4,), (2,)))
    assert expected.efficiency == 0
    assert expected.miss == pytest.approx(2 / 3)
    assert "66.67% miss" in str(expected)


def miss_by_sampling_theory(corpus, room):
    """Computes P(a batch of len(room) does not fit) from hypergeometric draws, one room after the other, exactly."""
    room, drawn = sorted(room, reverse=True), min(len(room), len(corpus))
    ways, left = {0: 1}, len(corpus)  # ways to draw so many of the sequences longer than the room reached
    for slot in range(drawn):
        longer = sum(length > room[slot] for length in corpus)
        new = longer - (len(corpus) - left)
        ways = {
            total: sum(ways[before] * math.comb(new, total - before) for before in ways if before <= total)
            for total in range(slot + 1)
        }
        left -= new
    fitting = sum(count * math.comb(left, drawn - before) for before, count in ways.items())
    return 1 - fractions.Fraction(fitting, math.comb(len(corpus), drawn))


@pytest.mark.parametrize(("size", "batch_size"), [(300, 20), (100, 99), (100, 100), (40, 64), (2000, 64)])
def test_miss_is_exact_where_batches_are_large(size, batch_size):
    rng = np.random.default_rng(size + batch_size)
    corpus = rng.integers(1, 60, size)
    for looser in (0, 3, 10, 60):
        room = np.minimum(60, np.sort(rng.choice(corpus, batch_size))[::-1] + looser)
        expected = float(miss_by_sampling_theory(corpus.tolist(), room.tolist()))
        assert coverage(corpus, plan_buckets(room, 60)).miss == pytest.approx(expected, abs=1e-9)


def test_a_plan_of_thousands_of_slots_can_be_weighed():
    halves = np.repeat([10, 1], 50_000)
    expected = [coverage(halves, BucketPlan((1, 10), (4000, long))).miss for long in (1, 1000, 2000, 2100, 4000)]
    assert expected[:2] == [1, 1]
    assert expected[2] == pytest.approx(0.4936, abs=1e-3)  # less than half by P(just 2,000 of 4,000) / 2
    assert 1e-4 < expected[3] < 1e-2
    assert expected[4] == pytest.approx(0, abs=1e-9)


def test_a_budget_of_cells_for_thousands_of_sequences_takes_few_plans():
    lengths, planned = gamma(50_000), []

    def planner(rooms):
        planned.append(len(rooms))
        return plan_buckets(rooms, 8)

    plan = plan_cover(lengths, max_cells=200_000, planner=planner)
    assert 0.995 * 200_000 < plan.size <= 200_000
    assert plan.num_sequences > 5000
    assert len(planned) < 25


def test_rooms_of_very_many_distinct_lengths_miss_as_often_as_said(monkeypatch):
    monkeypatch.setattr(_chances, "_CHANCES", 2000)  # of 16 * 1500: it takes every twelfth length
    lengths = np.random.default_rng(3).permutation(1500) + 1
    plan = plan_cover(lengths, 16, miss=0.1)
    assert 0.03 < coverage(lengths, plan).miss <= 0.1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plan_cover([], 2), ValueError, "the corpus is empty"),
        (lambda: plan_cover([3, -1], 2), ValueError, r"lengths\[1\] = -1 is negative"),
        (lambda: plan_cover([3, np.nan], 2), ValueError, "whole numbers"),
        (lambda: plan_cover([3]), ValueError, "pass either batch_size or max_cells"),
        (lambda: plan_cover([3], 1, max_cells=9), ValueError, "pass either batch_size or max_cells"),
        (lambda: plan_cover([3], 0), ValueError, "batch_size must be at least 1, got 0"),
        (lambda: plan_cover([3], 1.5), TypeError, "batch_size must be an int"),  # type: ignore[call-overload]
        (lambda: plan_cover([3], max_cells=2), ValueError, "max_cells = 2 does not hold the longest"),
        (lambda: plan_cover([3], 1, miss=0), ValueError, "between 0 and 1, got 0"),
        (lambda: plan_family([3], 2, 0), ValueError, "num_plans must be at least 1"),
        (lambda: coverage([], plan_padded(1, 1)), ValueError, "the corpus is empty"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_corpus_is_planned_for_a_platform_and_by_default_for_jaxs():
    lengths = np.append(gamma(), [500] * 40)  # the longest are far longer: stairs on a CPU, not on a GPU
    cpu, gpu = (plan_cover(lengths, 64, platform=platform) for platform in ("cpu", "gpu"))
    assert cpu.num_buckets > 1 == gpu.num_buckets
    assert gpu.num_steps == max(lengths) < cpu.num_steps or cpu.size < gpu.size
    default = jax.default_backend()
    assert plan_cover(lengths, 64) == plan_cover(lengths, 64, platform=default)
    assert plan_cover({"a": lengths}, 64, platform="gpu") == {"a": gpu}
    assert plan_family(lengths, 64) == plan_family(lengths, 64, platform=default)


@pytest.mark.parametrize("planned", [plan_cover, plan_family])
def test_a_platform_is_one_that_is_known_and_no_planner_is_beside_it(planned):
    with pytest.raises(ValueError, match=r"platform must be one of .* got 'h100'"):
        planned([4, 2], 2, platform="h100")
    with pytest.raises(ValueError, match=r"platform or planner, not both.*plan_best, platform='gpu'"):
        planned([4, 2], 2, platform="gpu", planner=plan_buckets)
