"""Promises of all batchers: every example once, reproducible epochs, exact resumes, and shards in step."""

import json
import sys
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
from corpora import Stream
from hypothesis import given
from hypothesis import strategies as st

import jaxpack
from jaxpack import plan_padded
from jaxpack.data import BucketByLength, SlotFilling, SortedChunks, plan_cover, plan_family

LONGEST = 9


def examples_of(lengths):
    """Examples each of whose steps holds the number of its example and its place."""
    return [np.arange(length) + 100 * index for index, length in enumerate(lengths)]


@st.composite
def batchers(draw):
    """Draws a function from shard_index and shard_count to a batcher, and the lengths of its source."""
    lengths = draw(st.lists(st.integers(0, LONGEST), min_size=1, max_size=30))
    batch_size = draw(st.integers(1, 5))
    source = draw(st.sampled_from([examples_of(lengths), Stream(examples_of(lengths))]))
    seed = draw(st.sampled_from([None, 0, 7, -3]))
    buffer_size = draw(st.sampled_from([None, 1, 8]))
    kind = draw(st.sampled_from([SlotFilling, BucketByLength, SortedChunks]))
    if kind is SlotFilling:
        options = {"plan": draw(st.sampled_from([plan_cover([LONGEST, *lengths], batch_size), plan_padded(2, 9)]))}
    elif kind is BucketByLength:
        options = {"boundaries": draw(st.sampled_from([(LONGEST,), (2, 5, LONGEST)])), "batch_size": batch_size}
    else:
        plans = draw(st.sampled_from([(plan_padded(batch_size, LONGEST),), plan_family([9, 3, 1, *lengths], 3, 2)]))
        options = {"plans": plans, "window": draw(st.integers(1, 3))}

    def make(**shard):
        return kind(source, seed=seed, buffer_size=buffer_size, **options, **shard)

    return make, lengths


def contents(batch):
    """Returns the content of a batch, row by row, as plain values."""
    steps = [row.tolist() for row in jaxpack.unpack_sequence(batch.inputs)]
    return batch.indices.tolist(), batch.weights.tolist(), steps, batch.inputs.plan


@pytest.fixture(autouse=True)
def _unpack_on_the_host(monkeypatch):
    """Reads rows without compiling a program for each set of lengths."""

    def unpack(packed):
        plan, slots = packed.plan, packed.unsorted_indices
        starts = plan.slot_starts[slots]
        return [
            packed.data[plan.step_offsets[start + np.arange(length)] + row]
            for start, length, row in zip(starts, packed.lengths, plan.slot_rows[slots], strict=True)
        ]

    monkeypatch.setattr(jaxpack, "unpack_sequence", unpack)


@given(batchers())
def test_every_example_is_given_once_an_epoch_whole_and_in_its_own_row(made):
    make, lengths = made
    batches = list(make())
    seen = []
    for batch in batches:
        indices, weights, steps, plan = contents(batch)
        assert len(indices) == len(weights) == plan.num_sequences
        for index, weight, row in zip(indices, weights, steps, strict=True):
            assert weight == (index >= 0)
            if index >= 0:
                seen.append(index)
                assert row == [100 * index + step for step in range(lengths[index])]
            else:
                assert row == []
        assert plan.fits(batch.inputs.lengths)
    assert sorted(seen) == list(range(len(lengths)))


@given(batchers())
def test_epochs_follow_from_the_seed(made):
    make, _ = made
    first, second = make(), make()
    epochs = [[contents(batch) for batch in first] for _ in range(3)]
    assert epochs == [[contents(batch) for batch in second] for _ in range(3)]
    if first.seed is not None and sum(len(indices) for indices, *_ in epochs[0]) > 20:
        assert epochs[0] != epochs[1] or len(epochs[0]) < 5


@given(batchers(), st.integers(0, 2))
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
    following = [contents(batch) for batch in whole]
    for done, state in enumerate(states):
        resumed = make()
        resumed.set_state(json.loads(json.dumps(state)))
        assert [contents(batch) for batch in resumed] == batches[done:]
    assert [contents(batch) for batch in resumed] == following


