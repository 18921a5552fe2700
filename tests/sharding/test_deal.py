"""Deals of a batch to shards: one tight plan fits all, their steps are nearly equal, and no sequence is lost."""

import jax.numpy as jnp
import numpy as np
import pytest
from corpora import CORPORA, Sized
from hypothesis import given
from hypothesis import strategies as st

import jaxpack
from jaxpack.data import BucketByLength, SlotFilling
from jaxpack.sharding import deal, plan_shards


@st.composite
def batches(draw):
    """Draws lengths whose number is a multiple of the shards', and the number of shards."""
    shards = draw(st.integers(1, 5))
    count = shards * draw(st.integers(1, 8))
    return np.array(draw(st.lists(st.integers(0, 60), min_size=count, max_size=count))), shards


def most_over_mean(lengths, rows):
    totals = lengths[rows].sum(axis=1)
    return totals.max() / totals.mean()


@given(batches(), st.randoms())
def test_no_deal_fits_a_tighter_plan(batch, random):
    lengths, shards = batch

    def rooms(rows):
        return np.sort(lengths[rows], axis=1)[:, ::-1].max(axis=0)

    rows = deal(lengths, shards)
    assert sorted(rows.ravel().tolist()) == list(range(len(lengths)))
    order = list(range(len(lengths)))
    random.shuffle(order)
    assert (rooms(rows) <= rooms(np.reshape(order, rows.shape))).all()


@given(
    batches(), st.sampled_from([jaxpack.plan_exact, lambda rooms: jaxpack.plan_buckets(rooms, 2), jaxpack.plan_best])
)
def test_every_shard_fits_the_plan_with_the_longest_differences_evened_out(batch, planner):
    lengths, shards = batch
    groups = np.sort(lengths)[::-1].reshape(-1, shards)
    plan = planner(groups[:, 0])
    rows = deal(lengths, shards, plan)
    assert sorted(rows.ravel().tolist()) == list(range(len(lengths)))
    assert all(plan.fits(lengths[each]) for each in rows)
    assert np.ptp(lengths[rows].sum(axis=1)) <= np.ptp(groups, axis=1).max()


@given(batches())
def test_the_shared_plan_is_the_best_one_of_the_longest_of_each_group(batch):
    lengths, shards = batch
    plan = plan_shards(lengths, shards, platform="gpu")
    assert plan == jaxpack.plan_best(np.sort(lengths)[::-1][::shards], platform="gpu")
    assert plan_shards(lengths, 1, platform="gpu") == jaxpack.plan_best(lengths, platform="gpu")


def test_the_most_steps_of_8_shards_of_64_sequences_are_within_2_percent_of_the_mean():
    for seed in range(20):
        drawn = np.random.default_rng(seed).lognormal(np.log(40), 0.7, 8 * 64)
        lengths = np.clip(drawn, 3, 200).astype(int)
        rows = deal(lengths, 8)
        assert most_over_mean(lengths, rows) < 1.002
        unsorted = np.arange(len(lengths)).reshape(8, 64)
        assert most_over_mean(lengths, unsorted) > 1.05


@pytest.mark.parametrize("corpus", ["words", "gamma", "log-normal"])
@pytest.mark.parametrize("kind", [SlotFilling, BucketByLength])
def test_over_an_epoch_the_most_steps_of_8_shards_are_within_half_a_percent_of_the_mean(corpus, kind):
    lengths = CORPORA[corpus]()[::4]
    batcher = kind(Sized(lengths), lengths=lengths, batch_size=64, local_shards=8)
    totals = np.array([batch.inputs.lengths.sum(axis=1) for batch in batcher])
    assert totals.sum() == lengths.sum()
    assert totals.max(axis=1).sum() / totals.mean(axis=1).sum() < (1.005 if kind is SlotFilling else 1.02)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: deal([3, 2, 1], 2), ValueError, "3 sequences do not divide among 2 shards. Append 1 sequences"),
        (lambda: plan_shards([3, 2, 1], 2), ValueError, "3 sequences do not divide among 2 shards"),
        (lambda: deal([3, 2], 0), ValueError, "num_shards must be at least 1"),
        (lambda: deal([3, 2], 2.0), TypeError, "num_shards must be an int"),  # type: ignore[arg-type]
        (lambda: deal([3, -2], 2), ValueError, r"lengths\[1\] = -2 is negative"),
        (lambda: deal(jnp.ones((2, 2), int), 2), ValueError, "must be a vector"),
        (
            lambda: deal([3, 2, 1, 1], 2, jaxpack.plan_padded(4, 3)),
            ValueError,
            r"the plan is for 4 sequences, but 4 sequences on 2 shards are 2 each. Use .*plan_shards\(lengths, 2\)",
        ),
        (
            lambda: deal([3, 9, 8, 7], 2, jaxpack.plan_exact([9, 5])),
            ValueError,
            r"lengths\[3\] = 7 does not fit the plan: of the 3 longest sequences one of 2 shards has 2",
        ),
    ],
)
def test_bad_deals_are_refused_with_the_way_out(call, error, message):
    with pytest.raises(error, match=message):
        call()
