"""What reaches a batch is what was given, whichever way it came: values, and memory that its source uses again."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpack
from jaxpack import plan_padded
from jaxpack.data import BucketByLength, SlotFilling, SortedChunks, pack_on_host

grain = pytest.importorskip("grain")
from jaxpack.data.grain import BatcherIterDataset, SlotFillIterDataset, pack_fn  # noqa: E402

PLAN = plan_padded(4, 6)


class Stream:
    """A source without an index."""

    def __init__(self, source):
        self.source = source

    def __iter__(self):
        return (self.source[i] for i in range(len(self.source)))


def slots(source, **options):
    return SlotFilling(source, PLAN, **options)


def buckets(source, **options):
    return BucketByLength(source, (2, 6), batch_size=4, **options)


def chunks(source, **options):
    return SortedChunks(source, [PLAN], window=2, **options)


def steps_of(source):
    def steps(example):
        first = example["x"] if isinstance(example, dict) else example
        return len(first[0]) if isinstance(first, tuple) and np.ndim(first[0]) else len(first)

    return [steps(source[i]) for i in range(len(source))]


def with_lengths(make):
    return lambda source, **options: make(source, lengths=steps_of(source), **options)


def as_map(source):
    return grain.MapDataset.source(source)


BATCHERS = {"slots": slots, "buckets": buckets, "chunks": chunks}
PROMOTING = {
    name: lambda source, make=make, **options: list(make(source, **options)) for name, make in BATCHERS.items()
}
PROMOTING["pack_fn"] = lambda source, **options: list(as_map(source).batch(4, batch_fn=pack_fn(PLAN, **options)))
PROMOTING["batcher dataset"] = lambda source, **options: list(BatcherIterDataset(slots(source, **options)))
FIRST = {f"{name}, lengths": with_lengths(make) for name, make in BATCHERS.items()}
FIRST |= {
    f"{name}, stream": lambda s, make=make, **options: make(Stream(s), **options) for name, make in BATCHERS.items()
}
FIRST["slot fill dataset"] = lambda source, **options: SlotFillIterDataset(as_map(source), PLAN, **options)
EVERY = PROMOTING | FIRST
DOORS = pytest.mark.parametrize("door", EVERY.values(), ids=EVERY)


def rows(batches, pick=lambda inputs: inputs):
    """What each example became, in the order of the source."""
    found = {}
    for place, batch in enumerate(batches):
        packed = pick(batch.inputs)
        plan = packed.plan
        for row, index in enumerate(batch.indices.tolist()):
            if index >= 0:
                slot, length = packed.unsorted_indices[row], packed.lengths[row]
                cells = plan.step_offsets[plan.slot_starts[slot] + np.arange(length)] + plan.slot_rows[slot]
                found[index if index not in found else (place, index)] = packed.data[cells]
    return [found[key] for key in sorted(found, key=str)]


def held(door, source, **options):
    """The values of each example, and the one dtype of all batches."""
    found = rows(door(source, **options))
    (dtype,) = {row.dtype for row in found}
    return sorted(row.tolist() for row in found), dtype


def outcome(call):
    """What it returns, or the message of its TypeError."""
    try:
        return call(), None
    except TypeError as error:
        return None, str(error)


MIXED = {
    "int16, int64": [np.array([1, 2], np.int16), np.array([40_000])],
    "uint8, int32": [np.array([255], np.uint8), np.array([-3, 70_000], np.int32)],
    "float16, float32": [np.array([0.5], np.float16), np.array([70_000.0, 2.0], np.float32)],
    "int8, float32": [np.array([-1], np.int8), np.array([0.25], np.float32)],
    "bool, int32": [np.array([True]), np.array([7, 2], np.int32)],
    "uint32, int64": [np.array([3], np.uint32), np.array([-5])],
    "big-endian": [np.array([3, 4], ">i2"), np.array([300], ">i4")],
    "lists": [[1, 2], [2.5], [True]],
    "numpy scalars": [[np.int8(3)], [np.float32(0.5), 2]],
    "arrays without axes": [[np.array(3), np.array(4)], [jnp.asarray(5)]],
    "tuples": [(1, 2), (3,)],
    "jax": [jnp.arange(3), jnp.ones(2)],
    "bfloat16": [np.ones(2, jnp.bfloat16), np.full(1, 3.0, np.float32)],
}


def plain(example):
    return np.asarray(example).astype(np.float64).tolist()


@pytest.mark.parametrize("order", ["given", "reversed"])
@pytest.mark.parametrize("examples", MIXED.values(), ids=MIXED)
@DOORS
def test_mixed_dtypes_are_promoted_or_refused_by_name(door, examples, order):
    examples = examples if order == "given" else examples[::-1]
    arrays = [np.asarray(example) for example in examples]
    native = [array.astype(array.dtype.newbyteorder("=")) for array in arrays]
    promoted = jax.eval_shape(lambda *parts: jnp.concatenate(parts), *native).dtype
    result, error = outcome(lambda: held(door, examples))
    if error is None:
        assert result == (sorted(plain(example) for example in examples), promoted)
    else:
        assert door in FIRST.values()
        assert re.search(r"example [12] has dtype \S+, which \S+ cannot hold", error)


@pytest.mark.parametrize(
    "examples", [[[], [1, 2, 3]], [[1, 2, 3], []], [[], [], [7], []], [[[1, 2], [3, 4]], []], [[], []], [[], [2.5]]]
)
@DOORS
def test_an_empty_list_takes_the_dtype_of_others(door, examples):
    full = [example for example in examples if example]
    values, dtype = held(door, examples)
    assert dtype == (jnp.asarray(full[0]).dtype if full else np.float32)
    assert values == sorted(examples)


@DOORS
def test_an_empty_list_in_a_pytree_does_too(door):
    examples = [
        {"x": [], "y": np.zeros((0, 2), np.int16), "label": 300},
        {"x": [1, 2], "y": np.ones((2, 2), np.int16), "label": 2},
        {"x": [], "y": [], "label": 0},
    ]
    batches = list(door(examples, time_varying={"x": True, "y": True, "label": False}))
    for key, dtype in {"x": np.int32, "y": np.int16}.items():
        found = rows(batches, lambda inputs, key=key: inputs[key])
        assert {row.dtype for row in found} == {np.dtype(dtype)}
        assert sorted(len(row) for row in found) == [0, 0, 2]
    assert {batch.inputs["label"].dtype.name for batch in batches} == {"int32"}


@pytest.mark.parametrize("values", [[1, 2**40], [-(2**31) - 1]])
@DOORS
def test_a_value_that_jax_would_wrap_is_named(door, values):
    with pytest.raises(ValueError, match=f"example 1 holds {values[-1]} at .*int32 cannot hold"):
        list(door([[1], values]))


@DOORS
def test_64_bit_values_are_kept_where_jax_keeps_them(door, x64):
    assert held(door, [[2**40], [1, 2]]) == ([[1, 2], [2**40]], np.dtype(np.int64))


@pytest.mark.parametrize("labels", [[np.int16(3), 40_000], [np.float16(0.5), np.float32(70_000)], [True, 5]])
@DOORS
def test_fixed_leaves_have_the_same_rule(door, labels):
    examples = [(np.ones(1, np.float32), label) for label in labels]
    batches, error = outcome(lambda: list(door(examples)))
    if error is not None:
        assert door in FIRST.values()
        first, second = (np.asarray(label).dtype for label in labels)
        assert f"leaf [1] of example 1 has dtype {second}, which {first} cannot hold" in error
    else:
        found = sorted(
            (index, label)
            for batch in batches
            for index, label in zip(batch.indices.tolist(), batch.inputs[1].tolist(), strict=True)
            if index >= 0
        )
        assert found == list(enumerate(map(float, labels)))


@pytest.mark.parametrize("example", [["a"], np.array([None]), np.array(["2020-01-01"], "M8[s]"), [2**70]])
@DOORS
def test_what_is_no_number_is_named(door, example):
    with pytest.raises(TypeError, match="must hold numbers"):
        list(door([example, example]))


def test_torch_tensors_are_taken_with_their_dtypes():
    torch = pytest.importorskip("torch")
    examples = [torch.ones(2, dtype=torch.bfloat16), [torch.tensor(3), torch.tensor(4)], torch.arange(3.0)]
    for door in EVERY.values():
        result, error = outcome(lambda door=door: held(door, examples))
        if error is None:
            assert result == ([[0, 1, 2], [1, 1], [3, 4]], np.float32)
        else:
            assert door in FIRST.values()
            assert "example 2 has dtype float32, which bfloat16 cannot hold" in error


@pytest.mark.parametrize(
    "sequences",
    [
        *MIXED.values(),
        [[], [1, 2, 3]],
        [[], []],
        [[[1, 2], [3, 4]], []],
        [np.arange(3), np.arange(2)],
        [np.ones(2), np.ones(1)],
        [{"x": np.ones(2, np.int8), "y": np.ones(2)}, {"x": np.full(1, 300), "y": np.ones(1, np.float16)}],
    ],
)
def test_pack_on_host_is_pack_sequence_leaf_for_leaf(sequences):
    if sequences is MIXED["big-endian"]:
        pytest.skip("JAX takes no other byte order")
    plan = plan_padded(len(sequences), 4)
    packed, expected = pack_on_host(sequences, plan), jaxpack.pack_sequence(sequences, plan=plan)
    structure: Any = jax.tree.structure(packed)
    assert structure == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(packed), jax.tree.leaves(expected), strict=True):
        assert isinstance(leaf, np.ndarray)
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(leaf, other)


class Reader:
    """Reads every example into the same memory, as audio readers do."""

    def __init__(self, convert=lambda array: array):
        self.buffer, self.convert = np.zeros(6, np.float32), convert

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if not 0 <= index < 12:
            raise IndexError(index)
        self.buffer[:] = index
        return self.convert(self.buffer[: 1 + index % 6])


class Loader:
    """A map of Grain's, whose dataset would pickle or share the reader."""

    def __init__(self, reader):
        self.reader = reader

    def __call__(self, index):
        return self.reader[index]


