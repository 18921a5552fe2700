"""Examples of several time axes, such as source and target: each under its own plan, every one once an epoch."""

import json
import re

import jax
import numpy as np
import pytest
from corpora import Stream
from hypothesis import given
from hypothesis import strategies as st

import jaxpack
from jaxpack import plan_exact, plan_padded
from jaxpack.data import BucketByLength, SlotFilling, SortedChunks, coverage, pack_on_host, plan_cover
from jaxpack.data._parts import cut_in_parts

LONGEST = 7
NAMES = ("source", "target")


def pairs_of(lengths):
    """Every step says whose it is and which."""
    return [(np.arange(a) + 100 * i, -np.arange(b) - 100 * i) for i, (a, b) in enumerate(lengths)]


def steps(packed):
    """Rows of a packed batch on the host."""
    plan, slots = packed.plan, packed.unsorted_indices
    places = zip(plan.slot_starts[slots], packed.lengths, plan.slot_rows[slots], strict=True)
    return [packed.data[plan.step_offsets[start + np.arange(length)] + row].tolist() for start, length, row in places]


def contents(batch):
    source, target = batch.inputs
    return batch.indices.tolist(), batch.weights.tolist(), steps(source), steps(target), source.plan, target.plan


lengths_of_pairs = st.lists(st.tuples(st.integers(0, LONGEST), st.integers(0, LONGEST)), min_size=1, max_size=25)


@st.composite
def batchers(draw):
    lengths = draw(lengths_of_pairs)
    batch_size = draw(st.integers(1, 5))
    columns = dict(zip(NAMES, zip(*lengths, (LONGEST, LONGEST), strict=True), strict=True))
    own = {name: plan_cover(columns[name], batch_size) for name in NAMES}  # which pairs need not fit together
    together = plan_cover(columns, batch_size)
    padded = {name: plan_padded(batch_size, LONGEST) for name in NAMES}
    options = {
        "plan": draw(st.sampled_from([own, together, padded])),
        "seed": draw(st.sampled_from([None, 0, 7])),
        "buffer_size": draw(st.sampled_from([None, 1, 8])),
    }
    source = draw(st.sampled_from([pairs_of(lengths), Stream(pairs_of(lengths))]))
    return lambda **shard: SlotFilling(source, time_varying=NAMES, **options, **shard), lengths


@given(batchers())
def test_every_pair_is_given_once_an_epoch_whole_and_in_its_own_row(made):
    make, lengths = made
    batcher, seen = make(), []
    for batch in batcher:
        indices, weights, sources, targets, *plans = contents(batch)
        assert dict(zip(NAMES, plans, strict=True)) == batcher.plan
        for index, weight, source, target in zip(indices, weights, sources, targets, strict=True):
            assert weight == (index >= 0)
            if index >= 0:
                seen.append(index)
                first, second = lengths[index]
                assert source == [100 * index + i for i in range(first)]
                assert target == [-100 * index - i for i in range(second)]
            else:
                assert source == target == []
        assert all(packed.plan.fits(packed.lengths) for packed in batch.inputs)
    assert sorted(seen) == list(range(len(lengths)))


@given(batchers(), st.integers(0, 1))
def test_resumes_at_every_batch(made, epoch):
    make, _ = made
    whole = make()
    for _ in range(epoch):
        list(whole)
    iterator = iter(whole)
    states, batches = [iterator.get_state()], []
    for batch in iterator:
        batches.append(contents(batch))
        states.append(iterator.get_state())
    for done, state in enumerate(states):
        resumed = make()
        resumed.set_state(json.loads(json.dumps(state)))
        assert [contents(batch) for batch in resumed] == batches[done:]


@given(batchers(), st.integers(2, 3))
def test_shards_have_as_many_batches_and_are_the_epoch_together(made, shard_count):
    make, lengths = made
    shards = [[contents(batch) for batch in make(shard_index=i, shard_count=shard_count)] for i in range(shard_count)]
    assert len({len(shard) for shard in shards}) == 1
    seen = [index for shard in shards for indices, *_ in shard for index in indices if index >= 0]
    assert sorted(seen) == list(range(len(lengths)))


