"""PackedSequence: its fields, map, arithmetic, misfits, pictures, and checks of its leaves."""

from typing import Any
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import linen, nnx
from hypothesis import given
from jax.experimental import checkify
from strategies import lengths_and_plan

import jaxpack
from jaxpack import BucketPlan, PackedSequence, pack_padded_sequence, plan_buckets, segment_sum

LENGTHS = [2, 4, 1]
LOOSE = BucketPlan((3, 5), (3, 1))


@pytest.fixture
def packed():
    return pack_padded_sequence(oracles.random_batch(LENGTHS, 2, dtype=np.float32), LENGTHS, True, plan=LOOSE)


def poisoned(packed):
    """The same batch with NaN in slack."""
    return packed.replace(data=jnp.where(packed.mask[:, None], packed.data, jnp.nan))


def test_is_a_pytree_with_a_static_plan(packed):
    leaves = jax.tree.leaves(packed)
    structure: Any = jax.tree.structure(packed)
    assert [leaf.dtype.name for leaf in leaves] == ["float32", "int32", "int32", "int32"]
    rebuilt = structure.unflatten(leaves)
    assert rebuilt.plan is packed.plan
    other = pack_padded_sequence(jnp.zeros((3, 5, 2)), [5, 3, 3], True, plan=LOOSE)
    assert structure == jax.tree.structure(other)
    assert jax.tree.map(lambda _: None, packed).data is None


def test_another_plan_is_another_program(packed):
    programs = []

    @jax.jit
    def run(packed):
        programs.append(packed.plan)
        return segment_sum(packed)

    padded = jaxpack.plan_padded(3, 5)
    for plan in (LOOSE, padded, LOOSE):
        run(pack_padded_sequence(jnp.ones((3, 5, 2)), LENGTHS, True, plan=plan))
    assert programs == [LOOSE, padded]


def test_shape_dtype_batch_sizes_and_repr(packed):
    assert packed.shape == (11, 2)
    assert packed.dtype == jnp.float32
    assert packed.batch_sizes.tolist() == [3, 3, 3, 1, 1]
    assert repr(packed) == (
        "PackedSequence(data=float32[11,2], lengths=int32[3], plan=BucketPlan(boundaries=(3, 5), rows=(3, 1)))"
    )
    several = packed.replace(data={"x": packed.data, "gaps": packed.data[:, 0]})
    assert "'gaps': float32[11]" in repr(several)
    with pytest.raises(ValueError, match="2 arrays, which have no one shape"):
        _ = several.shape


def test_mask_is_true_at_real_cells(packed):
    assert packed.sorted_indices.tolist() == [1, 0, 2]
    assert packed.unsorted_indices.tolist() == [1, 0, 2]
    # Steps 0..2 on three rows of lengths 4, 2, 1, then steps 3 and 4 on the longest.
    assert packed.mask.astype(int).tolist() == [1, 1, 1, 1, 1, 0, 1, 0, 0, 1, 0]


def test_map_is_token_wise_and_zeroes_slack(packed):
    mapped = packed.map(lambda data: data + 1)
    np.testing.assert_array_equal(mapped.data[packed.mask], packed.data[packed.mask] + 1)
    assert (mapped.data[~packed.mask] == 0).all()


def test_map_embeds_integers():
    tokens = pack_padded_sequence([[1, 2], [3, 0]], [2, 1], True)
    table = jnp.arange(8.0).reshape(4, 2)
    np.testing.assert_array_equal(tokens.map(lambda ids: table[ids]).data, table[jnp.array([1, 3, 2])])


def test_slack_is_inert_to_nan_in_values_and_gradients_of_map(packed):
    positive = packed.map(jnp.exp)

    def loss(scale, packed):
        return packed.map(lambda x: jnp.log(x * scale)).data.sum()

    gradient = jax.jit(jax.value_and_grad(loss))
    clean = gradient(2.0, positive)
    dirty = gradient(2.0, poisoned(positive))
    np.testing.assert_allclose(clean, dirty, rtol=1e-6)
    assert np.isfinite(clean[0])
    assert clean[1] == pytest.approx(2 * sum(LENGTHS) / 2.0)


