"""Batches in Grain's pipelines: every example once, and checkpoints through all of it."""

import itertools
import runpy
import sys

import jax
import numpy as np
import pytest
from corpora import assert_equal, assert_resumes
from hypothesis import given
from hypothesis import strategies as st

grain = pytest.importorskip("grain")

from jaxpack import plan_exact, plan_padded  # noqa: E402
from jaxpack.data import BucketByLength, SlotFilling, SortedChunks, plan_cover  # noqa: E402
from jaxpack.data import _grain as integration  # noqa: E402
from jaxpack.data.grain import BatcherIterDataset, SlotFillIterDataset, pack_fn  # noqa: E402

LENGTHS = np.random.default_rng(0).integers(1, 9, 50).tolist()
PLAN = plan_cover(LENGTHS, 4)
prefetch = grain.experimental.ThreadPrefetchIterDataset


def corpus(lengths=LENGTHS):
    """Sequences whose values are all different, and none 0."""
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end) + 1.0 for length, end in zip(lengths, ends, strict=True)]


def stream(lengths=LENGTHS):
    return grain.MapDataset.source(corpus(lengths)).shuffle(seed=3).to_iter_dataset()


def values(batches):
    """All that is in batches, in order of size."""
    return np.sort(np.concatenate([batch.inputs.data[batch.inputs.data != 0] for batch in batches]))


@pytest.mark.parametrize("parent", [grain.MapDataset.source(corpus()), stream()], ids=["map", "iter"])
def test_slot_fill_gives_every_example_once_under_one_plan(parent):
    batches = list(parent.pipe(SlotFillIterDataset, PLAN, buffer_size=12))
    assert {batch.inputs.plan for batch in batches} == {PLAN}
    np.testing.assert_array_equal(values(batches), np.concatenate(corpus()))
    indices = np.concatenate([batch.indices for batch in batches])
    np.testing.assert_array_equal(np.sort(indices[indices >= 0]), np.arange(len(LENGTHS)))
    for batch in batches:
        np.testing.assert_array_equal(batch.weights, batch.indices >= 0)


def test_slot_fill_draws_at_random():
    first, again, other = (
        [batch.indices.tolist() for batch in stream().pipe(SlotFillIterDataset, PLAN, seed=seed)] for seed in (1, 1, -1)
    )
    assert first == again != other


def test_slot_fill_without_draws_is_slot_filling_of_a_stream():
    batches = stream().pipe(SlotFillIterDataset, PLAN, buffer_size=10, seed=None)
    assert_equal(batches, SlotFilling(list(stream()).__iter__(), PLAN, buffer_size=10, seed=None))


@given(st.lists(st.integers(0, 6), max_size=20), st.integers(1, 12), st.sampled_from([None, 0, -5]))
def test_slot_fill_resumes_before_every_batch(lengths, buffer_size, seed):
    plan = plan_exact([6, 3, 1])
    assert_resumes(stream(lengths).pipe(SlotFillIterDataset, plan, buffer_size=buffer_size, seed=seed))


def test_slot_fill_resumes_a_stream_of_pytrees():
    parent = grain.MapDataset.source(corpus()).map(lambda x: {"x": x, "label": np.int32(x[0])}).repeat(2)
    assert_resumes(SlotFillIterDataset(parent, PLAN, buffer_size=12))


@pytest.mark.parametrize(
    "dataset",
    [BatcherIterDataset(SlotFilling(corpus(), PLAN), num_epochs=2), SlotFillIterDataset(stream(), PLAN, buffer_size=9)],
    ids=["batcher", "slot fill"],
)
def test_checkpoints_work_downstream_and_their_states_have_one_form(dataset):
    leaves = prefetch(dataset.filter(lambda batch: batch.indices[0] % 3), prefetch_buffer_size=2).map(jax.tree.leaves)
    grain.experimental.assert_equal_output_after_checkpoint(leaves)


