"""The buffer draws batches that fit, in the proportions of what it holds."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxpack._plans.planners import plan_buckets
from jaxpack.data import plan_cover
from jaxpack.data._buffer import rounds
from jaxpack.data._slot_buffer import SlotBuffer


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=60),
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.one_of(st.none(), st.integers(1, 30)),
    st.integers(1, 3),
    st.one_of(st.none(), st.integers(0, 99)),
)
def test_every_piece_is_drawn_once_and_every_batch_fits(lengths, rooms, size, shard_count, seed):
    plan = plan_buckets([9, *rooms], 9)
    rng = None if seed is None else np.random.default_rng(seed)
    drawn = list(rounds(iter(enumerate(lengths)), SlotBuffer(plan, size, shard_count, rng)))
    assert all(len(shards) == shard_count for shards in drawn)
    batches = [batch for shards in drawn for batch in shards]
    assert sorted(piece for batch in batches for piece in batch) == sorted(enumerate(lengths))
    for batch in batches:
        assert plan.fits([length for _, length in batch])
        assert [length for _, length in batch] == sorted((length for _, length in batch), reverse=True)


def test_what_waits_keeps_the_proportions_of_the_source():
    lengths = np.random.default_rng(0).geometric(0.2, 20_000)
    buffer = SlotBuffer(plan_cover(lengths, 32), 512, 1, np.random.default_rng(1))
    for piece in enumerate(lengths.tolist()):
        buffer.add(piece)
        if buffer.full:
            buffer.draw()
    waiting = [length for shards in buffer.rest() for batch in shards for _, length in batch]
    assert 480 <= len(waiting) < 512
    assert abs(np.mean(waiting) - lengths.mean()) < 0.15 * lengths.mean()
