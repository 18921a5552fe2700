"""BucketPlan: slots, cells, fitting lengths, equality, repr and pictures."""

import itertools
import pickle
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from counts import counted_calls
from hypothesis import given
from hypothesis import strategies as st
from strategies import plans, staircases

from jaxpack import BucketPlan
from jaxpack._checks import concrete_lengths

STAIRS = BucketPlan(boundaries=(2, 4), rows=(3, 1))
ROWS = BucketPlan(boundaries=(4,), rows=(2,), starts=((0,), (0, 2)))


def slots_by_hand(plan):
    """Row, start and end of each slot, walked row by row, then the longest first."""
    slots = []
    for row, starts in enumerate(plan.starts or [(0,)] * plan.rows[0]):
        end = sum(rows > row for rows in plan.batch_sizes)
        slots += [(row, start, stop) for start, stop in itertools.pairwise((*starts, end))]
    return sorted(slots, key=lambda slot: slot[1] - slot[2])


def test_properties_of_a_small_plan():
    assert STAIRS.num_buckets == 2
    assert STAIRS.num_sequences == 3
    assert STAIRS.max_length == STAIRS.num_steps == 4
    assert STAIRS.size == 8
    assert STAIRS.batch_sizes.tolist() == [3, 3, 1, 1]
    assert STAIRS.room.tolist() == [4, 2, 2]
    assert STAIRS.cell_slots.tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
    assert STAIRS.cell_steps.tolist() == [0, 0, 0, 1, 1, 1, 2, 3]


def test_properties_of_a_small_row_plan():
    assert ROWS.num_buckets == 1
    assert ROWS.num_sequences == 3
    assert ROWS.max_length == ROWS.num_steps == 4
    assert ROWS.size == 8
    assert ROWS.batch_sizes.tolist() == [2, 2, 2, 2]
    assert ROWS.room.tolist() == [4, 2, 2]
    assert ROWS.slot_rows.tolist() == [0, 1, 1]
    assert ROWS.slot_starts.tolist() == [0, 0, 2]
    assert ROWS.cell_slots.tolist() == [0, 1, 0, 1, 0, 2, 0, 2]
    assert ROWS.cell_steps.tolist() == [0, 0, 1, 1, 2, 0, 3, 1]
    assert ROWS.slot_begins.tolist() == [0, 1, 5]
    assert ROWS.slot_ends.tolist() == [6, 3, 7]


@given(staircases())
def test_cells_of_a_staircase_are_those_of_its_rows_step_by_step(plan):
    cells = [(slot, step) for step, rows in enumerate(plan.batch_sizes) for slot in range(rows)]
    assert list(zip(plan.cell_slots.tolist(), plan.cell_steps.tolist(), strict=True)) == cells
    assert plan.size == len(cells) == sum(bucket.size for bucket in plan.buckets)


@given(plans)
def test_slots_fill_their_rows_and_the_largest_room_comes_first(plan):
    slots = slots_by_hand(plan)
    assert plan.num_sequences == len(slots)
    assert plan.room.tolist() == [stop - start for _, start, stop in slots]
    assert plan.slot_rows.tolist() == [row for row, _, _ in slots]
    assert plan.slot_starts.tolist() == [start for _, start, _ in slots]
    assert plan.max_length == max(plan.room)
    assert plan.size == sum(plan.room)


@given(plans)
def test_every_cell_belongs_to_one_slot_and_step(plan):
    slots = slots_by_hand(plan)
    cells = [
        (slot, step - start)
        for step, alive in enumerate(plan.batch_sizes)
        for row in range(alive)
        for slot, (where, start, stop) in enumerate(slots)
        if where == row and start <= step < stop
    ]
    assert list(zip(plan.cell_slots.tolist(), plan.cell_steps.tolist(), strict=True)) == cells


@given(plans)
def test_a_slot_begins_at_its_first_cell_and_ends_at_its_last(plan):
    for slot, (begin, end) in enumerate(zip(plan.slot_begins, plan.slot_ends, strict=True)):
        assert (plan.cell_slots[begin], plan.cell_steps[begin]) == (slot, 0)
        assert (plan.cell_slots[end], plan.cell_steps[end]) == (slot, plan.room[slot] - 1)


@given(plans)
def test_index_vectors_are_int32_and_cannot_be_written(plan):
    for name in (
        "room",
        "slot_rows",
        "slot_starts",
        "slots_by_row",
        "row_firsts",
        "slot_begins",
        "slot_ends",
        "cell_slots",
        "cell_steps",
        "batch_sizes",
        "step_offsets",
    ):
        vector = getattr(plan, name)
        assert vector.dtype == np.int32
        assert not vector.flags.writeable