def test_orbax_saves_and_restores_an_iterator(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    dataset = prefetch(SlotFillIterDataset(stream(), PLAN, buffer_size=12), prefetch_buffer_size=2)
    iterator, restored = iter(dataset), iter(dataset)
    for _ in range(4):
        next(iterator)
    with ocp.Checkpointer(grain.checkpoint.CheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "data", args=grain.checkpoint.CheckpointSave(iterator))
        checkpointer.restore(tmp_path / "data", args=grain.checkpoint.CheckpointRestore(restored))
    assert_equal(list(restored), list(iterator))


def test_an_endless_stream_reads_little_again():
    reads = []

    def counted(example):
        reads.append(1)
        return example

    parent = grain.MapDataset.source(corpus()).repeat().map(counted)
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    dataset = SlotFillIterDataset(parent.to_iter_dataset(options), PLAN, buffer_size=16)
    iterator, resumed = iter(dataset), iter(dataset)
    for _ in range(500):
        next(iterator)
    state = iterator.get_state()
    reads.clear()
    resumed.set_state(state)
    assert len(reads) == state["read"] - state["anchor"] < 500 < state["anchor"]
    assert_equal(itertools.islice(resumed, 20), itertools.islice(iterator, 20))


BATCHERS = {
    "slots": lambda source: SlotFilling(source, PLAN),
    "buckets": lambda source: BucketByLength(source, [3, 8], batch_size=4),
    "chunks": lambda source: SortedChunks(source, [plan_padded(4, 8)], window=2),
}


@pytest.mark.parametrize("source", [corpus(), grain.MapDataset.source(corpus()), stream()], ids=["list", "map", "iter"])
@pytest.mark.parametrize("make", BATCHERS.values(), ids=BATCHERS)
def test_a_batcher_gives_its_epochs(make, source):
    batcher = make(source)
    epochs = [list(batcher), list(batcher)]
    assert_equal(BatcherIterDataset(make(source)), epochs[0])
    assert_equal(BatcherIterDataset(make(source), num_epochs=2), epochs[0] + epochs[1])
    some = len(epochs[0]) + 2
    assert_equal(
        itertools.islice(BatcherIterDataset(make(source), num_epochs=None), some), (epochs[0] + epochs[1])[:some]
    )


@pytest.mark.parametrize("make", BATCHERS.values(), ids=BATCHERS)
def test_a_batcher_resumes_before_every_batch(make):
    assert_resumes(BatcherIterDataset(make(corpus()), num_epochs=2))


def test_every_iterator_starts_where_the_batcher_stood():
    batcher = SlotFilling(corpus(), PLAN)
    next(iter(batcher))
    dataset = BatcherIterDataset(batcher)
    second = list(dataset)
    assert_equal(dataset, second)
    assert_equal(batcher, second)
    assert_equal(dataset, second)


@pytest.mark.parametrize("source", [corpus(), stream()], ids=["list", "iter"])
def test_workers_share_a_batcher_without_changing_its_batches(source):
    dataset = BatcherIterDataset(SlotFilling(source, PLAN), num_epochs=2)
    parallel = grain.experimental.multithread_prefetch(dataset, num_threads=3, buffer_size=1)
    assert_equal(parallel, dataset)
    dataset.set_slice(slice(1, None, 3))
    assert_resumes(dataset)


def test_workers_of_slot_fill_share_the_source():
    dataset = SlotFillIterDataset(stream(), PLAN, buffer_size=12)
    parallel = grain.experimental.multithread_prefetch(dataset, num_threads=2, buffer_size=1)
    np.testing.assert_array_equal(values(parallel), np.concatenate(corpus()))


def test_batches_go_to_a_device():
    device = jax.devices()[1]
    batch = next(iter(grain.experimental.device_put(SlotFillIterDataset(stream(), PLAN), device)))
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(batch))


def test_pack_fn_takes_the_cheapest_plan_that_fits():
    small, large = plan_exact([3, 2, 1]), plan_padded(3, 8)
    dataset = grain.MapDataset.source(corpus([1, 3, 2, 8, 3])).batch(3, batch_fn=pack_fn([large, small]))
    first, second = dataset
    assert (first.inputs.plan, second.inputs.plan) == (small, large)
    np.testing.assert_array_equal(first.inputs.lengths, [1, 3, 2])
    np.testing.assert_array_equal(first.inputs.data, [2, 5, 1, 3, 6, 4])  # steps of [2 3 4], [5 6], [1]
    np.testing.assert_array_equal(second.indices, [0, 1, -1])
    np.testing.assert_array_equal(second.weights, [1, 1, 0])
    np.testing.assert_array_equal(values([second]), np.arange(7, 18))


