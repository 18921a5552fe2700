"""Histograms of lengths bound the error of every quantile, merge in any order, and plan as well as all lengths do."""

import dataclasses
import functools
import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpack import plan_best, plan_buckets, plan_padded
from jaxpack.data import LengthHistogram, coverage, plan_cover, plan_family

any_lengths = st.lists(st.one_of(st.integers(0, 40), st.integers(0, 10**5), st.integers(2**52, 2**62)), max_size=40)
errors = st.sampled_from([0.5, 0.3, 1 / 16, 0.01, 2**-10])


def _draws():
    return np.random.default_rng(0)


# All have lengths beyond 2,048, which the default counts exactly, and the first three most of theirs.
CORPORA = {
    "log-normal": lambda: _draws().lognormal(np.log(4000), 0.7, 40_000).astype(int) + 1,
    "Zipf-like": lambda: np.minimum(1000 * _draws().zipf(1.7, 40_000) + _draws().integers(1000, size=40_000), 300_000),
    "bimodal": lambda: np.where(
        _draws().random(40_000) < 0.8, _draws().normal(3000, 200, 40_000), _draws().normal(30_000, 3000, 40_000)
    ).astype(int),
    "constant": lambda: np.full(40_000, 5003),
    "short": lambda: _draws().lognormal(np.log(40), 0.7, 40_000).astype(int) + 1,
}


@functools.cache
def corpus(name):
    return CORPORA[name]()


@given(any_lengths, errors)
def test_every_length_counts_as_itself_or_more_by_at_most_the_relative_error(lengths, error):
    histogram = LengthHistogram.of(lengths, relative_error=error)
    assert histogram.num_sequences == len(lengths)
    assert histogram.num_steps == sum(lengths)
    counted = [length for length, count in zip(histogram.longest, histogram.counts, strict=True) for _ in range(count)]
    for exact, found in zip(sorted(lengths), counted, strict=True):
        assert exact <= found <= exact * (1 + error)
        assert found == exact or exact > histogram.exact_up_to
    assert not lengths or counted[-1] == max(lengths)