@given(plans, st.lists(st.integers(0, 10), max_size=7))
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
    same = BucketPlan(boundaries=[np.int64(2), 4], rows=np.array([3, 1]))  # type: ignore[arg-type]
    assert same == STAIRS
    assert hash(same) == hash(STAIRS)
    assert {same: 1}[STAIRS] == 1
    _ = same.cell_slots
    assert pickle.loads(pickle.dumps(same)) == STAIRS
    assert BucketPlan((2, 4), (3, 2)) != STAIRS
    assert eval(repr(STAIRS)) == STAIRS


@given(plans)
def test_a_plan_is_equal_to_its_copy_and_its_repr_and_hashes_alike(plan):
    lists = BucketPlan(list(plan.boundaries), np.array(plan.rows), [list(row) for row in plan.starts])  # type: ignore[arg-type]
    assert lists == plan
    assert hash(lists) == hash(plan)
    assert eval(repr(plan)) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_a_pickle_holds_the_fields_alone():
    plan = BucketPlan((2, 4), (3, 1))
    small = pickle.dumps(plan)
    _ = hash(plan), plan.cell_slots, plan.room
    assert pickle.dumps(plan) == small
    assert vars(pickle.loads(small)) == {"boundaries": (2, 4), "rows": (3, 1), "starts": ()}


def test_a_hash_is_computed_once(monkeypatch):
    plan = BucketPlan((50,), (20_000,), ((0, 9, 40),) * 20_000)
    first = hash(plan)
    object.__setattr__(plan, "starts", ())  # would change it
    assert hash(plan) == first


def test_plans_that_differ_in_starts_are_different():
    assert BucketPlan((4,), (2,), ((0,), (0, 3))) != ROWS
    assert BucketPlan((4,), (2,), ((0, 2), (0,))) != ROWS
    assert BucketPlan((4,), (2,)) != ROWS


def test_one_slot_a_row_is_the_staircase_itself():
    spelled_out = BucketPlan((2, 4), (3, 1), ((0,), (0,), (0,)))
    assert spelled_out == STAIRS
    assert hash(spelled_out) == hash(STAIRS)
    assert spelled_out.starts == ()


def test_repr_of_a_row_plan_writes_its_starts():
    assert repr(ROWS) == "BucketPlan(boundaries=(4,), rows=(2,), starts=((0,), (0, 2)))"
    assert "starts" not in repr(STAIRS)


def test_repr_of_many_slots_is_short():
    plan = BucketPlan((50,), (20,), (tuple(range(50)),) * 20)
    row = "(0, 1, 2, 3, ..., 48, 49)"
    rows = f"{row}, {row}, {row}, {row}, ..., {row}, {row}"
    assert repr(plan) == f"BucketPlan(boundaries=(50,), rows=(20,), starts=({rows}))"


class Counted(int):
    """An int that counts how often it is written."""

    written = 0

    def __repr__(self):
        Counted.written += 1
        return int.__repr__(self)

    __str__ = __repr__


def test_repr_writes_no_more_slots_than_it_shows():
    plan = BucketPlan((50,), (1000,), ((0, 20),) * 1000)
    object.__setattr__(plan, "starts", (tuple(map(Counted, range(50))),) * 1000)
    assert len(repr(plan)) < 300
    assert Counted.written <= 36


def test_errors_of_many_buckets_are_short():
    with pytest.raises(ValueError, match="increase strictly") as caught:
        BucketPlan((*range(1, 10_000), 5), range(10_000, 0, -1))  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200


def test_starts_that_are_wrong_in_the_last_of_many_rows_are_named():
    good = ((0, 5),) * 99_999
    for bad in ((0, 5, 5), (0, 50), (1, 5), (5, 0), (), (0, -1)):
        with pytest.raises(ValueError, match=rf"got starts\[99999\] = {re.escape(repr(bad))} in a row of 50 steps"):
            BucketPlan((50,), (100_000,), (*good, bad))


def test_slots_of_many_rows_are_those_that_starts_say():
    starts = ((0, 20), (0,), (0, 10, 15)) * 3000
    plan = BucketPlan((40,), (9000,), starts)
    assert plan.num_sequences == 18_000
    found = zip(plan.slot_rows.tolist(), plan.slot_starts.tolist(), plan.room.tolist(), strict=True)
    expected = [
        (row, start, stop - start)
        for row, steps in enumerate(starts)
        for start, stop in zip(steps, (*steps[1:], 40), strict=True)
    ]
    assert sorted(found) == expected
    assert (np.diff(plan.room) <= 0).all()


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
def test_invalid_staircases_are_refused(boundaries, rows, error, message):
    with pytest.raises(error, match=message):
        BucketPlan(boundaries, rows)


