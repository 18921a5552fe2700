"""linear_scan against NumPy, one sequence at a time, and both of its forms against each other."""

import functools
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from strategies import FIXED_PLANS

import jaxpack
from jaxpack._linear.solve import Block, Form, solve

B, T, F = 5, 7, (2, 3)
LENGTHS = np.array([3, 7, 0, 1, 3])
DECAYS = {"per step": (B, T, *F), "of some axes": (B, T, 2, 1), "shared": (3,), "a number": ()}
KINDS = {"real": np.float64, "complex": np.complex128}


@pytest.fixture(autouse=True)
def _x64(x64):
    """Runs in float64."""


def numbers(shape, kind=np.float64, seed=0, scale=1.0):
    """Normal numbers."""
    rng = np.random.default_rng(seed)
    array = rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if kind is np.complex128 else 0)
    return scale * array


def oracle(lengths, decay, inputs, initial, resets, reverse):
    """States [B, T, *F] and final states [B, *F], by the definition."""
    per_step = np.broadcast_to(decay, inputs.shape)
    states, final = np.zeros_like(inputs + per_step), np.array(initial)
    for row, length in enumerate(lengths):
        steps = list(range(length))
        for t in reversed(steps) if reverse else steps:
            begins = t + 1 < length and resets[row, t + 1] if reverse else resets[row, t]
            before = initial[row] if begins else final[row]
            final[row] = states[row, t] = per_step[row, t] * before + inputs[row, t]
    return states, final


