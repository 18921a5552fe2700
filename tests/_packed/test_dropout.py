"""Random masks: what they depend on, and how often they are True. test_promises.py has what dropout promises too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpack
from jaxpack import BucketPlan
from jaxpack._packed.dropout import Origins, draw_sequences, draw_steps, drop_sequences, drop_steps

KEYS = {
    "typed": lambda: jax.random.key(3),
    "raw": lambda: jax.random.PRNGKey(3),
    "rbg": lambda: jax.random.key(3, impl="rbg"),
    "unsafe_rbg": lambda: jax.random.key(3, impl="unsafe_rbg"),
}
B, T, F = 3, 6, 5
LENGTHS = np.array([4, 6, 2])
PLANS = [jaxpack.plan_exact(LENGTHS), jaxpack.plan_padded(B, 7), BucketPlan((9,), (2,), ((0, 6), (0,)))]


def threefry(key, count):
    """The hash of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", of two words, in 20 rounds."""
    mask = 2**32 - 1
    keys = [*key, key[0] ^ key[1] ^ 0x1BD11BDA]
    x, y = (count[0] + keys[0]) & mask, (count[1] + keys[1]) & mask
    for i in range(20):
        rotation = ((13, 15, 26, 6), (17, 29, 16, 24))[i // 4 % 2][i % 4]
        x = (x + y) & mask
        y = ((y << rotation) | (y >> (32 - rotation))) & mask ^ x
        if i % 4 == 3:
            turn = i // 4 + 1
            x, y = (x + keys[turn % 3]) & mask, (y + keys[(turn + 1) % 3] + turn) & mask
    return x, y


@pytest.mark.parametrize("kind", KEYS)
def test_a_mask_is_the_hash_of_row_step_and_feature(kind):
    key, rate, rows, steps = KEYS[kind](), 0.3, [7, 0], [1, 4]
    words = [int(word) for word in jax.random.bits(key, (2,), jnp.uint32)]
    expected = []
    for row, step in zip(rows, steps, strict=True):
        blocks = [threefry(words, (row, step * 3 + block)) for block in range(3)]
        expected.append([word < rate * 2**32 for i in range(2) for word in (block[i] for block in blocks)][:F])
    origins = Origins(jnp.array([7, 5, 0]), jnp.array([0, 2]), jnp.array(steps))
    np.testing.assert_array_equal(jax.jit(lambda key: draw_steps(key, rate, origins, (F,)))(key), expected)


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("kind", KEYS)
def test_masks_depend_on_neither_plan_nor_other_sequences_nor_vmap(kind, locked):
    key, x = KEYS[kind](), np.random.default_rng(0).normal(size=(B, T, F)).astype(np.float32)

    def padded(plan, rows=slice(None)):
        packed = jaxpack.pack_padded_sequence(x[rows], LENGTHS[rows], batch_first=True, plan=plan)
        dropped = jax.jit(lambda key: jaxpack.dropout(packed, 0.4, key, locked=locked))(key)
        return jaxpack.pad_packed_sequence(dropped, batch_first=True, total_length=T if plan is not PLANS[1] else 7)[0]

    first, *others = (np.asarray(padded(plan))[:, :T] for plan in PLANS)
    for other in others:
        np.testing.assert_array_equal(other, first)
    np.testing.assert_array_equal(padded(None, slice(2)), first[:2])
    of_batch = Origins.of_batch(B, T)
    drop = drop_sequences if locked else drop_steps
    shaped = of_batch._replace(slots=of_batch.slots.reshape(B, T), steps=of_batch.steps.reshape(B, T))
    key = jax.random.fold_in(key, 0)
    for result in (
        jax.jit(lambda key, x: drop(key, x.reshape(-1, F), of_batch, 0.4).reshape(B, T, F))(key, x),
        jax.jit(lambda key, x: drop(key, x, shaped, 0.4))(key, x),
        jax.vmap(lambda x: drop(key, x, shaped, 0.4))(x[None])[0],
    ):
        real = np.arange(T) < LENGTHS[:, None]
        np.testing.assert_array_equal(np.where(real[..., None], result, 0), first)
    by_sequence = [row[:n] != 0 for row, n in zip(first, LENGTHS, strict=True)]
    assert all((kept == kept[0]).all() for kept in by_sequence) == locked


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_masks_have_their_rate_and_the_mean_stays(rate):
    origins = Origins.of_batch(40, 50)
    dropped = drop_steps(jax.random.key(0), jnp.ones((2000, 50)), origins, rate)
    assert (dropped == 0).mean() == pytest.approx(rate, abs=0.004)  # 100,000 of them: 2.5 deviations at most
    assert dropped.mean() == pytest.approx(float(rate < 1), abs=0.02)
    locked = draw_sequences(jax.random.key(0), rate, Origins.of_batch(2000, 1), (50,))
    assert locked.mean() == pytest.approx(rate, abs=0.004)


def test_leaves_have_masks_of_their_own_and_keep_shapes_and_dtypes():
    packed = jaxpack.pack_sequence([np.ones((40, 8), np.float32)])
    data = {"a": packed.data, "b": packed.data.reshape(40, 4, 2).astype(jnp.bfloat16), "c": packed.data[:, 0]}
    dropped = jaxpack.dropout(packed.replace(data=data), 0.5, jax.random.key(0)).data
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), dropped) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), data
    )
    assert (np.asarray(dropped["a"]) != np.asarray(dropped["b"], np.float32).reshape(40, 8)).any()


@pytest.mark.parametrize("rate", [-0.1, 1.5, True, "a", float("nan"), None])
def test_a_rate_outside_0_to_1_is_named(rate):
    packed = jaxpack.pack_sequence([np.ones((2, 3))])
    with pytest.raises(ValueError, match=r"rate must be a number in \[0, 1\], a probability, got"):
        jaxpack.dropout(packed, rate, jax.random.key(0))


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"dropout: data must be floating, got int32. Drop what an embedding"):
        jaxpack.dropout(jaxpack.pack_sequence([np.arange(3, dtype=np.int32)]), 0.5, jax.random.key(0))
