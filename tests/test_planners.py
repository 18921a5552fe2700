import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st

from jaxpack import BucketPlan, CostModel, plan_best, plan_buckets, plan_exact, plan_padded, plan_rows

SEED = [4, 6, 8, 5, 4, 3, 7, 8]
CELLS_ONLY = CostModel(cell=1, step=0, bucket=0, compilation=0)


def lognormal(seed, size=64):
    """Lengths of a median of 50, between 1 and 200."""
    return np.clip(np.random.default_rng(seed).lognormal(np.log(50), 0.7, size), 1, 200).astype(int)


def test_exact_plan_of_the_seed_example_has_45_cells():
    plan = plan_exact(SEED)
    assert plan == BucketPlan((3, 4, 5, 6, 7, 8), (8, 7, 5, 4, 3, 2))
    assert plan.size == 45
    assert plan.batch_sizes.tolist() == [8, 8, 8, 7, 5, 4, 3, 2]
    assert plan_padded(8, 8).size == 64


@given(strategies.lengths)
def test_exact_plan_has_no_slack_but_for_the_room_of_empty_sequences(lengths):
    assert plan_exact(lengths).slack(lengths) == lengths.count(0)
    assert plan_exact(lengths).num_sequences == len(lengths)


@given(strategies.lengths)
def test_padded_plan_is_one_rectangle(lengths):
    plan = plan_padded(len(lengths), max(1, *lengths, 1))
    assert plan.num_buckets == 1
    assert plan.fits(lengths)


