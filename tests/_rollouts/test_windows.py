"""Replay windows: they cover every step, cross no border, and start from the states that were stored."""

import re
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpack.rollouts import replay_windows

T, N = 9, 2
resets_of = st.lists(st.booleans(), min_size=T * N, max_size=T * N).map(lambda flat: np.array(flat).reshape(N, T))


def episodes(resets):
    """The first step of each episode of a row [T], and the one after its last."""
    starts = [t for t in range(T) if t == 0 or resets[t]]
    return list(zip(starts, [*starts[1:], T], strict=True))


@given(resets=resets_of, length=st.integers(1, 11), data=st.data())
def test_windows_cover_every_step_and_cross_no_border(resets, length, data):
    overlap = data.draw(st.integers(0, length - 1))
    windows = replay_windows(resets, length=length, overlap=overlap, axis=1)
    expected = []
    for row in range(N):
        for begin, end in episodes(resets[row]):
            starts = [*range(begin, max(end - length, begin), length - overlap), max(end - length, begin)]
            expected += [(row, start, min(length, end - begin), resets[row, start]) for start in starts]
    found = zip(windows.rows, windows.starts, windows.lengths, windows.begins, strict=True)
    assert list(found) == expected
    covered = {(row, start + t) for row, start, count, _ in expected for t in range(count)}
    assert len(covered) == T * N


@pytest.mark.parametrize("axis", [0, 1])
def test_steps_masks_and_states_are_those_of_the_memory(axis):
    rng = np.random.default_rng(0)
    resets = np.zeros((N, T), bool)
    resets[0, [0, 4]], resets[1, 2] = True, True
    memory = {"x": rng.standard_normal((N, T, 3)).astype(np.float32), "action": rng.integers(0, 9, (N, T), np.int32)}
    states = rng.standard_normal((T, 4, N, 2)).astype(np.float32)  # of four layers
    windows = replay_windows(np.swapaxes(resets, 1, axis), length=4, overlap=2, axis=axis)
    windows = windows.sample(np.random.default_rng(0), 12)
    laid_out = {name: np.swapaxes(array, 0, 1) if axis == 0 else array for name, array in memory.items()}
    taken = jax.jit(lambda windows, memory: windows.take(memory))(windows, laid_out)
    state = windows.stored_state(states, batch_axis=1)
    for i, (row, start, count) in enumerate(zip(windows.rows, windows.starts, windows.lengths, strict=True)):
        np.testing.assert_array_equal(windows.mask[i], np.arange(4) < count)
        for name, array in memory.items():
            np.testing.assert_array_equal(taken[name][i, :count], array[row, start : start + count])
            assert not np.asarray(taken[name][i, count:]).any()
        np.testing.assert_array_equal(state[:, i], 0 if resets[row, start] else states[start, :, row])


def test_a_seed_draws_the_same_windows_and_priorities_are_followed():
    windows = replay_windows(np.zeros((N, T), bool), length=3, overlap=1, axis=1)
    one, two = (windows.sample(np.random.default_rng(3), 50) for _ in range(2))
    np.testing.assert_array_equal(one.starts, two.starts)
    assert {*zip(one.rows, one.starts, strict=True)} == {*zip(windows.rows, windows.starts, strict=True)}
    weights = np.zeros(len(windows))
    weights[[1, 5]] = 1, 3
    drawn = windows.sample(np.random.default_rng(0), 400, weights)
    assert {*drawn.rows.tolist()} == {0, 1}
    assert 0.68 < np.mean(drawn.rows) < 0.82
    np.testing.assert_array_equal(windows[weights > 0].starts, windows.starts[[1, 5]])
    np.testing.assert_array_equal(windows[2:4].starts, windows.starts[2:4])


WINDOWS = replay_windows(np.zeros((N, T), bool), length=3, axis=1)
GENERATOR = np.random.default_rng(0)
NO_GENERATOR: Any = 0
WRONG = {
    "length": (lambda: replay_windows(np.zeros((N, T), bool), length=0, axis=1), ValueError, "length must be at least"),
    "overlap": (
        lambda: replay_windows(np.zeros((N, T), bool), length=3, overlap=3, axis=1),
        ValueError,
        "overlap must be in 0 to 2, as windows have 3 steps, got 3",
    ),
    "ints": (lambda: replay_windows(np.zeros((N, T), int), length=3, axis=1), TypeError, "resets must be bool"),
    "seed": (lambda: WINDOWS.sample(NO_GENERATOR, 3), TypeError, "generator must be a numpy.random.Generator, got int"),
    "none": (lambda: WINDOWS.sample(GENERATOR, 0), ValueError, "size must be at least 1"),
    "weights": (lambda: WINDOWS.sample(GENERATOR, 1, [1.0]), ValueError, "weights must be 6 numbers of 0 or more"),
    "zero weights": (lambda: WINDOWS.sample(GENERATOR, 1, np.zeros(6)), ValueError, "with a sum above 0"),
    "other axes": (lambda: WINDOWS.take(np.zeros((T, N))), ValueError, "Swap the axes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case):
    call, error, message = WRONG[case]
    with pytest.raises(error, match=re.escape(message)):
        call()
