"""A stream that is ordered by length is warned of, once; one in random order never is."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxpack import plan_padded
from jaxpack.data import BucketByLength, SlotFilling, SortedChunks, plan_cover
from jaxpack.data._trend import Trend

LENGTHS = np.random.default_rng(0).integers(1, 30, 2000)
PLAN = plan_cover(LENGTHS, 8)


class Stream:
    def __init__(self, lengths):
        self.lengths = lengths

    def __iter__(self):
        return (np.zeros(length, np.int8) for length in self.lengths)


def grain_slots(stream):
    grain = pytest.importorskip("grain")
    from jaxpack.data.grain import SlotFillIterDataset

    source = grain.MapDataset.source([np.zeros(length, np.int8) for length in stream.lengths])
    return SlotFillIterDataset(source, PLAN)


DOORS: dict[str, Callable[..., Any]] = {
    "slots": lambda stream, **options: SlotFilling(stream, PLAN, **options),
    "buckets": lambda stream, **options: BucketByLength(stream, (8, 29), batch_size=8, buffer_size=500, **options),
    "chunks": lambda stream, **options: SortedChunks(stream, [plan_padded(8, 29)], window=8, **options),
    "grain": grain_slots,
}
DOOR = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
ORDERS = {
    "ascending": np.sort(LENGTHS),
    "descending": -np.sort(-LENGTHS),
    "up and down": np.concatenate([np.sort(LENGTHS[::2]), -np.sort(-LENGTHS[1::2])]),
    "nearly": LENGTHS[np.argsort(LENGTHS + np.random.default_rng(1).normal(0, 3, len(LENGTHS)))],
    "two corpora": np.repeat([3, 20], 1000),
    "buckets": np.repeat([9, 29, 3, 17], 500),
}


def caught(run):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run()
    return [warning for warning in found if issubclass(warning.category, UserWarning)]


@pytest.mark.parametrize("order", ORDERS)
@DOOR
def test_an_ordered_stream_is_warned_of_once_an_epoch(door, order):
    batches = door(Stream(ORDERS[order]))
    for _ in range(2):
        (warning,) = caught(lambda: list(batches))
        assert "ordered by length" in str(warning.message)
        assert "%" in str(warning.message)
        assert "Shuffle the stream first, or pass a larger buffer_size" in str(warning.message)


DISTRIBUTIONS = {
    "uniform": lambda rng: rng.integers(1, 30, 2000),
    "log-normal": lambda rng: np.clip(rng.lognormal(2, 0.8, 2000).astype(int), 1, 29),
    "two": lambda rng: rng.choice([1, 29], 2000),
    "rare": lambda rng: np.where(rng.random(2000) < 0.01, 29, 2),
    "equal": lambda rng: np.full(2000, 7),
    "short runs": lambda rng: np.sort(rng.integers(1, 30, (200, 10)), axis=1).reshape(-1),
}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@DOOR
def test_a_stream_in_random_order_is_never_warned_of(door, distribution):
    lengths = DISTRIBUTIONS[distribution](np.random.default_rng(3))
    assert caught(lambda: list(door(Stream(lengths)))) == []


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_nor_in_many_tries_at_any_buffer(distribution):
    def watch():
        for seed in range(100):
            trend = Trend([1, 30, 300, 1500][seed % 4])
            for length in DISTRIBUTIONS[distribution](np.random.default_rng(seed)).tolist():
                trend.add((length,))
            trend.end()

    assert caught(watch) == []


def test_an_order_that_the_buffer_holds_as_a_whole_is_none():
    assert caught(lambda: list(SlotFilling(Stream(np.sort(LENGTHS)), PLAN, buffer_size=2000))) == []


def test_the_order_of_a_source_with_an_index_does_not_matter():
    source = [np.zeros(length, np.int8) for length in np.sort(LENGTHS)]
    assert caught(lambda: list(SlotFilling(source, PLAN, buffer_size=100))) == []


@pytest.mark.parametrize(("door", "warned"), [("slots", 1), ("buckets", 0), ("chunks", 0)])
def test_without_a_seed_an_order_may_be_wanted_but_for_slots(door, warned):
    assert len(caught(lambda: list(DOORS[door](Stream(np.sort(LENGTHS)), seed=None)))) == warned


def test_parts_of_one_long_example_are_no_trend():
    lengths = np.random.default_rng(0).integers(1, 600, 300)
    assert caught(lambda: list(SlotFilling(Stream(lengths), PLAN, buffer_size=600, too_long="split"))) == []


def test_a_trend_of_either_time_axis_is_warned_of():
    pairs = [(np.zeros(5), np.zeros(length)) for length in np.sort(LENGTHS)]
    plans = {"source": plan_padded(8, 5), "target": plan_padded(8, 29)}
    stream = SlotFilling(iter(pairs), plans, time_varying=("source", "target"), buffer_size=100)
    assert len(caught(lambda: list(stream))) == 1