def test_map_of_an_empty_batch_has_finite_gradients():
    empty = pack_padded_sequence(jnp.full((2, 3, 1), jnp.nan), [0, 0], True, plan=BucketPlan((3,), (2,)))
    run = jax.jit(jax.value_and_grad(lambda scale: empty.map(lambda x: jnp.log(x * scale)).data.sum()))
    value, gradient = run(2.0)
    assert (value, gradient) == (0, 0)


def test_map_refuses_values_per_sequence(packed):
    with pytest.raises(ValueError, match=r"one value per cell, a leading axis of 11, got shape \(2,\)"):
        packed.map(lambda data: data.sum(0))


def test_astype(packed):
    assert packed.astype(jnp.bfloat16).dtype == jnp.bfloat16
    assert packed.astype(int).dtype == jnp.int32


def test_fits_is_in_the_callers_order_and_misfits_alone_become_nan():
    @jax.jit
    def run(lengths):
        packed = pack_padded_sequence(jnp.ones((3, 5, 2)), lengths, True, plan=LOOSE)
        return packed.fits, segment_sum(packed), packed.lengths

    fits, sums, lengths = run(jnp.array([4, 1, 5]))  # rooms are 5, 3, 3
    assert fits.tolist() == [False, True, True]
    assert np.isnan(sums[0]).all()
    np.testing.assert_array_equal(sums[1:], [[1, 1], [5, 5]])
    assert lengths.tolist() == [4, 1, 5]


def test_of_tied_lengths_the_later_row_is_the_misfit():
    fits = jax.jit(lambda n: pack_padded_sequence(jnp.ones((3, 5, 2)), n, True, plan=LOOSE).fits)(jnp.array([4, 5, 5]))
    assert fits.tolist() == [False, True, False]


@pytest.mark.parametrize("bad", [-1, -(2**31), 6, 2**31 - 1])
def test_negative_and_too_long_traced_lengths_are_misfits(bad):
    @jax.jit
    def run(lengths):
        packed = pack_padded_sequence(jnp.ones((3, 5), int), lengths, True, plan=LOOSE)
        return packed.fits, packed.map(lambda ids: ids * 0.5).data, packed.plan.cell_slots, packed.unsorted_indices

    fits, data, slots, unsorted = run(jnp.array([2, bad, 3]))
    assert fits.tolist() == [True, False, True]
    assert np.isnan(data[slots == unsorted[1]]).all()
    assert np.isfinite(data[slots != unsorted[1]]).all()


def test_a_length_beyond_the_array_is_a_misfit_even_where_the_plan_has_room():
    @jax.jit
    def run(lengths):
        packed = pack_padded_sequence(jnp.ones((3, 4), int), lengths, True, plan=LOOSE)
        return packed.fits, packed.map(jnp.float32)

    fits, floats = run(jnp.array([2, 5, 3]))
    assert fits.tolist() == [True, False, True]
    assert np.isnan(floats.data).sum() > 0


@pytest.mark.optimized
def test_zeros_and_ones_of_a_misfit_are_nan():
    @jax.jit
    def run(lengths):
        packed = pack_padded_sequence(-jnp.ones((3, 5)), lengths, True, plan=LOOSE)
        flags = packed.map(lambda x: (x > 0).astype(jnp.float32))
        return flags.data, (flags + 0).data, jaxpack.pad_packed_sequence(flags, True)[0]

    data, summed, padded = run(jnp.array([2, 5, 4]))  # of the second and third longest only one fits
    misfit = LOOSE.cell_slots == 1
    for cells in (data, summed):
        np.testing.assert_array_equal(np.isnan(cells), misfit)
    assert np.isnan(padded).all(1).tolist() == [False, False, True]


