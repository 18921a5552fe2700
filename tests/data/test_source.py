"""Sources and lengths are read by position, or refused by name."""

import collections
import functools
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxpack import plan_padded
from jaxpack.data import BucketByLength, SlotFilling, SortedChunks, coverage, plan_cover, plan_family

PLAN = plan_padded(3, 6)
BATCHERS = {
    "slots": lambda source, **options: SlotFilling(source, PLAN, **options),
    "buckets": lambda source, **options: BucketByLength(source, (6,), batch_size=3, **options),
    "chunks": lambda source, **options: SortedChunks(source, [PLAN], **options),
}
BATCHER = pytest.mark.parametrize("make", BATCHERS.values(), ids=BATCHERS)
EXAMPLES = [[i] * (1 + i) for i in range(6)]
LENGTHS = [1, 2, 3, 4, 5, 6]


class Series:
    """As pandas has it: [] takes labels."""

    def __init__(self, values, labels):
        self.values, self.index = list(values), list(labels)
        self.iloc = _Positions(self.values)

    def __len__(self):
        return len(self.values)

    def __iter__(self):
        return iter(self.values)

    def __getitem__(self, label):
        try:
            return self.values[self.index.index(label)]
        except ValueError:
            raise KeyError(label) from None

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype)

    def keys(self):
        return self.index

    def tolist(self):
        return self.values


class _Positions:
    """Without a length, as pandas's."""

    def __init__(self, values):
        self._values = values

    def __getitem__(self, place):
        return self._values[place]


SHUFFLED, FILTERED = [3, 5, 0, 2, 4, 1], [7, 9, 12, 20, 21, 40]
SERIES = {"fake": Series, "pandas": lambda values, labels: pytest.importorskip("pandas").Series(values, index=labels)}


def contents(batches):
    """What each example became: its first step and how many there are."""
    found = {}
    for batch in batches:
        plan, slots = batch.inputs.plan, batch.inputs.unsorted_indices
        first = batch.inputs.data[plan.step_offsets[plan.slot_starts[slots]] + plan.slot_rows[slots]]
        for index, value, length in zip(batch.indices.tolist(), first, batch.inputs.lengths.tolist(), strict=True):
            if index >= 0:
                found[index] = (int(value), length)
    return [found[index] for index in range(len(found))]


@pytest.mark.parametrize("labels", [SHUFFLED, FILTERED, list("abcdef")], ids=["shuffled", "filtered", "words"])
@pytest.mark.parametrize("kind", SERIES)
@BATCHER
def test_a_series_is_read_by_position(make, kind, labels):
    source = SERIES[kind](EXAMPLES, labels)
    expected = [(i, 1 + i) for i in range(6)]
    assert contents(make(source)) == expected
    assert contents(make(source, lengths=LENGTHS)) == expected
    assert contents(make(EXAMPLES, lengths=SERIES[kind](LENGTHS, labels))) == expected


@pytest.mark.parametrize("plan", [plan_cover, lambda x, b: coverage(x, PLAN), plan_family])
def test_lengths_of_a_series_are_read_by_position(plan):
    assert plan(Series(LENGTHS, FILTERED), 3) == plan(LENGTHS, 3)


@pytest.mark.parametrize(
    "source", [np.arange(12).reshape(6, 2), tuple(EXAMPLES), collections.deque(EXAMPLES), range], ids=type
)
@BATCHER
def test_what_has_positions_is_read_by_them(make, source):
    batches = make([np.arange(2)] * 6 if source is range else source)
    assert sum((batch.indices >= 0).sum() for batch in batches) == 6


class Table:
    columns = ("a", "b")

    def __len__(self):
        return 2

    def __getitem__(self, name):
        raise KeyError(name)


class Labelled:
    """By label, with nothing that says so but its keys."""

    def __len__(self):
        return 2

    def __getitem__(self, label):
        return {5: [1], 9: [2]}[label]


class Locating(Labelled):
    loc = None


REFUSED = {
    "dict": ({0: [1], 1: [2]}, TypeError, r"read by key, not by position.*list\(source.values\(\)\)"),
    "mapping": (types.MappingProxyType({"a": [1]}), TypeError, "read by key, not by position"),
    "set": ({(1, 2), (3,)}, TypeError, "a set, whose order is not fixed"),
    "frozenset": (frozenset({(1, 2)}), TypeError, "a frozenset, whose order"),
    "string": ("abc", TypeError, "must hold examples, arrays of numbers, got a str"),
    "bytes": (b"abc", TypeError, "got a bytes"),
    "table": (Table(), TypeError, "a Table, which is read by column.*tolist.*to_dict"),
    "labels": (Labelled(), ValueError, r"no key 0: batchers read it by position.*\.tolist\(\)"),
    "loc": (Locating(), TypeError, r"read by label, not by position. Pass source.tolist\(\)"),
    "number": (7, TypeError, "a list of examples, or an iterable of them, got a int"),
    "none": (None, TypeError, "got a NoneType"),
    "empty": ([], ValueError, "the source is empty"),
    "empty array": (np.zeros((0, 3)), ValueError, "the source is empty"),
    "strings": (["ab", "c"], TypeError, "must hold numbers"),
    "ragged": ([[[1, 2], [3]]], ValueError, "example 0 has a list whose rows have different lengths"),
}


@pytest.mark.parametrize(("source", "error", "message"), REFUSED.values(), ids=REFUSED)
@BATCHER
def test_what_is_not_read_by_position_is_refused(make, source, error, message):
    with pytest.raises(error, match=message):
        make(source)


@BATCHER
def test_attributes_of_a_data_set_do_not_make_it_a_table_or_a_mapping(make):
    class Source(list):
        def __init__(self, examples):
            super().__init__(examples)
            self.keys, self.columns, self.loc = ["a"], ["b"], "c"

    assert contents(make(Source(EXAMPLES))) == [(i, 1 + i) for i in range(6)]


def test_a_key_error_of_the_source_itself_passes_through():
    class Source(Labelled):
        def __getitem__(self, index):
            return dict[str, list]()["words"]

    with pytest.raises(KeyError, match="words"):
        SlotFilling(Source(), PLAN)


def test_pandas_frames_are_refused():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(TypeError, match="read by column"):
        SlotFilling(pandas.DataFrame({"words": EXAMPLES}), PLAN)


WRONG = {
    "map": (lambda: map(len, EXAMPLES), r"got a map. Make it a list: list\(lengths\)"),
    "generator": (lambda: (len(example) for example in EXAMPLES), r"got a generator. Make it a list"),
    "dict": (lambda: dict(enumerate(LENGTHS)), r"got a dict. Write list\(lengths.values\(\)\)"),
    "set": (lambda: set(LENGTHS), "got a set"),
    "string": (lambda: "123456", "got a str"),
}


def taking(make, lengths):
    return make(EXAMPLES, lengths=lengths)


TAKERS: dict[str, Callable[[Any], Any]] = {
    **{name: functools.partial(taking, make) for name, make in BATCHERS.items()},
    "plan_cover": lambda lengths: plan_cover(lengths, 3),
    "plan_family": lambda lengths: plan_family(lengths, 3),
    "coverage": lambda lengths: coverage(lengths, PLAN),
}


@pytest.mark.parametrize(("lengths", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("taker", TAKERS)
def test_lengths_without_an_order_are_refused(taker, lengths, message):
    if taker == "plan_cover" and isinstance(lengths(), dict):
        message = "lengths"  # there a dict is of time axes
    with pytest.raises((TypeError, ValueError), match=message):
        TAKERS[taker](lengths())
