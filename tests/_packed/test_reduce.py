"""Reductions, softmax, statistics and concatenation against NumPy and JAX on each sequence alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.special
import strategies
from hypothesis import given

import jaxpack
from jaxpack import BucketPlan, concatenate, pack_padded_sequence, pack_sequence, softmax

LENGTHS = [2, 4, 0, 1]
PLAN = BucketPlan((3, 5), (4, 1))

# Each reduction of one sequence [L, F] in NumPy, and its result for an empty sequence.
REDUCTIONS = {
    "first": (lambda s: s[0], 0.0),
    "last": (lambda s: s[-1], 0.0),
    "segment_sum": (lambda s: s.sum(0), 0.0),
    "segment_mean": (lambda s: s.mean(0), 0.0),
    "segment_max": (lambda s: s.max(0), -np.inf),
    "segment_min": (lambda s: s.min(0), np.inf),
    "segment_var": (lambda s: s.var(0), 0.0),
    "segment_std": (lambda s: s.std(0), 0.0),
    "segment_logsumexp": (lambda s: scipy.special.logsumexp(s, axis=0), -np.inf),
}
each_reduction = pytest.mark.parametrize("name", REDUCTIONS)


def packed_batch(lengths=LENGTHS, plan=PLAN, dtype=np.float32, extra=0):
    batch = oracles.random_batch(lengths, 3, dtype=dtype, extra=extra)
    return batch, pack_padded_sequence(batch, lengths, batch_first=True, plan=plan)


def with_slack(packed, value):
    return packed.replace(data=jnp.asarray(np.where(np.asarray(packed.mask)[:, None], packed.data, np.float32(value))))


@jax.jit
def reduce_all(packed):
    """All reductions in one program."""
    return {name: getattr(jaxpack, name)(packed) for name in REDUCTIONS}


@given(strategies.fixed_plan_and_lengths())
def test_reductions_equal_numpy_on_each_sequence(plan_and_lengths):
    plan, lengths = plan_and_lengths
    batch, packed = packed_batch(lengths, plan, extra=strategies.LONGEST - max(lengths))
    for name, found in reduce_all(packed).items():
        reduce, identity = REDUCTIONS[name]
        expected = [reduce(row[:n]) if n else np.full(3, identity) for row, n in zip(batch, lengths, strict=True)]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=name)


DENSE = {
    "first": lambda s: s[0],
    "last": lambda s: s[-1],
    "segment_sum": lambda s: s.sum(0),
    "segment_mean": lambda s: s.mean(0),
    "segment_max": lambda s: s.max(0),
    "segment_min": lambda s: s.min(0),
    "segment_var": lambda s: s.var(0),
    "segment_std": lambda s: s.std(0) if len(s) > 1 else s.sum(0) * 0,
    "segment_logsumexp": lambda s: jax.nn.logsumexp(s, axis=0),
}


@pytest.mark.usefixtures("x64")
def test_gradients_equal_autodiff_of_each_sequence_alone():
    batch, packed = packed_batch(dtype=np.float64)

    def loss(name, data):
        values = getattr(jaxpack, name)(packed.replace(data=data))
        return jnp.where(jnp.isfinite(values), jnp.sin(values), 0).sum()

    def alone(dense, row):
        return jax.grad(lambda s: jnp.sin(dense(s)).sum())(row) if len(row) else row

    @jax.jit
    def gradients(data, rows):
        packed_ = {name: jax.grad(functools.partial(loss, name))(data) for name in REDUCTIONS}
        return packed_, {name: [alone(DENSE[name], row) for row in rows] for name in REDUCTIONS}

    rows = [jnp.asarray(row[:n]) for row, n in zip(batch, LENGTHS, strict=True)]
    found, expected = gradients(packed.data, rows)
    for name in REDUCTIONS:
        cells = pack_sequence([np.asarray(row) for row in expected[name]], plan=PLAN).data
        np.testing.assert_allclose(found[name], cells, atol=1e-12, err_msg=name)


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


def test_integers_are_reduced_as_in_numpy():
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


def test_softmax_equals_scipy_on_each_sequence():
    batch, packed = packed_batch()
    weights = softmax(packed)
    rows = [scipy.special.softmax(row[:n], axis=0) if n else row[:0] for row, n in zip(batch, LENGTHS, strict=True)]
    np.testing.assert_allclose(weights.data, pack_sequence(rows, plan=PLAN).data, rtol=1e-5)
    np.testing.assert_array_equal(softmax(with_slack(packed, jnp.nan)).data, weights.data)


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
def test_concatenate_refuses_other_batches(others, error, message):
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


PLANS = [PLAN, BucketPlan((4,), (4,)), BucketPlan((8,), (2,), ((0, 4), (0, 4)))]


STATISTICS = {"mean": jaxpack.mean, "var": jaxpack.var, "std": jaxpack.std}


@pytest.mark.parametrize("plan", PLANS)
def test_statistics_of_a_batch_are_numpys_over_real_steps(plan):
    batch, packed = packed_batch(plan=plan)
    real = np.concatenate([row[:n] for row, n in zip(batch, LENGTHS, strict=True)])
    run = jax.jit(lambda packed: {name: statistic(packed) for name, statistic in STATISTICS.items()})
    for value in (0, np.nan, np.inf):
        for name, found in run(with_slack(packed, value)).items():
            np.testing.assert_allclose(found, getattr(real, name)(0), rtol=1e-5, atol=1e-6, err_msg=name)


def test_statistics_of_a_batch_have_the_gradients_of_jax():
    batch, packed = packed_batch(dtype=np.float64)
    rows = [jnp.asarray(row[:n]) for row, n in zip(batch, LENGTHS, strict=True)]

    @jax.jit
    def gradients(data, rows):
        def ours(name):
            return jax.grad(lambda data: jnp.sin(STATISTICS[name](packed.replace(data=data))).sum())(data)

        def dense(name):
            return jax.grad(lambda rows: jnp.sin(getattr(jnp, name)(jnp.concatenate(rows), 0)).sum())(rows)

        return {name: (ours(name), dense(name)) for name in STATISTICS}

    for found, expected in gradients(packed.data, rows).values():
        cells = pack_sequence([np.asarray(row) for row in expected], plan=PLAN).data
        np.testing.assert_allclose(found, cells, rtol=1e-4, atol=1e-6)


def test_statistics_of_no_steps_are_zero_and_move_nothing():
    empty = pack_padded_sequence(jnp.full((2, 3), jnp.nan), [0, 0], True, plan=BucketPlan((3,), (2,)))

    @jax.jit
    def statistics(data):
        functions = (jaxpack.mean, jaxpack.var, jaxpack.std)
        return [jax.value_and_grad(lambda d, f=f: f(empty.replace(data=d)))(data) for f in functions]

    for value, gradient in statistics(empty.data):
        assert value == 0
        assert (gradient == 0).all()


def test_a_misfit_makes_the_statistics_of_its_batch_nan():
    def run(lengths):
        packed = pack_padded_sequence(jnp.ones((3, 4), int), lengths, True, plan=BucketPlan((2, 4), (3, 1)))
        return jaxpack.mean(packed), jaxpack.var(packed), jaxpack.std(packed)

    assert np.isnan(jax.jit(run)(jnp.array([1, 3, 4]))).all()
    np.testing.assert_array_equal(jax.jit(run)(jnp.array([1, 2, 4])), [1, 0, 0])


@pytest.mark.parametrize("plan", PLANS)
def test_places_of_extrema_are_numpys_in_each_sequence(plan):
    batch = np.random.default_rng(0).integers(0, 3, (4, 4, 5)).astype(np.float32)  # with ties
    batch[1, 2, 0] = np.nan  # which jnp.argmax takes for the largest, argmin for the least
    packed = with_slack(pack_padded_sequence(batch, LENGTHS, True, plan=plan), np.nan)
    places = jax.jit(lambda p: {"argmax": jaxpack.segment_argmax(p), "argmin": jaxpack.segment_argmin(p)})
    for name, found in places(packed).items():
        expected = [getattr(row[:n], name)(0) if n else np.full(5, -1) for row, n in zip(batch, LENGTHS, strict=True)]
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, expected)
    misfit = jax.jit(lambda n: pack_padded_sequence(batch, n, True, plan=plan))(jnp.array([2, 9, 0, 1]))
    assert all((found[1] == -1).all() for found in places(misfit).values())


def test_minima_of_integers_and_bools():
    assert jaxpack.segment_min(pack_sequence([np.array([3, -7], np.int8), np.array([5], np.int8)])).tolist() == [-7, 5]
    assert jaxpack.segment_min(pack_sequence([[True, False], [True]])).tolist() == [False, True]


@pytest.mark.parametrize("plan", PLANS)
def test_values_of_sequences_are_broadcast_to_their_steps(plan):
    _, packed = packed_batch(plan=plan)
    values = {"speaker": np.arange(8.0).reshape(4, 2), "row": np.arange(4)}
    spread = jax.jit(jaxpack.broadcast_to_steps)(values, with_slack(packed, np.nan))
    for row, sequence in enumerate(jaxpack.unpack_sequence(spread)):
        assert sequence["row"].tolist() == [row] * LENGTHS[row]
        np.testing.assert_array_equal(sequence["speaker"], np.tile(values["speaker"][row], (LENGTHS[row], 1)))
    assert (spread.data["row"][~packed.mask] == 0).all()
    squares = jax.jit(jax.grad(lambda v: (jaxpack.broadcast_to_steps(v, packed).data ** 2).sum()))
    gradient = squares(jnp.arange(4.0))
    np.testing.assert_allclose(gradient, 2 * np.arange(4.0) * LENGTHS)


@pytest.mark.parametrize("values", [np.ones(3), np.ones((1, 4)), 1.0])
def test_values_of_another_number_of_sequences_are_refused(values):
    with pytest.raises(ValueError, match=r"leading axis of 4 sequences, got shape"):
        jaxpack.broadcast_to_steps(values, packed_batch()[1])
