"""run_chunks: equal to the whole, truncated as NumPy truncates, and little memory."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import jaxpack
from jaxpack.rollouts import run_chunks

B, T, F = 3, 10, 2


@pytest.fixture(autouse=True)
def _x64(x64):
    """Runs in float64."""


@functools.cache
def program(steps, truncate, ragged=True):
    """A linear recurrence in chunks: outputs, final states, and gradients of a loss of both."""

    def loss(decay, x, state, lengths, weights):
        options: dict[str, Any] = {"lengths": lengths} if ragged else {}
        outputs, final = run_chunks(jaxpack.linear_scan, decay, x, state, steps=steps, truncate=truncate, **options)
        return jnp.sum(outputs * weights[0]) + jnp.sum(final * weights[1]), (outputs, final)

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))


def oracle(decay, x, state, lengths, weights, steps):
    """The same in NumPy, one sequence at a time; with steps, no gradient passes from a chunk to the one before."""
    outputs, final = np.zeros_like(x), np.array(state)
    d_decay, dx, d_state = np.zeros_like(decay), np.zeros_like(x), np.array(weights[1])
    for row, length in enumerate(lengths):
        before = []
        for t in range(length):
            before.append(final[row].copy())
            final[row] = outputs[row, t] = decay * final[row] + x[row, t]
        d = d_state[row]
        for t in reversed(range(T)):
            if t < length:
                d = d + weights[0][row, t]
                dx[row, t] = d
                d_decay += d * before[t]
                d = decay * d
            if steps and t and t % steps == 0:
                d = np.zeros_like(d)
        d_state[row] = d
    return (d_decay, dx, d_state), (outputs, final)


@pytest.mark.parametrize("truncate", [False, True], ids=["whole", "truncated"])
@pytest.mark.parametrize("steps", [1, 4, 5, 20])
def test_values_are_the_wholes_and_gradients_stop_at_borders_if_truncated(steps, truncate):
    rng = np.random.default_rng(0)
    x, state = rng.standard_normal((B, T, F)), rng.standard_normal((B, F))
    weights = rng.standard_normal((B, T, F)), rng.standard_normal((B, F))
    decay, lengths = np.array([0.5, -0.8]), np.array([10, 0, 6])
    found = program(steps, truncate)(decay, x, state, lengths, weights)
    expected = oracle(decay, x, state, lengths, weights, steps if truncate else None)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("misfit", [11, -1])
def test_a_sequence_that_does_not_fit_is_an_error_or_nan(misfit):
    x, state, weights = np.ones((B, T, F)), np.ones((B, F)), (np.ones((B, T, F)), np.ones((B, F)))
    lengths = np.array([10, misfit, 6])
    _, (outputs, final) = program(4, False)(np.ones(F), x, state, lengths, weights)
    assert np.isnan(final).all(1).tolist() == np.isnan(outputs).any((1, 2)).tolist() == [False, True, False]
    with pytest.raises(ValueError, match=rf"lengths\[1\] = {misfit} is"):
        run_chunks(jaxpack.linear_scan, np.ones(F), x, state, steps=4, lengths=lengths)


def test_an_lstm_in_chunks_that_are_recomputed_is_the_lstm():
    layer = jaxpack.LSTM(F, 3)
    params, x = oracles.random_params(layer), np.random.default_rng(0).standard_normal((B, T, F))
    apply = jax.checkpoint(layer.apply)

    def loss(run):
        return lambda params, x: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(run(params, x)))

    found, expected = (
        jax.jit(jax.value_and_grad(loss(run), (0, 1)))(params, x)
        for run in (functools.partial(run_chunks, apply, steps=4), layer.apply)
    )
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-10)


def test_a_tree_of_inputs_and_a_loss_for_each_step():
    layer = jaxpack.GRU(F, 3)
    params = oracles.random_params(layer)
    x, targets = np.random.default_rng(0).standard_normal((2, B, T, F))

    def losses(params, inputs, state):
        output, state = layer.apply(params, inputs[0], state)
        return {"loss": jnp.sum((output[..., :F] - inputs[1]) ** 2, -1)}, state

    found, _ = run_chunks(losses, params, (x, targets), steps=5)
    np.testing.assert_allclose(found["loss"], losses(params, (x, targets), None)[0]["loss"], atol=1e-12)


@pytest.mark.optimized(code=False)
def test_recomputed_chunks_need_a_fraction_of_the_memory():
    layer = jaxpack.RNN(4, 32)
    params, x = layer.init(jax.random.key(0), jnp.float32), jnp.ones((4, 1024, 4), jnp.float32)

    def losses(params, x, state):
        output, state = layer.apply(params, x, state, plan=jaxpack.plan_padded(4, x.shape[1]))
        return jnp.mean(output**2, -1), state

    def temporaries(run):
        compiled: Any = jax.jit(jax.grad(lambda params: run(params, x)[0].sum())).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = temporaries(lambda params, x: losses(params, x, None))
    chunked = temporaries(functools.partial(run_chunks, jax.checkpoint(losses), steps=64))
    assert whole > 4 * 1024 * 32 * 4  # at least the outputs
    assert chunked < whole / 4


BOTH = jaxpack.GRU(F, 3, bidirectional=True)
WRONG: dict[str, Any] = {
    "steps": (lambda: run_chunks(jaxpack.linear_scan, 0.5, np.ones((B, T)), steps=0), ValueError, "steps must be at"),
    "packed": (
        lambda: run_chunks(jaxpack.linear_scan, 0.5, jaxpack.pack_sequence([[1.0]]), steps=2),
        TypeError,
        "run_chunks takes padded inputs",
    ),
    "both directions": (
        lambda: run_chunks(BOTH.apply, {}, np.ones((B, T, F)), steps=2),
        ValueError,
        "run a bidirectional layer over whole sequences",
    ),
    "both directions, wrapped": (
        lambda: run_chunks(jax.checkpoint(functools.partial(BOTH.apply, dtype=float)), {}, np.ones((B, T, F)), steps=2),
        ValueError,
        "run a bidirectional layer over whole sequences",
    ),
    "no steps": (
        lambda: run_chunks(lambda p, x, s: (x.sum(), s), 0.5, np.ones((B, T)), np.zeros(B), steps=2),
        ValueError,
        "the outputs of a chunk of 2 steps must be [B, 2, ...], got shape []",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case):
    call, error, message = WRONG[case]
    with pytest.raises(error, match=re.escape(message)):
        call()