@given(batchers(), st.integers(2, 3))
def test_shards_have_as_many_batches_under_the_same_plans_and_are_the_epoch_together(made, shard_count):
    make, lengths = made
    shards = [
        [contents(batch) for batch in make(shard_index=index, shard_count=shard_count)] for index in range(shard_count)
    ]
    assert len({len(shard) for shard in shards}) == 1
    for together in zip(*shards, strict=True):
        assert len({plan for *_, plan in together}) == 1
    seen = [index for shard in shards for indices, *_ in shard for index in indices if index >= 0]
    assert sorted(seen) == list(range(len(lengths)))


@given(batchers(), st.integers(1, 2), st.integers(1, 3))
def test_a_host_has_the_shards_of_as_many_hosts_stacked(made, hosts, local):
    make, _ = made
    total = hosts * local
    shards = [list(make(shard_index=index, shard_count=total)) for index in range(total)]
    for host in range(hosts):
        batches = list(make(shard_index=host, shard_count=hosts, local_shards=local))
        own = zip(*shards[host * local : (host + 1) * local], strict=True)
        for batch, together in zip(batches, own, strict=True):
            assert batch.inputs.plan == together[0].inputs.plan
            for leaf, *others in zip(*map(jax.tree.leaves, (batch, *together)), strict=True):
                np.testing.assert_array_equal(leaf, np.stack(others))


@given(batchers(), st.integers(1, 3), st.integers(1, 3))
def test_a_state_continues_on_another_number_of_hosts_with_as_many_shards(made, hosts, local):
    make, _ = made
    whole, split = make(local_shards=hosts * local), make(shard_count=hosts, local_shards=local)
    iterator = iter(whole)
    next(iterator)
    split.set_state(json.loads(json.dumps(iterator.get_state())))
    for batch, first in zip(iterator, split, strict=True):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda leaf: leaf[:local], batch), first)


@given(batchers(), st.integers(2, 4))
def test_the_shards_of_a_round_differ_by_no_more_than_two_sequences_do(made, local):
    make, _ = made
    batcher = make(local_shards=local)
    for batch in batcher:
        lengths = batch.inputs.lengths
        assert np.ptp(lengths.sum(axis=1)) <= lengths.max()
        assert all(batch.inputs.plan.fits(each) for each in lengths)


@given(batchers(), st.sampled_from([None, 1, 3]))
def test_statistics_count_what_batches_hold(made, shards):
    make, lengths = made
    batcher = make(local_shards=shards)
    expected = batcher.statistics()
    iterator = iter(batcher)
    batches = list(iterator)
    assert iterator.statistics == expected
    assert expected.batches == len(batches)
    assert expected.rows == len(lengths)
    assert expected.tokens == sum(lengths)
    assert expected.cells == (shards or 1) * sum(batch.inputs.plan.size for batch in batches)
    assert expected.programs == len({batch.inputs.plan for batch in batches}) <= len(batcher.plans)
    assert {batch.inputs.plan for batch in batches} <= set(batcher.plans)
    if not isinstance(batcher._examples, Stream):
        assert len(make(local_shards=shards)) == len(batches)


def test_a_tree_of_examples_gives_packed_leaves_beside_stacked_ones():
    source = [{"x": np.full((length, 2), length, np.float32), "label": length, "name": np.ones(3)} for length in (2, 4)]
    flags = {"x": True, "label": False, "name": False}
    (batch,) = SlotFilling(source, plan_padded(3, 4), time_varying=flags)
    assert batch.inputs["x"].data.shape == (12, 2)
    assert batch.inputs["x"].lengths.tolist() == [4, 2, 0]
    assert batch.inputs["label"].tolist() == [4, 2, 0]
    assert batch.inputs["name"].tolist() == [[1.0] * 3] * 2 + [[0.0] * 3]
    assert batch.indices.tolist() == [1, 0, -1]