def test_gradients_of_parameters_that_met_a_misfit_are_nan():
    def loss(scale, lengths):
        packed = pack_padded_sequence(jnp.ones((3, 5, 2)), lengths, True, plan=LOOSE)
        return packed.map(lambda x: x * scale).data.sum()

    gradient = jax.jit(jax.grad(loss))
    assert gradient(2.0, jnp.array([5, 3, 3])) == 22
    assert np.isnan(gradient(2.0, jnp.array([5, 4, 3])))


def test_checkify_users_get_the_error():
    @jax.jit
    def run(lengths):
        packed = pack_padded_sequence(jnp.ones((3, 5, 2)), lengths, True, plan=LOOSE)
        return segment_sum(packed)

    checked = checkify.checkify(run)
    error, _ = checked(jnp.array([5, 3, 1]))
    error.throw()
    error, _ = checked(jnp.array([1, 4, 5]))
    with pytest.raises(
        checkify.JaxRuntimeError, match=r"lengths\[1\] = 4 does not fit the plan: its row has room for 3 steps"
    ):
        error.throw()


def test_stacked_batches_are_for_vmap(packed):
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), packed, packed)
    with pytest.raises(ValueError, match=r"vector \[B\].*use jax.vmap"):
        stacked.map(jnp.exp)
    mapped = jax.vmap(lambda p: p.map(jnp.exp))(stacked)
    np.testing.assert_allclose(mapped.data[1], packed.map(jnp.exp).data, rtol=1e-6)


def test_data_and_indices_of_another_plan_are_refused(packed):
    with pytest.raises(ValueError, match=r"leading axis of 11 cells .*got shape \(4, 2\)"):
        packed.replace(data=jnp.ones((4, 2))).map(jnp.exp)
    with pytest.raises(ValueError, match="lengths has 2 entries, but the plan is for 3"):
        packed.replace(lengths=packed.lengths[:2]).map(jnp.exp)
    for strange in (None, 2.5, "abc", jnp.ones(3), [[1, 2]]):
        with pytest.raises((TypeError, ValueError), match=r"lengths (must be|has)"):
            packed.replace(lengths=strange).map(jnp.exp)
        with pytest.raises((TypeError, ValueError), match=r"sorted_indices (must be|has)"):
            packed.replace(sorted_indices=strange).map(jnp.exp)
    np.testing.assert_array_equal(packed.replace(lengths=LENGTHS).map(jnp.exp).data, packed.map(jnp.exp).data)
    with pytest.raises(ValueError, match=r"lengths\[0\] = 6 does not fit"):
        packed.replace(lengths=jnp.array([6, 4, 1])).map(jnp.exp)


def test_leaves_may_be_anything_a_pytree_holds():
    hollow = PackedSequence(None, None, object(), object(), plan_buckets([3]))  # type: ignore[arg-type]
    structure: Any = jax.tree.structure(hollow)
    assert structure == jax.tree.structure(jax.tree.map(lambda leaf: leaf, hollow))


def test_complex_infinities_are_not_poisoned():
    packed = pack_padded_sequence(np.array([[np.inf + 0j, 1 + 2j]], np.complex64), [2], True)
    np.testing.assert_array_equal(packed.data, np.array([np.inf + 0j, 1 + 2j], np.complex64))


def test_an_exported_function_of_packed_batches_can_be_serialised(packed):
    exported = jax.export.export(jax.jit(lambda p: p.map(jnp.tanh)))(packed)
    restored = jax.export.deserialize(exported.serialize())
    result = restored.call(packed)
    assert result.plan == packed.plan
    np.testing.assert_allclose(result.data, packed.map(jnp.tanh).data, rtol=1e-6)


