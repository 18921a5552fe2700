"""burn_in: values of the whole, and the gradient of the steps after the first ones, by NumPy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from strategies import FIXED_PLANS

import jaxpack
from jaxpack.rollouts import burn_in

B, T, F, K = 5, 7, 2, 2
LENGTHS = {"stairs": [3, 7, 0, 1, 2], "rows": [5, 7, 4, 2, 0], "padded": [3, 7, 0, 1, 2], "no plan": [3, 7, 2, 1, 0]}


@pytest.fixture(autouse=True)
def _x64(x64):
    """Runs in float64."""


@functools.cache
def program(form, steps):
    """The burn-in of a linear recurrence: outputs [B, T, F], final states, and gradients of a loss of both."""

    def loss(decay, x, state, lengths, weights):
        if form == "no plan":
            outputs, final = burn_in(jaxpack.linear_scan, decay, x, state, steps=steps, lengths=lengths)
        else:
            packed = jaxpack.pack_padded_sequence(x, lengths, True, plan=FIXED_PLANS[form])
            outputs, final = burn_in(jaxpack.linear_scan, decay, packed, state, steps=steps)
            outputs, _ = jaxpack.pad_packed_sequence(outputs, True, total_length=T)
        return jnp.sum(outputs * weights[0]) + jnp.sum(final * weights[1]), (outputs, final)

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))


def oracle(decay, x, state, lengths, weights, steps):
    """The same in NumPy, one sequence at a time."""
    outputs, final = np.zeros_like(x), np.array(state)
    d_decay, dx = np.zeros_like(decay), np.zeros_like(x)
    for row, length in enumerate(lengths):
        before = []
        for t in range(length):
            before.append(final[row].copy())
            final[row] = outputs[row, t] = decay * final[row] + x[row, t]
        d = weights[1][row]
        for t in reversed(range(steps, length)):
            d = d + weights[0][row, t]
            dx[row, t] = d
            d_decay += d * before[t]
            d = decay * d
    return (d_decay, dx, np.zeros_like(state)), (outputs, final)


@pytest.mark.parametrize("steps", [K, T])
@pytest.mark.parametrize("form", LENGTHS)
def test_values_are_the_wholes_and_the_burn_in_has_no_gradient(form, steps):
    rng = np.random.default_rng(0)
    x, state = rng.standard_normal((B, T, F)), rng.standard_normal((B, F))
    weights = rng.standard_normal((B, T, F)), rng.standard_normal((B, F))
    decay, lengths = np.array([0.5, -0.8]), np.array(LENGTHS[form])
    found = program(form, steps)(decay, x, state, jnp.asarray(lengths), weights)
    expected = oracle(decay, x, state, lengths, weights, steps)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize(("form", "lengths"), [("stairs", [6, 6, 1, 1, 2]), ("no plan", [6, 8, 1, 1, 2])])
def test_a_sequence_that_does_not_fit_is_nan_and_the_others_are_not(form, lengths):
    """Under "stairs" the second longest has room for 3 steps, without a plan for 7."""
    rng = np.random.default_rng(0)
    x, state = rng.standard_normal((B, T, F)), rng.standard_normal((B, F))
    weights = np.ones((B, T, F)), np.ones((B, F))
    _, (outputs, final) = program(form, K)(np.array([0.5, 0.5]), x, state, jnp.array(lengths), weights)
    assert np.isnan(final).all(1).tolist() == [False, True, False, False, False]
    assert np.isnan(outputs).any((1, 2)).tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("packed", [False, True])
def test_an_lstm_burns_in_from_a_stored_state(packed):
    layer = jaxpack.LSTM(F, 3, num_layers=2)
    params, x = oracles.random_params(layer), np.random.default_rng(0).standard_normal((B, T, F))
    stored = tuple(np.random.default_rng(1).standard_normal((2, 2, B, 3)))
    inputs: Any = jaxpack.pack_sequence(list(x)) if packed else x
    run = jax.jit(functools.partial(burn_in, layer.apply, steps=3))
    expected = layer.apply(params, inputs, stored)
    for ours, theirs in zip(jax.tree.leaves(run(params, inputs, stored)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_nothing_is_saved_for_the_burn_in():
    """The backward pass of a long burn-in and a few steps is that of the few steps: its loops are no more."""
    layer = jaxpack.GRU(F, 3)
    params = layer.init(jax.random.key(0))

    def loops(apply):
        text = jax.jit(jax.grad(lambda p: apply(p)[0][:, -2:].sum())).lower(params).as_text()
        return text.count("stablehlo.while")

    whole = loops(lambda p: layer.apply(p, jnp.ones((B, T, F))))
    forward = jax.jit(lambda p: layer.apply(p, jnp.ones((B, K, F)))).lower(params).as_text().count("stablehlo.while")
    assert loops(lambda p: burn_in(layer.apply, p, jnp.ones((B, T, F)), steps=K)) == whole + forward


def test_what_is_wrong_is_named():
    packed = jaxpack.pack_sequence([jnp.ones((2, F))])
    with pytest.raises(ValueError, match="steps must be at least 1"):
        burn_in(jaxpack.linear_scan, 0.5, packed, steps=0)
    with pytest.raises(TypeError, match="do not give lengths="):
        burn_in(jaxpack.linear_scan, 0.5, packed, steps=1, lengths=[2])
    with pytest.raises(ValueError, match=r"lengths\[0\] = 4 is longer than the padded batch, which has 3 steps"):
        burn_in(jaxpack.linear_scan, 0.5, np.ones((1, 3)), steps=1, lengths=[4])
    with pytest.raises(ValueError, match="run a bidirectional layer over whole sequences"):
        burn_in(jaxpack.GRU(F, 3, bidirectional=True).apply, {}, packed, steps=1)
    with pytest.raises(ValueError, match=r"inputs must have a batch and a time axis"):
        burn_in(jaxpack.linear_scan, 0.5, np.ones(3), steps=1)