REUSED: dict[str, Callable[..., Any]] = {f"{name}, {how}": door for name, make in BATCHERS.items() for how, door in (
    ("index", make),
    ("lengths", lambda source, make=make: make(source, lengths=[1 + i % 6 for i in range(12)])),
    ("stream", lambda source, make=make: make(Stream(source))),
)}  # fmt: skip
REUSED["slot fill dataset"] = lambda source: SlotFillIterDataset(
    grain.MapDataset.range(12).to_iter_dataset(grain.ReadOptions(num_threads=0)).map(Loader(source)), PLAN
)


@pytest.mark.parametrize("convert", ["numpy", "torch", "pytree"])
@pytest.mark.parametrize("door", REUSED.values(), ids=REUSED)
def test_a_source_may_read_into_the_same_memory(door, convert):
    if convert == "torch":
        torch = pytest.importorskip("torch")
        source, pick = Reader(torch.from_numpy), lambda inputs: inputs
    elif convert == "pytree":
        source, pick = Reader(lambda array: {"x": array, "y": array[:, None]}), lambda inputs: inputs["x"]
    else:
        source, pick = Reader(), lambda inputs: inputs
    found = rows(door(source), pick)
    assert sorted(row.tolist() for row in found) == sorted([float(i)] * (1 + i % 6) for i in range(12))


@pytest.mark.parametrize("too_long", ["truncate", "split"])
def test_so_may_one_whose_examples_are_cut(too_long):
    for source in (Reader(), Stream(Reader())):
        found = rows(SlotFilling(source, plan_padded(3, 4), too_long=too_long))
        assert {value for row in found for value in row.tolist()} == set(map(float, range(12)))
        assert all(len(set(row.tolist())) == 1 for row in found)


@DOORS
def test_batches_share_no_memory(door):
    source = [np.full(1 + i % 6, i, np.float32) for i in range(12)]
    batches = list(door(source))
    arrays = [leaf for batch in batches for leaf in jax.tree.leaves(batch)]
    assert all(leaf.flags.writeable for leaf in arrays)
    assert not any(np.shares_memory(a, b) for a, b in itertools.combinations(arrays, 2))
    assert not any(np.shares_memory(leaf, example) for leaf in arrays for example in source)