@functools.cache
def program(plan, packed, reverse, with_resets):
    """linear_scan as one program from padded arrays to padded arrays."""

    @jax.jit
    def run(decay, inputs, initial, resets, lengths):
        options = {"reverse": reverse}
        if not packed:
            resets = resets if with_resets else None
            return jaxpack.linear_scan(
                decay, inputs, initial, lengths=lengths, plan=FIXED_PLANS[plan], resets=resets, **options
            )

        def pack(array):
            return jaxpack.pack_padded_sequence(array, lengths, batch_first=True, plan=FIXED_PLANS[plan])

        decay = pack(decay) if decay.shape[:2] == (B, T) else decay
        states, final = jaxpack.linear_scan(
            decay, pack(inputs), initial, resets=pack(resets) if with_resets else None, **options
        )
        return jaxpack.pad_packed_sequence(states, batch_first=True, total_length=T)[0], final

    return run


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("plan", FIXED_PLANS)
def test_states_are_the_definitions(plan, reverse):
    lengths = {"stairs": [3, 6, 0, 1, 2], "padded": LENGTHS, "rows": [1, 5, 0, 4, 2]}[plan]
    resets = numbers((B, T), seed=5) > 0.5
    for kind, dtype in KINDS.items():
        for name, shape in DECAYS.items():
            with_resets, packed = name != "shared", kind == "real"
            decay, inputs = numbers(shape, dtype, 1, 0.7), numbers((B, T, *F), dtype, 2)
            initial = numbers((B, *F), dtype, 3)
            found = program(plan, packed, reverse, with_resets)(decay, inputs, initial, resets, np.array(lengths))
            expected = oracle(lengths, decay, inputs, initial, resets & with_resets, reverse)
            for ours, theirs in zip(found, expected, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def scanned(decay, inputs, initial):
    """The forward recurrence by lax.scan, which JAX differentiates by itself; a sequence that has ended stays."""

    def step(h, cells):
        decay, inputs, is_real = cells
        h = jnp.where(is_real, decay * h + inputs, h)
        return h, jnp.where(is_real, h, 0)

    is_real = np.arange(T)[:, None] < LENGTHS
    decays, steps = (jnp.moveaxis(array, 1, 0) for array in (jnp.broadcast_to(decay, inputs.shape), inputs))
    final, states = jax.lax.scan(step, initial, (decays, steps, is_real[..., None, None]))
    return jnp.moveaxis(states, 0, 1), final


def weighed(run, weights):
    """A real number from the results of `run`, and the function of its arguments that gives it."""

    def loss(*arguments):
        states, final = run(*arguments)
        return jnp.sum((states * weights[0]).real) + jnp.sum((final * weights[1]).real)

    return loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decay", ["per step", "of some axes", "shared"])
def test_gradients_are_those_of_a_plain_scan(decay, kind):
    dtype = KINDS[kind]
    arguments = numbers(DECAYS[decay], dtype, 1, 0.7), numbers((B, T, *F), dtype, 2), numbers((B, *F), dtype, 3)
    weights = numbers((B, T, *F), dtype, 4), numbers((B, *F), dtype, 5)
    plan = jaxpack.BucketPlan((10,), (2,), ((0, 7), (0, 3, 6)))

    def ours(decay, inputs, initial):
        return jaxpack.linear_scan(decay, inputs, initial, lengths=jnp.asarray(LENGTHS), plan=plan)

    def gradients(run):
        return jax.jit(jax.grad(weighed(run, weights), (0, 1, 2)))(*arguments)

    for found, expected in zip(gradients(ours), gradients(scanned), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shared", [False, True])
def test_slack_is_inert_in_values_and_gradients(shared):
    plan = jaxpack.BucketPlan((10,), (2,), ((0, 7), (0, 3, 6)))
    batch = jaxpack.pack_padded_sequence(np.ones((B, T)), LENGTHS, batch_first=True, plan=plan)
    real = np.asarray(batch.mask)[:, None]
    cells = [numbers((plan.size, 3), seed=seed, scale=0.7) for seed in range(3)]
    shared_decay, initial = numbers(3, seed=3), numbers((B, 3), seed=4)

    @jax.jit
    def run(value):
        decay, inputs, weights = (jnp.where(real, each, value) for each in cells)

        def scan(decay, inputs, initial):
            decay = decay if shared else batch.replace(data=decay)
            states, final = jaxpack.linear_scan(decay, batch.replace(data=inputs), initial)
            return states.data, final

        results, vjp = jax.vjp(scan, shared_decay if shared else decay, inputs, initial)
        return results, vjp((weights, jnp.ones_like(initial)))

    clean = run(0.0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(clean))
    for value in (np.nan, np.inf):
        jax.tree.map(np.testing.assert_array_equal, run(value), clean)


FORMS = {
    "rows": Form((Block(0, 6, 3),)),
    "stairs": Form((Block(0, 2, 4), Block(8, 3, 2))),
    "stairs, reversed": Form((Block(0, 2, 4), Block(8, 3, 2)), reverse=True),
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_parallel_form_equals_the_sequential_one(form, shared):
    blocks = FORMS[form].blocks
    size = sum(block.steps * block.rows for block in blocks)
    fresh = jnp.asarray(numbers(size, seed=5) > 0.8)
    decay = numbers((1 if shared else size, 3), seed=1)
    decay = decay if shared else jnp.where(fresh[:, None], 0, decay)
    rows = blocks[-1 if FORMS[form].reverse else 0].rows
    arguments = decay, numbers((size, 3), seed=2), numbers((rows, 3), seed=3)
    tangents = tuple(map(np.cos, arguments))

    def both(parallel):
        static = FORMS[form]._replace(parallel=parallel)

        def run(decay, inputs, carry):
            return solve(static, decay, inputs, fresh, carry)

        h, vjp = jax.vjp(run, *arguments)
        return h, jax.jvp(run, arguments, tangents)[1], vjp(jnp.cos(h))

    sequential, parallel = (jax.jit(both, static_argnums=0)(which) for which in (False, True))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), parallel, sequential)


@pytest.mark.parametrize("parallel", [False, True])
def test_nan_of_one_sequence_reaches_no_other(parallel):
    form = Form((Block(0, 6, 1),), parallel=parallel)
    fresh = jnp.array([True, False, True, False, True, True])  # sequences of 2 and 2 steps, and slack
    decay = jnp.where(fresh, 0, jnp.array([1, 1, 1, jnp.nan, 1, 1]))
    inputs = jnp.array([1, 2, jnp.nan, 3, 4, 0.0])

    @jax.jit
    def run(decay, inputs):
        h, vjp = jax.vjp(lambda a, b: solve(form, a, b, fresh, jnp.zeros(1)), decay, inputs)
        return h, *vjp(jnp.ones(6))

    h, *gradients = run(decay, inputs)
    for leaf in (h, *gradients):
        assert np.isfinite(np.asarray(leaf)[[0, 1, 4, 5]]).all()
    assert np.isnan(h[2:4]).all()


@pytest.mark.optimized(code=False)
def test_the_backward_pass_saves_decays_and_states_alone():
    plan = jaxpack.plan_padded(4, 256)
    packed = jaxpack.pack_padded_sequence(np.ones((4, 256, 64), np.float32), [256] * 4, True, plan=plan)
    array = packed.data.nbytes

    def loss(decay, inputs, weights):
        states, _ = jaxpack.linear_scan(packed.replace(data=decay), packed.replace(data=inputs))
        return jnp.sum(states.data * weights)

    compiled: Any = jax.jit(jax.grad(loss, (0, 1))).lower(packed.data, packed.data, packed.data).compile()
    # Decays that are zero where sequences begin, states, and as much again while the backward pass runs.
    assert compiled.memory_analysis().temp_size_in_bytes < 4.5 * array


def test_half_precision_keeps_the_state_in_float32():
    inputs = jnp.full((1, 4096, 1), 2.0**-8, jnp.bfloat16)
    states, final = jax.jit(lambda x: jaxpack.linear_scan(jnp.ones((), jnp.bfloat16), x))(inputs)
    assert states.dtype == final.dtype == jnp.bfloat16
    assert float(final[0, 0]) == 16  # in bfloat16 alone it would stay at 1


def test_one_program_for_all_lengths_exports_for_every_platform():
    resets = np.zeros((B, T), bool)

    def run(decay, inputs, lengths):
        return jaxpack.linear_scan(decay, inputs, lengths=lengths, plan=FIXED_PLANS["rows"], resets=resets)

    arguments = numbers((B, T, 2)), numbers((B, T, 2), seed=1), np.array([1, 5, 0, 4, 2], np.int32)
    exported = jax.export.export(jax.jit(run), platforms=oracles.PLATFORMS)(*arguments)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12), exported.call(*arguments), jax.jit(run)(*arguments)
    )