def fewest_cells(lengths, num_buckets, row_multiple):
    """Brute force over all places of at most num_buckets stairs."""
    longest = max(1, *lengths, 1)
    best = None
    for count in range(min(num_buckets, longest)):
        for inner in itertools.combinations(range(1, longest), count):
            stops = (*inner, longest)
            starts = (0, *inner)
            alive = [max(1, sum(max(n, 1) > start for n in lengths)) for start in starts]
            rows = [min(len(lengths), -(-n // row_multiple) * row_multiple) for n in alive]
            cells = sum((stop - start) * n for start, stop, n in zip(starts, stops, rows, strict=True))
            best = cells if best is None else min(best, cells)
    return best


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=9),
    st.integers(1, 5),
    st.integers(1, 4),
)
def test_buckets_are_optimal_by_brute_force(lengths, num_buckets, row_multiple):
    plan = plan_buckets(lengths, num_buckets, row_multiple=row_multiple)
    assert plan.fits(lengths)
    assert plan.num_sequences == len(lengths)
    assert plan.num_buckets <= num_buckets
    assert all(rows % row_multiple == 0 or rows == len(lengths) for rows in plan.rows)
    assert plan.size == fewest_cells(lengths, num_buckets, row_multiple)


@given(strategies.positive_lengths, st.integers(0, 9))
def test_buckets_cost_least_by_brute_force(lengths, bucket):
    model = CostModel(cell=1, step=2, bucket=bucket, compilation=10, runs=10)
    plan = plan_buckets(lengths, cost_model=model)
    counts = range(1, max(lengths) + 1)
    least = min(fewest_cells(lengths, count, 1) + (bucket + 1) * count for count in counts)
    assert model.total(plan) == least + 2 * max(lengths)


@given(strategies.positive_lengths, st.integers(1, 4), st.integers(0, 9))
def test_a_cost_model_stops_at_buckets_that_do_not_pay_even_if_more_are_allowed(lengths, num_buckets, bucket):
    model = CostModel(cell=1, step=0, bucket=bucket, compilation=0)
    plan = plan_buckets(lengths, num_buckets, cost_model=model)
    assert plan.num_buckets <= num_buckets
    least = min(fewest_cells(lengths, count, 1) + bucket * count for count in range(1, num_buckets + 1))
    assert model.total(plan) == least


def test_by_default_a_bucket_must_pay_for_its_compilation():
    assert plan_buckets(SEED) == plan_padded(8, 8)
    assert plan_buckets(SEED * 40).num_buckets > 1
    assert plan_buckets(SEED, cost_model=CostModel(runs=10**6, bucket=0)) == plan_exact(SEED)


def test_enough_buckets_give_the_exact_plan():
    assert plan_buckets(SEED, 6) == plan_buckets(SEED, 100) == plan_exact(SEED)


def test_few_buckets_by_default():
    lengths = lognormal(1)
    plan = plan_buckets(lengths)
    assert 4 <= plan.num_buckets <= 12
    assert plan.efficiency(lengths) > 0.85
    assert plan_padded(64, lengths.max()).efficiency(lengths) < 0.5


def test_thousands_of_distinct_lengths_can_be_planned():
    lengths = np.random.default_rng(0).integers(1, 2001, 4096)
    for num_buckets in (1, 8, 64):
        plan = plan_buckets(lengths, num_buckets)
        assert plan.num_buckets == num_buckets
        assert plan.fits(lengths)


def test_row_plan_of_the_seed_example_in_four_rows():
    plan = plan_rows(SEED, 4)
    assert plan == BucketPlan((12,), (4,), ((0, 8), (0, 8), (0, 7), (0, 6)))
    assert plan.picture(SEED) == "████████▓▓▓▓\n████████▓▓▓░\n███████▓▓▓▓░\n██████▓▓▓▓▓░"


@given(strategies.lengths, st.none() | st.integers(1, 7))
def test_row_plan_is_one_rectangle_of_as_many_slots_as_sequences(lengths, num_rows):
    plan = plan_rows(lengths, num_rows)
    assert plan.num_buckets == 1
    assert plan.num_sequences == len(lengths)
    assert plan.fits(lengths)
    assert plan.rows[0] <= (num_rows or len(lengths))
    assert plan.num_steps >= max(1, *lengths, 1)


@given(strategies.lengths, st.integers(1, 5))
def test_row_plan_draws_its_longest_sequences_first_down_and_along(lengths, num_rows):
    plan = plan_rows(lengths, num_rows)
    slots = zip(plan.slot_rows.tolist(), plan.slot_starts.tolist(), plan.room.tolist(), strict=True)
    rows = [[room for _, _, room in row] for _, row in itertools.groupby(sorted(slots), key=lambda slot: slot[0])]
    firsts, inner = [row[0] for row in rows if len(row) > 1], [row[:-1] for row in rows]
    assert firsts == sorted(firsts, reverse=True)
    assert all(row == sorted(row, reverse=True) for row in inner)


def least_width(lengths, num_rows):
    """Brute force over all ways to deal lengths to rows."""
    ways = itertools.product(range(num_rows), repeat=len(lengths))
    needed = np.maximum(lengths, 1)
    return min(max(np.bincount(way, needed, num_rows)) for way in map(list, ways))


@given(st.lists(st.integers(0, 9), min_size=2, max_size=6), st.integers(1, 3))
def test_given_rows_are_within_a_third_of_the_shortest_by_brute_force(lengths, num_rows):
    plan = plan_rows(lengths, num_rows)
    if num_rows < len(lengths):
        assert least_width(lengths, num_rows) <= plan.num_steps <= 4 / 3 * least_width(lengths, num_rows)


@given(strategies.lengths, st.integers(0, 3))
def test_with_a_row_for_every_sequence_rows_are_as_long_as_the_longest(lengths, more):
    assert plan_rows(lengths, len(lengths) + more).num_steps == max(1, *lengths, 1)


@pytest.mark.parametrize("seed", range(10))
def test_row_plan_computes_at_most_3_percent_more_than_real_cells(seed):
    lengths = lognormal(seed)
    assert plan_rows(lengths).size <= 1.03 * lengths.sum()


@given(strategies.lengths)
def test_row_plan_costs_no_more_than_padding(lengths):
    padded = plan_padded(len(lengths), max(1, *lengths, 1))
    for model in (CostModel(), CELLS_ONLY, CostModel(step=1)):
        assert model.total(plan_rows(lengths, cost_model=model)) <= model.total(padded)


@given(strategies.lengths, st.integers(1, 4), st.integers(1, 4))
def test_rows_that_may_end_in_a_staircase_have_no_more_cells_and_few_buckets(lengths, num_rows, num_buckets):
    plan = plan_rows(lengths, num_rows, num_buckets=num_buckets, cost_model=CELLS_ONLY)
    assert plan.fits(lengths)
    assert plan.num_buckets <= num_buckets
    assert plan.rows[0] <= num_rows
    assert plan.size <= plan_rows(lengths, num_rows).size
    if num_buckets >= num_rows:
        assert plan.size == sum(max(length, 1) for length in lengths)


def test_a_staircase_of_rows_saves_the_width_of_a_sequence_much_longer_than_others():
    lengths = [600] + [10] * 200
    plan = plan_rows(lengths, num_buckets=2, cost_model=CELLS_ONLY)
    assert plan.efficiency(lengths) > 0.99 > 0.9 > plan_rows(lengths, 10).efficiency(lengths)


def test_dear_steps_keep_rows_as_short_as_the_longest_sequence():
    lengths = lognormal(0)
    assert plan_rows(lengths, cost_model=CostModel(step=1)).num_steps == lengths.max()
    assert plan_rows(lengths).num_steps > lengths.max()


def test_free_steps_leave_at_most_1_percent_slack():
    for seed in range(5):
        lengths = lognormal(seed)
        assert plan_rows(lengths, cost_model=CELLS_ONLY).efficiency(lengths) >= 0.99


def test_rows_of_thousands_of_sequences_can_be_planned():
    for lengths in (np.random.default_rng(0).integers(1, 2001, 4096), lognormal(0, 4096)):
        for num_rows in (None, 1, 100):
            assert plan_rows(lengths, num_rows).efficiency(lengths) > 0.98


def test_rows_of_huge_lengths_can_be_planned():
    assert plan_rows([10**9, 10**9 - 1, 1]) == BucketPlan((10**9,), (2,), ((0,), (0, 10**9 - 1)))


@given(st.lists(st.integers(0, 300), min_size=1, max_size=40))
def test_best_is_the_cheaper_of_buckets_and_rows(lengths):
    for model in (CostModel(), CostModel(runs=1), CELLS_ONLY, CostModel(step=1)):
        plan = plan_best(lengths, cost_model=model)
        candidates = [plan_buckets(lengths, cost_model=model), plan_rows(lengths, cost_model=model)]
        assert plan in candidates
        assert model.total(plan) == min(map(model.total, candidates))


def test_best_has_rows_of_several_sequences_where_a_loop_is_dear_and_buckets_where_it_is_free():
    assert plan_best(lognormal(0)).starts
    assert not plan_best(lognormal(0), cost_model=CELLS_ONLY).starts
    assert plan_best([5, 5, 5]) == plan_padded(3, 5)


PLANNERS = [plan_exact, plan_buckets, plan_rows, plan_best]


@pytest.mark.parametrize("planner", PLANNERS)
def test_lengths_may_be_jax_arrays_but_not_traced(planner):
    assert planner(jnp.array(SEED)) == planner(SEED)
    with pytest.raises(TypeError, match=r"lengths are traced.*outside jit"):
        jax.jit(planner)(jnp.array(SEED))


@pytest.mark.parametrize("planner", PLANNERS)
@given(lengths=strategies.lengths, data=st.data())
def test_the_order_of_lengths_does_not_matter(planner, lengths, data):
    assert planner(data.draw(st.permutations(lengths))) == planner(lengths)


@pytest.mark.parametrize("planner", PLANNERS)
def test_an_empty_sequence_gets_room_for_a_step(planner):
    assert planner([0, 0]) == planner([1, 1])
    assert planner([0, 0]).num_sequences == 2


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([], ValueError, "at least one sequence"),
        ([3, -1], ValueError, r"lengths\[1\] = -1 is negative"),
        ([3, 1.5], ValueError, "whole numbers"),
        (None, TypeError, "got None"),
    ],
)
def test_bad_lengths_are_named(planner, lengths, error, message):
    with pytest.raises(error, match=message):
        planner(lengths)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plan_buckets([3], 0), ValueError, "num_buckets must be at least 1, got 0"),
        (lambda: plan_buckets([3], 1.5), TypeError, "num_buckets must be an int, got 1.5"),
        (lambda: plan_buckets([3], row_multiple=0), ValueError, "row_multiple must be at least 1, got 0"),
        (lambda: plan_rows([3], 0), ValueError, "num_rows must be at least 1, got 0"),
        (lambda: plan_rows([3], 1.5), TypeError, "num_rows must be an int, got 1.5"),
        (lambda: plan_rows([3], num_buckets=0), ValueError, "num_buckets must be at least 1, got 0"),
        (lambda: plan_padded(0, 3), ValueError, "batch_size must be at least 1, got 0"),
        (lambda: plan_padded(3, 0), ValueError, "max_length must be at least 1, got 0"),
        (lambda: plan_padded(3, 2.5), TypeError, "max_length must be an int, got 2.5"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
