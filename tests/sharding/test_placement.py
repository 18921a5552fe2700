"""Shards on the devices of a mesh: their sharding, prefetched, and what is refused before anything is sent."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

import jaxpack
from jaxpack.data import SlotFilling
from jaxpack.sharding import map_shards, pack_shards, prefetch_to_mesh, put, stack_shards, sum_shards

SEQUENCES = [[1, 2, 3], [4], [5, 6], [7, 8], [9], [1]]
MESH = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))


def test_each_device_holds_its_own_shards():
    batch = pack_shards(SEQUENCES[:4], 4)
    placed = put(batch, MESH)
    for leaf, host in zip(*map(jax.tree.leaves, (placed, batch)), strict=True):
        assert leaf.sharding == NamedSharding(MESH, jax.P("data"))
        for d, part in enumerate(leaf.addressable_shards):
            np.testing.assert_array_equal(part.data, host[2 * d : 2 * d + 2])
    assert placed.inputs.plan == batch.inputs.plan


def test_of_several_processes_each_gives_the_shards_of_its_own_devices(monkeypatch):
    batch = pack_shards(SEQUENCES[:4], 4)
    expected = put(batch, MESH)
    monkeypatch.setattr(jax, "process_count", lambda: 2)  # all devices are this process's, so its shards are all
    placed = put(batch, MESH)
    for ours, theirs in zip(*map(jax.tree.leaves, (placed, expected)), strict=True):
        assert ours.sharding == theirs.sharding
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="the batch has 3 shards"):
        put(np.ones((3, 1)), MESH)


def test_one_axis_or_several_spread_the_shards():
    mesh = jax.make_mesh((1, 2), ("hosts", "data"), axis_types=(AxisType.Auto,) * 2)
    placed = put(np.zeros((2, 3)), mesh, ("hosts", "data"))
    assert placed.sharding.spec == jax.P(("hosts", "data"))


def test_batches_are_prefetched_to_all_devices_with_the_state_after_each():
    batches = SlotFilling(SEQUENCES, batch_size=1, local_shards=2)
    expected = list(SlotFilling(SEQUENCES, batch_size=1, local_shards=2))
    epoch = prefetch_to_mesh(batches, MESH)
    for number, batch in enumerate(expected, 1):
        placed = next(epoch)
        assert epoch.get_state()["batch"] == number
        assert {leaf.sharding for leaf in jax.tree.leaves(placed)} == {NamedSharding(MESH, jax.P("data"))}
        jax.tree.map(np.testing.assert_array_equal, placed, batch)
    assert next(epoch, None) is None


def test_an_error_of_put_is_raised_in_place_of_its_batch():
    epoch = prefetch_to_mesh([np.ones((3, 1))], MESH)
    with pytest.raises(ValueError, match="the batch has 3 shards"):
        next(epoch)


@pytest.mark.parametrize("call", [put, lambda *args: map_shards(lambda *_: 0, args[1], *args[2:])(None, args[0])])
@pytest.mark.parametrize(
    ("batch", "axis", "message"),
    [
        (np.ones((2, 1)), "model", r"the mesh has the axes \('data',\), and none is named 'model'. Pass axis="),
        (np.ones((3, 1)), "data", "the batch has 3 shards, which is not a multiple of the 2 devices along"),
        (np.ones((0, 1)), "data", "the batch has 0 shards"),
        ({"x": np.ones((2, 1)), "y": np.ones(4)}, "data", "x has 2, .*y has 4. Make the batch with"),
        ({"x": np.ones((2, 1)), "y": 3.0}, "data", "y is one number"),
        ({}, "data", "there is no array"),
    ],
)
def test_batches_that_do_not_match_the_mesh_are_refused_before_anything_is_sent(call, batch, axis, message):
    with pytest.raises(ValueError, match=message):
        call(batch, MESH, axis)


def test_a_mesh_without_the_axis_is_refused_where_a_function_is_made():
    for make in (map_shards, sum_shards):
        with pytest.raises(ValueError, match="none is named 'batch'"):
            make(lambda *_: 0, MESH, "batch")
    with pytest.raises(ValueError, match="none is named 'batch'"):
        prefetch_to_mesh([], MESH, axis="batch")


def test_one_plain_batch_is_not_taken_for_shards():
    packed = jaxpack.pack_sequence([np.ones(1), np.ones(2)])
    with pytest.raises(ValueError, match=r"data has 3, lengths has 2. Make the batch with .*pack_shards"):
        put(packed, MESH)
    assert put(stack_shards([packed, packed]), MESH).lengths.shape == (2, 2)