@given(lengths_of_pairs, st.integers(1, 6))
def test_default_plans_are_filled_in_the_fewest_batches(lengths, batch_size):
    batcher = SlotFilling(pairs_of(lengths), batch_size=batch_size, time_varying=NAMES)
    assert batcher.statistics().batches == -(-len(lengths) // batch_size)
    columns = {name: [pair[i] for pair in lengths] for i, name in enumerate(NAMES)}
    assert batcher.plan == plan_cover(columns, batch_size)
    again = SlotFilling(pairs_of(lengths[::-1]), batch_size=batch_size, time_varying=NAMES)
    assert again.plan == batcher.plan  # whatever the order of the corpus


@given(batchers())
def test_statistics_count_each_axis(made):
    make, lengths = made
    batcher = make()
    expected = batcher.statistics()
    iterator = iter(batcher)
    batches = list(iterator)
    assert iterator.statistics == expected
    assert expected.rows == len(lengths)
    assert expected.programs == 1
    for i, name in enumerate(NAMES):
        assert expected.axes[name].tokens == sum(pair[i] for pair in lengths)
        assert expected.axes[name].cells == sum(batch.inputs[i].plan.size for batch in batches)
    assert expected.tokens == sum(axis.tokens for axis in expected.axes.values())
    assert expected.cells == sum(axis.cells for axis in expected.axes.values())
    assert re.search(r"efficiency \d+\.\d% \(source \d+\.\d%, target \d+\.\d%\)", str(expected))
    assert "efficiency, target" in expected._repr_html_()


def related(correlation, size=4000):
    rng = np.random.default_rng(0)
    normal = rng.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]], size)
    return np.maximum(1, np.exp(0.6 * normal + 3)).astype(int)


class Sized:
    """Pairs that are never looked at, but for the first."""

    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        return tuple(np.zeros(length, np.int8) for length in self.lengths[index])


