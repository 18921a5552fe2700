"""Packing on the host gives what pack_sequence gives, and says what is wrong with examples."""

import jax
import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st

import jaxpack
from jaxpack import plan_exact, plan_padded
from jaxpack.data import pack_on_host
from jaxpack.data._form import Form


@given(strategies.lengths_and_plan(), st.booleans())
def test_packs_as_pack_sequence_does_in_numpy(lengths_and_plan, tree):
    lengths, plan = lengths_and_plan
    numbers = np.arange(sum(lengths), dtype=np.float32)
    arrays = np.split(numbers[:, None] * [1, 10], np.cumsum(lengths)[:-1])
    arrays = [array.astype(np.float32) for array in arrays]
    sequences = [{"x": array, "y": array[:, 0].astype(np.int32)} for array in arrays] if tree else arrays
    packed, expected = pack_on_host(sequences, plan), jaxpack.pack_sequence(sequences, plan=plan)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(packed))
    assert packed.plan == plan
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(packed), jax.tree.leaves(expected))
    assert [leaf.dtype for leaf in jax.tree.leaves(packed)] == [leaf.dtype for leaf in jax.tree.leaves(expected)]


def test_rows_that_are_left_are_empty():
    packed = pack_on_host([[1, 2], [3, 4, 5]], plan_padded(4, 3))
    assert packed.lengths.tolist() == [2, 3, 0, 0]
    assert jaxpack.segment_sum(packed).tolist() == [3, 12, 0, 0]


def test_sequences_may_be_read_one_by_one_into_the_same_memory():
    def read():
        buffer = np.zeros(3, np.float32)
        for value in (1, 2):
            buffer[:] = value
            yield buffer

    assert pack_on_host(read(), plan_exact([3, 3])).data.tolist() == [1, 2] * 3


def form_of(example, time_varying):
    form = Form(time_varying)
    form.learn(example, 0, promote=True)
    return form


def test_examples_of_lists_scalars_and_fixed_leaves_have_a_form():
    example = {"x": np.zeros((2, 1)), "label": 3, "speaker": np.zeros(4), "words": [[1, 2, 3], [4, 5, 6]]}
    form = form_of(example, {"x": True, "label": False, "speaker": False, "words": True})
    assert form.axes == (None, None, 0, 0)  # in the order of keys
    assert form.features == [(), (4,), (3,), (1,)]
    assert form.dtypes == [np.int32, np.float32, np.int32, np.float32]
    assert form.lengths(form.leaves(example, 0)) == (2,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pack_on_host([], plan_padded(1, 1)), ValueError, "sequences is empty"),
        (lambda: pack_on_host([[1, 2]], plan_padded(1, 1)), ValueError, r"lengths\[0\] = 2 does not fit"),
        (lambda: pack_on_host([[1], [2]], plan_padded(1, 1)), ValueError, "the plan is for 1 sequences"),
        (
            lambda: pack_on_host([np.zeros((1, 2)), np.zeros((1, 3))], plan_padded(2, 1)),
            ValueError,
            r"example 1 has features of shape \(3,\), the first has \(2,\)",
        ),
        (lambda: pack_on_host({"a": [1]}, plan_padded(2, 1)), TypeError, "must be a list of arrays, got dict"),
        (lambda: pack_on_host({1, 2}, plan_padded(2, 1)), TypeError, "must be a list of arrays, got set"),
        (
            lambda: pack_on_host(7, plan_padded(2, 1)),  # type: ignore[arg-type]
            TypeError,
            "must be a list of arrays, got int",
        ),
        (
            lambda: pack_on_host([([1, 2], [3])], plan_padded(2, 2)),
            ValueError,
            r"different lengths: \[0\] 2, \[1\] 1. Here all of them share",
        ),
        (lambda: pack_on_host([[[1, 2], [3]]], plan_padded(2, 2)), ValueError, "rows have different lengths.*a tuple"),
        (lambda: pack_on_host([{"a": np.zeros(1)}, {"b": np.zeros(1)}], plan_padded(2, 1)), ValueError, "example 1"),
        (lambda: pack_on_host([3.0], plan_padded(1, 1)), ValueError, "must have a leading time axis"),
        (lambda: pack_on_host(["ab"], plan_padded(1, 2)), TypeError, "must hold numbers.*got dtype <U2"),
        (lambda: form_of({}, None), ValueError, "holds no array"),
        (lambda: form_of({"a": 1}, None), ValueError, "no leaf of an example varies in time"),
        (lambda: form_of(((1, 2), (3, 4)), None), ValueError, "no leaf of an example varies.*in a tuple one leaf each"),
        (lambda: form_of({"a": np.zeros(1)}, {"b": True}), ValueError, "time_varying must be a bool or the name"),
        (lambda: form_of({"a": np.zeros(1)}, {"a": 5}), TypeError, "time_varying must hold bools, or names"),
        (lambda: form_of((np.zeros(1),) * 2, ("a", True)), ValueError, "True beside .*'a'.*Write a name in place"),
    ],
)
def test_bad_examples_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