def test_a_batch_is_a_pytree_whose_plan_is_static():
    source = examples_of([3, 2, 2, 1, 3, 1])
    traced = []

    @jax.jit
    def total(batch):
        traced.append(batch.inputs.plan)
        return (jaxpack.segment_sum(batch.inputs) * batch.weights).sum()

    assert sum(float(total(batch)) for batch in SlotFilling(source, batch_size=2)) == sum(map(np.sum, source))
    assert len(traced) == 1


@pytest.mark.parametrize("as_source", [list, Stream])
@pytest.mark.parametrize(
    ("too_long", "spans"),
    [
        ("truncate", {(0, 0, 3), (1, 0, 4)}),
        ("drop", {(0, 0, 3)}),
        ("split", {(0, 0, 3), (1, 0, 4), (1, 4, 8), (1, 8, 9)}),
    ],
)
def test_what_is_too_long_is_cut_as_chosen_and_counted(as_source, too_long, spans):
    batcher = SlotFilling(as_source(examples_of([3, 9])), plan_padded(2, 4), too_long=too_long)
    iterator = iter(batcher)
    rows = [(i, s) for batch in iterator for i, s in zip(*(contents(batch)[k] for k in (0, 2)), strict=True) if i >= 0]
    assert {(index, steps[0] - 100 * index, steps[-1] - 100 * index + 1) for index, steps in rows} == spans
    statistics = iterator.statistics
    counts = {"truncate": statistics.truncated, "drop": statistics.dropped, "split": statistics.split}
    assert counts == dict.fromkeys(counts, 0) | {too_long: 1}
    assert f"1 {'dropped' if too_long == 'drop' else too_long}" in str(statistics)


def test_notebooks_show_statistics_as_a_table():
    statistics = SlotFilling(examples_of([4, 2, 4, 9]), plan_padded(2, 4), too_long="drop").statistics()
    figure = ElementTree.fromstring(statistics._repr_html_())
    titles, values = ([cell.text for cell in figure.iter(tag)] for tag in ("th", "td"))
    counts = {"batches": "2", "programs": "1", "rows": "3", "tokens": "10", "cells": "16"}
    cut = {"truncated": "0", "dropped": "1", "split": "0"}
    quality = {"efficiency": "62.5%", "rank correlation": f"{statistics.rank_correlation:+.3f}"}
    assert dict(zip(titles, values, strict=True)) == counts | cut | quality
    assert [text.text for text in figure.iter("text")] == ["10 real", "6 slack"]


def test_a_source_that_raises_loses_nothing():
    class Flaky(list):
        broken = False

        def __getitem__(self, index):
            if self.broken and index == 5:
                raise OSError("disk")
            return super().__getitem__(index)

        def __iter__(self):
            return (self[i] for i in range(len(self)))

    for wrap in (lambda source: source, Stream):
        source = Flaky(examples_of([3, 1, 2, 2, 3, 1, 1, 3]))
        expected = [contents(batch) for batch in SlotFilling(wrap(source), plan_padded(2, 3), buffer_size=2)]
        iterator = iter(SlotFilling(wrap(source), plan_padded(2, 3), buffer_size=2))
        given: list[list] = []
        source.broken = True
        with pytest.raises(OSError, match="disk"):
            given.extend(contents(batch) for batch in iterator)
        state = iterator.get_state()
        source.broken = False
        assert state["batch"] == len(given) < len(expected)
        given.extend(contents(batch) for batch in iterator)
        assert given == expected


