"""Hypothesis strategies: lengths, and plans that fit them."""

from hypothesis import strategies as st

from jaxpack import BucketPlan, CostModel, plan_buckets, plan_exact, plan_padded, plan_rows

lengths = st.lists(st.integers(0, 7), min_size=1, max_size=6)
CELLS_ONLY = CostModel(step=0, crossing=0, bucket=0, compilation=0)
positive_lengths = st.lists(st.integers(1, 7), min_size=1, max_size=6)


@st.composite
def plans_for(draw, lengths):
    """Any plan under which the lengths fit: one of the planners', or one loosened at random."""
    kind = draw(st.sampled_from(["exact", "buckets", "padded", "loose", "rows", "loose rows"]))
    if kind == "exact":
        return plan_exact(lengths)
    if kind == "buckets":
        return plan_buckets(lengths, draw(st.integers(1, 3)))
    if kind == "padded":
        return plan_padded(len(lengths), max(1, *lengths) + draw(st.integers(0, 2)))
    if kind == "rows":
        return plan_rows(lengths, draw(st.integers(1, 4)), num_buckets=draw(st.integers(1, 2)), cost_model=CELLS_ONLY)
    loosened = [max(length, 1) + draw(st.integers(0, 2)) for length in lengths]
    return plan_exact(loosened) if kind == "loose" else plan_rows(loosened, draw(st.integers(1, 4)))


@st.composite
def lengths_and_plan(draw):
    """Lengths (zeros included) and a plan that they fit."""
    chosen = draw(lengths)
    return chosen, draw(plans_for(chosen))


@st.composite
def staircases(draw):
    """Any valid plan of one slot a row."""
    stops = sorted(draw(st.sets(st.integers(1, 9), min_size=1, max_size=4)))
    rows = sorted(draw(st.lists(st.integers(1, 6), min_size=len(stops), max_size=len(stops))), reverse=True)
    return BucketPlan(tuple(stops), tuple(rows))


@st.composite
def row_plans(draw):
    """Any valid plan, with any number of slots a row."""
    stairs = draw(staircases())
    starts = [{0, *draw(st.sets(st.integers(0, int(end) - 1), max_size=3))} for end in stairs.room]
    return BucketPlan(stairs.boundaries, stairs.rows, tuple(tuple(sorted(row)) for row in starts))


plans = st.one_of(staircases(), row_plans())

# Where a plan is a compilation, random lengths go under a few fixed plans, of one batch size and longest room.
FIXED_PLANS = {
    "stairs": BucketPlan((1, 3, 7), (5, 3, 1)),
    "padded": plan_padded(5, 7),
    "rows": BucketPlan((7,), (3,), ((0, 5), (0, 4), (0,))),
}
BATCH_SIZE, LONGEST = 5, 7


@st.composite
def lengths_under(draw, plan):
    """Lengths that fit a plan, zeros included, in any order."""
    return draw(st.permutations([draw(st.integers(0, min(int(room), LONGEST))) for room in plan.room]))


@st.composite
def fixed_plan_and_lengths(draw):
    """A fixed plan, and lengths that fit it."""
    plan = draw(st.sampled_from(list(FIXED_PLANS.values())))
    return plan, draw(lengths_under(plan))