def test_pack_fn_packs_the_leaves_that_vary_in_time():
    example = {"x": np.ones((2, 3)), "style": np.ones(5)}
    batch = pack_fn(plan_padded(2, 4), time_varying={"x": True, "style": False})([example])
    assert batch.inputs["x"].data.shape == (8, 3)
    np.testing.assert_array_equal(batch.inputs["style"], [[1] * 5, [0] * 5])


def test_pack_fn_refuses_what_fits_no_plan():
    pack = pack_fn([plan_padded(2, 4), plan_padded(2, 2)])
    with pytest.raises(ValueError, match=r"lengths\[1\] = 5 does not fit the plan: its row has room for 4"):
        pack(corpus([4, 5]))
    with pytest.raises(ValueError, match="3 entries, but the plan is for 2"):
        pack(corpus([1, 1, 1]))
    with pytest.raises(ValueError, match="plans is empty"):
        pack_fn([])
    with pytest.raises(ValueError, match="examples is empty"):
        pack([])


def test_an_example_too_long_is_named_and_never_passed_over():
    iterator = iter(grain.MapDataset.source(corpus([4, 2, 9])).pipe(SlotFillIterDataset, plan_padded(2, 4)))
    for _ in range(2):
        with pytest.raises(ValueError, match="example 2 has 9 steps, but the longest that fits has 4"):
            next(iterator)
    restored = iter(grain.MapDataset.source(corpus([4, 2, 9])).pipe(SlotFillIterDataset, plan_padded(2, 9)))
    restored.set_state(iterator.get_state())
    np.testing.assert_array_equal(values(restored), np.arange(1, 16))


def test_examples_must_be_alike():
    mixed = grain.MapDataset.source([np.ones(2, np.int8), np.ones(2, np.float32)])
    with pytest.raises(TypeError, match="example 1 has dtype float32, which int8 cannot hold"):
        list(mixed.pipe(SlotFillIterDataset, PLAN))


def test_dtypes_are_those_of_the_first_example_after_a_resume_too():
    kinds = [np.float32, np.int8, np.int16, np.uint8]
    source = [x.astype(kind) for x, kind in zip(corpus(), itertools.cycle(kinds), strict=False)]
    assert_resumes(SlotFillIterDataset(grain.MapDataset.source(source), PLAN, buffer_size=4, seed=None))


def test_empty_lists_at_the_start_wait_for_the_first_that_has_a_dtype():
    source = [[], [], [], [], [], *[[1, 2, 3]] * 9]
    dataset = SlotFillIterDataset(grain.MapDataset.source(source), plan_padded(2, 3), buffer_size=2)
    assert {batch.inputs.data.dtype.name for batch in dataset} == {"int32"}
    assert_resumes(dataset)
    (batch,) = grain.MapDataset.source([[], []]).batch(2, batch_fn=pack_fn(plan_padded(2, 3)))
    assert batch.inputs.data.dtype == np.float32


def test_a_state_of_more_examples_is_refused():
    iterator = iter(SlotFillIterDataset(stream(), PLAN, buffer_size=12))
    next(iterator)
    fewer = iter(SlotFillIterDataset(stream(LENGTHS[:5]), PLAN, buffer_size=12))
    with pytest.raises(ValueError, match="taken after 12 examples, but now there are 5"):
        fewer.set_state(iterator.get_state())


def test_a_state_of_another_batcher_is_refused():
    state = iter(BatcherIterDataset(SlotFilling(corpus(), PLAN, seed=1))).get_state()
    with pytest.raises(ValueError, match="the state is that of"):
        iter(BatcherIterDataset(SlotFilling(corpus(), PLAN))).set_state(state)


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="buffer_size must be at least 1, got 0"):
        SlotFillIterDataset(stream(), PLAN, buffer_size=0)
    with pytest.raises(ValueError, match="num_epochs must be at least 1, got 0"):
        BatcherIterDataset(SlotFilling(corpus(), PLAN), num_epochs=0)
    with pytest.raises(TypeError, match="batcher must be one of"):
        BatcherIterDataset(corpus())


def test_nothing_gives_no_batches():
    assert not list(SlotFillIterDataset(grain.MapDataset.source([]), PLAN))
    dropped = SlotFilling(corpus([9, 9]), plan_padded(2, 4), too_long="drop")
    assert not list(BatcherIterDataset(dropped, num_epochs=None))


def test_without_grain_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ModuleNotFoundError, match=r"jaxpack\[data\]"):
        runpy.run_path(integration.__file__)