def test_a_state_of_another_batcher_is_refused():
    source = examples_of([1, 2])
    state = iter(SlotFilling(source, plan_padded(2, 2))).get_state()
    for other in (
        SlotFilling(source, plan_padded(2, 2), seed=1),
        SlotFilling(source[:1], plan_padded(2, 2)),
        SlotFilling(source[::-1], plan_padded(2, 2)),
        SlotFilling(source, plan_padded(2, 3)),
        SlotFilling(source, plan_padded(2, 2), buffer_size=2),
        SlotFilling(source, plan_padded(2, 2), shard_count=2),
        SlotFilling(source, plan_padded(2, 2), local_shards=2),
        SortedChunks(source, [plan_padded(2, 2)]),
    ):
        with pytest.raises(ValueError, match=r"the state is that of .*SlotFilling"):
            other.set_state(state)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SlotFilling([], plan_padded(1, 1)), ValueError, "the source is empty"),
        (lambda: SlotFilling(range(sys.maxsize), plan_padded(1, 1)), ValueError, "the source is endless"),
        (lambda: list(SlotFilling(Stream([]), plan_padded(1, 1))), ValueError, "the source is empty"),
        (lambda: SlotFilling(examples_of([1, 5, 6]), plan_padded(1, 4)), ValueError, "example 1 has 5 steps.*1 more"),
        (lambda: list(SlotFilling(Stream(examples_of([5])), plan_padded(1, 4))), ValueError, "example 0 has 5 steps"),
        (
            lambda: SlotFilling([[1]], plan_padded(1, 1), too_long="cut"),  # type: ignore[arg-type]
            ValueError,
            'too_long must be "error"',
        ),
        (
            lambda: SlotFilling(Stream([[1]]), plan_padded(1, 1), too_long="cut"),  # type: ignore[arg-type]
            ValueError,
            'too_long must be "error"',
        ),
        (lambda: SlotFilling([[1]], plan_padded(1, 1), lengths=[np.nan]), ValueError, "whole numbers"),
        (lambda: SlotFilling([[1]], plan_padded(1, 1), lengths=[-1]), ValueError, "is negative"),
        (lambda: SlotFilling([[1]], plan_padded(1, 1), lengths=[1, 1]), ValueError, "2 entries, but the source 1"),
        (lambda: list(SlotFilling([[1]], plan_padded(1, 2), lengths=[2])), ValueError, "has 1 steps, but .* as 2"),
        (lambda: SlotFilling(Stream([[1]]), plan_padded(1, 1), lengths=[1]), ValueError, "this one has no index"),
        (lambda: SlotFilling([np.ones((1, 2)), np.ones((1, 3))], batch_size=2), ValueError, "example 1 has features"),
        (lambda: SlotFilling([[1]], plan_padded(1, 1), shard_index=1), ValueError, "shard_index must be in"),
        (lambda: SlotFilling([[1]], plan_padded(1, 1), local_shards=0), ValueError, "local_shards must be at least 1"),
        (lambda: SlotFilling([[1]], plan_padded(1, 1), buffer_size=0), ValueError, "buffer_size must be at least 1"),
        (
            lambda: SlotFilling([[1]], plan_padded(1, 1), seed=0.5),  # type: ignore[arg-type]
            TypeError,
            "seed must be an int",
        ),
        (
            lambda: SlotFilling([[1]], plan_padded(1, 1), shuffle=True),  # type: ignore[call-arg]
            TypeError,
            "unexpected keyword argument 'shuffle'",
        ),
        (
            lambda: BucketByLength([[1]], batch_size=1, shuffle=True),  # type: ignore[call-arg]
            TypeError,
            "unexpected keyword argument 'shuffle'",
        ),
        (
            lambda: SortedChunks([[1]], batch_size=1, shuffle=True),  # type: ignore[call-arg]
            TypeError,
            "unexpected keyword argument 'shuffle'",
        ),
        (lambda: len(SlotFilling(Stream([[1]]), plan_padded(1, 1))), TypeError, "not known before it is read"),
    ],
)
def test_bad_sources_and_options_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_an_iterator_can_be_read_for_one_epoch():
    batcher = SlotFilling(iter(examples_of([1, 2])), plan_padded(2, 2))
    assert len(list(batcher)) == 1
    with pytest.raises(ValueError, match="an iterator, which can be read once"):
        list(batcher)
