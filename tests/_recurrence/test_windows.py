"""Which cells the loops go over: every cell of a plan once, and every real cell of dealt rows."""

import collections
import functools

import jax
import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st

from jaxpack._recurrence.deals import deals_of
from jaxpack._recurrence.derivative import CPU, unplanned_cells
from jaxpack._recurrence.slots import BatchCells
from jaxpack._recurrence.windows import checkpoint_rows, stairs_of


def own_cells(stairs):
    """How often each cell is among a window's own, and the rows of the checkpoints, in the order of the loops."""
    cells: collections.Counter[int] = collections.Counter()
    checkpoints: list[int] = []
    for stair in stairs:
        for index in range(int(stair.number)):
            window = stair.window(index)
            assert 0 <= int(window.start) <= stair.length - stair.steps
            for step in range(int(window.skip), stair.steps):
                first = int(window.cell(step))
                cells.update(range(first, first + stair.rows))
            row = int(stair.checkpoint_row(index))
            checkpoints.extend(range(row, row + stair.rows))
    return cells, checkpoints


@given(plan=strategies.plans, chunk_cells=st.sampled_from([None, 1, 3, 7, 512]))
def test_the_chunks_of_a_plan_hold_each_cell_once(plan, chunk_cells):
    stairs = stairs_of(plan, chunk_cells)
    cells, checkpoints = own_cells(stairs)
    assert cells == collections.Counter(range(plan.size))
    assert sorted(checkpoints) == list(range(checkpoint_rows(stairs)))


DEALS = [  # the number of sequences, the longest, and the divisors and cells of a chunk of the schedule
    (14, 12, (3,), 5),
    (13, 15, (2,), 64),
    (9, 12, (8,), 1),
    (6, 12, (3,), 1),
    (5, 9, (2,), None),
    (5, 7, (1,), None),
    (1, 12, (8,), 5),
]


@st.composite
def deal_and_lengths(draw):
    """One of a few deals, each of which is a program, and any lengths under it."""
    number, longest, *schedule = draw(st.sampled_from(DEALS))
    lengths = draw(st.lists(st.integers(0, longest), min_size=number, max_size=number))
    return longest, tuple(schedule), lengths


@functools.cache
def program(number, longest, schedule):
    """The only deal for so many sequences, and what it makes of their lengths: its cells, and how many chunks."""
    (deal,) = deals_of(number, longest, *schedule)

    @jax.jit
    def run(lengths):
        batch = BatchCells.of(lengths, longest)
        cells = deal.cells(batch)
        assert cells.places is not None
        return {
            "chunks": deal.chunks(batch.ranked),
            "sources": cells.places.sources,
            "targets": cells.places.targets,
            "mask": cells.mask,
            "first": cells.first,
            "last": cells.last,
            "borders": cells.borders and (cells.borders.begins, cells.borders.ends, cells.borders.slots),
        }

    return deal, run


@given(case=deal_and_lengths())
def test_dealt_rows_hold_each_sequence_from_its_first_step_to_its_last(case):
    longest, schedule, lengths = case
    number = len(lengths)
    deal, run = program(number, longest, schedule)
    found = jax.device_get(run(np.array(lengths, np.int32)))
    sources, targets, real, borders = (found[name] for name in ("sources", "targets", "mask", "borders"))
    assert (borders is None) == (deal.rows == number)
    assert len(real) == deal.length * deal.rows
    assert not real[found["chunks"] * deal.steps * deal.rows :].any()
    assert sorted(sources[real]) == [i * longest + t for i, length in enumerate(lengths) for t in range(length)]
    assert (sources[~real] == number * longest).all()
    assert (targets[sources[real]] == np.flatnonzero(real)).all()
    assert (targets[~np.isin(np.arange(number * longest), sources[real])] == len(real)).all()
    for i, length in enumerate(lengths):
        own = [int(targets[i * longest + t]) for t in range(length)]  # one row, step after step
        assert own == [found["first"][i] + t * deal.rows for t in range(length)]
        if length:
            assert own[-1] == found["last"][i]
        if length and borders is not None:
            begins, ends, slots = borders
            assert begins[own].tolist() == [True] + [False] * (length - 1)
            assert ends[own].tolist() == [False] * (length - 1) + [True]
            assert (slots[own] == i).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_best_deal_computes_at_most_a_third_more_than_real_cells(seed):
    lengths = np.clip(np.round(np.random.default_rng(seed).lognormal(np.log(50), 0.7, 64)), 1, 200).astype(int)
    assert lengths.sum() <= unplanned_cells(lengths, lengths.max()) <= 4 / 3 * lengths.sum()


def test_no_deal_computes_slack_at_equal_lengths():
    assert CPU.chunk_cells
    assert unplanned_cells(np.full(64, 100), 104) <= 6400 + CPU.chunk_cells


def test_a_batch_of_one_chunk_is_not_dealt():
    (deal,) = deals_of(8, 20, CPU.divisors, CPU.chunk_cells)
    assert (deal.rows, deal.length, deal.steps) == (8, 20, 20)
    assert len(deals_of(8, 200, CPU.divisors, CPU.chunk_cells)) == len(CPU.divisors)
