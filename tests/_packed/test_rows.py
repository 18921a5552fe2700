"""to_rows and from_rows, attention and rotary: NumPy on each sequence alone, under every plan; errors."""

import functools
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strategies
from strategies import FIXED_PLANS

import jaxpack
from jaxpack import BucketPlan
from jaxpack._packed.rows import ranks_in_row, rows_plan

PLANS = FIXED_PLANS | {"stairs of rows": BucketPlan((4, 9), (3, 1), ((0, 7), (0, 2), (0,)))}
LENGTHS = [(7, 1, 3, 0, 1), (1, 0, 2, 2, 4)]
HEADS, KV, SIZE = 4, 2, 6

each_plan = pytest.mark.parametrize("plan", PLANS)


def sequences_of(lengths, *features, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((length, *features)) for length in lengths]


@each_plan
def test_rows_hold_each_sequence_once_with_its_own_id_and_positions(plan):
    run = jax.jit(jaxpack.to_rows)
    for lengths in LENGTHS:
        sequences = [np.arange(length) + 10.0 * (row + 1) for row, length in enumerate(lengths)]
        rows = jax.device_get(run(jaxpack.pack_sequence(sequences, plan=PLANS[plan])))
        assert rows.data.shape == rows.segment_ids.shape == rows.positions.shape
        found = {}
        for r, ids in enumerate(rows.segment_ids):
            for each in set(ids.tolist()) - {0}:
                here = np.flatnonzero(ids == each)
                np.testing.assert_array_equal(np.diff(here), 1)
                np.testing.assert_array_equal(rows.positions[r, here], np.arange(len(here)))
                found[rows.data[r, here[0]]] = rows.data[r, here]
        slack = rows.segment_ids == 0
        assert not rows.data[slack].any()
        assert not rows.positions[slack].any()
        assert sorted(found) == sorted(each[0] for each in sequences if len(each))
        for each in sequences:
            if len(each):
                np.testing.assert_array_equal(found[each[0]], each)


