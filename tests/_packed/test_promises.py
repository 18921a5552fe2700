"""Promises of every public function of packed batches: one program, inert slack, NaN for misfits, transformations."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from counts import counted_calls
from packed_functions import FUNCTIONS, leaves, names

import jaxpack
from jaxpack import BucketPlan, PackedSequence, losses, metrics, pack_padded_sequence
from jaxpack._checks import check_lengths_type
from jaxpack._packed.indices import check_indices
from jaxpack._packed.packed_sequence import check_packed

F, T = 3, 8
LENGTHS = (2, 5, 0, 3)
STAIRS = BucketPlan((6, 18), (4, 2))
ROWS = BucketPlan((24,), (2,), ((0, 12), (0, 18)))
PLANS = [STAIRS, ROWS]
BATCH = jnp.asarray(np.nan_to_num(oracles.random_batch(LENGTHS, F, dtype=np.float32, extra=3)))
PACKED = names(takes="packed", jits=True)
JITTED = names(jits=True)
ON_PLAN = [name for name in JITTED if FUNCTIONS[name].takes != "list"]

each_packed = pytest.mark.parametrize("name", PACKED)
each_jitted = pytest.mark.parametrize("name", JITTED)
each_on_plan = pytest.mark.parametrize("name", ON_PLAN)
each_differentiable = pytest.mark.parametrize("name", names(jits=True, differentiable=True))


TRACES: collections.Counter[str] = collections.Counter()


@functools.partial(jax.jit, static_argnums=0)
def run_under_each_plan(name, batches, x):
    """The results of a function under each plan, in one program: one of all functions takes longer to compile."""
    TRACES[name] += 1
    return [FUNCTIONS[name].run(packed, x) for packed in batches]


def run_jitted(batches, x):
    """The results of all functions, in programs that all tests share. None of them may promote ranks."""
    with jax.numpy_rank_promotion("raise"):
        return {name: run_under_each_plan(name, batches, x) for name in JITTED}


@functools.partial(jax.jit, static_argnums=2)
def pack(x, lengths, plan):
    return pack_padded_sequence(x, lengths, True, plan=plan)


@functools.cache
def packed(lengths=LENGTHS, scale=1.0, slack=0.0):
    """The batch under each plan, with a value in slack."""
    batches = [pack(scale * BATCH, jnp.array(lengths), plan) for plan in PLANS]
    return [each.replace(data=jnp.where(each.mask[:, None], each.data, slack)) for each in batches]


@functools.cache
def results(lengths=LENGTHS, scale=1.0, slack=0.0):
    return run_jitted(packed(lengths, scale, slack), scale * BATCH)


def rows_of(leaf, real=False):
    """The values of each sequence in a result: a row of an array, or the steps of a packed batch, or its real ones."""
    if not isinstance(leaf, PackedSequence):
        return list(np.asarray(leaf))
    slots, steps = leaf.plan.cell_slots, leaf.plan.cell_steps
    spans = np.asarray(leaf.lengths)[np.asarray(leaf.sorted_indices)] if real else leaf.plan.room
    data = np.asarray(leaf.data)
    in_slot = [data[np.flatnonzero((slots == slot) & (steps < spans[slot]))] for slot in range(len(spans))]
    return [in_slot[slot] for slot in np.asarray(leaf.unsorted_indices)]


def is_float(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def test_every_public_function_is_listed():
    public = {name for name in jaxpack.__all__ if name.islower() and not name.startswith("plan_")}
    public -= {"unchecked", *(name for name in public if name.endswith("_cell"))}
    public |= {name for name in vars(PackedSequence) if name.islower() and not name.startswith("_")}
    public -= {"batch_sizes", "data", "dtype", "lengths", "picture", "plan", "replace", "shape"}
    public -= {"sorted_indices", "unsorted_indices"}
    public |= {"losses." + name for name in losses.__all__} - {"losses.Mean", "losses.ctc_min_frames"}
    public -= {"losses.sequence_cross_entropy", "resets_from_dones", "compact", "scatter_back"}  # take no packed batch
    public -= {"split_weight_norm", "join_weight_norm"}  # nor do these
    public |= {"metrics." + name for name in metrics.__all__ if name.startswith(("accuracy", "ctc"))}
    assert public <= set(FUNCTIONS)


@each_jitted
def test_jit_gives_what_eager_calls_give(name):
    eager = FUNCTIONS[name].run(packed()[1], BATCH)
    for ours, expected in zip(jax.tree.leaves(results()[name][1]), jax.tree.leaves(eager), strict=True):
        assert ours.dtype == expected.dtype
        np.testing.assert_allclose(np.asarray(ours, float), np.asarray(expected, float), rtol=1e-5, atol=1e-6)


def test_one_program_that_promotes_no_ranks_serves_all_lengths_of_a_plan():
    for lengths in ((2, 5, 0, 3), (0, 0, 0, 0), (5, 1, 3, 4), (1, 9, 1, 1)):
        results(lengths)
    assert {TRACES[name] for name in JITTED} == {1}


@each_on_plan
def test_plans_do_not_matter(name):
    stairs, rows = results()[name]
    for ours, other in zip(leaves(stairs), leaves(rows), strict=True):
        if isinstance(ours, PackedSequence) or not FUNCTIONS[name].of_batch:
            for a, b in zip(rows_of(ours, real=True), rows_of(other, real=True), strict=True):
                np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("slack", [np.nan, np.inf, -np.inf])
@each_packed
def test_slack_is_inert_in_values(name, slack):
    dirty = results(slack=slack)[name]
    for ours, expected in zip(jax.tree.leaves(dirty), jax.tree.leaves(results()[name]), strict=True):
        np.testing.assert_array_equal(ours, expected)


def misfits(plan, lengths):
    """The rows whose sequence has no room in its slot, or in the padded batch."""
    in_batch = [n if n <= T else -n for n in lengths]
    ranked = sorted(range(len(lengths)), key=lambda row: -in_batch[row])
    return {row for slot, row in enumerate(ranked) if not 0 <= in_batch[row] <= plan.room[slot]}


@pytest.mark.parametrize("lengths", [(2, 9, 0, 3), (2, 13, 0, 3), (2, -1, 0, 3), (7, 8, 8, 7)])
@each_on_plan
def test_misfits_are_nan_and_others_are_as_without_them(name, lengths):
    for i, plan in enumerate(PLANS):
        bad = misfits(plan, lengths)
        fitting = tuple(0 if row in bad else n for row, n in enumerate(lengths))
        for ours, expected in zip(leaves(results(lengths)[name][i]), leaves(results(fitting)[name][i]), strict=True):
            if FUNCTIONS[name].of_batch:
                assert np.isnan(ours).all()
                continue
            assert all(not is_float(values) or np.isnan(values).all() for values in map(rows_of(ours).__getitem__, bad))
            if isinstance(ours, PackedSequence):
                ours, expected = rows_of(ours, real=True), rows_of(expected, real=True)
            for row in set(range(len(lengths))) - bad:
                np.testing.assert_array_equal(ours[row], expected[row])
    assert bad


BROKEN = {
    "added to itself": lambda p: jax.tree.map(jnp.add, p, p),
    "other lengths": lambda p: p.replace(lengths=p.lengths[::-1]),
    "rows permuted": lambda p: p.replace(sorted_indices=jnp.roll(p.sorted_indices, 1)),
    "slots out of range": lambda p: p.replace(unsorted_indices=p.unsorted_indices + 7),
    "slots below 0": lambda p: p.replace(unsorted_indices=p.unsorted_indices - 3),
}
each_broken = pytest.mark.parametrize("how", BROKEN)
CHECKED = [name for name in [*PACKED, "unpack_sequence"] if FUNCTIONS[name].batches]


@each_broken
@pytest.mark.parametrize("name", CHECKED)
def test_indices_that_disagree_are_refused(name, how):
    for each in packed():
        with pytest.raises(ValueError, match=r"inverse permutations|do not sort the lengths"):
            FUNCTIONS[name].run(BROKEN[how](each), BATCH)


@functools.cache
def broken_results(how):
    return run_jitted([BROKEN[how](each) for each in packed()], BATCH)


@each_broken
@each_packed
def test_traced_indices_that_disagree_are_nan_everywhere(name, how):
    for leaf in jax.tree.leaves(broken_results(how)[name]):
        if name == "fits":
            assert not leaf.any()
        assert not is_float(leaf) or np.isnan(leaf).all()


def loss(name, data, x):
    """A sum of what a function returns under each plan, and of its data."""
    batches = [each.replace(data=values) for each, values in zip(packed(), data, strict=True)]
    floats = [leaf for leaf in jax.tree.leaves(results_of(name, batches, x)) if is_float(leaf)]
    return sum(jnp.where(jnp.isfinite(leaf), jnp.sin(leaf), 0).sum() for leaf in floats)


def results_of(name, batches, x):
    run = FUNCTIONS[name].run
    found = [run(each, x) for each in batches]
    return [each.data if isinstance(each, PackedSequence) else each for leaf in found for each in leaves(leaf)]


@functools.partial(jax.jit, static_argnums=0)
def derivatives(name, data, x, tangents):
    """The gradients of a function, and its derivatives in a direction in both modes."""
    primals, call = (data, x), functools.partial(loss, name)
    gradients = jax.grad(call, (0, 1))(*primals)
    products = jax.tree.map(lambda g, t: (g * t).sum(), gradients, tangents)
    return gradients, sum(jax.tree.leaves(products)), jax.jvp(call, primals, tangents)[1]


@functools.cache
def derivatives_at(name, slack=0.0):
    """The derivatives at the batch with a value in slack, as NumPy arrays."""
    data = [each.data for each in packed(slack=slack)]
    real = [np.asarray(each.mask)[:, None] for each in packed()]
    waves = [np.cos(np.arange(each.size, dtype=np.float32)).reshape(each.shape) for each in [*data, BATCH]]
    tangents = [mask * wave for mask, wave in zip(real, waves, strict=False)], waves[-1]
    return jax.device_get(derivatives(name, data, BATCH, tangents))


@each_differentiable
def test_both_modes_of_differentiation_agree(name):
    gradients, reverse, forward = derivatives_at(name)
    np.testing.assert_allclose(forward, reverse, rtol=1e-4, atol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert any((leaf != 0).any() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("slack", [np.nan, np.inf, -np.inf])
@each_differentiable
def test_slack_is_inert_in_gradients(name, slack):
    gradients, _, _ = derivatives_at(name, slack)
    jax.tree.map(np.testing.assert_array_equal, gradients, derivatives_at(name)[0])
    for gradient, each in zip(gradients[0], packed(), strict=True):
        assert (gradient[~each.mask] == 0).all()


@functools.cache
def stacked_batches():
    batches = [packed()[1], packed((5, 1, 3, 4), 2.0)[1]]
    return jax.tree.map(lambda *each: jnp.stack(each), *batches), jnp.stack([BATCH, 2 * BATCH])


@each_jitted
def test_vmap_over_stacked_batches_is_each_batch(name):
    mapped = jax.device_get(jax.jit(jax.vmap(FUNCTIONS[name].run))(*stacked_batches()))
    for i, expected in enumerate((results(), results((5, 1, 3, 4), 2.0))):
        for ours, other in zip(jax.tree.leaves(mapped), jax.tree.leaves(expected[name][1]), strict=True):
            np.testing.assert_allclose(np.asarray(ours[i], float), np.asarray(other, float), rtol=1e-4, atol=1e-5)


def test_all_are_lowered_for_every_platform():
    def run(batch, x):
        return {name: jax.tree.leaves(FUNCTIONS[name].run(batch, x)) for name in JITTED}

    exported = jax.export.export(jax.jit(run), platforms=oracles.PLATFORMS)(packed()[1], BATCH)
    assert exported.platforms == oracles.PLATFORMS
    for name, found in exported.call(packed()[1], BATCH).items():
        for ours, expected in zip(found, jax.tree.leaves(results()[name][1]), strict=True):
            np.testing.assert_allclose(np.asarray(ours, float), np.asarray(expected, float), rtol=1e-5, atol=1e-6)


@functools.cache
def results_for_none():
    none = pack_padded_sequence(jnp.ones((0, T, F)), [], batch_first=True)
    return jax.jit(lambda p, x: {name: FUNCTIONS[name].run(p, x) for name in ON_PLAN})(none, jnp.ones((0, T, F)))


@each_on_plan
def test_a_batch_of_no_sequences_gives_results_for_none(name):
    none = pack_padded_sequence(jnp.ones((0, T, F)), [], batch_first=True)
    x = jnp.ones((0, T, F))
    for result in (FUNCTIONS[name].run(none, x), results_for_none()[name]):
        for leaf in jax.tree.leaves(result):
            assert 0 in leaf.shape or FUNCTIONS[name].of_batch
            assert np.isfinite(leaf).all()


@pytest.mark.parametrize("name", [name for name in JITTED if FUNCTIONS[name].programs is not None])
def test_outside_jit_a_function_is_few_programs(name):
    function, batch = FUNCTIONS[name], packed()[1]
    jaxpr = jax.make_jaxpr(lambda data, x: function.run(batch.replace(data=data), x))(batch.data, BATCH)
    assert function.programs is not None
    assert len(jaxpr.eqns) <= function.programs, jaxpr


@pytest.mark.parametrize("name", names(takes="packed", jits=True, resizes=False))
def test_packed_results_share_the_index_leaves_of_their_batch(name):
    batch = packed()[1]
    for leaf in leaves(FUNCTIONS[name].run(batch, BATCH)):
        if isinstance(leaf, PackedSequence):
            assert leaf.plan is batch.plan
            for index in ("lengths", "sorted_indices", "unsorted_indices"):
                assert getattr(leaf, index) is getattr(batch, index)


@each_packed
def test_numpy_leaves_are_arrays_too(name):
    host = jax.device_get(packed()[1])
    assert isinstance(host.data, np.ndarray)
    for ours, expected in zip(
        jax.tree.leaves(FUNCTIONS[name].run(host, BATCH)), jax.tree.leaves(results()[name][1]), strict=True
    ):
        np.testing.assert_allclose(np.asarray(ours, float), np.asarray(expected, float), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if FUNCTIONS[name].batches])
def test_an_eager_call_checks_each_batch_and_its_lengths_once(name):
    function, batch = FUNCTIONS[name], jax.block_until_ready(packed()[1])
    calls, indices, lengths = counted_calls(
        lambda: function.run(batch, BATCH), check_packed, check_indices, check_lengths_type
    )
    expected = function.batches if function.takes == "packed" else 0
    assert (calls, indices) == (expected, expected)
    assert lengths == (0 if name == "pad_sequence" else function.batches)