@given(st.lists(st.tuples(any_lengths, errors), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_merging_is_associative_commutative_and_what_counting_at_once_gives(parts, shuffler: random.Random):
    histograms = [LengthHistogram.of(lengths, relative_error=error) for lengths, error in parts]
    coarsest = max(error for _, error in parts)
    whole = LengthHistogram.of([length for lengths, _ in parts for length in lengths], relative_error=coarsest)
    assert histograms[0].merge(*histograms[1:]) == whole
    shuffler.shuffle(histograms)
    while len(histograms) > 1:  # any two neighbours first
        i = shuffler.randrange(len(histograms) - 1)
        histograms[i : i + 2] = [histograms[i].merge(histograms[i + 1])]
    assert histograms[0] == whole


@given(any_lengths, st.sampled_from([0, 0.1, 0.5, 0.77, 1]))
def test_quantiles_of_exact_lengths_are_numpys(lengths, share):
    lengths = [length % 2048 for length in lengths] + [7]
    expected = np.quantile(lengths, share, method="inverted_cdf")
    assert LengthHistogram.of(lengths).quantile(share) == expected


def test_memory_is_bounded_by_the_bins_whatever_is_counted():
    lengths = np.exp(_draws().uniform(0, np.log(1e12), 100_000)).astype(int)
    histogram = LengthHistogram.of(lengths, relative_error=0.01)
    assert histogram.exact_up_to == 256
    assert 2000 < len(histogram.counts) <= 256 + 32 * 128  # 32 octaves from 2^8 to 2^40


def test_a_stream_is_read_once_and_a_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr("jaxpack.data._histogram._CHUNK", 100)
    lengths = corpus("log-normal")[:1050]
    read = iter(lengths.tolist())
    assert LengthHistogram.of(read) == LengthHistogram.of(lengths)
    assert next(read, None) is None
    with pytest.raises(ValueError, match=r"lengths\[300:\]\[7\] = -1 is negative"):
        LengthHistogram.of(-1 if i == 307 else i for i in range(500))


def test_json_holds_a_histogram():
    histogram = LengthHistogram.of([*corpus("Zipf-like"), 2**60])
    assert LengthHistogram(**json.loads(json.dumps(dataclasses.asdict(histogram)))) == histogram


@pytest.mark.parametrize("planner", [None, plan_buckets, plan_best])
@pytest.mark.parametrize("name", CORPORA)
def test_plans_are_as_efficient_as_those_made_from_all_lengths_to_half_a_percent(name, planner):
    lengths = corpus(name)
    histogram = LengthHistogram.of(lengths)
    plans = [plan_cover(known, 64, planner=planner) for known in (lengths, histogram)]
    all_lengths, streamed = (coverage(lengths, plan).efficiency for plan in plans)
    assert streamed > 0.995 * all_lengths > 0
    assert plans[1].fits(np.sort(lengths)[:: -(len(lengths) // 64)][:64])
    assert (plans[0] == plans[1]) == (name in ("constant", "short"))  # where the histogram is exact


@pytest.mark.parametrize("name", ["log-normal", "Zipf-like", "bimodal"])
def test_plans_for_random_batches_are_as_small_as_those_made_from_all_lengths_to_half_a_percent(name):
    lengths = corpus(name)
    histogram = LengthHistogram.of(lengths)
    one, two = (plan_cover(known, 32, miss=0.05) for known in (lengths, histogram))
    assert two.size < 1.005 * one.size
    assert coverage(lengths, two).miss <= 0.05
    families = [plan_family(known, 32, 2) for known in (lengths, histogram)]
    assert len({len(family) for family in families}) == 1
    for one, two in zip(*families, strict=True):
        assert two.size < 1.005 * one.size
    assert coverage(lengths, one).efficiency <= 1.005 * coverage(histogram, two).efficiency


def test_where_lengths_are_counted_exactly_everything_is_the_same():
    lengths = corpus("short")
    histogram = LengthHistogram.of(lengths)
    assert plan_family(histogram, 32) == plan_family(lengths, 32)
    for options in ({"miss": 0.1, "batch_size": 32}, {"max_cells": 4000}):
        assert plan_cover(histogram, **options) == plan_cover(lengths, **options)
    plan = plan_cover(lengths, 64)
    assert coverage(histogram, plan) == coverage(lengths, plan)
    assert plan_best(histogram.rooms(64)) == plan_cover(histogram, 64, planner=plan_best)


def test_a_billion_sequences_are_planned_as_the_same_ones_once():
    once = LengthHistogram.of(corpus("short"))
    often = dataclasses.replace(once, counts=tuple(25_000 * n for n in once.counts), num_steps=25_000 * once.num_steps)
    assert often.num_sequences == 10**9
    assert plan_cover(often, 64) == plan_cover(once, 64)
    room = often.quantile(0.999)
    longer = sum(n for length, n in zip(often.longest, often.counts, strict=True) if length > room) / 10**9
    # With so many, draws are independent.
    assert coverage(often, plan_padded(64, room)).miss == pytest.approx(1 - (1 - longer) ** 64, rel=1e-3)


def test_random_batches_on_several_axes_need_no_more_than_a_histogram_of_each():
    source, target = corpus("short"), corpus("short")[::-1] + 3
    known = {"source": source, "target": target}
    histograms = {name: LengthHistogram.of(lengths) for name, lengths in known.items()}
    assert plan_cover(histograms, 16, miss=0.1) == plan_cover(known, 16, miss=0.1)
    with pytest.raises(ValueError, match=r"does not say which lengths occur together.*miss="):
        plan_cover(histograms, 16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LengthHistogram.of([3, -1]), ValueError, r"lengths\[1\] = -1 is negative"),
        (lambda: LengthHistogram.of([3, 0.5]), ValueError, "whole numbers"),
        (lambda: LengthHistogram.of(["abc"]), TypeError, "must be integers"),
        (lambda: LengthHistogram.of("abc"), TypeError, "must be a vector"),
        (lambda: LengthHistogram.of({"a": 3}), TypeError, r"Write list\(lengths.values\(\)\)"),  # type: ignore[dict-item]
        (lambda: LengthHistogram.of(3), ValueError, "must be a vector"),
        (lambda: LengthHistogram.of(iter([np.ones(3)])), TypeError, r"pass \(len\(sequence\) for"),  # type: ignore[arg-type]
        (lambda: LengthHistogram.of([3], relative_error=0), ValueError, "relative_error must be between 0 and 1"),
        (lambda: LengthHistogram((3, 2), (1, 1), 5), ValueError, "one length from each bin, in increasing order"),
        (lambda: LengthHistogram((4001, 4002), (1, 1), 8003), ValueError, "one length from each bin"),
        (lambda: LengthHistogram((3,), (1, 1), 6), ValueError, "one entry for each bin"),
        (lambda: LengthHistogram((3,), (0,), 0), ValueError, "at least one sequence"),
        (lambda: LengthHistogram((3,), (2,), 7), ValueError, "num_steps = 7 is not the sum"),
        (lambda: LengthHistogram((3,), (2,), 5), ValueError, "num_steps = 5 is not the sum"),
        (lambda: LengthHistogram((1.5,), (2,), 3), TypeError, r"longest\[0\] must be an int"),  # type: ignore[arg-type]
        (lambda: LengthHistogram.of([]).quantile(0.5), ValueError, "the corpus is empty"),
        (lambda: LengthHistogram.of([3]).quantile(1.5), ValueError, "share must be between 0 and 1"),
        (lambda: LengthHistogram.of([3]).rooms(0), ValueError, "batch_size must be at least 1"),
        (lambda: plan_cover(LengthHistogram.of([]), 2), ValueError, "the corpus is empty"),
        (lambda: plan_best(LengthHistogram.of([3])), TypeError, r"Pass its .rooms\(batch_size\)"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
