import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import staircases

from jaxpack import BucketPlan

STAIRS = BucketPlan(boundaries=(2, 4), rows=(3, 1))


def test_properties_of_a_small_plan():
    assert STAIRS.num_buckets == 2
    assert STAIRS.num_sequences == 3
    assert STAIRS.max_length == STAIRS.num_steps == 4
    assert STAIRS.size == 8
    assert STAIRS.batch_sizes.tolist() == [3, 3, 1, 1]
    assert STAIRS.room.tolist() == [4, 2, 2]
    assert STAIRS.cell_slots.tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
    assert STAIRS.cell_steps.tolist() == [0, 0, 0, 1, 1, 1, 2, 3]


@given(staircases())
def test_every_cell_belongs_to_one_slot_and_step(plan):
    cells = [(slot, step) for step, rows in enumerate(plan.batch_sizes) for slot in range(rows)]
    assert list(zip(plan.cell_slots.tolist(), plan.cell_steps.tolist(), strict=True)) == cells
    assert plan.size == len(cells) == sum(bucket.size for bucket in plan.buckets)
    assert plan.room.tolist() == [sum(rows > slot for rows in plan.batch_sizes) for slot in range(plan.num_sequences)]


@given(staircases(), st.lists(st.integers(0, 10), max_size=7))
def test_fits_agrees_with_its_definition(plan, lengths):
    ranked = sorted(lengths, reverse=True)
    expected = len(ranked) <= plan.num_sequences and all(n <= plan.room[i] for i, n in enumerate(ranked))
    assert plan.fits(lengths) == expected
    if expected:
        plan.check(lengths)
        assert plan.slack(lengths) == plan.size - sum(lengths)
        assert plan.efficiency(lengths) == pytest.approx(sum(lengths) / plan.size)
    else:
        with pytest.raises(ValueError, match="plan"):
            plan.check(lengths)


def test_a_misfit_is_named_with_its_row_length_and_room():
    with pytest.raises(ValueError, match=r"lengths\[1\] = 3 does not fit the plan: its row has room for 2 steps"):
        STAIRS.check([4, 3, 1])
    with pytest.raises(ValueError, match=r"lengths has 4 entries, but the plan is for 3"):
        STAIRS.slack([1, 1, 1, 1])


def test_of_tied_lengths_the_later_row_is_the_misfit():
    with pytest.raises(ValueError, match=r"lengths\[2\] = 3"):
        STAIRS.check([1, 3, 3])


def test_plans_compare_hash_and_pickle_by_value():
    same = BucketPlan(boundaries=[np.int64(2), 4], rows=np.array([3, 1]))
    assert same == STAIRS
    assert hash(same) == hash(STAIRS)
    assert {same: 1}[STAIRS] == 1
    _ = same.cell_slots
    assert pickle.loads(pickle.dumps(same)) == STAIRS
    assert BucketPlan((2, 4), (3, 2)) != STAIRS
    assert eval(repr(STAIRS)) == STAIRS


def test_repr_of_many_buckets_is_short():
    plan = BucketPlan(tuple(range(1, 101)), tuple(range(100, 0, -1)))
    assert repr(plan) == "BucketPlan(boundaries=(1, 2, 3, 4, ..., 99, 100), rows=(100, 99, 98, 97, ..., 2, 1))"


@pytest.mark.parametrize(
    ("boundaries", "rows", "error", "message"),
    [
        ((), (), ValueError, "at least one bucket"),
        ((1, 2), (3,), ValueError, "2 boundaries and 1 rows"),
        ((2, 2), (3, 1), ValueError, "increase strictly"),
        ((0, 2), (3, 1), ValueError, "increase strictly from above 0"),
        ((1, 2), (1, 3), ValueError, "must not increase"),
        ((1, 2), (1, 0), ValueError, "at least 1"),
        ((1.5,), (1,), TypeError, "boundaries must be a tuple of ints"),
        ((1,), None, TypeError, "rows must be a tuple of ints"),
    ],
)
def test_what_is_no_staircase_is_refused(boundaries, rows, error, message):
    with pytest.raises(error, match=message):
        BucketPlan(boundaries, rows)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([1, -2], ValueError, r"lengths\[1\] = -2 is negative"),
        ([1, 1.5], ValueError, r"whole numbers, got lengths\[1\] = 1.5"),
        ([1, np.nan], ValueError, "whole numbers"),
        ([[1, 2]], ValueError, r"vector \[B\], got shape \(1, 2\)"),
        (3, ValueError, r"vector \[B\], got shape \(\)"),
        (["a"], TypeError, "integers"),
        ([True, False], TypeError, "integers, got dtype bool"),
    ],
)
def test_bad_lengths_are_named(lengths, error, message):
    with pytest.raises(error, match=message):
        STAIRS.fits(lengths)


def test_whole_floats_are_lengths():
    assert STAIRS.fits([4.0, 2.0, 1.0])


def test_picture_shows_cells_and_slack():
    assert STAIRS.picture() == "████\n██\n██"
    assert STAIRS.picture([1, 3, 2]) == "███░\n██\n█░"


def test_picture_of_a_large_plan_is_sampled():
    lines = BucketPlan((500, 1000), (400, 100)).picture(columns=40, lines=8).splitlines()
    assert [len(line) for line in lines] == [40, 40, 20, 20, 20, 20, 20, 20]


def test_html_picture_draws_every_bucket():
    html = STAIRS._repr_html_()
    assert html.count("<rect") == 2
    assert "8 cells (padded: 12)" in html