@pytest.mark.parametrize(
    ("starts", "error", "message"),
    [
        (((0,),), ValueError, "one entry per row, got 1 for 2 rows"),
        (((0,), (0,), (0, 1)), ValueError, "one entry per row, got 3 for 2 rows"),
        (((0,), ()), ValueError, r"got starts\[1\] = \(\) in a row of 2 steps"),
        (((0,), (1,)), ValueError, r"increase from 0 .* got starts\[1\] = \(1,\)"),
        (((0, 2, 2), (0,)), ValueError, r"got starts\[0\] = \(0, 2, 2\) in a row of 4 steps"),
        (((0, 4), (0,)), ValueError, r"be below its end, got starts\[0\] = \(0, 4\)"),
        (((0, 1), (0, 2)), ValueError, r"got starts\[1\] = \(0, 2\) in a row of 2 steps"),
        (((0, 1.5), (0,)), TypeError, r"starts\[0\] must be a tuple of ints, got \(0, 1.5\)"),
        ((0, 2), TypeError, r"starts\[0\] must be a tuple of ints, got 0"),
    ],
)
def test_invalid_starts_are_refused(starts, error, message):
    with pytest.raises(error, match=message):
        BucketPlan((2, 4), (2, 1), starts)


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
def test_errors_name_bad_lengths(lengths, error, message):
    with pytest.raises(error, match=message):
        STAIRS.fits(lengths)


def test_whole_floats_are_lengths():
    assert STAIRS.fits([4.0, 2.0, 1.0])


@pytest.mark.parametrize("method", ["fits", "check", "filled", "slack", "efficiency", "picture"])
def test_a_method_checks_lengths_once(method):
    assert counted_calls(lambda: getattr(STAIRS, method)([4, 1]), concrete_lengths) == [1]


def test_picture_shows_cells_and_slack():
    assert STAIRS.picture() == "████\n██\n██"
    assert STAIRS.picture([1, 3, 2]) == "███░\n██\n█░"


def test_picture_shades_the_slots_of_a_row_in_turn():
    assert ROWS.picture() == "████\n██▓▓"
    assert ROWS.picture([1, 4, 2]) == "████\n██▓░"
    assert BucketPlan((2, 6), (2, 1), ((0, 1, 3), (0, 1))).picture() == "█▓▓███\n█▓"


def test_picture_takes_fewer_lengths_than_slots():
    assert ROWS.picture([3]) == "███░\n░░░░"


def test_picture_refuses_lengths_that_do_not_fit():
    with pytest.raises(ValueError, match=r"lengths\[0\] = 5 does not fit"):
        ROWS.picture([5])


@given(plans)
def test_picture_draws_every_cell(plan):
    picture = plan.picture()
    assert [len(line) for line in picture.splitlines()] == [sum(plan.batch_sizes > row) for row in range(plan.rows[0])]
    assert "░" not in picture
    assert plan.picture([]).count("░") == plan.size


def test_picture_of_a_large_plan_is_sampled():
    lines = BucketPlan((500, 1000), (400, 100)).picture(columns=40, lines=8).splitlines()
    assert [len(line) for line in lines] == [40, 40, 20, 20, 20, 20, 20, 20]


def test_picture_of_a_huge_plan_makes_no_vector_of_its_cells():
    plan = BucketPlan((10_000,), (4096,))
    lines = plan.picture([10_000, *[5000] * 4095], columns=10, lines=4).splitlines()
    assert lines == ["█████░░░░░"] * 4
    assert "_cells" not in vars(plan)


@pytest.mark.parametrize(
    ("plan", "caption"),
    [
        (STAIRS, "BucketPlan: 2 buckets, 3 sequences of at most 4 steps, 8 cells (padded: 12)"),
        (ROWS, "BucketPlan: 2 rows of 4 steps, 3 sequences of at most 4 steps, 8 cells (padded: 12)"),
        (BucketPlan((1,), (1,)), "BucketPlan: 1 bucket, 1 sequence of at most 1 step, 1 cell (padded: 1)"),
    ],
)
def test_notebooks_show_a_picture_with_a_caption(plan, caption):
    figure = ElementTree.fromstring(plan._repr_html_())
    lines = figure.find("figcaption")
    assert lines is not None
    assert [line.text for line in lines] == [caption]
    assert len(figure.findall("svg")) == 1