def test_checkify_names_a_length_beyond_the_array():
    @jax.jit
    def run(lengths):
        return pack_padded_sequence(jnp.ones((3, 4), int), lengths, True, plan=LOOSE).data

    error, _ = checkify.checkify(run)(jnp.array([2, 5, 3]))
    with pytest.raises(
        checkify.JaxRuntimeError, match=r"lengths\[1\] = -5 does not fit .* longer than its padded batch"
    ):
        error.throw()


def by_hand(lengths, plan, data=None):
    """A batch of lengths alone, without packing anything."""
    return PackedSequence(data, lengths, None, None, plan)  # type: ignore[arg-type]


def captions_of(packed):
    figure = ElementTree.fromstring(packed._repr_html_())
    assert len(figure.findall("svg")) == 1
    lines = figure.find("figcaption")
    assert lines is not None
    return [line.text for line in lines]


@given(lengths_and_plan())
def test_picture_is_that_of_the_plan_and_the_lengths(drawn):
    lengths, plan = drawn
    for array in (np.array(lengths, np.int32), np.array(lengths, np.uint8)):
        assert by_hand(array, plan).picture() == plan.picture(lengths)
    assert f"{sum(lengths) / plan.size:.1%} real" in captions_of(by_hand(array, plan))[1]


def test_picture_takes_the_size_of_the_plans(packed):
    assert packed.picture() == "████░\n██░\n█░░"
    assert packed.picture(columns=3, lines=1) == LOOSE.picture(LENGTHS, columns=3, lines=1) == "█░"


def test_picture_marks_the_room_of_misfits():
    assert by_hand(np.array([9, -1, 2]), LOOSE).picture() == "!!!!!\n██░\n!!!"
    assert by_hand(np.array([-(2**31), 4, 4], np.int32), LOOSE).picture() == "████░\n!!!\n!!!"


def test_notebooks_show_what_a_batch_holds(packed):
    assert captions_of(packed) == [
        "PackedSequence: data float32[11,2]",
        "3 sequences, 7 tokens in 11 cells (63.6% real), 2 buckets",
    ]
    several = packed.replace(data={"x": packed.data, "<gaps>": packed.data[:, 0]})
    assert captions_of(several)[0] == "PackedSequence: data['<gaps>'] float32[11], data['x'] float32[11,2]"
    many = packed.replace(data=[packed.data] * 10)
    assert captions_of(many)[0].endswith("data[7] float32[11,2] and 2 more")


def test_notebooks_name_misfits_and_count_none_of_their_cells(packed):
    lines = captions_of(packed.replace(lengths=jnp.array([1, -4, 6])))
    assert lines[1:] == [
        "3 sequences, 1 token in 11 cells (9.1% real), 2 buckets",
        "Do not fit the plan: lengths[2] = 6 (room 5), lengths[1] = -4 (room 3)",
    ]


def test_pictures_of_traced_batches_are_those_of_the_plan(packed):
    seen = []

    def look(packed):
        seen.append((packed.picture(), captions_of(packed)[1]))
        return packed.data.sum()

    jax.jit(look)(packed)
    jax.jit(jax.grad(look, allow_int=True))(packed)
    jax.vmap(look)(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), packed))
    assert {picture for picture, _ in seen} == {LOOSE.picture()}
    assert {line for _, line in seen} == {"3 sequences, 11 cells, 2 buckets; lengths int32[3], without values here"}
    assert len(seen) == 3


