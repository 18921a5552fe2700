"""linear_attention, gated_delta_rule and the rule of mLSTM: the plain recurrence of each sequence alone, and memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpack
from jaxpack._matrix.chunks import chunk_size, scan_chunks
from jaxpack._matrix.rules import delta_rule, linear_attention, mlstm
from jaxpack._packed.resets import Entering

G, P, K, V = 2, 2, 3, 4
LENGTHS = (9, 1, 5, 0, 6)
PLANS = {
    "stairs": jaxpack.plan_buckets(LENGTHS, 3),
    "rows": jaxpack.plan_rows(LENGTHS, 2),
}
KINDS = ("linear", "linear by key", "delta", "mlstm")
RULES: dict[str, Any] = {
    "linear": linear_attention,
    "linear by key": linear_attention,
    "delta": delta_rule,
    "mlstm": mlstm,
}


def operands(kind, gates, seed=0):
    """The arrays of each sequence, with pre-activations of gates of this magnitude, and initial states."""
    rng = np.random.default_rng(seed)
    shapes = {"query": (G, K), "key": (G, K), "value": (G, P, V), "log_decay": (G, P, K if "by key" in kind else 1)}
    shapes |= {"beta": (G, P)} if kind == "delta" else {}
    shapes |= {"log_input": (G, P, 1)} if kind == "mlstm" else {}
    sequences = []
    for length in LENGTHS:
        arrays = {name: rng.standard_normal((length, *shape)) for name, shape in shapes.items()}
        far = {name: np.sign(array) + array / 100 for name, array in arrays.items()}  # no two gates are equal
        arrays["log_decay"] = -np.logaddexp(0, gates * far["log_decay"])
        if kind == "delta":
            arrays["beta"] = 1 / (1 + np.exp(-gates * arrays["beta"]))
            arrays["key"] /= np.linalg.norm(arrays["key"], axis=-1, keepdims=True)
        if kind == "mlstm":
            arrays["log_input"] = gates * far["log_input"]
        sequences.append(arrays)
    state = rng.standard_normal((len(LENGTHS), G, P, K, V + (kind == "mlstm")))
    return sequences, (state, np.abs(state[..., 0, 0])) if kind == "mlstm" else state


@functools.partial(jax.jit, static_argnums=0)
def plain(kind, arrays, initial, starts):
    """The recurrence of one sequence, step by step, in jax.numpy: outputs [L, G, P, V] and the final state."""

    def step(state, at):
        arrays, begins = at
        state = jax.tree.map(lambda first, before: jnp.where(begins, first, before), initial, state)
        q, k, v = arrays["query"][:, None], arrays["key"][:, None], arrays["value"]
        decay = jnp.exp(arrays["log_decay"])[..., None]
        if kind == "mlstm":
            memory, m = state
            log_f, log_i = arrays["log_decay"][..., 0], arrays["log_input"][..., 0]
            new_m = jnp.maximum(jnp.maximum(log_f + m, log_i), 0)
            v = jnp.concatenate([v, jnp.ones((G, P, 1))], -1)
            f, i = (jnp.exp(each - new_m)[..., None, None] for each in (log_f + m, log_i))
            memory = f * memory + i * k[..., None] * v[..., None, :]
            read = jnp.einsum("gpkv,gqk->gpv", memory, q)
            return (memory, new_m), read[..., :-1] / jnp.maximum(jnp.abs(read[..., -1:]), jnp.exp(-new_m)[..., None])
        state = decay * state
        if kind == "delta":
            v = arrays["beta"][..., None] * (v - jnp.einsum("gpkv,gqk->gpv", state, k))
        state = state + k[..., None] * v[..., None, :]
        return state, jnp.einsum("gpkv,gqk->gpv", state, q)

    final, outputs = jax.lax.scan(step, initial, (arrays, starts))
    return outputs, final


def total(ys, final, weights):
    """A number that every output and every leaf of the final state changes."""
    return (ys * weights).sum() + sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(final))


@functools.partial(jax.jit, static_argnums=(0, 1))
def in_chunks(kind, size, packed, initial):
    """The total of a batch that runs in chunks, and its gradients by data and initial states."""

    def loss(data, initial):
        arrays = {name: data[name] for name in packed.data if name not in ("starts", "weights")}
        y, final = scan_chunks(RULES[kind], packed, arrays, Entering(initial), data["starts"], size)
        return total(jnp.where(packed.mask[:, None, None, None], y, 0), final, data["weights"])

    return jax.value_and_grad(loss, (0, 1), allow_int=True)(packed.data, initial)


@functools.partial(jax.jit, static_argnums=0)
def alone(kind, sequences, initial, starts, weights):
    """The same of each sequence by itself, step by step."""

    def loss(sequences, initial):
        losses = []
        for row, arrays in enumerate(sequences):
            state = jax.tree.map(lambda leaf, row=row: leaf[row], initial)
            ys, final = plain(kind, arrays, state, starts[row])
            losses.append(total(ys, final, weights[row]))
        return sum(losses)

    return jax.value_and_grad(loss, (0, 1))(sequences, initial)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("gates", [1.0, 50.0])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_the_plain_recurrence_values_and_gradients_resets_included(kind, gates):
    sequences, initial = operands(kind, gates)
    rng = np.random.default_rng(1)
    starts = [rng.random(length) < 0.25 for length in LENGTHS]
    weights = [rng.standard_normal((length, G, P, V)) for length in LENGTHS]
    value, (dsequences, dinitial) = alone(kind, sequences, initial, starts, weights)
    for plan, size in (("stairs", 4), ("rows", 8)):
        everything = [
            arrays | {"starts": s, "weights": w} for arrays, s, w in zip(sequences, starts, weights, strict=True)
        ]
        packed = jaxpack.pack_sequence(everything, plan=PLANS[plan])
        found, (ddata, dstate) = in_chunks(kind, size, packed, initial)
        np.testing.assert_allclose(found, value, rtol=1e-10)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), dstate, dinitial)
        expected = jaxpack.pack_sequence(dsequences, plan=PLANS[plan])
        for name, leaf in expected.data.items():
            np.testing.assert_allclose(ddata[name], leaf, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_and_single_precision_stay_near_the_double_with_gates_at_50(kind, dtype):
    sequences, initial = operands(kind, 50.0, seed=2)
    packed = jaxpack.pack_sequence(sequences, plan=PLANS["rows"])
    narrow = packed.astype(dtype)
    gates = {name: packed.data[name] for name in packed.data if name.startswith("log")}
    arrays = narrow.data | {name: jnp.asarray(gate, jnp.float32) for name, gate in gates.items()}
    state = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), initial)
    run = jax.jit(lambda arrays: scan_chunks(RULES[kind], packed, arrays, Entering(state), None, 16))
    y, final = run(arrays)
    assert y.dtype == dtype
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), arrays)
        batch = jaxpack.unpack_sequence(packed.replace(data=wide))
        expected = [
            plain(kind, each, jax.tree.map(lambda leaf, row=row: leaf[row], initial), np.zeros(LENGTHS[row], bool))
            for row, each in enumerate(batch)
        ]
    tolerance = 2e-5 if dtype == jnp.float32 else 2e-2
    for ours, (theirs, _) in zip(jaxpack.unpack_sequence(packed.replace(data=y)), expected, strict=True):
        np.testing.assert_allclose(np.asarray(ours, float), theirs, rtol=tolerance, atol=tolerance)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(final))


@pytest.mark.optimized(code=False)
@pytest.mark.parametrize("kind", ["linear", "delta"])
def test_memory_of_the_backward_pass_does_not_grow_with_a_matrix_a_step(kind):
    """Temporaries of four times the steps: what a step adds is far less than a state of heads * K * V numbers."""
    heads, size = 2, 32

    def temporaries(steps):
        array = jax.ShapeDtypeStruct((2, steps, heads, size), jnp.float32)
        gate = jax.ShapeDtypeStruct((2, steps, heads), jnp.float32)

        def loss(q, k, v, gate, beta):
            if kind == "linear":
                return jaxpack.linear_attention(q, k, v, gate)[0].sum()
            return jaxpack.gated_delta_rule(q, k, v, beta, gate)[0].sum()

        compiled: Any = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(array, array, array, gate, gate).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    a_step = (temporaries(1024) - temporaries(256)) / (2 * 768)
    assert a_step < heads * size * size * 4 / 2


def test_a_chunk_is_shorter_where_sequences_are_short():
    assert [chunk_size(jaxpack.plan_padded(8, length), 64, 64) for length in (1, 5, 1000)] == [1, 8, 32]
    assert chunk_size(jaxpack.plan_padded(8, 1000), 64, 64, per_key=True) < 32


ONES = jaxpack.pack_sequence([np.ones((3, 2, 4)), np.ones((1, 2, 4))])
COMPLEX = ONES.map(lambda x: x.astype(jnp.complex64))


def of(*shape):
    return ONES.map(lambda x: jnp.ones((len(x), *shape)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: jaxpack.linear_attention(ONES, ONES, of(3, 4)),
            ValueError,
            "2 heads of query and key do not divide the 3",
        ),
        (lambda: jaxpack.linear_attention(ONES, of(2, 3), ONES), ValueError, r"query as key, got query \[2, 4\]"),
        (lambda: jaxpack.linear_attention(ONES, ONES, ONES, of(3)), ValueError, r"log_decay must be \[2\] or \[2, 4\]"),
        (lambda: jaxpack.gated_delta_rule(ONES, ONES, ONES, of(2), of(2, 4)), ValueError, r"must be \[2\] at each"),
        (lambda: jaxpack.gated_delta_rule(ONES, ONES, ONES, of(2, 1)), ValueError, r"beta must be \[2\]"),
        (
            lambda: jaxpack.linear_attention(ONES, ONES, ONES, None, np.ones((2, 2, 4))),
            ValueError,
            r"initial_state must be \[B, H, K, V\] = \[2, 2, 4, 4\]",
        ),
        (lambda: jaxpack.linear_attention(ONES.data, ONES, ONES), TypeError, "must be packed too"),
        (lambda: jaxpack.linear_attention(COMPLEX, ONES, ONES), TypeError, "query must be real, got dtype complex64"),
        (lambda: jaxpack.gated_delta_rule(ONES, ONES, COMPLEX, of(2)), TypeError, "value must be real"),
        (
            lambda: jaxpack.linear_attention(ONES, ONES, ONES, None, np.ones((2, 2, 4, 4), complex)),
            TypeError,
            "initial_state must be real",
        ),
    ],
)
def test_errors_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()