@pytest.mark.parametrize(("correlation", "least"), [(0.95, 0.77), (0.8, 0.72), (0.0, 0.6)])
def test_parts_are_tight_on_both_axes(correlation, least):
    lengths = related(correlation)
    given = dict(zip(NAMES, lengths.T, strict=True))
    batcher = SlotFilling(Sized(lengths), batch_size=64, time_varying=NAMES, lengths=given)
    statistics = batcher.statistics()
    batches = -(-len(lengths) // 64)
    by_source = lengths[np.argsort(-lengths[:, 0])]
    sorted_by_source = sum(by_source[i : i + batches].max(axis=0).sum() for i in range(0, len(lengths), batches))
    assert statistics.efficiency > least > lengths.sum() / (batches * sorted_by_source)
    assert abs(statistics.rank_correlation) < 0.05
    buffered = SlotFilling(Sized(lengths), batcher.plan, time_varying=NAMES, lengths=given, buffer_size=1024)
    assert buffered.statistics().rows == len(lengths)
    assert buffered.statistics().efficiency > 0.9 * statistics.efficiency


def test_parts_of_one_axis_are_those_of_the_sorted_corpus():
    lengths = related(0.5, 100)[:, :1]
    parts = cut_in_parts(lengths, 7, 15)
    np.testing.assert_array_equal(np.concatenate([lengths[part, 0] for part in parts]), -np.sort(-lengths[:, 0]))
    assert [len(part) for part in parts] == [15] * 6 + [10]


def test_leaves_lie_on_the_axis_of_their_name():
    examples = [
        {"words": np.ones((n, 2)), "tags": np.arange(n), "phonemes": [1] * (2 * n), "label": [n, 0]} for n in (1, 3)
    ]
    flags = {"words": "in", "tags": "in", "phonemes": "out", "label": None}
    batcher = SlotFilling(examples, batch_size=2, time_varying=flags)
    assert isinstance(batcher.plan, dict)
    assert list(batcher.plan) == ["out", "in"]  # in the order of the leaves
    (batch,) = batcher
    order = batch.indices.tolist()
    assert batch.inputs["words"].lengths.tolist() == batch.inputs["tags"].lengths.tolist() == [(1, 3)[i] for i in order]
    assert batch.inputs["phonemes"].lengths.tolist() == [(2, 6)[i] for i in order]
    assert batch.inputs["label"].tolist() == [[(1, 3)[i], 0] for i in order]


def test_a_batch_is_one_program():
    traced = []

    @jax.jit
    def total(batch):
        traced.append(1)
        source, target = batch.inputs
        return (jaxpack.segment_sum(source) + jaxpack.segment_sum(target)).sum()

    lengths = [(3, 1), (2, 2), (1, 4), (4, 4), (2, 1), (1, 1)]
    found = sum(float(total(batch)) for batch in SlotFilling(pairs_of(lengths), batch_size=2, time_varying=NAMES))
    assert found == sum(np.sum(leaf) for pair in pairs_of(lengths) for leaf in pair)
    assert len(traced) == 1


def test_one_axis_with_a_name_is_as_one_without():
    source = [([1, 2, 3], 7), ([4], 5)]
    named = SlotFilling(source, plan_padded(2, 3), time_varying=("words", False))
    (batch,), (expected,) = named, SlotFilling(source, plan_padded(2, 3), time_varying=(True, False))
    jax.tree.map(np.testing.assert_array_equal, batch, expected)
    again = SlotFilling(source, {"words": plan_padded(2, 3)}, time_varying=("words", False), lengths={"words": [3, 1]})
    assert again.plan == plan_padded(2, 3)
    assert again.statistics().axes == {}


def test_plans_of_a_budget_of_cells_or_of_a_miss_probability():
    lengths = dict(zip(NAMES, related(0.9, 500).T, strict=True))
    plans = plan_cover(lengths, max_cells=2000)
    assert 1500 < sum(plan.size for plan in plans.values()) <= 2000
    assert len({plan.num_sequences for plan in plans.values()}) == 1
    missing = plan_cover(lengths, 16, miss=0.1)
    assert sum(coverage(lengths[name], plan).miss for name, plan in missing.items()) <= 0.1


@pytest.mark.parametrize(("too_long", "rows"), [("truncate", [(2, 1), (4, 3), (3, 4)]), ("drop", [(2, 1)])])
@pytest.mark.parametrize("as_source", [list, Stream])
def test_what_is_too_long_on_either_axis_is_cut_as_chosen(as_source, too_long, rows):
    plan = {"source": plan_padded(3, 4), "target": plan_padded(3, 4)}
    source = as_source(pairs_of([(2, 1), (9, 3), (3, 5)]))
    (batch,) = SlotFilling(source, plan, time_varying=NAMES, too_long=too_long)
    found = zip(batch.indices.tolist(), *(packed.lengths.tolist() for packed in batch.inputs), strict=True)
    assert sorted((index, *lengths) for index, *lengths in found if index >= 0) == [
        (i, *row) for i, row in enumerate(rows)
    ]


EXAMPLES = {
    "pair": (np.ones(3), np.ones(5)),
    "lists": ([1, 2, 3], [1, 2]),
    "dict": {"en": np.ones(3), "de": np.ones(5), "id": 7},
    "nested": {"x": {"ids": np.ones(3), "mask": np.ones(3)}, "y": {"ids": np.ones(5)}},
    "triple": (np.ones(3), np.ones(5), np.ones(9)),
}
DOORS = {
    "slots": lambda source, **options: SlotFilling(source, batch_size=1, **options),
    "lengths": lambda source, **options: list(
        SlotFilling(source, options.pop("plan", plan_padded(1, 9)), lengths=options.pop("lengths", [3]), **options)
    ),
    "stream": lambda source, **options: list(
        SlotFilling(iter(source), options.pop("plan", plan_padded(1, 9)), **options)
    ),
    "buckets": lambda source, **options: BucketByLength(source, batch_size=1, **options),
    "chunks": lambda source, **options: SortedChunks(source, batch_size=1, **options),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_leaves_of_different_lengths_are_named_with_what_to_write(door, example):
    with pytest.raises(ValueError, match=r"leaves of example 0 that vary in time have different lengths") as caught:
        DOORS[door]([example])
    message = str(caught.value)
    for path, leaf in jax.tree_util.tree_flatten_with_path(example, is_leaf=lambda node: type(node) is list)[0]:
        if np.ndim(leaf):
            assert f"{jax.tree_util.keystr(path)} {len(leaf)}" in message
    named, fixed = (eval(text) for text in re.findall(r"time_varying=(.*?[)}]+)[.]", message))  # as a user would paste
    assert len(SlotFilling([example], batch_size=1, time_varying=named)) == 1
    assert len(SlotFilling([example], batch_size=1, time_varying=fixed)) == 1
    if door in ("buckets", "chunks"):
        with pytest.raises(ValueError, match=r"takes examples of one time axis.*SlotFilling, whose batches fit"):
            DOORS[door]([example], time_varying=named)


def test_a_fixed_leaf_whose_leading_axis_is_time_is_named_with_what_to_write():
    with pytest.raises(ValueError, match=r"fixed leaf of shape \(7,\).*time_varying=\('source', 'target'\)"):
        SlotFilling([(np.ones(3), np.ones(5)), (np.ones(4), np.ones(7))], batch_size=1, time_varying=(True, False))


def test_those_of_one_named_axis_must_agree():
    with pytest.raises(ValueError, match=r"example 0 on the time axis 'in' have different lengths: \[0\] 3, \[1\] 5"):
        SlotFilling([(np.ones(3), np.ones(5), np.ones(2))], batch_size=1, time_varying=("in", "in", "out"))
    with pytest.raises(ValueError, match="Here all of them share the steps"):
        pack_on_host([(np.ones(3), np.ones(5))], plan_padded(1, 9))


PAIRS = pairs_of([(1, 2), (3, 1)])
BOTH = {"source": plan_padded(2, 3), "target": plan_padded(2, 2)}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: SlotFilling(PAIRS, BOTH["source"], time_varying=NAMES),
            ValueError,
            'a plan for each, {"source": plan',
        ),
        (lambda: SlotFilling(PAIRS, BOTH), ValueError, r"names none.*time_varying=\('source', 'target'\)"),
        (
            lambda: SlotFilling(PAIRS, {**BOTH, "x": plan_padded(2, 1)}, time_varying=NAMES),
            ValueError,
            "'x', but time_varying names",
        ),
        (
            lambda: SlotFilling(PAIRS, {**BOTH, "source": 1}, time_varying=NAMES),  # type: ignore[dict-item]
            TypeError,
            r"plan\['source'\] must be",
        ),
        (
            lambda: SlotFilling(PAIRS, {**BOTH, "target": plan_padded(3, 2)}, time_varying=NAMES),
            ValueError,
            "for the same number of sequences, got {'source': 2, 'target': 3}",
        ),
        (
            lambda: SlotFilling([[1]], 7),  # type: ignore[arg-type]
            TypeError,
            "plan must be a jaxpack.BucketPlan, or a dict",
        ),
        (lambda: SlotFilling(PAIRS, BOTH, time_varying=NAMES, too_long="split"), ValueError, '"split" is for examples'),
        (
            lambda: SlotFilling(pairs_of([(1, 2), (3, 5)]), BOTH, time_varying=NAMES),
            ValueError,
            "example 1 has 5 steps on the time axis 'target', but the longest that fits has 2",
        ),
        (
            lambda: list(SlotFilling(iter(pairs_of([(9, 2)])), BOTH, time_varying=NAMES)),
            ValueError,
            "example 0 has 9 steps on the time axis 'source'",
        ),
        (
            lambda: SlotFilling(PAIRS, BOTH, time_varying=NAMES, lengths=[1, 3]),
            TypeError,
            r'lengths={"source": \[...\], "target": \[...\]}',
        ),
        (
            lambda: SlotFilling(PAIRS, BOTH, time_varying=NAMES, lengths={"source": [1, 3], "target": [2]}),
            ValueError,
            "of the same number of examples on each time axis, got {'source': 2, 'target': 1}",
        ),
        (
            lambda: SlotFilling(PAIRS, BOTH, time_varying=NAMES, lengths={"source": [1, 3]}),
            ValueError,
            r"the time axes \['source'\], but examples have \['source', 'target'\]",
        ),
        (
            lambda: list(SlotFilling(PAIRS, BOTH, time_varying=NAMES, lengths={"source": [1, 3], "target": [2, 2]})),
            ValueError,
            r"example 1 has \(3, 1\) steps, but its length was given as \(3, 2\)",
        ),
        (lambda: SlotFilling(PAIRS, BOTH, time_varying=("source", True)), ValueError, "Write a name in place of True"),
        (lambda: SlotFilling(PAIRS, BOTH, time_varying=("source", "")), TypeError, "must hold bools, or names"),
        (lambda: plan_cover({}, 2), ValueError, "an empty dict"),
        (lambda: plan_cover({"a": [], "b": []}, 2), ValueError, "the corpus is empty"),
        (lambda: plan_cover({"a": [3], "b": [4]}, max_cells=6), ValueError, "does not hold the longest.*has 7 steps"),
    ],
)
def test_what_does_not_go_together_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_state_of_other_axes_is_refused():
    state = iter(SlotFilling(PAIRS, BOTH, time_varying=NAMES)).get_state()
    other = SlotFilling(PAIRS, {"a": BOTH["source"], "b": BOTH["target"]}, time_varying=("a", "b"))
    with pytest.raises(ValueError, match="the state is that of"):
        other.set_state(state)


