import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.special
import strategies
from hypothesis import given, settings

import jaxpack
from jaxpack import BucketPlan, concatenate, pack_padded_sequence, pack_sequence, softmax

LENGTHS = [2, 4, 0, 1]
PLAN = BucketPlan((3, 5), (4, 1))

# Each reduction of one sequence [L, F] in NumPy, and what it gives for an empty one.
REDUCTIONS = {
    "first": (lambda s: s[0], 0.0),
    "last": (lambda s: s[-1], 0.0),
    "segment_sum": (lambda s: s.sum(0), 0.0),
    "segment_mean": (lambda s: s.mean(0), 0.0),
    "segment_max": (lambda s: s.max(0), -np.inf),
    "segment_logsumexp": (lambda s: scipy.special.logsumexp(s, axis=0), -np.inf),
}
each_reduction = pytest.mark.parametrize("name", REDUCTIONS)


def packed_batch(lengths=LENGTHS, plan=PLAN, dtype=np.float32, features=3):
    batch = oracles.random_batch(lengths, features, dtype=dtype)
    return batch, pack_padded_sequence(batch, lengths, batch_first=True, plan=plan)


def with_slack(packed, value):
    return packed.replace(data=jnp.where(packed.mask[:, None], packed.data, value))


@each_reduction
@settings(max_examples=10)
@given(strategies.lengths_and_plan())
def test_equals_numpy_on_each_sequence(name, lengths_and_plan):
    lengths, plan = lengths_and_plan
    batch, packed = packed_batch(lengths, plan)
    reduce, identity = REDUCTIONS[name]
    expected = [reduce(row[:n]) if n else np.full(3, identity) for row, n in zip(batch, lengths, strict=True)]
    np.testing.assert_allclose(jax.jit(getattr(jaxpack, name))(packed), expected, rtol=1e-5, atol=1e-6)


@each_reduction
@pytest.mark.usefixtures("x64")
def test_gradients_equal_autodiff_of_each_sequence_alone(name):
    batch, packed = packed_batch(dtype=np.float64)
    dense = {
        "first": lambda s: s[0],
        "last": lambda s: s[-1],
        "segment_sum": lambda s: s.sum(0),
        "segment_mean": lambda s: s.mean(0),
        "segment_max": lambda s: s.max(0),
        "segment_logsumexp": lambda s: jax.nn.logsumexp(s, axis=0),
    }[name]

    def loss(packed):
        values = getattr(jaxpack, name)(packed)
        return jnp.where(jnp.isfinite(values), jnp.sin(values), 0).sum()

    gradient = jax.grad(lambda data: loss(packed.replace(data=data)))(packed.data)
    rows = [
        jax.grad(lambda s: jnp.sin(dense(s)).sum())(jnp.asarray(row[:n])) if n else row[:0]
        for row, n in zip(batch, LENGTHS, strict=True)
    ]
    np.testing.assert_allclose(gradient, pack_sequence(rows, plan=PLAN).data, atol=1e-12)


@each_reduction
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_slack_is_inert(name, value):
    _, packed = packed_batch()
    dirty = with_slack(packed, value)

    def run(packed, data):
        values = getattr(jaxpack, name)(packed.replace(data=data))
        return jnp.where(jnp.isfinite(values), values**2, 0).sum()

    clean = jax.value_and_grad(lambda d: run(packed, d))(packed.data)
    result = jax.value_and_grad(lambda d: run(dirty, d))(dirty.data)
    np.testing.assert_array_equal(result[0], clean[0])
    np.testing.assert_array_equal(result[1], clean[1])
    assert np.isfinite(result[1]).all()


@pytest.mark.parametrize("plan", [BucketPlan((2, 4), (3, 1)), BucketPlan((4,), (2,), ((0,), (0, 2)))])
@each_reduction
def test_traced_misfits_alone_are_nan(name, plan):
    def run(lengths):
        return getattr(jaxpack, name)(pack_padded_sequence(jnp.ones((3, 4, 2)), lengths, True, plan=plan))

    values = jax.jit(run)(jnp.array([1, 3, 4]))
    assert np.isnan(values[1]).all()
    assert np.isfinite(values[jnp.array([0, 2])]).all()


@each_reduction
def test_refuses_a_padded_array(name):
    with pytest.raises(TypeError, match=f"{name} takes a PackedSequence.*pack_padded_sequence"):
        getattr(jaxpack, name)(jnp.ones((2, 3)))


