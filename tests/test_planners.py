import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st

from jaxpack import BucketPlan, plan_buckets, plan_exact, plan_padded

SEED = [4, 6, 8, 5, 4, 3, 7, 8]


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
def test_bucket_cost_is_minimised_with_the_cells(lengths, bucket_cost):
    plan = plan_buckets(lengths, bucket_cost=bucket_cost)
    cost = plan.size + bucket_cost * plan.num_buckets
    assert cost == min(fewest_cells(lengths, k, 1) + bucket_cost * k for k in range(1, max(lengths) + 1))


def test_enough_buckets_give_the_exact_plan():
    assert plan_buckets(SEED, 6) == plan_buckets(SEED, 100) == plan_exact(SEED)


def test_few_buckets_by_default():
    lengths = np.clip(np.random.default_rng(1).lognormal(np.log(50), 0.7, 64), 1, 200).astype(int)
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


def test_lengths_may_be_jax_arrays_but_not_traced():
    assert plan_exact(jnp.array(SEED)) == plan_exact(SEED)
    with pytest.raises(TypeError, match=r"lengths are traced.*outside jit"):
        jax.jit(plan_exact)(jnp.array(SEED))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plan_exact([]), ValueError, "at least one sequence"),
        (lambda: plan_exact([3, -1]), ValueError, "negative"),
        (lambda: plan_buckets([3], 0), ValueError, "num_buckets must be at least 1, got 0"),
        (lambda: plan_buckets([3], 1.5), TypeError, "num_buckets must be an int, got 1.5"),
        (lambda: plan_buckets([3], row_multiple=0), ValueError, "row_multiple must be at least 1, got 0"),
        (lambda: plan_buckets([3], bucket_cost=-1), ValueError, "bucket_cost must be 0 or more cells, got -1"),
        (lambda: plan_padded(0, 3), ValueError, "batch_size must be at least 1, got 0"),
        (lambda: plan_padded(3, 0), ValueError, "max_length must be at least 1, got 0"),
        (lambda: plan_padded(3, 2.5), TypeError, "max_length must be an int, got 2.5"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