def test_grain_packs_and_fills_a_plan_for_each_axis():
    grain = pytest.importorskip("grain")
    from corpora import assert_resumes

    from jaxpack.data.grain import BatcherIterDataset, SlotFillIterDataset, pack_fn

    lengths = related(0.7, 60).clip(1, 60)
    dataset = grain.MapDataset.source(pairs_of(lengths))
    plans = plan_cover(dict(zip(NAMES, lengths.T, strict=True)), 4)
    for filled in (
        SlotFillIterDataset(dataset, plans, time_varying=NAMES, buffer_size=16),
        BatcherIterDataset(SlotFilling(dataset, plans, time_varying=NAMES)),
    ):
        batches = list(filled)
        assert sorted(i for batch in batches for i in batch.indices.tolist() if i >= 0) == list(range(60))
        assert {tuple(packed.plan for packed in batch.inputs) for batch in batches} == {tuple(plans.values())}
        assert_resumes(filled)
    small = {"source": plan_exact([3, 1]), "target": plan_padded(2, 2)}
    large = {"source": plan_padded(2, 9), "target": plan_padded(2, 9)}
    pack = pack_fn([large, small], time_varying=NAMES)
    assert pack(pairs_of([(3, 2), (1, 2)])).inputs[0].plan == small["source"]
    assert pack(pairs_of([(3, 3), (1, 2)])).inputs[0].plan == large["source"]
    with pytest.raises(ValueError, match=r"on the time axis 'target', lengths\[0\] = 10 does not fit"):
        pack(pairs_of([(3, 10)]))
    with pytest.raises(ValueError, match="example 1 has 99 steps on the time axis 'target'"):
        list(SlotFillIterDataset(grain.MapDataset.source(pairs_of([(1, 1), (1, 99)])), plans, time_varying=NAMES))
