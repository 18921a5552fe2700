"""resets_from_dones against environments that know which episode each observation belongs to."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpack
from jaxpack import resets_from_dones


class Environment:
    """An environment of Gymnasium's interface, whose observation is the number of the episode and its step.

    Args:
      ends: the lengths of the episodes: `step` returns done when an episode has had so many steps.
      mode: "SAME_STEP" or "NEXT_STEP", as gymnasium.vector.AutoresetMode.
    """

    def __init__(self, ends, mode):
        self.ends, self.mode = ends, mode

    def reset(self):
        self.episode, self.time, self.done = 0, 0, False
        return self.episode, self.time

    def step(self):
        """Returns the next observation, and whether the step ended an episode."""
        if self.done and self.mode == "NEXT_STEP":  # the action is ignored
            self.episode, self.time, self.done = self.episode + 1, 0, False
            return (self.episode, self.time), False
        self.time += 1
        self.done = self.time == self.ends[self.episode]
        if self.done and self.mode == "SAME_STEP":
            self.episode, self.time = self.episode + 1, 0
        return (self.episode, self.time), self.done


def rollouts_of(mode, ends, steps, count):
    """Yields rollouts: the observations that the policy saw, and dones."""
    environment = Environment(ends, mode)
    seen = environment.reset()
    for _ in range(count):
        observations, dones = [], []
        for _ in range(steps):
            observations.append(seen)
            seen, done = environment.step()
            dones.append(done)
        yield np.array(observations), np.array(dones)


ENDS = {"every step": [1] * 40, "at borders": [4] * 10, "mixed": [1, 4, 3, 1, 1, 7, 9, 40], "long": [40]}


@pytest.mark.parametrize("ends", ENDS)
def test_resets_are_where_observations_begin_an_episode(ends):
    first = True
    for observations, dones in rollouts_of("SAME_STEP", ENDS[ends], 4, 5):
        resets = np.asarray(resets_from_dones(dones, first=first, axis=0))
        np.testing.assert_array_equal(resets, observations[:, 1] == 0)
        first = dones[-1]


@pytest.mark.parametrize("ends", ENDS)
def test_twice_is_for_environments_that_reset_at_the_next_step(ends):
    done, begins = False, True
    for observations, dones in rollouts_of("NEXT_STEP", ENDS[ends], 4, 5):
        ignored = np.asarray(resets_from_dones(dones, first=done, axis=0))
        resets = np.asarray(resets_from_dones(ignored, first=begins, axis=0))
        np.testing.assert_array_equal(resets, observations[:, 1] == 0)
        episodes, times = observations.T
        np.testing.assert_array_equal(ignored, times == np.take(ENDS[ends], episodes))
        done, begins = dones[-1], ignored[-1]


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_each_axis_is_shifted_on_its_own(axis):
    dones = np.random.default_rng(0).random((5, 5)) < 0.4
    first = np.array([True, False, True, False, False])
    along = np.moveaxis(dones, axis, 0)
    expected = np.moveaxis(np.concatenate([first[None], along[:-1]]), 0, axis)
    np.testing.assert_array_equal(resets_from_dones(dones, first=first, axis=axis), expected)
    np.testing.assert_array_equal(
        jax.jit(lambda d, f: resets_from_dones(d, first=f, axis=axis))(dones, first), expected
    )


def test_one_row_one_step_and_none():
    assert resets_from_dones([True, False, False], first=False, axis=0).tolist() == [False, True, False]
    assert resets_from_dones([[True, False]], first=[False, True], axis=0).tolist() == [[False, True]]
    assert resets_from_dones(jnp.zeros((0, 2), bool), first=True, axis=0).shape == (0, 2)


def test_a_done_at_the_end_is_carried_by_first_alone():
    dones = np.array([[False], [True]])
    assert not np.asarray(resets_from_dones(dones, first=False, axis=0)).any()
    assert resets_from_dones(dones, first=dones[-1], axis=0).tolist() == [[True], [False]]


def test_rollouts_with_resets_equal_one_run_over_the_episodes():
    """With done flags where resets are meant the result is another one: the error that the function is against."""
    rng = np.random.default_rng(0)
    x, dones = rng.standard_normal((2, 12)).astype(np.float32), rng.random((2, 12)) < 0.3
    expected, h = np.zeros_like(x), np.zeros(2)
    for t in range(12):
        h = x[:, t] + 0.5 * np.where(dones[:, t - 1] if t else True, 0, h)
        expected[:, t] = h
    resets = resets_from_dones(dones, first=True, axis=1)
    states, _ = jaxpack.linear_scan(0.5, x, resets=resets)
    np.testing.assert_allclose(states, expected, atol=1e-6)
    wrong, _ = jaxpack.linear_scan(0.5, x, resets=dones)
    assert np.abs(wrong - expected).max() > 0.1


WRONG: dict[str, tuple[Any, Any, Any, type[Exception], str]] = {
    "floats": (np.zeros((3, 2)), True, 0, TypeError, "dones must be bool, got dtype float32"),
    "first of ints": (np.zeros((3, 2), bool), 1, 0, TypeError, "first must be bool, got dtype int"),
    "another axis": (np.zeros((3, 2), bool), [True] * 3, 0, ValueError, "Is axis right?"),
    "no axis": (np.zeros((3, 2), bool), True, 2, ValueError, "axis=2 is no axis of dones, which have shape (3, 2)"),
    "an axis that is no number": (np.zeros((3, 2), bool), True, "time", TypeError, "axis must be an int"),
    "a number": (np.array(True), True, 0, ValueError, "axis=0 is no axis of dones"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case):
    dones, first, axis, error, message = WRONG[case]
    with pytest.raises(error, match=re.escape(message)):
        resets_from_dones(dones, first=first, axis=axis)


def test_first_and_axis_have_no_default():
    with pytest.raises(TypeError, match="'first' and 'axis'"):
        resets_from_dones(np.zeros((3, 2), bool))  # type: ignore[call-arg]
