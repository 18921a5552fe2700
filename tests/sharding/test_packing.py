"""Batches dealt to shards and packed in NumPy, and results in the order of the rows again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpack
from jaxpack.data import pack_on_host
from jaxpack.sharding import in_caller_order, pack_shards, plan_shards, stack_shards

LENGTHS = [3, 1, 5, 2, 0, 4, 2, 2]
SEQUENCES = [np.arange(length) + 10 * row for row, length in enumerate(LENGTHS)]


def shard(batch, d):
    return jax.tree.map(lambda leaf: leaf[d], batch)


def test_shards_hold_every_sequence_once_under_one_plan():
    batch = pack_shards(SEQUENCES, 4)
    assert batch.inputs.plan == plan_shards(LENGTHS, 4)
    assert sorted(batch.indices.ravel().tolist()) == list(range(8))
    assert batch.weights.tolist() == [[1.0, 1.0]] * 4
    for d in range(4):
        rows = batch.indices[d]
        expected = pack_on_host([SEQUENCES[row] for row in rows], batch.inputs.plan)
        jax.tree.map(np.testing.assert_array_equal, shard(batch.inputs, d), expected)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(batch))


def test_results_come_back_in_the_order_of_the_rows():
    batch = pack_shards(SEQUENCES, 4)
    sums, padded = jax.jit(jax.vmap(lambda packed: (jaxpack.segment_sum(packed), jaxpack.pad_packed_sequence(packed))))(
        batch.inputs
    )
    data = jnp.swapaxes(padded[0], 1, 2)  # [D, B/D, T]
    sums, data, lengths = in_caller_order((sums, data, padded[1]), batch.indices)
    assert sums.tolist() == [sequence.sum() for sequence in SEQUENCES]
    assert lengths.tolist() == LENGTHS
    assert [row[:length].tolist() for row, length in zip(data, LENGTHS, strict=True)] == [s.tolist() for s in SEQUENCES]


def test_a_plan_with_further_rows_leaves_them_empty():
    plan = plan_shards([*LENGTHS, 0], 3)
    batch = pack_shards(SEQUENCES, 3, plan)
    assert batch.inputs.plan == plan
    assert sorted(batch.indices.ravel().tolist()) == [-1, *range(8)]
    np.testing.assert_array_equal(batch.weights, batch.indices >= 0)
    assert in_caller_order(batch.inputs.lengths, batch.indices).tolist() == LENGTHS


def test_leaves_of_fixed_size_travel_along_and_memory_may_be_reused():
    def examples():
        x = np.zeros((5, 2), np.float32)
        for row, length in enumerate(LENGTHS):
            x[:length] = row
            yield {"x": x[:length], "label": row}

    batch = pack_shards(examples(), 2, time_varying={"x": True, "label": False})
    np.testing.assert_array_equal(batch.inputs["label"], batch.indices)
    sums = jax.vmap(jaxpack.segment_sum)(batch.inputs["x"])
    assert in_caller_order(sums, batch.indices)[:, 0].tolist() == [r * n for r, n in enumerate(LENGTHS)]


def test_dtypes_are_promoted_over_all_shards_or_named():
    mixed = [np.ones(2, np.float32), np.ones(3, np.int32), np.ones(2, np.int32), np.ones(1, np.int32)]
    assert pack_shards(mixed, 4).inputs.dtype == np.float32
    plan = jaxpack.plan_padded(1, 3)
    shards = [pack_on_host([sequence], plan) for sequence in mixed]
    with pytest.raises(TypeError, match=r"data of shard 1 has dtype int32, but float32 in shard 0. Cast the shards"):
        stack_shards(shards)


def test_stacked_shards_are_numpy_only_where_all_are():
    plan = jaxpack.plan_padded(1, 3)
    shards = [pack_on_host([sequence], plan) for sequence in SEQUENCES[:2]]
    on_host, on_device = stack_shards(shards), stack_shards(map(jax.device_put, shards))
    assert isinstance(on_host.data, np.ndarray)
    assert isinstance(on_device.data, jax.Array)
    jax.tree.map(np.testing.assert_array_equal, on_host, on_device)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pack_shards(SEQUENCES, 3), ValueError, "8 sequences do not divide among 3 shards. Append 1"),
        (
            lambda: pack_shards(SEQUENCES, 4, plan_shards(LENGTHS, 2)),
            ValueError,
            "the plan is for 4 sequences, but 8 sequences on 4 shards are 2 each",
        ),
        (
            lambda: pack_shards(SEQUENCES, 4, jaxpack.plan_padded(2, 3)),
            ValueError,
            r"lengths\[2\] = 5 does not fit the plan: of the 1 longest .* has room for 3 steps",
        ),
        (lambda: pack_shards([], 1), ValueError, "sequences is empty"),
        (lambda: pack_shards("text", 1), TypeError, "sequences must be a list of arrays"),
        (
            lambda: pack_shards([([1], [2, 3])], 1, time_varying=("source", "target")),
            ValueError,
            "takes one time axis, but time_varying names .*SlotFilling with local_shards=1",
        ),
        (lambda: stack_shards([]), ValueError, "there are no shards"),
        (
            lambda: stack_shards([pack_on_host([[1]], jaxpack.plan_padded(1, n)) for n in (1, 2)]),
            ValueError,
            "shard 1 has another plan or structure than shard 0",
        ),
        (lambda: stack_shards([np.ones(2), np.ones(3)]), ValueError, r"the array of shard 1 has shape \(3,\), but"),
        (lambda: in_caller_order(np.ones((2, 2)), [[0, 1], [2, 4]]), ValueError, "must hold each row from 0 once"),
        (lambda: in_caller_order(np.ones((2, 3)), [[0, 1], [2, 3]]), ValueError, r"the axes of indices, \(2, 2\)"),
    ],
)
def test_bad_batches_are_refused_with_the_way_out(call, error, message):
    with pytest.raises(error, match=message):
        call()
