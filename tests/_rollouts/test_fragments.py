"""Fragments of rollouts: packed and put back bit for bit, equal to the loop over episodes, in fewer steps."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxpack
from jaxpack import plan_padded
from jaxpack.data import plan_cover
from jaxpack.rollouts import cut_rollout, fragment_lengths

T, N, F = 7, 3, 2
PLANS = {"padded": plan_padded(T * N, T), "rows": jaxpack.BucketPlan((2 * T,), (11,), ((0, T),) * 11)}


@pytest.fixture(autouse=True)
def _x64(x64):
    """Runs in float64."""


def random_resets(seed=0, chance=0.3, shape=(T, N)):
    return np.random.default_rng(seed).random(shape) < chance


def loop(decay, x, resets, carried, fresh):
    """h_t = decay h_{t-1} + x_t over a rollout [T, N, F], from the fresh state where a reset is."""
    states, before, h = np.zeros_like(x), np.zeros_like(x), np.array(carried)
    for t in range(len(x)):
        before[t] = h
        h = decay * np.where(resets[t, :, None], fresh, h) + x[t]
        states[t] = h
    return states, before, h


def laid_out(array, axis):
    """An array [T, N, ...] with time at an axis."""
    return np.swapaxes(array, 0, axis)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("plan", PLANS)
@given(resets=st.lists(st.booleans(), min_size=T * N, max_size=T * N))
def test_packing_and_restoring_is_the_identity_bit_for_bit(plan, axis, resets):
    resets = laid_out(np.array(resets).reshape(T, N), axis)
    fragments = cut_rollout(resets, axis=axis, plan=PLANS[plan])
    rng = np.random.default_rng(0)
    tree = {
        "values": laid_out(rng.standard_normal((T, N, F)), axis),
        "masks": laid_out(rng.random((T, N)) < 0.5, axis),
        "actions": laid_out(rng.integers(0, 9, (T, N), np.int32), axis),
        "half": laid_out(rng.standard_normal((T, N)), axis).astype(jnp.bfloat16),
        "lost": np.full(resets.shape, np.nan),
    }
    packed = fragments.pack(tree)
    assert int(packed.mask.sum()) == T * N
    restored = fragments.restore(packed)
    for name, array in tree.items():
        assert restored[name].dtype == array.dtype
        np.testing.assert_array_equal(restored[name], array)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_fragment_is_the_steps_between_two_resets(axis):
    resets = random_resets()
    steps = np.stack(np.meshgrid(np.arange(T), np.arange(N), indexing="ij"), -1)
    fragments = cut_rollout(laid_out(resets, axis), axis=axis)
    expected = [steps[a:b, n] for n in range(N) for a, b in pairs(resets[:, n])]
    found = jaxpack.unpack_sequence(fragments.pack(laid_out(steps, axis)))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(fragment_lengths(laid_out(resets, axis), axis=axis), [len(one) for one in expected])
    np.testing.assert_array_equal(fragments.begins, [resets[tuple(one[0])] for one in expected])


def pairs(resets):
    """The first step of each fragment of a row, and the first one after it."""
    starts = [t for t in range(T) if t == 0 or resets[t]]
    return zip(starts, [*starts[1:], T], strict=True)


@functools.cache
def program(axis):
    """The recurrence over fragments, from the rollout to the rollout, with its final states."""

    @jax.jit
    def run(x, fragments, carried, fresh):
        state = fragments.initial_state(carried, fresh, batch_axis=0)
        states, final = jaxpack.linear_scan(0.5, fragments.pack(x), state)
        return fragments.restore(states), fragments.final_state(final, batch_axis=0)

    return run


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("plan", PLANS)
def test_fragments_equal_the_loop_over_episodes_through_several_rollouts(plan, axis):
    rng = np.random.default_rng(1)
    carried, fresh = np.zeros((N, F)), rng.standard_normal((1, F))
    kept = carried
    for i, chance in enumerate([0.3, 0.0, 1.0, 0.5]):  # 0: no fragment begins; 1: every step is one
        resets, x = random_resets(i, chance), rng.standard_normal((T, N, F))
        fragments = cut_rollout(laid_out(resets, axis), axis=axis, plan=PLANS[plan])
        states, kept = program(axis)(laid_out(x, axis), fragments, kept, fresh)
        expected, _, carried = loop(0.5, x, resets, carried, fresh)
        np.testing.assert_allclose(laid_out(np.asarray(states), axis), expected, atol=1e-12)
        np.testing.assert_allclose(kept, carried, atol=1e-12)
    assert program(axis)._cache_size() <= 2 * len(PLANS)  # the first states are NumPy's


def test_gradients_stay_within_their_episode():
    resets = random_resets(3)
    x, weights = np.random.default_rng(0).standard_normal((2, T, N, F))
    fragments = cut_rollout(resets, axis=0, plan=PLANS["rows"])

    def loss(x, carried):
        states, _ = program(0)(x, fragments, carried, np.zeros((1, F)))
        return jnp.sum(states * weights)

    dx, dcarried = jax.grad(loss, (0, 1))(x, np.ones((N, F)))
    expected, after = np.zeros_like(x), np.zeros((N, F))
    for t in reversed(range(T)):  # the recurrence, backwards: nothing comes from a step that begins an episode
        expected[t] = weights[t] + 0.5 * after
        after = np.where(resets[t][:, None], 0, expected[t])
    np.testing.assert_allclose(dx, expected, atol=1e-12)
    np.testing.assert_allclose(dcarried, 0.5 * after, atol=1e-12)


def test_what_one_episode_holds_changes_no_bit_of_another():
    resets, x = random_resets(3), np.random.default_rng(0).standard_normal((T, N, F))
    fragments = cut_rollout(resets, axis=0, plan=PLANS["rows"])
    episode = np.cumsum(resets, axis=0)
    inside = (episode == 1) & (np.arange(N) == 1)
    assert 0 < inside.sum() < T
    carried, fresh = np.ones((N, F)), np.zeros((1, F))
    before, after = (
        np.asarray(program(0)(each, fragments, carried, fresh)[0])
        for each in (x, np.where(inside[..., None], np.nan, x))
    )
    np.testing.assert_array_equal(np.isnan(after).any(-1), inside)
    np.testing.assert_array_equal(before[~inside], after[~inside])


def test_an_lstm_over_fragments_equals_numpy_over_episodes():
    resets = random_resets(5)
    layer = jaxpack.LSTM(F, 4)
    params = oracles.random_params(layer)
    rng = np.random.default_rng(0)
    x, carried = rng.standard_normal((T, N, F)), tuple(rng.standard_normal((2, 1, N, 4)))
    fragments = cut_rollout(resets, axis=0, plan=PLANS["rows"])
    state = fragments.initial_state(carried, batch_axis=1)
    output, final = jax.jit(layer.apply)(params, fragments.pack(x), state)
    found, kept = fragments.restore(output), fragments.final_state(final, batch_axis=1)
    for n in range(N):
        h, c = (leaf[0, n] for leaf in carried)
        for t in range(T):
            h, c = oracles.cell_step("lstm", params["l0"], (h * ~resets[t, n], c * ~resets[t, n]), x[t, n])
            np.testing.assert_allclose(found[t, n], h, atol=1e-10)
        np.testing.assert_allclose([leaf[0, n] for leaf in kept], [h, c], atol=1e-10)


@pytest.mark.parametrize("axis", [0, 1])
def test_pieces_start_from_stored_states(axis):
    rng = np.random.default_rng(2)
    resets, x = random_resets(2, 0.2), rng.standard_normal((T, N, F))
    carried, fresh = rng.standard_normal((2, N, F))
    expected, before, _ = loop(0.5, x, resets, carried, fresh)
    fragments = cut_rollout(laid_out(resets, axis), axis=axis, max_length=3)
    assert fragments.plan.max_length == 3 == max(fragment_lengths(resets, axis=0, max_length=3))
    state = fragments.stored_state(before, fresh, batch_axis=0)
    states, final = jaxpack.linear_scan(0.5, fragments.pack(laid_out(x, axis)), state)
    np.testing.assert_allclose(laid_out(np.asarray(fragments.restore(states)), axis), expected, atol=1e-12)
    np.testing.assert_allclose(fragments.final_state(final, batch_axis=0), expected[-1], atol=1e-12)
    moved = fragments.stored_state(np.moveaxis(before, 1, 2), fresh.T, batch_axis=1)
    np.testing.assert_array_equal(moved.T, state)
    with pytest.raises(ValueError, match="Give the states of all steps to stored_state"):
        fragments.initial_state(carried, batch_axis=0)


def episodes(lengths, rows, steps):
    """Resets [N, T] of rows of episodes with lengths that a function draws."""
    resets = np.zeros((rows, steps), bool)
    for row in resets:
        t = 0
        while t < steps:
            row[t] = True
            t += int(lengths())
    return resets


DRAWS = {
    "8 to 24 steps": (128, lambda rng: lambda: rng.integers(8, 25), 4.0),
    "1 to 31 steps": (128, lambda rng: lambda: rng.integers(1, 32), 3.8),
    "geometric, 16 rows": (16, lambda rng: lambda: rng.geometric(1 / 16), 1.3),
}


@pytest.mark.parametrize("name", DRAWS)
def test_short_episodes_take_fewer_steps_one_after_the_other(name):
    """Episodes of 16 steps in the mean, in rollouts of 128."""
    rows, draw, times = DRAWS[name]
    resets = episodes(draw(np.random.default_rng(0)), rows, 128)
    lengths = fragment_lengths(resets, axis=1)
    assert 13 < lengths.mean() < 18
    for platform in ("cpu", "gpu"):
        plan = jaxpack.plan_best(lengths, platform=platform)
        assert cut_rollout(resets, axis=1, plan=plan).plan.num_steps * times <= 128
        assert plan.size <= 1.1 * resets.size


def test_pieces_make_the_steps_few_however_long_episodes_are():
    resets = episodes(lambda: 1000, 8, 128)
    assert cut_rollout(resets, axis=1, plan=None, max_length=32).plan.num_steps == 32


def test_one_plan_serves_rollouts_it_has_not_seen():
    rng = np.random.default_rng(0)
    rollouts = [episodes(lambda: rng.integers(1, 32), 16, 64) for _ in range(24)]
    lengths = [fragment_lengths(resets, axis=1) for resets in rollouts]
    seen, new = lengths[:12], lengths[12:]
    plan = plan_cover(np.concatenate(seen), int(1.1 * max(map(len, seen))), miss=1e-3)
    assert all(plan.fits(each) for each in new)


def test_a_learned_state_gets_its_gradient_from_fresh_fragments():
    resets = random_resets(4)
    fragments = cut_rollout(resets, axis=0, plan=PLANS["padded"])
    ones = jax.grad(lambda fresh: fragments.initial_state(jnp.ones((N, F)), fresh, batch_axis=0).sum())(
        jnp.ones((1, F))
    )
    slots = PLANS["padded"].num_sequences
    np.testing.assert_array_equal(ones, slots - (~resets[0]).sum())


RESETS = random_resets()
NO_PLAN: Any = 4
NO_BATCH: Any = np.zeros((T, N))
FRAGMENTS = functools.cache(lambda: cut_rollout(RESETS, axis=0))
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "ints": (lambda: cut_rollout(RESETS.astype(int), axis=0), TypeError, "resets must be bool, got dtype int64"),
    "traced": (lambda: jax.jit(lambda r: cut_rollout(r, axis=0).cells)(RESETS), TypeError, "cut it outside jit"),
    "one row": (lambda: cut_rollout(RESETS[0], axis=0), ValueError, "resets must be [T, N] or [N, T]"),
    "no steps": (lambda: cut_rollout(RESETS[:0], axis=0), ValueError, "at least one step and one row, got [0, 3]"),
    "axis": (
        lambda: cut_rollout(RESETS, axis=2),
        ValueError,
        "axis must be 0 for a rollout [T, N], or 1 for [N, T], got 2",
    ),
    "plan": (
        lambda: cut_rollout(RESETS, axis=0, plan=NO_PLAN),
        TypeError,
        "plan must be a jaxpack.BucketPlan, got int",
    ),
    "few": (lambda: cut_rollout(RESETS, axis=0, plan=plan_padded(2, T)), ValueError, "but the plan is for 2 sequences"),
    "short": (lambda: cut_rollout(RESETS, axis=0, plan=plan_padded(21, 2)), ValueError, "does not fit the plan"),
    "max_length": (lambda: cut_rollout(RESETS, axis=0, max_length=0), ValueError, "max_length must be at least 1"),
    "other axes": (lambda: FRAGMENTS().pack(np.zeros((N, T))), ValueError, "Swap the axes"),
    "another batch": (
        lambda: FRAGMENTS().initial_state(np.zeros((N + 1, F)), batch_axis=0),
        ValueError,
        "carried must have 3 rows at axis 0, got shape (4, 2). Is batch_axis right?",
    ),
    "another structure": (
        lambda: FRAGMENTS().initial_state(np.zeros((N, F)), (np.zeros((N, F)),), batch_axis=0),
        ValueError,
        "fresh must have the structure of the state",
    ),
    "steps": (
        lambda: FRAGMENTS().stored_state(np.zeros((N, N, F)), batch_axis=0),
        ValueError,
        "states must be stacked over the 7 steps in front, got shape (3, 3, 2)",
    ),
    "final": (
        lambda: FRAGMENTS().final_state(np.zeros((1, F)), batch_axis=0),
        ValueError,
        "rows at axis 0, got shape (1, 2)",
    ),
    "an array": (lambda: FRAGMENTS().restore(NO_BATCH), TypeError, "restore takes a PackedSequence"),
    "other sequences": (
        lambda: FRAGMENTS().restore(cut_rollout(RESETS, axis=0, plan=plan_padded(21, 7)).places),
        ValueError,
        "restore: the batch has the plan",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case):
    call, error, message = WRONG[case]
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_values_of_other_fragments_under_the_same_plan_are_refused_or_nan():
    plan = PLANS["padded"]
    ours, theirs = (cut_rollout(random_resets(seed), axis=0, plan=plan) for seed in (0, 1))
    values = theirs.pack(np.ones((T, N)))
    with pytest.raises(ValueError, match="restore: the batch has the lengths"):
        ours.restore(values)
    assert np.isnan(jax.jit(lambda a, b: a.restore(b))(ours, values)).any()


# Layers with resets=.
LAYERS: dict[str, Any] = {
    "min_gru": jaxpack.MinGRU(F, 3),
    "lstm": jaxpack.LSTM(F, 3),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_rollout_as_it_is_and_in_fragments_is_the_same(name):
    """A layer with resets over [N, T], and over its episodes, packed: outputs and gradients."""
    layer, resets = LAYERS[name], random_resets(6, shape=(N, T))
    params = layer.init(jax.random.key(0), jnp.float64)
    x, weights = np.random.default_rng(0).standard_normal((2, N, T, F))
    fragments = cut_rollout(resets, axis=1, plan=PLANS["rows"])

    def as_it_is(params, x):
        output, _ = layer.apply(params, x, resets=resets)
        return jnp.sum(output[..., :F] * weights), output

    def in_fragments(params, x):
        output, _ = layer.apply(params, fragments.pack(x))
        output = fragments.restore(output)
        return jnp.sum(output[..., :F] * weights), output

    one, other = (jax.jit(jax.grad(f, (0, 1), has_aux=True))(params, x) for f in (as_it_is, in_fragments))
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-10)
