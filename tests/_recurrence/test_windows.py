"""Which cells the loops go over: every cell of a plan once, and every real cell without a plan."""

import collections

import jax.numpy as jnp
import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st

from jaxpack import plan_padded
from jaxpack._recurrence.windows import checkpoint_rows, ladder_cells, ladder_ends, ladder_of, levels_of, stairs_of


def own_cells(stairs):
    """How often each cell is among a window's own, and where each chunk keeps its memory, in the order of the loops."""
    cells: collections.Counter[int] = collections.Counter()
    kept = []
    for stair in stairs:
        for index in range(int(stair.number)):
            window = stair.window(index)
            assert 0 <= int(window.start) <= stair.length - stair.steps
            for step in range(int(window.skip), stair.steps):
                first = int(window.cell(step))
                cells.update(range(first, first + stair.rows))
            kept.append((int(stair.checkpoint_row(index)), stair.rows))
    return cells, kept


def check_kept(kept, room):
    """Each chunk keeps its rows where no other does."""
    places = [row for first, rows in kept for row in range(first, first + rows)]
    assert len(set(places)) == len(places)
    assert max(places, default=-1) < room


@given(strategies.plans, st.sampled_from([None, 1, 3, 7, 512]))
def test_the_chunks_of_a_plan_hold_each_cell_once(plan, chunk_cells):
    cells, kept = own_cells(stairs_of(plan, chunk_cells))
    assert cells == collections.Counter(range(plan.size))
    if chunk_cells in (None, 512):  # memories are kept for chunks of at least 512 cells
        check_kept(kept, checkpoint_rows(plan, 512, False))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(0, 5), st.sampled_from([2, 9, 40]))
def test_the_ladder_holds_each_real_cell_once(lengths, more, chunk_cells):
    plan = plan_padded(len(lengths), max(1, *lengths) + more)
    longest_first = np.sort(lengths)[::-1]
    cells, kept = own_cells(ladder_of(plan, ladder_ends(plan, jnp.array(longest_first)), chunk_cells))
    real = {step * len(lengths) + row for row, length in enumerate(longest_first) for step in range(length)}
    assert set(cells) >= real
    assert set(cells.values()) <= {1}
    assert len({row for row, _ in kept}) == len(kept)


@pytest.mark.parametrize("seed", range(3))
def test_the_ladder_computes_at_most_a_third_more_than_real_cells(seed):
    lengths = np.clip(np.round(np.random.default_rng(seed).lognormal(np.log(50), 0.7, 64)), 1, 200).astype(int)
    plan = plan_padded(64, lengths.max())
    ends = ladder_ends(plan, jnp.array(np.sort(lengths)[::-1]))
    cells, kept = own_cells(ladder_of(plan, ends, 512))
    assert ladder_cells(plan, lengths) == cells.total() <= 4 / 3 * lengths.sum() < plan.size
    check_kept(kept, checkpoint_rows(plan, 512, True))


def test_the_ladder_computes_no_slack_at_equal_lengths():
    assert ladder_cells(plan_padded(64, 100), np.full(64, 100)) == 6400


@pytest.mark.parametrize("batch_size", [1, 2, 7, 27, 64, 1000])
def test_levels_go_down_from_all_rows(batch_size):
    levels = levels_of(batch_size)
    assert levels[0] == batch_size
    assert list(levels) == sorted(set(levels), reverse=True)
    assert len(levels) == min(batch_size, 8)


def test_a_misfit_keeps_the_ladder_going_to_its_end():
    # Slot 2 does not fit, which counts as all of its steps.
    assert ladder_ends(plan_padded(3, 9), jnp.array([4, 2, 9])).tolist() == [9, 9, 9]