@hypothesis.given(strategies.plans)
def test_slots_of_any_plan_have_room_in_rows_as_long_as_its_longest(plan):
    rows = rows_plan(plan)
    assert rows.num_steps == plan.num_steps
    assert rows.num_sequences == plan.num_sequences
    assert (rows.room >= plan.room).all()
    assert rows.size - plan.size < plan.num_steps * (1 + plan.num_sequences // 2)
    ids = [set(zip(rows.slot_rows, of, strict=True)) for of in (ranks_in_row(plan), rows.slot_starts)]
    assert len(ids[0]) == len(ids[1]) == plan.num_sequences


@each_plan
def test_from_rows_is_the_inverse(plan):
    packed = jaxpack.pack_sequence(sequences_of(LENGTHS[0], 2, 3), plan=PLANS[plan])
    both = packed.replace(data=(packed.data, {"steps": packed.plan.cell_steps * packed.mask}))
    back = jax.jit(lambda p: jaxpack.from_rows(jaxpack.to_rows(p).data, p))(both)
    jax.tree.map(np.testing.assert_array_equal, back.data, both.data)
    rows = jaxpack.to_rows(both)
    junk = jnp.where(rows.segment_ids[..., None, None] == 0, jnp.nan, rows.data[0])
    np.testing.assert_array_equal(jaxpack.from_rows(junk, packed).data, packed.data)


def test_a_plan_of_one_bucket_keeps_its_rows():
    plan = PLANS["rows"]
    assert jaxpack.to_rows(jaxpack.pack_sequence(sequences_of(LENGTHS[0], 2), plan=plan)).data.shape == (3, 7, 2)


def test_rows_of_a_staircase_are_fewer_than_its_sequences():
    lengths = [40, *[10] * 8]
    packed = jaxpack.pack_sequence(sequences_of(lengths, 2))
    assert jaxpack.to_rows(packed).data.shape == (3, 40, 2)


def attention_alone(q, k, v, mask):
    """Attention of one sequence in NumPy, head by head: [L, N, H]."""
    outputs = []
    for head in range(q.shape[1]):
        group = head * k.shape[1] // q.shape[1]
        scores = np.where(mask, q[:, head] @ k[:, group].T / np.sqrt(q.shape[2]), -np.inf)
        weights = np.exp(scores - scores.max(1, keepdims=True, initial=-1e300))
        outputs.append(weights / weights.sum(1, keepdims=True) @ v[:, group])
    return np.stack(outputs, 1)


def sees(length, causal, before, after):
    t, s = np.mgrid[:length, :length]
    return (s >= t - before) & (s <= t + (0 if causal else after))


KINDS: dict[str, Any] = {
    "bidirectional": ({}, (False, 99, 99)),
    "causal": ({"is_causal": True}, (True, 99, 99)),
    "window": ({"local_window_size": 1}, (False, 1, 1)),
    "causal window": ({"is_causal": True, "local_window_size": (2, 0)}, (True, 2, 0)),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", KINDS)
@each_plan
def test_attention_is_that_of_each_sequence_alone(plan, kind):
    options, window = KINDS[kind]
    run = jax.jit(functools.partial(jaxpack.attention, **options))
    for lengths in LENGTHS:
        q, k, v = (sequences_of(lengths, n, SIZE, seed=seed) for seed, n in enumerate((HEADS, KV, KV)))
        output = run(*(jaxpack.pack_sequence(each, plan=PLANS[plan]) for each in (q, k, v)))
        for row, ours in enumerate(jaxpack.unpack_sequence(output)):
            expected = attention_alone(q[row], k[row], v[row], sees(len(q[row]), *window))
            np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)  # JAX's softmax is in float32


@pytest.mark.usefixtures("x64")
def test_gradients_of_attention_reach_no_other_sequence():
    plan = PLANS["rows"]
    packed = jaxpack.pack_sequence(sequences_of((3, 2, 2, 1, 1), 1, SIZE), plan=plan)

    def loss(data):
        output = jaxpack.attention(*3 * [packed.replace(data=data)])
        return jnp.sin(jaxpack.unpack_sequence(output)[0]).sum()

    gradient = jaxpack.unpack_sequence(packed.replace(data=jax.grad(loss)(packed.data)))
    assert gradient[0].any()
    assert not any(each.any() for each in gradient[1:])


@pytest.mark.usefixtures("x64")
@each_plan
def test_rotary_turns_by_the_step_of_each_sequence(plan):
    lengths, offset = LENGTHS[0], np.array([3, 0, 5, 1, 2])
    sequences = sequences_of(lengths, 2, SIZE)
    run = jax.jit(functools.partial(jaxpack.rotary, base=100.0))
    for start in (None, offset):
        turned = run(jaxpack.pack_sequence(sequences, plan=PLANS[plan]), offset=start)
        for row, ours in enumerate(jaxpack.unpack_sequence(turned)):
            pairs = sequences[row][..., : SIZE // 2] + 1j * sequences[row][..., SIZE // 2 :]
            steps = np.arange(lengths[row]) + (0 if start is None else start[row])
            angles = steps[:, None, None] * 100.0 ** (-2 * np.arange(SIZE // 2) / SIZE)
            expected = pairs * np.exp(1j * angles)
            np.testing.assert_allclose(ours, np.concatenate([expected.real, expected.imag], -1), rtol=0, atol=1e-12)


def test_scores_of_rotated_queries_and_keys_depend_on_distance_alone():
    ones = jaxpack.pack_sequence([np.ones((6, 1, SIZE), np.float32)])
    turned = jaxpack.rotary(ones).data[:, 0]
    scores = turned @ turned.T
    np.testing.assert_allclose(scores[1:, 1:], scores[:-1, :-1], rtol=1e-5)


PACKED = jaxpack.pack_sequence([np.ones((3, 4, 2)), np.ones((1, 4, 2))])
OTHER = jaxpack.pack_sequence([np.ones((3, 4, 2)), np.ones((2, 4, 2))])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jaxpack.to_rows(np.ones((2, 3))), TypeError, "takes a PackedSequence"),  # type: ignore[arg-type]
        (lambda: jaxpack.from_rows(np.ones((3, 3)), PACKED), ValueError, r"\[2, 3, \.\.\.\], got shape \(3, 3\)"),
        (lambda: jaxpack.attention(PACKED, OTHER, OTHER), ValueError, "key has the plan .* query has"),
        (
            lambda: jaxpack.attention(PACKED, *2 * [PACKED.map(lambda x: x[:, :3])]),
            ValueError,
            "3 heads of key and value do not divide the 4",
        ),
        (lambda: jaxpack.attention(PACKED, PACKED, PACKED.map(lambda x: x[:, :1])), ValueError, "the same heads"),
        (lambda: jaxpack.attention(*3 * [PACKED.map(lambda x: x[:, 0])]), ValueError, r"\[S, heads, head size\]"),
        (lambda: jaxpack.rotary(PACKED.map(lambda x: x[..., :1])), ValueError, "even number of features"),
        (lambda: jaxpack.rotary(PACKED, offset=[1]), ValueError, "one entry for each of 2 sequences"),
    ],
)
def test_errors_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()
