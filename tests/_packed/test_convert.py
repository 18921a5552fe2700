"""PyTorch's six functions and reverse_sequences: layout, round trips, dtypes, padding values and errors."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import checkify

from jaxpack import (
    BucketPlan,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    pad_sequence,
    plan_buckets,
    plan_exact,
    plan_padded,
    reverse_sequences,
    unpack_sequence,
    unpad_sequence,
)
from jaxpack._packed.layout import lay_out
from jaxpack.serving import counted_compilations

SEED = [4, 6, 8, 5, 4, 3, 7, 8]
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int8", "bool", "complex64"])
feature_shapes = st.sampled_from([(), (2,), (1, 3)])


def batch_of(lengths, features=(), dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(1, 100, (len(lengths), max(lengths), *features)).astype(dtype)


def test_a_concrete_batch_can_be_padded_inside_jit():
    packed = pack_sequence([jnp.arange(3.0), jnp.arange(2.0)])
    padded, _ = jax.jit(lambda: pad_packed_sequence(packed, batch_first=True))()
    assert padded.tolist() == [[0, 1, 2], [0, 1, 0]]


def test_the_readme_example():
    packed = pack_padded_sequence([[1, 2, 3], [3, 4, 0]], lengths=[3, 2], batch_first=True)
    assert packed.data.tolist() == [1, 3, 2, 4, 3]
    assert packed.batch_sizes.tolist() == [2, 2, 1]


def test_45_cells_where_padding_needs_64():
    packed = pack_padded_sequence(batch_of(SEED), SEED, batch_first=True)
    assert packed.data.shape == (45,)
    assert packed.plan == plan_exact(SEED)


@given(strategies.positive_lengths, feature_shapes)
def test_exact_packing_is_pytorchs_layout(lengths, features):
    batch = batch_of(lengths, features)
    packed = pack_sequence([row[:n] for row, n in zip(batch, lengths, strict=True)])  # in NumPy: no program a plan
    data, batch_sizes = oracles.pack(batch, lengths)
    np.testing.assert_array_equal(packed.data, data)
    assert packed.batch_sizes.tolist() == batch_sizes


@pytest.mark.parametrize("lengths", [SEED, [2, 5, 2, 1, 5]])
def test_exact_packing_of_a_padded_batch_is_pytorchs_layout(lengths):
    batch = {"x": batch_of(lengths), "y": batch_of(lengths, (2,)), "z": batch_of(lengths, (1, 3))}
    packed = pack_padded_sequence(batch, lengths, batch_first=True)
    for name, leaf in batch.items():
        data, batch_sizes = oracles.pack(leaf, lengths)
        np.testing.assert_array_equal(packed.data[name], data)
        assert packed.batch_sizes.tolist() == batch_sizes


@oracles.needs_torch
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("lengths", [SEED, [3, 3, 3], [5]])
def test_byte_for_byte_as_torch(lengths, batch_first):
    rnn = oracles.torch.nn.utils.rnn
    batch = oracles.random_batch(lengths, 3, dtype=np.float32, extra=2)
    batch = batch if batch_first else batch.swapaxes(0, 1)
    ours = pack_padded_sequence(batch, lengths, batch_first)
    theirs = rnn.pack_padded_sequence(oracles.torch.tensor(batch), oracles.torch.tensor(lengths), batch_first, False)
    np.testing.assert_array_equal(ours.data, theirs.data)
    np.testing.assert_array_equal(ours.batch_sizes, theirs.batch_sizes)
    reference = rnn.pad_packed_sequence(theirs, batch_first, -1.5, max(lengths) + 1)
    result = pad_packed_sequence(ours, batch_first, -1.5, max(lengths) + 1)
    np.testing.assert_array_equal(result[0], reference[0])
    np.testing.assert_array_equal(result[1], reference[1])


@oracles.needs_torch
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_lists_of_sequences_as_torch(batch_first, side):
    torch, rnn = oracles.torch, oracles.torch.nn.utils.rnn
    rng = np.random.default_rng(0)
    sequences = [rng.standard_normal((n, 2)).astype(np.float32) for n in (3, 1, 5, 3)]
    tensors = [torch.tensor(s) for s in sequences]
    np.testing.assert_array_equal(
        pad_sequence(sequences, batch_first, 7.0, side), rnn.pad_sequence(tensors, batch_first, 7.0, side)
    )
    packed, reference = pack_sequence(sequences), rnn.pack_sequence(tensors, enforce_sorted=False)
    np.testing.assert_array_equal(packed.data, reference.data)
    for ours, theirs in zip(unpack_sequence(packed), rnn.unpack_sequence(reference), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    padded = pad_sequence(sequences, batch_first)
    lengths = [len(s) for s in sequences]
    for ours, theirs in zip(unpad_sequence(padded, lengths, batch_first), sequences, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def batch_under(lengths):
    """A padded batch for a fixed plan: arrays of several shapes."""
    return {
        name: batch_of([*lengths, strategies.LONGEST], features)[:-1]
        for name, features in (("x", ()), ("y", (2,)), ("z", (1, 3)))
    }


@jax.jit
def pad_minus_one(packed):
    return pad_packed_sequence(packed, batch_first=True, padding_value=-1)


@given(strategies.fixed_plan_and_lengths())
def test_pack_and_pad_round_trip(plan_and_lengths):
    plan, lengths = plan_and_lengths
    batch = batch_under(lengths)
    packed = pack_padded_sequence(batch, lengths, batch_first=True, plan=plan)
    padded, returned = pad_minus_one(packed)
    assert returned.tolist() == lengths
    assert returned.dtype == jnp.int32
    real, slack = np.arange(plan.max_length) < np.array(lengths)[:, None], ~np.asarray(packed.mask)
    for name, leaf in batch.items():
        assert padded[name].shape == (len(lengths), plan.max_length, *leaf.shape[2:])
        found = np.asarray(padded[name])
        np.testing.assert_array_equal(found[real], leaf[real])
        assert (found[~real] == -1).all()
        assert (np.asarray(packed.data[name])[slack] == 0).all()


@given(strategies.fixed_plan_and_lengths())
def test_lists_and_padded_batches_are_packed_alike(plan_and_lengths):
    plan, lengths = plan_and_lengths
    batch = batch_under(lengths)
    sequences = [jax.tree.map(lambda leaf, b=b, n=n: leaf[b, :n], batch) for b, n in enumerate(lengths)]
    on_host = pack_sequence(sequences, plan=plan)
    packed = pack_padded_sequence(batch, lengths, batch_first=True, plan=plan)
    jax.tree.map(np.testing.assert_array_equal, on_host, packed)


@given(strategies.lengths_and_plan(), feature_shapes)
def test_sequences_round_trip(lengths_and_plan, features):
    lengths, plan = lengths_and_plan
    sequences = [batch_of([n], features, seed=n)[0] for n in lengths]
    packed = pack_sequence(sequences, plan=plan)
    for ours, sequence in zip(unpack_sequence(packed), sequences, strict=True):
        np.testing.assert_array_equal(ours, sequence)


def test_a_batch_is_taken_apart_by_a_program_for_each_length():
    programs = []
    for lengths in ([3, 4, 5] * 4, [3] * 16, [4, 5, 3, 3, 3] * 2 + [3] * 4):  # 48 cells each
        packed = pack_sequence([jnp.ones(length) for length in lengths])
        with counted_compilations() as compiled:
            sequences = unpack_sequence(packed)
        assert [len(sequence) for sequence in sequences] == lengths
        programs.append(len(compiled))
    assert programs[1:] == [0, 0]


@given(strategies.fixed_plan_and_lengths())
def test_reversing_spans_equals_numpy_and_is_an_involution(plan_and_lengths):
    plan, lengths = plan_and_lengths
    batch = batch_under(lengths)
    packed = pack_padded_sequence(batch, lengths, batch_first=True, plan=plan)
    reversed_ = reverse_sequences(packed)
    backwards = jax.tree.map(lambda leaf: oracles.reverse(leaf, lengths), batch)
    expected = pack_padded_sequence(backwards, lengths, batch_first=True, plan=plan)
    jax.tree.map(np.testing.assert_array_equal, reversed_.data, expected.data)
    jax.tree.map(np.testing.assert_array_equal, reverse_sequences(reversed_).data, packed.data)


@dtypes
def test_any_dtype_can_be_packed(dtype):
    batch = jnp.asarray(batch_of([3, 2], (2,))).astype(dtype)
    packed = pack_padded_sequence(batch, [3, 2], batch_first=True)
    assert packed.dtype == dtype
    padded, _ = pad_packed_sequence(packed, batch_first=True)
    assert padded.dtype == dtype
    np.testing.assert_array_equal(padded[1, :2], batch[1, :2])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["float64", "int64"])
def test_wide_dtypes_stay_and_index_leaves_are_int32(dtype):
    packed = pack_padded_sequence(batch_of([3, 2]).astype(dtype), np.array([3, 2], np.int64), batch_first=True)
    assert packed.dtype == dtype
    leaves = (packed.lengths, packed.sorted_indices, packed.unsorted_indices)
    assert {leaf.dtype.name for leaf in leaves} == {"int32"}


def test_lengths_of_any_integer_dtype_make_one_program():
    batch, traces = jnp.ones((2, 4)), []

    @jax.jit
    def run(packed):
        traces.append(packed)
        return packed.data.sum()

    for lengths in ([4, 2], np.array([3, 1], np.uint8), np.array([3, 1], np.int64), jnp.array([2, 2], jnp.int16)):
        run(pack_padded_sequence(batch, lengths, True, plan=plan_padded(2, 4)))
    assert len(traces) == 1


@pytest.mark.parametrize("plan", [BucketPlan((2, 4), (3, 2)), BucketPlan((6,), (2,), ((0, 4), (0,)))])
def test_one_program_for_all_lengths_under_a_plan(plan):
    traces = []

    @jax.jit
    def run(batch, lengths):
        traces.append(lengths)
        packed = pack_padded_sequence(batch, lengths, batch_first=True, plan=plan)
        return pad_packed_sequence(reverse_sequences(packed), batch_first=True)

    for lengths in ([4, 4, 2], [1, 2, 3], [0, 0, 0]):
        batch = oracles.random_batch(lengths, 2, dtype=np.float32)
        batch = np.pad(batch, ((0, 0), (0, 4 - batch.shape[1]), (0, 0)))
        padded = run(batch, jnp.array(lengths))[0][:, :4]
        expected = np.nan_to_num(oracles.reverse(batch, lengths))
        np.testing.assert_array_equal(padded, expected)
    assert len(traces) == 1


@pytest.mark.parametrize("ones", [np.ones, jnp.ones])
def test_lists_of_any_lengths_are_packed_and_taken_apart_without_a_program(ones):
    plan = plan_padded(2, 23)
    for lengths in ([3, 1], [23, 2], [5, 5]):
        sequences = [jax.block_until_ready(ones((n, 29), np.float32)) for n in lengths]
        with counted_compilations() as compiled:
            packed = jax.block_until_ready(pack_sequence(sequences, plan=plan))
            again = unpack_sequence(packed)
        assert not compiled
        assert [sequence.sum() for sequence in again] == [29 * n for n in lengths]
        assert packed.mask.sum() == sum(lengths)


def test_lists_of_arrays_on_a_chosen_device_are_one_program_under_a_plan():
    plan, device, program = plan_padded(2, 17), jax.devices()[1], cast(Any, lay_out)
    before = program._cache_size()
    for lengths in ([3, 1], [17, 2], [5, 5]):
        packed = pack_sequence([jax.device_put(np.ones((n, 19), np.float32), device) for n in lengths], plan=plan)
        assert packed.data.devices() == {device}
        assert [sequence.shape for sequence in unpack_sequence(packed)] == [(n, 19) for n in lengths]
    assert program._cache_size() == before + 1


def test_pytrees_are_packed_leaf_by_leaf():
    batch = {"x": batch_of([3, 2], (2,)), "gaps": batch_of([3, 2], seed=1)}
    packed = pack_padded_sequence(batch, [3, 2], batch_first=True)
    assert packed.data["x"].shape == (5, 2)
    np.testing.assert_array_equal(
        packed.data["gaps"], pack_padded_sequence(batch["gaps"], [3, 2], batch_first=True).data
    )
    first, second = unpack_sequence(packed)
    np.testing.assert_array_equal(second["x"], batch["x"][1, :2])
    again = pack_sequence([first, second])
    np.testing.assert_array_equal(again.data["x"], packed.data["x"])


@pytest.mark.parametrize("plan", [None, BucketPlan((2, 5), (3, 2))])
def test_padding_is_inert_to_nan_in_values_and_gradients(plan):
    lengths = [2, 3, 1]
    dirty = oracles.random_batch(lengths, 2, dtype=np.float32, extra=2)

    def loss(batch):
        packed = pack_padded_sequence(batch, lengths, batch_first=True, plan=plan)
        return (pad_packed_sequence(reverse_sequences(packed))[0] ** 2).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(dirty)
    assert value == pytest.approx(np.nansum(dirty**2), rel=1e-5)
    np.testing.assert_allclose(gradient, 2 * np.nan_to_num(dirty), rtol=1e-6)


@pytest.mark.parametrize("plan", [BucketPlan((2, 5), (3, 2)), BucketPlan((5,), (2,), ((0,), (0, 3)))])
def test_a_nan_cotangent_in_padding_reaches_nothing(plan):
    lengths = [2, 3, 1]
    packed = pack_padded_sequence(jnp.ones((3, 5, 2)), lengths, batch_first=True, plan=plan)

    @jax.jit
    def pull_back(data, cotangent):
        return jax.vjp(lambda data: pad_packed_sequence(packed.replace(data=data), True)[0], data)[1](cotangent)

    real = np.arange(5)[None, :, None] < np.array(lengths)[:, None, None]
    (gradient,) = pull_back(packed.data, jnp.asarray(np.where(real, [1, 1], np.nan), jnp.float32))
    np.testing.assert_array_equal(gradient, packed.mask[:, None] * np.ones(2))


def test_total_length_below_the_plan_is_legal_and_a_longer_sequence_a_misfit():
    plan = BucketPlan((2, 5), (3, 2))
    packed = pack_padded_sequence(jnp.ones((3, 5)), [2, 3, 1], batch_first=True, plan=plan)
    assert pad_packed_sequence(packed, True, total_length=3)[0].tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    with pytest.raises(ValueError, match="total_length=2 and max sequence length being 3"):
        pad_packed_sequence(packed, total_length=2)
    padded = jax.jit(lambda p: pad_packed_sequence(p, True, total_length=2)[0])(packed)
    assert np.isnan(padded[1]).all()
    assert padded[0].tolist() == [1, 1]


def test_total_length_beyond_the_plan_pads():
    packed = pack_padded_sequence(jnp.ones((2, 3)), [2, 1], batch_first=True)
    assert pad_packed_sequence(packed, True, 9, 4)[0].tolist() == [[1, 1, 9, 9], [1, 9, 9, 9]]


@pytest.mark.parametrize("plan", [BucketPlan((2, 4), (3, 1)), BucketPlan((4,), (2,), ((0,), (0, 2)))])
def test_misfits_are_poisoned_when_padded_and_others_are_not(plan):
    run = jax.jit(lambda n: pad_packed_sequence(pack_padded_sequence(jnp.ones((3, 4)), n, True, plan=plan), True)[0])
    padded = run(jnp.array([2, 3, 4]))
    assert np.isnan(padded[1]).all()
    assert padded[0].tolist() == [1, 1, 0, 0]
    assert padded[2].tolist() == [1, 1, 1, 1]


@pytest.mark.optimized(code=False)
@pytest.mark.parametrize(
    "outputs", [lambda packed: pad_packed_sequence(packed, batch_first=True)[0], lambda p: reverse_sequences(p).data]
)
def test_a_loss_of_outputs_keeps_one_array_of_their_size(outputs):
    packed = pack_padded_sequence(jnp.ones((40, 40, 16)), np.arange(1, 41), batch_first=True)
    cotangent = jnp.ones_like(outputs(packed))

    def loss(data, packed, cotangent):
        return jnp.sum(outputs(packed.replace(data=data)) * cotangent)

    program = jax.jit(jax.value_and_grad(loss)).lower(packed.data, packed.replace(data=None), cotangent).compile()
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 1.5 * cotangent.nbytes


def test_length_zero_is_legal_with_a_plan():
    plan = plan_buckets([3, 0, 0])
    packed = pack_padded_sequence(jnp.ones((3, 3)), [0, 3, 0], batch_first=True, plan=plan)
    assert pad_packed_sequence(packed, True)[0].tolist() == [[0] * 3, [1] * 3, [0] * 3]
    assert [len(s) for s in unpack_sequence(packed)] == [0, 3, 0]
    assert [len(s) for s in unpack_sequence(pack_sequence([jnp.ones((0, 2))] * 2, plan=plan_padded(2, 1)))] == [0, 0]


def test_enforce_sorted_checks_concrete_lengths_only():
    assert pack_padded_sequence(jnp.ones((2, 3)), [3, 2], True, True).sorted_indices.tolist() == [0, 1]
    with pytest.raises(ValueError, match="must be sorted in decreasing order"):
        pack_padded_sequence(jnp.ones((2, 3)), [2, 3], True, True)
    with pytest.raises(ValueError, match="must be sorted in decreasing order"):
        pack_sequence([jnp.ones(2), jnp.ones(3)], True)
    run = jax.jit(lambda n: pack_padded_sequence(jnp.ones((2, 3)), n, True, True, plan=plan_padded(2, 3)))
    assert run(jnp.array([2, 3])).sorted_indices.tolist() == [1, 0]


def test_the_sort_is_stable():
    packed = pack_padded_sequence(jnp.ones((5, 3)), [1, 2, 2, 1, 3], batch_first=True)
    assert packed.sorted_indices.tolist() == [4, 1, 2, 0, 3]


def test_arguments_are_not_changed():
    batch, lengths = batch_of([3, 2]), np.array([3, 2])
    before = batch.copy(), lengths.copy()
    pack_padded_sequence(batch, lengths, batch_first=True)
    unpad_sequence(batch, lengths, batch_first=True)
    np.testing.assert_array_equal(batch, before[0])
    np.testing.assert_array_equal(lengths, before[1])


def test_pad_sequence_of_integers_keeps_them():
    padded = pad_sequence([np.array([1, 2], np.int8), np.array([3], np.int8)], batch_first=True)
    assert padded.tolist() == [[1, 2], [3, 0]]
    assert padded.dtype == jnp.int8


def test_sequences_are_differentiable_with_concrete_lengths():
    def loss(a, b):
        packed = pack_sequence([a, b])
        return sum((s**2).sum() for s in unpack_sequence(packed)) + pad_sequence([a, b]).sum()

    gradients = jax.grad(loss, (0, 1))(jnp.ones((2, 1)), jnp.full((3, 1), 2.0))
    np.testing.assert_array_equal(gradients[0], np.full((2, 1), 3))
    np.testing.assert_array_equal(gradients[1], np.full((3, 1), 5))


BATCH = jnp.ones((2, 3, 1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pack_padded_sequence(BATCH, [3], True), ValueError, "1 lengths for a batch of 2.*batch_first"),
        (lambda: pack_padded_sequence(BATCH, [3, 4], True), ValueError, r"lengths\[1\] = 4 is longer .* 3 steps"),
        (lambda: pack_padded_sequence(BATCH, [3, 0], True), ValueError, "has to be greater than 0"),
        (lambda: pack_padded_sequence(BATCH, [3, -1], True), ValueError, "negative"),
        (lambda: pack_padded_sequence(BATCH, [3, 1.5], True), ValueError, "whole numbers"),  # type: ignore[list-item]
        (lambda: pack_padded_sequence(BATCH, [[3, 1]], True), ValueError, "vector"),  # type: ignore[list-item]
        (lambda: pack_padded_sequence(jnp.ones(3), [3], True), ValueError, r"batch and a time axis.*\(3,\)"),
        (lambda: pack_padded_sequence({}, [3], True), ValueError, "input holds no array"),
        (
            lambda: pack_padded_sequence({"a": BATCH, "b": BATCH[:, :2]}, [2, 2], True),
            ValueError,
            r"same batch and time axes, got \[B, T\] = \(2, 3\) and \(2, 2\)",
        ),
        (
            lambda: pack_padded_sequence(BATCH, [3, 2], True, plan=plan_padded(3, 3)),
            ValueError,
            "plan is for 3 sequences, but the batch has 2: append sequences of length 0",
        ),
        (
            lambda: pack_padded_sequence(BATCH, [3, 2], True, plan=plan_padded(2, 2)),
            ValueError,
            r"lengths\[0\] = 3 does not fit the plan: its row has room for 2 steps. Use a plan that covers it",
        ),
        (lambda: pack_padded_sequence(BATCH, [3, 2], True, plan=(3,)), TypeError, "plan must be a jaxpack.BucketPlan"),  # type: ignore[arg-type]
        (
            lambda: jax.jit(lambda n: pack_padded_sequence(BATCH, n, True))(jnp.array([3, 2])),
            TypeError,
            "lengths are traced, so the plan must be given.*plan_buckets",
        ),
        (
            lambda: jax.jit(lambda n: pack_padded_sequence(BATCH, n, True, plan=plan_padded(2, 3)))(jnp.ones(2)),
            TypeError,
            "traced lengths must be integers, got dtype float32",
        ),
        (lambda: pad_packed_sequence(BATCH), TypeError, "takes a PackedSequence, got .*pack_padded_sequence"),  # type: ignore[arg-type]
        (lambda: unpack_sequence(BATCH), TypeError, "takes a PackedSequence"),  # type: ignore[arg-type]
        (lambda: reverse_sequences(BATCH), TypeError, "takes a PackedSequence"),  # type: ignore[arg-type]
        (
            lambda: pad_packed_sequence(pack_sequence([jnp.ones(2)]), total_length=2.5),  # type: ignore[arg-type]
            TypeError,
            "total_length must be an int, got 2.5",
        ),
        (lambda: pack_sequence([]), ValueError, "sequences is empty"),
        (lambda: pack_sequence({"a": BATCH}), TypeError, "list of arrays, got dict"),
        (lambda: pack_sequence(3), TypeError, "list of arrays, got int"),  # type: ignore[arg-type]
        (
            lambda: pack_padded_sequence([[1, 2], [3]], [2, 1], True),
            ValueError,
            "rows have different lengths.*pack_seq",
        ),
        (lambda: pack_padded_sequence(jnp.ones(3), [3]), ValueError, r"batch and a time axis.*\(3,\)"),
        (lambda: pack_padded_sequence(BATCH, None, True), TypeError, "got None"),  # type: ignore[arg-type]
        (lambda: pad_packed_sequence(pack_sequence([[1]]), padding_value=[1, 2]), ValueError, "one number"),  # type: ignore[arg-type]
        (
            lambda: pack_sequence([jnp.ones((2, 1)), jnp.ones((2, 3))]),
            ValueError,
            r"sequences\[1\] has features of shape \(3,\), others \(1,\)",
        ),
        (lambda: pad_sequence([jnp.ones(2)], padding_side="top"), ValueError, 'padding_side must be "left" or "right"'),
        (lambda: unpad_sequence(BATCH, [3, 4], True), ValueError, r"lengths\[1\] = 4 is longer"),
        (
            lambda: jax.jit(lambda n: unpad_sequence(BATCH, n, True))(jnp.array([3, 2])),
            TypeError,
            "unpad_sequence needs concrete lengths.*outside jit",
        ),
        (
            lambda: jax.jit(unpack_sequence)(pack_sequence([jnp.ones(2)])),
            TypeError,
            "unpack_sequence needs concrete lengths",
        ),
    ],
)
def test_errors_name_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_packing_across_an_explicit_mesh_says_where_to_pack():
    mesh = jax.make_mesh((1,), ("data",))
    with jax.set_mesh(mesh):
        batch = jax.device_put(jnp.ones((2, 3)), jax.NamedSharding(mesh, jax.P("data")))
        with pytest.raises(ValueError, match=r"sharded over its batch axis.*jax.shard_map"):
            pack_padded_sequence(batch, [3, 2], batch_first=True)


def test_checkify_names_a_length_above_total_length():
    packed = pack_padded_sequence(jnp.arange(5)[None], [5], True, plan=plan_padded(1, 5))
    error, _ = checkify.checkify(jax.jit(lambda p: pad_packed_sequence(p, total_length=2)[0]))(packed)
    with pytest.raises(checkify.JaxRuntimeError, match=r"lengths\[0\] = 5 is above total_length = 2"):
        error.throw()


@oracles.needs_torch
def test_torch_tensors_are_taken_everywhere():
    torch = oracles.torch
    tensors = [torch.randn(3, 2, requires_grad=True), torch.randn(1, 2)]
    packed = pack_sequence(tensors)
    np.testing.assert_array_equal(packed.data, torch.nn.utils.rnn.pack_sequence(tensors).data.detach())
    padded = torch.randn(2, 3, 2, dtype=torch.bfloat16)
    again = pack_padded_sequence(padded, torch.tensor([3, 1]), batch_first=True)
    assert again.dtype == jnp.bfloat16
    assert len(unpad_sequence(padded, torch.tensor([3, 1]), batch_first=True)) == 2


def test_sequences_may_come_from_any_iterable():
    rows = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(pad_sequence(rows, batch_first=True), rows)
    np.testing.assert_array_equal(pad_sequence((row for row in rows), batch_first=True), rows)


def test_an_empty_list_is_a_sequence_of_what_the_others_hold():
    packed = pack_sequence([[], [[1, 2]], []], plan=BucketPlan((2,), (3,)))
    assert packed.dtype == jnp.int32
    assert [s.shape for s in unpack_sequence(packed)] == [(0, 2), (1, 2), (0, 2)]


# Values reach a batch as they were given.


@pytest.mark.parametrize(
    "pad",
    [
        lambda value, dtype: pad_packed_sequence(pack_sequence([np.ones(2, dtype), np.ones(1, dtype)]), True, value)[0],
        lambda value, dtype: pad_sequence([np.ones(2, dtype), np.ones(1, dtype)], True, value),
        lambda value, dtype: pad_sequence([jnp.ones(2, dtype), jnp.ones(1, dtype)], True, value),
    ],
)
def test_padding_is_the_value_given_or_an_error(pad):
    held = [(-1, "int32"), (-1.0, "int8"), (np.inf, "float32"), (np.nan, "bfloat16"), (0.1, "float16"), (True, "bool")]
    for value, dtype in (*held, (2j, "complex64"), (np.int64(7), "uint8")):
        padded = pad(value, dtype)
        assert padded.dtype == dtype
        np.testing.assert_array_equal(complex(padded[1, 1]), complex(np.asarray(value).astype(dtype)))
    for value, dtype in [(np.nan, "int32"), (-np.inf, "int8"), (0.5, "int32"), (-1, "uint8"), (300, "uint8"),
                         (2**31, "int32"), (10**30, "int32"), (2, "bool"), (1e300, "float32"), (70000, "float16"),
                         (1j, "float32")]:  # fmt: skip
        with pytest.raises(ValueError, match=rf"padding_value .* cannot be held by data of dtype {dtype}"):
            pad(value, dtype)


def test_traced_padding_of_another_kind_is_an_error():
    packed = pack_sequence([np.ones(2, int), np.ones(1, int)])
    run = jax.jit(lambda value: pad_packed_sequence(packed, True, value)[0])
    assert run(7)[1, 1] == 7
    with pytest.raises(ValueError, match="of dtype float32 cannot be held by data of dtype int32"):
        run(0.5)


FUNCTIONS = [
    lambda a, b: pack_sequence([a, b]).data,
    lambda a, b: pack_sequence([{"x": a}, {"x": b}]).data["x"],
    lambda a, b: pad_sequence([a, b]),
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_dtypes_are_promoted_as_by_jax_and_values_kept(function):
    wide = [(np.int16, np.int32), (np.uint8, np.int8), (np.int32, np.float32), (bool, np.float32)]
    for first, second in wide:
        for a, b in ((first, second), (second, first)):
            result = function(np.array([1, 0], a), np.array([40000 if b == np.int32 else 1], b))
            assert result.dtype == jnp.promote_types(jnp.ones(1, a).dtype, jnp.ones(1, b).dtype)
            assert sorted(np.asarray(result, float).ravel().tolist())[-1] == (40000 if b == np.int32 else 1)


@pytest.mark.parametrize(
    "function", [*FUNCTIONS, lambda a, b: pack_padded_sequence(np.stack([a[:1], b[:1]]), [1, 1], True)]
)
def test_integers_that_jax_would_wrap_are_named(function):
    with pytest.raises(ValueError, match=r"holds 1099511627776 at .*, which int32 cannot hold"):
        function(np.array([1, 0]), np.array([2**40]))


def test_host_leaves_that_jax_would_wrap_are_named():
    packed = pack_sequence([np.ones(2, int)])
    with pytest.raises(ValueError, match="holds 1099511627776"):
        packed.replace(data=np.array([1, 2**40])).map(jnp.abs)


@pytest.mark.parametrize("sequences", [[[], [1, 2, 3]], [[1, 2, 3], []], [[], np.array([1, 2, 3])]])
def test_an_empty_list_has_no_dtype_of_its_own(sequences):
    assert pack_sequence(sequences, plan=plan_padded(2, 3)).dtype == jnp.int32
    assert pad_sequence(sequences).dtype == jnp.int32


@pytest.mark.parametrize("function", [lambda rows: pack_sequence(rows), lambda rows: pad_sequence(rows)])
def test_a_reader_may_give_all_sequences_in_the_same_memory(function):
    buffer = np.zeros(3)

    def read():
        for i in range(4):
            buffer[:] = i
            yield buffer[: 1 + i % 3]

    expected = function([np.full(1 + i % 3, float(i)) for i in range(4)])
    jax.tree.map(np.testing.assert_array_equal, function(read()), expected)