def deleted_lengths():
    lengths = jnp.array([3, 2, 1])
    lengths.delete()
    return lengths


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        lambda: 0,
        lambda: "<script>" * 100,
        lambda: [1, 2, 3],
        object,
        lambda: np.float32,
        lambda: np.array([1.0, 2.0, 3.0]),
        lambda: np.array([True, False, True]),
        lambda: np.array(["<a>", "b", "c"]),
        lambda: np.ones((2, 3), int),
        lambda: np.array(3),
        lambda: jax.ShapeDtypeStruct((3,), jnp.int32),
        lambda: jax.sharding.PartitionSpec("<batch>"),
        lambda: jax.random.split(jax.random.key(0), 3),
        deleted_lengths,
    ],
)
def test_pictures_and_repr_take_any_leaf(make):
    leaf = make()
    strange = PackedSequence({"<a>": leaf}, leaf, leaf, leaf, LOOSE)
    assert strange.picture() == LOOSE.picture()
    named, known = captions_of(strange)
    assert known.endswith("without values here")
    assert len(named) < 150
    assert "<script" not in strange._repr_html_()
    assert repr(strange).startswith("PackedSequence(data={'<a>': ")


# Index leaves that do not agree.


def test_checkify_names_indices_that_do_not_belong_together(packed):
    run = checkify.checkify(jax.jit(lambda p: segment_sum(jax.tree.map(jnp.add, p, p))))
    error, _ = run(packed)
    with pytest.raises(checkify.JaxRuntimeError, match=r"do not belong together: .* packed \+ other"):
        error.throw()


def test_pytorchs_constructor_call_names_the_alternative(packed):
    for arguments in ((packed.data, packed.batch_sizes), (packed.data, packed.batch_sizes, packed.sorted_indices)):
        with pytest.raises(TypeError, match=r"write packed\.map\(fn\), or packed\.replace"):
            PackedSequence(*arguments)


# Arithmetic and functions of several batches.


@pytest.mark.parametrize("plan", [LOOSE, BucketPlan((6,), (2,), ((0,), (0, 3)))])
def test_arithmetic_is_step_by_step(plan):
    batch = oracles.random_batch(LENGTHS, 2, dtype=np.float32)
    packed = pack_padded_sequence(batch, LENGTHS, True, plan=plan)
    row, scalar = np.array([2.0, -1.0], np.float32), 3.0
    cases = {
        "batches": (lambda p: p * p + p, batch * batch + batch),
        "a row of features": (lambda p: p - row, batch - row),
        "a row on the left": (lambda p: row / p, row / batch),
        "a JAX array on the left": (lambda p: jnp.asarray(row) * p, row * batch),
        "a number": (lambda p: scalar - p / 2, scalar - batch / 2),
        "a NumPy number": (lambda p: np.float32(2) * p, 2 * batch),
        "the negative": (lambda p: -p, -batch),
    }

    @jax.jit
    def run(packed):
        results = {name: case(packed) for name, (case, _) in cases.items()}
        steps = batch.shape[1]
        return results, {
            name: jaxpack.pad_packed_sequence(each, True, np.nan, total_length=steps)[0]
            for name, each in results.items()
        }

    results, padded = run(packed)
    slack = ~np.asarray(packed.mask)
    for name, (_, expected) in cases.items():
        np.testing.assert_allclose(padded[name], expected, rtol=1e-6, err_msg=name)
        assert (np.asarray(results[name].data)[slack] == 0).all()


def test_a_division_by_slack_is_inert_in_gradients(packed):
    dirty = packed.replace(data=jnp.where(packed.mask[:, None], packed.data, 0))
    gradient = jax.jit(jax.grad(lambda data: (1 / dirty.replace(data=data)).data.sum()))(dirty.data)
    np.testing.assert_allclose(gradient, jnp.where(packed.mask[:, None], -1 / packed.data**2, 0), rtol=1e-5)


def test_arithmetic_of_pytrees_is_leaf_by_leaf(packed):
    pair = packed.replace(data={"x": packed.data, "y": 2 * packed.data})
    np.testing.assert_array_equal((pair + pair).data["y"], 4 * packed.data)


def test_map_takes_others(packed):
    product = packed.map(lambda a, b, c: a * b + c, packed, 2 * packed)
    np.testing.assert_allclose(product.data, packed.data**2 + 2 * packed.data, rtol=1e-6)


