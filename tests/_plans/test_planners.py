"""Planners against brute force and packing one by one."""

import itertools
from bisect import bisect_left, insort

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strategies
from counts import counted_calls
from hypothesis import given
from hypothesis import strategies as st

from jaxpack import BucketPlan, CostModel, pack_sequence, plan_best, plan_buckets, plan_exact, plan_padded, plan_rows
from jaxpack._checks import concrete_lengths
from jaxpack._plans import planners
from jaxpack._plans.best_fit import Distinct, best_fit
from jaxpack.data import coverage, plan_cover, plan_family

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


def best_fit_one_by_one(lengths, width):
    """The packing of one sequence after the other, longest first: what each row holds."""
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []
    for length in sorted((max(1, int(length)) for length in lengths), reverse=True):
        place = bisect_left(left, (length, 0))
        room, row = left.pop(place) if place < len(left) else (width, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(length)
        insort(left, (room - length, row))
    return rows


@given(st.lists(st.integers(0, 30), min_size=1, max_size=40), st.integers(1, 9))
def test_packing_many_at_once_deals_the_same_to_each_row_as_packing_one_by_one(lengths, num_rows):
    plan = plan_rows(lengths, num_rows)
    rows = best_fit_one_by_one(lengths, plan.num_steps)
    assert len(rows) == plan.rows[0]
    starts = tuple((0, *itertools.accumulate(row[:-1])) for row in rows)
    assert plan.starts == (starts if any(len(row) > 1 for row in rows) else ())
    if plan.num_steps > max(1, *lengths, 1):  # no narrower rows of as many would do
        assert len(best_fit_one_by_one(lengths, plan.num_steps - 1)) > num_rows


def cheapest_one_by_one(lengths, model):
    """The cost, cells and steps of the best plan that packing one by one finds, in rows wider by 1/32 each time."""
    total, width = int(np.maximum(lengths, 1).sum()), max(1, *lengths)

    def cost(rows, width):
        return (model.cell + model.crossing * (rows < len(lengths))) * rows * width + model.step * width

    tried = [(cost(rows, width), rows * width, width) for rows in [len(best_fit_one_by_one(lengths, width))]]
    while width < total:
        width = min(total, width + -(-width // 32))
        if model.cell * (total // width) * width + model.step * width > 0.99 * (min(tried)[0] - model.bucket):
            break
        rows = len(best_fit_one_by_one(lengths, width))
        least = max(max(lengths), -(-total // rows))
        narrow = range(least, width)
        width_of_rows = least + bisect_left(
            narrow, True, key=lambda width: len(best_fit_one_by_one(lengths, width)) <= rows
        )
        tried.append((cost(rows, width_of_rows), rows * width_of_rows, width_of_rows))
    return min(tried)


CORPORA = {
    "log-normal": lambda rng, size: lognormal(0, size),
    "heavy tail": lambda rng, size: np.maximum(1, rng.lognormal(np.log(300), 1, size)).astype(int),
    "gamma": lambda rng, size: np.maximum(1, rng.gamma(3, 8, size)).astype(int),
    "uniform": lambda rng, size: rng.integers(1, 2001, size),
    "uniform, all long": lambda rng, size: rng.integers(1001, 2001, size),
    "words": lambda rng, size: np.maximum(1, rng.poisson(7.5, size)),
    "equal": lambda rng, size: np.full(size, 50),
    "bimodal": lambda rng, size: np.where(rng.random(size) < 0.5, 10, 400),
    "just above halves": lambda rng, size: np.where(rng.random(size) < 0.5, 51, 101),
    "adversarial": lambda rng, size: rng.choice([101, 51, 26, 27, 50, 34, 67], size),
}


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("size", [60, 300])
def test_rows_of_hundreds_cost_what_packing_one_by_one_finds(corpus, size):
    lengths, model = CORPORA[corpus](np.random.default_rng(1), size), CostModel(bucket=0, compilation=0)
    assert model.total(plan_rows(lengths, cost_model=model)) <= cheapest_one_by_one(lengths, model)[0] * (1 + 1e-9)


@pytest.mark.parametrize("corpus", ["heavy tail", "uniform", "uniform, all long"])
def test_rows_of_a_thousand_distinct_lengths_cost_at_most_1_percent_more(corpus):
    lengths, model = CORPORA[corpus](np.random.default_rng(1), 1200), CostModel(bucket=0, compilation=0)
    assert len(set(lengths.tolist())) > 512
    least, cells, steps = cheapest_one_by_one(lengths, model)
    plan = plan_rows(lengths, cost_model=model)
    assert model.total(plan) <= 1.01 * least
    assert plan.size <= 1.01 * cells
    assert plan.num_steps <= 1.15 * steps


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("num_buckets", [1, 4])
def test_every_length_of_a_large_corpus_has_a_slot_of_its_own(corpus, num_buckets):
    lengths = CORPORA[corpus](np.random.default_rng(2), 30_000)
    plan = plan_rows(lengths, num_buckets=num_buckets)
    assert plan.num_sequences == len(lengths)
    assert plan.fits(lengths)
    assert plan.efficiency(lengths) > 0.985
    ends = plan.slot_starts + plan.room
    by_row = np.lexsort((plan.slot_starts, plan.slot_rows))
    same_row = np.diff(plan.slot_rows[by_row]) == 0
    assert (plan.slot_starts[by_row][1:][same_row] == ends[by_row][:-1][same_row]).all()  # end to end, no overlap


@pytest.mark.parametrize("corpus", CORPORA)
def test_a_packing_takes_few_deals_however_many_sequences_there_are(corpus):
    deals = []
    for size in (10_000, 100_000):
        batch = Distinct.of(CORPORA[corpus](np.random.default_rng(3), size))
        deals.append(len(best_fit(batch, 3 * batch.longest).deals) / len(batch.lengths))
    assert max(deals) < 12


def packings(lengths, monkeypatch):
    """The widths at which a plan of rows packs these lengths."""
    widths = []

    def recorded(batch, width):
        widths.append(width)
        return best_fit(batch, width)

    with monkeypatch.context() as patch:
        patch.setattr(planners, "best_fit", recorded)
        plan_rows(lengths)
    return widths


@pytest.mark.parametrize("corpus", ["heavy tail", "uniform", "uniform, all long"])
def test_many_distinct_lengths_are_packed_few_times(corpus, monkeypatch):
    lengths = CORPORA[corpus](np.random.default_rng(4), 100_000)
    assert len(packings(lengths, monkeypatch)) < 100


def test_buckets_of_ten_thousand_distinct_lengths_are_as_many_as_asked_for_and_no_fewer_are_better():
    lengths = np.random.default_rng(0).permutation(10_000) + 1
    plans = [plan_buckets(lengths, count) for count in (7, 8, 9)]
    assert [plan.num_buckets for plan in plans] == [7, 8, 9]
    saved = -np.diff([plan.size for plan in plans])
    assert saved[0] >= saved[1] > 0  # cells are convex in the number of buckets
    ideal = [5000 * 10_000 * (1 + 1 / count) for count in (7, 8, 9)]  # stairs of a straight slope: evenly spaced
    assert [plan.size for plan in plans] == pytest.approx(ideal, rel=1e-3)


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
    assert plan_best(lognormal(0), platform="cpu").starts
    assert not plan_best(lognormal(0), cost_model=CELLS_ONLY).starts
    assert plan_best([5, 5, 5]) == plan_padded(3, 5)


@pytest.mark.parametrize("planner", [plan_buckets, plan_rows, plan_best])
def test_a_planner_takes_a_platform_or_a_cost_model(planner):
    lengths = lognormal(0)
    for platform in ("cpu", "cuda", "tpu"):
        costs = CostModel.for_platform(platform)
        assert planner(lengths, platform=platform) == planner(lengths, cost_model=costs)
    assert planner(lengths) == planner(lengths, platform=jax.default_backend())
    with pytest.raises(ValueError, match=r"not both: cost_model=CostModel\.for_platform\('gpu'\)"):
        planner(lengths, platform="gpu", cost_model=costs)
    with pytest.raises(ValueError, match=r"platform must be one of .* got 'h100'"):
        planner(lengths, platform="h100")


def test_buckets_are_free_up_to_their_number_unless_a_platform_says_what_they_cost():
    lengths = lognormal(0)
    assert plan_buckets(lengths, 8).num_buckets == 8
    assert plan_buckets(lengths, 8, platform="gpu").num_buckets == 1


@given(st.lists(st.integers(0, 300), min_size=1, max_size=40))
def test_a_plan_for_a_gpu_is_one_loop_of_as_many_steps_as_the_longest_sequence(lengths):
    plan = plan_best(lengths, platform="gpu")
    assert (plan.num_buckets, plan.num_steps) == (1, max(1, *lengths, 1))


PLANNERS = [plan_exact, plan_buckets, plan_rows, plan_best]


@pytest.mark.parametrize("planner", PLANNERS)
def test_lengths_may_be_jax_arrays_but_not_traced(planner):
    assert planner(jnp.array(SEED)) == planner(SEED)
    with pytest.raises(TypeError, match=r"lengths are traced.*outside jit"):
        jax.jit(planner)(jnp.array(SEED))


@pytest.mark.parametrize("planner", PLANNERS)
def test_a_planner_checks_lengths_once(planner):
    assert counted_calls(lambda: planner(SEED), concrete_lengths) == [1]


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
def test_errors_name_bad_lengths(planner, lengths, error, message):
    with pytest.raises(error, match=message):
        planner(lengths)


@pytest.mark.parametrize("planner", PLANNERS)
def test_more_steps_than_can_be_indexed_are_refused_before_any_plan_is_made(planner):
    with pytest.raises(ValueError, match=r"4000000000 steps in all, more than int32 can index.*plan_cover"):
        planner(np.full(2, 2 * 10**9))


CORPUS_PLANNERS = [
    # A dict holds the lengths of several axes.
    lambda lengths: plan_cover({"source": lengths} if isinstance(lengths, dict) else lengths, 2),  # type: ignore[dict-item]
    lambda lengths: plan_family(lengths, 2),
    lambda lengths: coverage(lengths, plan_padded(2, 2)),
]
PACKED = pack_sequence([np.ones((3, 1)), np.ones((1, 1))])
NO_VECTORS = {
    "a map": (lambda: map(int, "12"), TypeError, r"got a map. Make it a list: list\(lengths\)"),
    "a generator": (lambda: (n for n in [1, 2]), TypeError, r"got a generator. Make it a list"),
    "values of a dict": (lambda: {0: 1}.values(), TypeError, "got a dict_values. Make it a list"),
    "a dict": (lambda: {0: 1}, TypeError, "got a dict"),
    "a set": (lambda: {1, 2}, TypeError, r"got a set\.$"),
    "text": (lambda: "12", TypeError, "got a str"),
    "words": (lambda: ["1", "2"], TypeError, "integers, got dtype str"),
    "a packed batch": (lambda: PACKED, TypeError, r"got a PackedSequence. Pass its .lengths"),
    "a plan": (lambda: PACKED.plan, TypeError, "got a BucketPlan"),
    "sequences": (lambda: [[1], [1, 2]], TypeError, r"nested list whose rows differ.*\[len\(sequence\) for sequence"),
    "a mask": (lambda: np.ones((2, 3), bool), TypeError, r"got a mask \(2, 3\): pass mask.sum\(axis=1\)"),
    "booleans": (lambda: [True, False], TypeError, "integers, got dtype bool"),
    "a column": (lambda: np.ones((3, 1), int), ValueError, r"shape \(3, 1\). Drop the axes of size 1: lengths.ravel"),
    "a row": (lambda: [[1, 2]], ValueError, r"shape \(1, 2\). Drop the axes of size 1: lengths.ravel"),
    "stacked batches": (lambda: np.ones((2, 3)), ValueError, r"shape \(2, 3\). For stacked batches use jax.vmap"),
    "a number": (lambda: 3, ValueError, r"shape \(\). Of one sequence they are \[length\]"),
    "a huge number": (lambda: [2**63], ValueError, r"lengths\[0\] = 9223372036854775808 is more than int64"),
    "a huge float": (lambda: [1e30], ValueError, r"lengths\[0\] = 1e\+30 is more than int64"),
    "infinity": (lambda: [np.inf], ValueError, r"whole numbers, got lengths\[0\] = inf"),
}


@pytest.mark.parametrize("kind", NO_VECTORS)
@pytest.mark.parametrize("planner", [*PLANNERS, *CORPUS_PLANNERS, PACKED.plan.fits, PACKED.plan.check])
def test_errors_for_lengths_that_are_not_a_vector_name_the_way_out(planner, kind):
    make, error, message = NO_VECTORS[kind]
    with pytest.raises(error, match=message):
        planner(make())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plan_buckets([3], 0), ValueError, "num_buckets must be at least 1, got 0"),
        (lambda: plan_buckets([3], 1.5), TypeError, "num_buckets must be an int, got 1.5"),  # type: ignore[arg-type]
        (lambda: plan_buckets([3], row_multiple=0), ValueError, "row_multiple must be at least 1, got 0"),
        (lambda: plan_rows([3], 0), ValueError, "num_rows must be at least 1, got 0"),
        (lambda: plan_rows([3], 1.5), TypeError, "num_rows must be an int, got 1.5"),  # type: ignore[arg-type]
        (lambda: plan_rows([3], num_buckets=0), ValueError, "num_buckets must be at least 1, got 0"),
        (lambda: plan_padded(0, 3), ValueError, "batch_size must be at least 1, got 0"),
        (lambda: plan_padded(3, 0), ValueError, "max_length must be at least 1, got 0"),
        (lambda: plan_padded(3, 2.5), TypeError, "max_length must be an int, got 2.5"),  # type: ignore[arg-type]
    ],
)
def test_errors_name_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