def test_infinities_of_the_data_stay():
    packed = pack_sequence([jnp.array([1.0, jnp.inf]), jnp.array([-jnp.inf, -jnp.inf]), jnp.array([0.0, jnp.nan])])
    np.testing.assert_array_equal(jaxpack.segment_logsumexp(packed), [np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(jaxpack.segment_max(packed), [np.inf, -np.inf, np.nan])


def test_logsumexp_and_softmax_do_not_overflow():
    packed = pack_sequence([jnp.array([1000.0, 1000.0]), jnp.array([-1000.0])])
    np.testing.assert_allclose(jaxpack.segment_logsumexp(packed), [1000 + np.log(2), -1000])
    np.testing.assert_allclose(softmax(packed).data, [0.5, 1, 0.5])


def test_integers():
    packed = pack_sequence([np.array([1, 2, 4]), np.array([-3])])
    assert jaxpack.segment_sum(packed).tolist() == [7, -3]
    assert jaxpack.segment_sum(packed).dtype == jnp.int32
    assert jaxpack.segment_max(packed).tolist() == [4, -3]
    assert jaxpack.segment_mean(packed).dtype == jnp.float32
    np.testing.assert_allclose(jaxpack.segment_mean(packed), [7 / 3, -3], rtol=1e-6)
    np.testing.assert_allclose(jaxpack.segment_logsumexp(packed)[1], -3)
    empty = pack_padded_sequence(jnp.ones((1, 2), int), [0], True, plan=BucketPlan((2,), (1,)))
    assert jaxpack.segment_max(empty).tolist() == [jnp.iinfo(jnp.int32).min]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_summed_in_single(dtype):
    packed = pack_padded_sequence(jnp.full((1, 4000), 0.25, dtype), [4000], batch_first=True)
    total = jaxpack.segment_sum(packed)
    assert total.dtype == dtype
    assert total[0] == 1000
    assert jaxpack.segment_mean(packed)[0] == 0.25


def test_half_precision_neither_overflows_nor_rounds_counts():
    packed = pack_padded_sequence(np.full((1, 1001), 1000, np.float16), [1001], batch_first=True)
    assert jaxpack.segment_mean(packed)[0] == 1000
    assert jaxpack.segment_logsumexp(packed.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_bools_and_narrow_integers_reduce_as_in_numpy():
    flags = pack_sequence([[True, False, True], [False]])
    assert jaxpack.segment_sum(flags).tolist() == [2, 0]
    assert jaxpack.segment_max(flags).tolist() == [True, False]
    assert jaxpack.segment_sum(pack_sequence([np.array([250, 250, 17], np.uint8)])).tolist() == [517]


def test_softmax_equals_jax_on_each_sequence():
    batch, packed = packed_batch()
    weights = softmax(packed)
    rows = [jax.nn.softmax(row[:n], axis=0) for row, n in zip(batch, LENGTHS, strict=True)]
    np.testing.assert_allclose(weights.data, pack_sequence(rows, plan=PLAN).data, rtol=1e-5)
    np.testing.assert_array_equal(softmax(with_slack(packed, jnp.nan)).data, weights.data)


def test_softmax_gradient_is_finite_with_nan_in_slack():
    _, packed = packed_batch()
    dirty = with_slack(packed, jnp.nan)

    def loss(data, packed):
        return (softmax(packed.replace(data=data)).data ** 2).sum()

    np.testing.assert_array_equal(jax.grad(loss)(dirty.data, dirty), jax.grad(loss)(packed.data, packed))


def test_pytrees_are_reduced_leaf_by_leaf():
    packed = pack_sequence([{"a": jnp.ones(2), "b": jnp.ones((2, 3))}, {"a": jnp.ones(1), "b": jnp.ones((1, 3))}])
    sums = jaxpack.segment_sum(packed)
    assert sums["a"].tolist() == [2, 1]
    assert sums["b"].shape == (2, 3)


def test_concatenate_joins_features():
    _, packed = packed_batch()
    joined = concatenate([packed, with_slack(packed, jnp.nan)])
    np.testing.assert_array_equal(joined.data, np.concatenate([packed.data, packed.data], -1))


@pytest.mark.parametrize(
    ("others", "error", "message"),
    [
        (lambda p: p, TypeError, "list of PackedSequence, got PackedSequence"),
        (lambda p: [], ValueError, "at least one"),
        (lambda p: [p, p.data], TypeError, "takes a PackedSequence"),
        (lambda p: [p, packed_batch(plan=BucketPlan((5,), (4,)))[1]], ValueError, r"packed\[1\] has the plan"),
        (lambda p: [p, packed_batch([2, 4, 1, 1])[1]], ValueError, r"packed\[1\] has the lengths"),
        (lambda p: [p, p.map(lambda d: d[:, 0])], ValueError, "without a feature axis"),
    ],
)
def test_concatenate_refuses_what_does_not_match(others, error, message):
    with pytest.raises(error, match=message):
        concatenate(others(packed_batch()[1]))


def test_concatenating_traced_batches_of_different_lengths_is_nan_where_they_differ():
    @jax.jit
    def run(lengths, others):
        plan = BucketPlan((4,), (3,))
        first, second = (pack_padded_sequence(jnp.ones((3, 4, 1)), n, True, plan=plan) for n in (lengths, others))
        return jaxpack.segment_sum(concatenate([first, second]))

    sums = run(jnp.array([4, 3, 1]), jnp.array([4, 1, 3]))
    assert np.isnan(sums[1:]).all()
    assert sums[0].tolist() == [4, 4]
