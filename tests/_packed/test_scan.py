"""packed_scan against a NumPy loop over each sequence alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import strategies
from hypothesis import given

from jaxpack import (
    BucketPlan,
    pack_padded_sequence,
    packed_scan,
    pad_packed_sequence,
    plan_exact,
    plan_padded,
    plan_rows,
)

LENGTHS = [2, 4, 0, 1]
PLAN = BucketPlan((3, 5), (4, 1))
LOOSE = BucketPlan((6,), (4,))


def step(carry, x):
    """A recurrence with a pytree carry and pytree outputs that would make NaN of zeros."""
    total, count = carry
    total = total * 0.5 + jnp.log(x["positive"]).sum(-1)
    return (total, count + 1), {"sum": total, "count": count}


def reference(row, total):
    """The same for one sequence, in NumPy."""
    count, outputs = 0, []
    for x in row:
        total = total * 0.5 + np.log(x).sum()
        outputs.append((total, count))
        count += 1
    return total, count, outputs


def inputs(lengths, plan, dtype=np.float32, extra=0):
    positive = np.exp(oracles.random_batch(lengths, 2, dtype=dtype, extra=extra))
    batch = {"positive": positive, "gaps": np.ones((*positive.shape[:2],), np.int32)}
    packed = pack_padded_sequence(batch, lengths, batch_first=True, plan=plan)
    carry = np.arange(len(lengths), dtype=dtype), np.zeros(len(lengths), np.int32)
    return positive, carry, packed


def with_nan_slack(packed):
    positive = packed.data["positive"]
    dirty = jnp.where(packed.mask[:, None], positive, jnp.nan)
    return packed.replace(data={**packed.data, "positive": dirty})


@jax.jit
def scan_and_pad(carry, packed):
    final, outputs = packed_scan(step, carry, packed)
    return final, pad_packed_sequence(outputs, batch_first=True)[0]


@given(strategies.fixed_plan_and_lengths())
def test_equals_each_sequence_alone(plan_and_lengths):
    plan, lengths = plan_and_lengths
    positive, carry, packed = inputs(lengths, plan, extra=strategies.LONGEST - max(lengths))
    (totals, counts), sums = scan_and_pad(carry, packed)
    assert counts.tolist() == lengths
    for row, length in enumerate(lengths):
        total, _, steps = reference(positive[row, :length], float(row))
        np.testing.assert_allclose(totals[row], total, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(sums["sum"][row, :length], [s for s, _ in steps], rtol=1e-4, atol=1e-5)
        assert sums["count"][row, :length].tolist() == list(range(length))
        assert (sums["sum"][row, length:] == 0).all()


@pytest.mark.usefixtures("x64")
def test_slack_is_inert_to_nan_in_values_and_all_gradients():
    _, carry, packed = inputs(LENGTHS, PLAN, np.float64)

    def loss(packed, positive, start, weight):
        data = {**packed.data, "positive": positive}
        scan = packed_scan(
            lambda c, x: (jnp.log(x["positive"] * weight).sum(-1) + 0.5 * c,) * 2, start, packed.replace(data=data)
        )
        return (scan[0] ** 2).sum() + (scan[1].data ** 3).sum()

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(1, 2, 3)))
    clean = gradient(packed, packed.data["positive"], carry[0], 2.0)
    dirty_batch = with_nan_slack(packed)
    dirty = gradient(dirty_batch, dirty_batch.data["positive"], carry[0], 2.0)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
        assert np.isfinite(b).all()
    assert (dirty[1][0][~packed.mask] == 0).all()


@pytest.mark.usefixtures("x64")
def test_nan_cotangents_in_slack_reach_nothing():
    _, carry, packed = inputs(LENGTHS, LOOSE, np.float64)

    def run(start, weight):
        def scaled(c, x):
            new = jnp.log(x["positive"] * weight).sum(-1) + 0.5 * c
            return new, new

        final, out = packed_scan(scaled, start, packed)
        return final, out.data

    @jax.jit
    def pull_back(start, weight, cotangent):
        (final, _), vjp = jax.vjp(run, start, weight)
        return vjp((jnp.ones_like(final), cotangent))

    clean = pull_back(carry[0], 2.0, jnp.where(packed.mask, 1.0, 0.0))
    dirty = pull_back(carry[0], 2.0, jnp.where(packed.mask, 1.0, jnp.nan))
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("x64")
def test_the_result_is_the_same_under_every_plan_that_fits():
    plans = [plan_exact(LENGTHS), BucketPlan((1, 2, 9), (4, 3, 2)), plan_rows(LENGTHS, 2)]
    _, carry, packed = zip(*(inputs(LENGTHS, plan, np.float64) for plan in plans), strict=True)

    @jax.jit
    def run(carry, packed):
        final, out = packed_scan(step, carry, packed)
        return final, pad_packed_sequence(out, True, total_length=4)[0]

    results = [run(carry[0], each) for each in packed]
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-14), results[0], other)


def test_exactly_45_cell_steps_for_the_seed_lengths():
    lengths = [4, 6, 8, 5, 4, 3, 7, 8]

    def run(batch, plan):
        packed = pack_padded_sequence(batch, lengths, batch_first=True, plan=plan)
        return packed_scan(lambda c, x: (c + x, c), jnp.zeros(8), packed)

    def count(plan):
        return oracles.count_cell_steps(jax.make_jaxpr(lambda b: run(b, plan))(jnp.ones((8, 8))).jaxpr)

    assert count(plan_exact(lengths)) == 45
    assert count(plan_padded(8, 8)) == 64


@pytest.mark.parametrize("plan", [BucketPlan((2, 4), (3, 1)), BucketPlan((4,), (2,), ((0,), (0, 2)))])
def test_traced_misfits_alone_are_nan(plan):
    def run(lengths):
        packed = pack_padded_sequence(jnp.ones((3, 4)), lengths, True, plan=plan)
        final, out = packed_scan(lambda c, x: (c + jnp.nan_to_num(x), c * 0 + 1), jnp.zeros(3), packed)
        return final, pad_packed_sequence(out, True)[0]

    for lengths in ([1, 3, 4], [1, -1, 4]):
        final, out = jax.jit(run)(jnp.array(lengths))
        assert np.isnan(final).tolist() == [False, True, False]
        assert np.isnan(out).all(1).tolist() == [False, True, False]
        assert final[2] == 4


def test_outputs_of_any_dtype_and_none():
    _, carry, packed = inputs(LENGTHS, PLAN)
    final, out = jax.jit(lambda c, p: packed_scan(lambda c, x: (c, {"flag": c > 1, "nothing": None}), c, p))(
        carry[0], packed
    )
    assert out.data["flag"].dtype == bool
    assert out.data["nothing"] is None
    np.testing.assert_array_equal(final, carry[0])


def test_forward_mode_equals_reverse_mode():
    _, carry, packed = inputs(LENGTHS, PLAN)

    def loss(weight):
        return packed_scan(lambda c, x: (c * weight + x["positive"].sum(-1),) * 2, carry[0], packed)[0].sum()

    @jax.jit
    def derivatives(weight):
        forward = jax.jacfwd(loss)(weight), jax.jvp(loss, (weight,), (1.0,))[1]
        return forward, (jax.jacrev(loss)(weight), jax.grad(loss)(weight))

    forward, reverse = derivatives(0.3)
    np.testing.assert_allclose(forward, reverse, rtol=1e-5)


@pytest.mark.parametrize(
    ("step", "carry", "error", "message"),
    [
        (
            lambda c, x: (c.astype(jnp.float16), x),
            jnp.zeros(4),
            TypeError,
            r"went in as float32\[4\] and came out as f",
        ),
        (lambda c, x: (c[:, None], x), jnp.zeros(4), TypeError, r"came out as float32\[4, 1\]"),
        (lambda c, x: ((c, c), x), jnp.zeros(4), TypeError, "carry of the structure it was given"),
        (lambda c, x: (c, c.sum()), jnp.zeros(4), ValueError, r"outputs with a leading axis of rows.*shape \(\)"),
        (lambda c, x: (c, x), jnp.zeros(3), ValueError, r"leading axis of 4 sequences, got shape \(3,\)"),
        (lambda c, x: (c, x), 0.0, ValueError, r"leading axis of 4 sequences, got shape \(\)"),
    ],
)
def test_a_step_or_carry_of_another_shape_is_refused(step, carry, error, message):
    packed = pack_padded_sequence(jnp.ones((4, 5)), LENGTHS, batch_first=True, plan=PLAN)
    with pytest.raises(error, match=message):
        packed_scan(step, carry, packed)


def test_refuses_a_padded_array():
    with pytest.raises(TypeError, match="packed_scan takes a PackedSequence"):
        packed_scan(step, jnp.zeros(2), jnp.ones((2, 3)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "plan", [BucketPlan((3,), (2,)), plan_exact([3, 1]), BucketPlan((2, 5), (2, 1)), BucketPlan((5,), (1,), ((0, 3),))]
)
def test_a_step_never_meets_in_slack_what_a_sequence_ended_with(plan):
    # A further step of row 1 would take the square root of a negative number.
    def loss(x):
        packed = pack_padded_sequence(x, [3, 1], batch_first=True, plan=plan)
        return packed_scan(lambda c, v: (c - v, jnp.sqrt(c - v)), jnp.array([4.0, 1.5]), packed)[1].data.sum()

    gradient = jax.jit(jax.grad(loss))(jnp.ones((2, 3)))
    np.testing.assert_allclose(gradient[1], [-0.5 / np.sqrt(0.5), 0, 0], rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_an_empty_sequence_may_have_any_initial_carry():
    packed = pack_padded_sequence(jnp.ones((2, 3)), [0, 2], batch_first=True, plan=plan_padded(2, 3))

    def loss(weight):
        final, _ = packed_scan(lambda c, x: (c * weight + x, c), jnp.array([jnp.nan, 1.0]), packed)
        return final[1]

    assert jax.jit(jax.grad(loss))(2.0) == 2 * 2.0 + 1


@pytest.mark.parametrize("plan", [plan_exact(LENGTHS), LOOSE])
def test_a_step_with_statistics_asks_for_the_mask(plan):
    batch = oracles.random_batch(LENGTHS, 2, dtype=np.float32)
    packed = pack_padded_sequence(batch, LENGTHS, batch_first=True, plan=plan)

    def centred(carry, x, mask):
        y = x - jnp.mean(x, 0, where=mask, keepdims=True)
        return carry + y, y

    @jax.jit
    def run(packed):
        final, outputs = packed_scan(centred, jnp.zeros((4, 2)), packed, pass_mask=True)
        return final, pad_packed_sequence(outputs, True, np.nan, total_length=4)[0]

    final, padded = run(packed)
    expected = batch - np.nanmean(batch, 0)
    np.testing.assert_allclose(padded, expected, atol=1e-6)
    np.testing.assert_allclose(final, np.nansum(expected, 1), atol=1e-5)


def test_statistics_over_different_steps_are_refused():
    packed = pack_padded_sequence(jnp.ones((2, 3)), [3, 1], batch_first=True, plan=plan_rows([3, 1], 1))
    with pytest.raises(ValueError, match=r"sequences that share a row .* Use a staircase"):
        packed_scan(lambda c, x, mask: (c, x), jnp.zeros(2), packed, pass_mask=True)


@pytest.mark.parametrize("plan", [plan_padded(2, 5), BucketPlan((10,), (1,), ((0, 5),))], ids=["padded", "rows"])
def test_a_scan_inside_shard_map_takes_a_constant_carry(plan):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    batch = np.nan_to_num(oracles.random_batch(LENGTHS, 3, dtype=np.float32, extra=1))

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
    def run(batch, lengths):
        carry = jnp.zeros((2, 3)), jnp.zeros(2, int), jnp.zeros(2, bool)
        packed = pack_padded_sequence(batch, lengths, batch_first=True, plan=plan)
        (total, steps, odd), _ = packed_scan(lambda c, x: ((c[0] + x, c[1] + 1, ~c[2]), x), carry, packed)
        return total, steps, odd

    total, steps, odd = run(batch, jnp.array(LENGTHS))
    np.testing.assert_allclose(total, batch.sum(1), rtol=1e-5, atol=1e-6)
    assert steps.tolist() == LENGTHS
    assert odd.tolist() == [length % 2 == 1 for length in LENGTHS]
