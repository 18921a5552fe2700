"""Hypothesis strategies: lengths, and plans that fit them."""

import numpy as np
from hypothesis import strategies as st

from jaxpack import BucketPlan, plan_buckets, plan_exact, plan_padded

lengths = st.lists(st.integers(0, 7), min_size=1, max_size=6)
positive_lengths = st.lists(st.integers(1, 7), min_size=1, max_size=6)


@st.composite
def fitting_plans(draw, lengths):
    """Any plan under which the lengths fit: one of the planners', or a staircase loosened at random."""
    kind = draw(st.sampled_from(["exact", "buckets", "padded", "loose"]))
    if kind == "exact":
        return plan_exact(lengths)
    if kind == "buckets":
        return plan_buckets(lengths, draw(st.integers(1, 3)))
    if kind == "padded":
        return plan_padded(len(lengths), max(1, *lengths) + draw(st.integers(0, 2)))
    room = np.maximum(np.sort(lengths)[::-1], 1) + np.array([draw(st.integers(0, 2)) for _ in lengths])
    return plan_exact(np.sort(room)[::-1])


@st.composite
def lengths_and_plan(draw):
    """Lengths (zeros included) and a plan that they fit."""
    chosen = draw(lengths)
    return chosen, draw(fitting_plans(chosen))


@st.composite
def staircases(draw):
    """Any valid plan."""
    stops = sorted(draw(st.sets(st.integers(1, 9), min_size=1, max_size=4)))
    rows = sorted(draw(st.lists(st.integers(1, 6), min_size=len(stops), max_size=len(stops))), reverse=True)
    return BucketPlan(tuple(stops), tuple(rows))
