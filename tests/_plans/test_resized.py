"""Plans of changed lengths: what fits the old plan fits the new one, rows stay rows, and stairs stay stairs."""

import numpy as np
import strategies
from hypothesis import given
from hypothesis import strategies as st

from jaxpack import BucketPlan, plan_exact, plan_padded
from jaxpack._packed.windows import Windows
from jaxpack._plans.resized import resized

windows = st.builds(
    Windows,
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 2),
    st.one_of(st.none(), st.tuples(st.integers(0, 3), st.integers(0, 3))),
    st.booleans(),
)


@given(strategies.plans, windows)
def test_lengths_that_fit_a_plan_fit_the_resized_one_in_the_same_slots(plan, windows):
    new = resized(plan, windows.count)
    assert new.num_sequences == plan.num_sequences
    # Whatever fits is at most the room of each slot, so the count of the room is the worst case of each.
    counts = windows.count(plan.room)
    assert (counts <= new.room).all()
    assert (np.diff(windows.count(np.arange(40))) >= 0).all()


@given(strategies.plans, windows)
def test_rows_stay_rows_and_buckets_do_not_become_more(plan, windows):
    new = resized(plan, windows.count)
    assert new.rows[0] == plan.rows[0]
    assert new.num_buckets <= plan.num_buckets
    assert [len(row) for row in new.starts] in ([len(row) for row in plan.starts], [])
    assert not plan.starts or sum(map(len, plan.starts)) == new.num_sequences
    assert hash(new) == hash(resized(plan, windows.count))


def test_a_resized_exact_plan_is_the_exact_plan_of_the_new_lengths():
    lengths, halves = np.array([9, 7, 6, 6, 3, 2, 1]), Windows(2, 2, ceil=True)
    assert resized(plan_exact(lengths), halves.count) == plan_exact(halves.count(lengths))
    assert resized(plan_padded(3, 7), halves.count) == plan_padded(3, 4)


def test_rows_keep_their_slots_end_to_end():
    plan = BucketPlan((12,), (2,), ((0, 5), (0, 6)))  # rooms 7, 6, 6, 5
    assert resized(plan, Windows(2, 2, ceil=True).count) == BucketPlan((7,), (2,), ((0, 3), (0, 3)))
