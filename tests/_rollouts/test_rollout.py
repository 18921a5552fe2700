"""run_rollout: rows continue from one state, episodes begin from another; equal to NumPy and to fragments."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpack
from jaxpack.rollouts import cut_rollout, run_rollout

N, T, F = 3, 6, 2


@pytest.fixture(autouse=True)
def _x64(x64):
    """Runs in float64."""


def draws(seed, chance):
    rng = np.random.default_rng(seed)
    return rng.random((N, T)) < chance, *(rng.standard_normal(shape) for shape in ((N, T, F), (N, F), (1, F)))


@jax.jit
def gradients(decay, x, resets, carried, fresh, weights):
    def loss(decay, x, carried, fresh):
        outputs, final = run_rollout(jaxpack.linear_scan, decay, x, resets, carried, fresh, axis=1, batch_axis=0)
        return jnp.sum(outputs * weights[0]) + jnp.sum(final * weights[1]), (outputs, final)

    return jax.grad(loss, (0, 1, 2, 3), has_aux=True)(decay, x, carried, fresh)


def oracle(decay, x, resets, carried, fresh, weights):
    """The same in NumPy."""
    h, outputs, before = np.array(carried), np.zeros_like(x), np.zeros_like(x)
    for t in range(T):
        before[:, t] = np.where(resets[:, t, None], fresh, h)
        h = outputs[:, t] = decay * before[:, t] + x[:, t]
    d, dx, d_decay, d_fresh = np.array(weights[1]), np.zeros_like(x), np.zeros_like(decay), np.zeros_like(fresh)
    for t in reversed(range(T)):
        dx[:, t] = d + weights[0][:, t]
        d_decay += (dx[:, t] * before[:, t]).sum(0)
        d_fresh += np.where(resets[:, t, None], decay * dx[:, t], 0).sum(0, keepdims=True)
        d = np.where(resets[:, t, None], 0, decay * dx[:, t])
    return (d_decay, dx, d, d_fresh), (outputs, h)


@pytest.mark.parametrize("chance", [0, 0.3, 1], ids=["no reset", "some", "every step"])
def test_values_and_all_gradients_are_numpys(chance):
    resets, x, carried, fresh = draws(0, chance)
    weights = draws(1, 0)[1:3]
    decay = np.array([0.5, -0.8])
    found = gradients(decay, x, resets, carried, fresh, weights)
    expected = oracle(decay, x, resets, carried, fresh, weights)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


# Layers with resets=, and the axis of rows in their states.
LAYERS: dict[str, Any] = {
    "min_gru": (jaxpack.MinGRU(F, 3), 0),
    "lstm": (jaxpack.LSTM(F, 3, num_layers=2), 1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_gives_what_it_gives_in_fragments_through_rollouts(name):
    layer, batch_axis = LAYERS[name]
    params = layer.init(jax.random.key(0), jnp.float64)
    zeros = layer.apply(params, np.zeros((N, 1, F)))[1]
    carried = kept = fresh = jax.tree.map(lambda leaf: jnp.zeros_like(leaf) + 0.5, zeros)
    run = jax.jit(
        lambda x, resets, state: run_rollout(
            layer.apply, params, x, resets, state, fresh, axis=0, batch_axis=batch_axis
        )
    )
    for seed in range(3):
        resets, x, *_ = draws(seed, 0.3)
        output, carried = run(np.swapaxes(x, 0, 1), resets.T, carried)
        fragments = cut_rollout(resets, axis=1, plan=jaxpack.plan_padded(N * T, T))
        state = fragments.initial_state(kept, fresh, batch_axis=batch_axis)
        pieces, final = layer.apply(params, fragments.pack(x), state)
        kept = fragments.final_state(final, batch_axis=batch_axis)
        np.testing.assert_allclose(np.swapaxes(output, 0, 1), fragments.restore(pieces), atol=1e-12)
        for ours, theirs in zip(jax.tree.leaves(carried), jax.tree.leaves(kept), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-12)


def call(x=None, resets=None, carried=None, fresh=None, apply=jaxpack.linear_scan, axis=1):
    x = np.ones((N, T, F)) if x is None else x
    resets = np.zeros((N, T), bool) if resets is None else resets
    carried = np.ones((N, F)) if carried is None else carried
    return run_rollout(apply, 0.5, x, resets, carried, fresh, axis=axis, batch_axis=0)


WRONG: dict[str, Any] = {
    "ints": ({"resets": np.zeros((N, T), int)}, TypeError, "resets must be bool, got dtype int64"),
    "time first": (
        {"resets": np.zeros((T, N), bool)},
        ValueError,
        "resets must be [N, T] = [3, 6], as the inputs",
    ),
    "an axis of features": ({"axis": 2}, ValueError, "axis must be 0 for a rollout [T, N], or 1 for [N, T], got 2"),
    "another batch": ({"carried": np.ones((N + 1, F))}, ValueError, "carried must have 3 rows at axis 0"),
    "fresh rows": ({"fresh": np.ones((2, F))}, ValueError, "fresh must have 3 or 1 rows at axis 0"),
    "structure": ({"fresh": (np.ones((1, F)),)}, ValueError, "fresh must have the structure of carried"),
    "packed": ({"x": jaxpack.pack_sequence([[1.0]])}, TypeError, "run_rollout takes the arrays of a rollout"),
    "both directions": (
        {"apply": jaxpack.GRU(F, 3, bidirectional=True).apply},
        ValueError,
        "run a bidirectional layer over whole sequences",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case):
    options, error, message = WRONG[case]
    with pytest.raises(error, match=re.escape(message)):
        call(**options)


def test_a_rollout_of_no_steps_keeps_its_state():
    outputs, final = call(np.ones((N, 0, F)), np.zeros((N, 0), bool))
    assert outputs.shape == (N, 0, F)
    np.testing.assert_array_equal(final, np.ones((N, F)))