OTHER_LENGTHS = pack_padded_sequence(jnp.ones((3, 5, 2)), [3, 4, 1], True, plan=LOOSE)
OTHER_PLAN = pack_padded_sequence(jnp.ones((3, 5, 2)), LENGTHS, True, plan=BucketPlan((5,), (3,)))


@pytest.mark.parametrize("combine", [lambda a, b: a + b, lambda a, b: a.map(jnp.add, b)])
def test_batches_of_other_sequences_are_refused(packed, combine):
    with pytest.raises(ValueError, match=r"has the lengths \[3 4 1\], .* has \[2 4 1\]"):
        combine(packed, OTHER_LENGTHS)
    with pytest.raises(ValueError, match=r"has the plan .* Pack both under one"):
        combine(packed, OTHER_PLAN)
    sums = jax.jit(lambda a, b: segment_sum(combine(a, b)))(packed, OTHER_LENGTHS)
    assert np.isnan(sums).any(1).tolist() == [True, False, False]


def test_arrays_without_the_shape_of_a_step_are_refused(packed):
    for array in (np.ones(3), np.ones((11, 2)), jnp.ones((1, 2))):
        with pytest.raises(ValueError, match=r"broadcast to the shape of one step, \(2,\), .*broadcast_to_steps"):
            packed * array
    with pytest.raises(TypeError, match="takes a PackedSequence, got"):
        packed.map(jnp.add, packed.data)
    with pytest.raises(TypeError, match="unsupported operand"):
        packed + "a"


# Statistics over cells.

NORM_PLANS = [LOOSE, BucketPlan((6,), (2,), ((0,), (0, 3)))]


@pytest.mark.parametrize("plan", NORM_PLANS)
def test_flax_normalisations_see_real_cells_alone(plan):
    batch = oracles.random_batch(LENGTHS, 2, dtype=np.float32)
    real = np.concatenate([row[:n] for row, n in zip(batch, LENGTHS, strict=True)])
    packed = poisoned(pack_padded_sequence(batch, LENGTHS, True, plan=plan))
    expected = (batch - real.mean(0)) / np.sqrt(real.var(0) + 1e-5)

    module = linen.BatchNorm(use_running_average=False, momentum=0.0)
    variables = module.init(jax.random.key(0), batch[:, 0])

    @jax.jit
    def run(packed):
        norm, layer = nnx.BatchNorm(2, momentum=0.0, rngs=nnx.Rngs(0)), nnx.LayerNorm(2, rngs=nnx.Rngs(0))
        normalised = packed.map(norm, pass_mask=True)
        statistics = []

        def call(x, mask):
            y, state = module.apply(variables, x, mask=mask, mutable="batch_stats")
            statistics.append(state["batch_stats"]["mean"])
            return y

        of_linen = packed.map(call, pass_mask=True)
        padded, _ = jaxpack.pad_packed_sequence(normalised, True, np.nan, total_length=4)
        means = norm.mean[...], statistics[0]
        return padded, normalised, of_linen, means, norm.var[...], packed.map(layer, pass_mask=True), packed.map(layer)

    padded, normalised, of_linen, means, variance, masked_layer, layer = run(packed)
    np.testing.assert_allclose(padded, expected, rtol=1e-4, atol=1e-5)
    for mean in means:
        np.testing.assert_allclose(mean, real.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, real.var(0), rtol=1e-5)
    np.testing.assert_allclose(of_linen.data, normalised.data, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(masked_layer.data, layer.data, rtol=1e-5, atol=1e-6)


def test_masks_are_given_array_by_array(packed):
    several = packed.replace(data={"x": packed.data, "gaps": packed.data[:, 0]})
    seen = []

    def look(data, mask):
        seen.append(mask)
        return data

    several.map(look, pass_mask=True)
    np.testing.assert_array_equal(seen[0]["gaps"], packed.mask)
    np.testing.assert_array_equal(seen[0]["x"], jnp.stack([packed.mask] * 2, 1))
