"""SortedChunks: windows sorted, each batch under the plan that costs it least."""

import numpy as np
import pytest
from corpora import CORPORA, Sized

from jaxpack import plan_padded
from jaxpack.data import SortedChunks


def test_sorting_windows_saves_cells_and_keeps_the_order_of_batches_random():
    lengths = CORPORA["gamma"]()
    padded = [plan_padded(64, int(lengths.max()))]
    unsorted = SortedChunks(Sized(lengths), padded, lengths=lengths).statistics()
    found = SortedChunks(Sized(lengths), batch_size=64, lengths=lengths).statistics()
    assert found.programs <= 6
    assert found.efficiency > 2 * unsorted.efficiency
    assert abs(found.rank_correlation) < 0.05


def test_each_batch_takes_the_plan_of_fewest_cells_a_sequence():
    source = [np.zeros(length) for length in (8, 8, 2, 2, 2, 2)]
    plans = [plan_padded(2, 8), plan_padded(4, 2), plan_padded(4, 4)]
    assert sorted(batch.inputs.plan.size for batch in SortedChunks(source, plans)) == [8, 16]


def test_batches_of_a_window_have_like_lengths():
    source = [np.zeros(length) for length in np.random.default_rng(0).permutation(np.repeat([1, 5, 9], 8))]
    for batch in SortedChunks(source, [plan_padded(4, 9)], window=6):
        assert len(set(batch.inputs.lengths.tolist())) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SortedChunks([[1]], []), "plans is empty"),
        (lambda: SortedChunks([[1]], [plan_padded(1, 1)], batch_size=1), "pass plans, or batch_size"),
        (lambda: SortedChunks([[1]], batch_size=1, window=0), "window must be at least 1"),
        (lambda: SortedChunks(iter([[1]]), batch_size=1), "no lengths to make plans from"),
        (lambda: SortedChunks([[1, 2]], [plan_padded(1, 1)]), "example 0 has 2 steps"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