def test_a_misfit_is_nan_in_states_and_gradients_of_decays():
    def loss(decay, lengths):
        states, final = jaxpack.linear_scan(decay, jnp.ones((2, 4, 3)), lengths=lengths, plan=plan)
        return jnp.sum(final[0]), (states, final)

    plan = jaxpack.BucketPlan((2, 4), (2, 1))
    run = jax.jit(jax.grad(loss, has_aux=True))
    _, (states, final) = run(jnp.full(3, 0.5), jnp.array([4, 3]))
    assert np.isfinite(states[0]).all()
    assert np.isnan(states[1]).any()
    assert np.isnan(final).any(axis=1).tolist() == [False, True]


def test_a_batch_of_no_sequences_has_no_states():
    states, final = jaxpack.linear_scan(0.5, jnp.zeros((0, 4, 3)))
    assert (states.shape, final.shape) == ((0, 4, 3), (0, 3))


PACKED = jaxpack.pack_sequence([np.ones((3, 2)), np.ones((1, 2))])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jaxpack.linear_scan(np.ones(3), PACKED), ValueError, r"decay must .* features of one step, \[2\]"),
        (lambda: jaxpack.linear_scan(np.ones((2, 3, 4)), np.ones((2, 3, 2))), ValueError, "decay must"),
        (lambda: jaxpack.linear_scan(PACKED, np.ones((2, 3, 2))), TypeError, "decay is packed, but the inputs are not"),
        (lambda: jaxpack.linear_scan(0.5, PACKED, resets=np.ones(4, bool)), TypeError, "resets must be packed too"),
        (lambda: jaxpack.linear_scan(0.5, PACKED, resets=PACKED), TypeError, "resets must be one bool a step"),
        (lambda: jaxpack.linear_scan(0.5, PACKED, np.ones((2, 3))), ValueError, r"initial_state must be .* = \[2, 2\]"),
        (lambda: jaxpack.linear_scan(0.5, PACKED, lengths=[3, 1]), TypeError, "do not give lengths="),
        (lambda: jaxpack.linear_scan(0.5, np.ones(3)), ValueError, "inputs must be one array"),
        (lambda: jaxpack.linear_scan(0.5, np.ones((2, 3)), resets=np.ones((3, 2), bool)), ValueError, "resets must"),
        (
            lambda: jaxpack.linear_scan(jaxpack.pack_sequence([np.ones((4, 2))] * 2), PACKED),
            ValueError,
            "decay has the plan",
        ),
    ],
)
def test_errors_say_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call()
