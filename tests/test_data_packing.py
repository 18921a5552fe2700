"""Packing on the host gives what pack_sequence gives, and says what is wrong with examples."""

import jax
import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st

import jaxpack
from jaxpack import plan_padded
from jaxpack.data import pack_on_host
from jaxpack.data.packing import Form


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


def test_examples_of_lists_scalars_and_fixed_leaves_have_a_form():
    example = {"x": np.zeros((2, 1)), "label": 3, "speaker": np.zeros(4)}
    with pytest.raises(ValueError, match=r"example 7 that vary in time have 4 and 2 steps.*time_varying="):
        Form.of(example, None).leaves(example, 7)
    form = Form.of(example, {"x": True, "label": False, "speaker": False})
    assert form.varying == (False, False, True)  # in the order of keys
    assert form.features == ((), (4,), (1,))
    assert form.length(example, 0) == 2


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
        (
            lambda: pack_on_host([np.zeros(1, int), np.zeros(1)], plan_padded(2, 1)),
            TypeError,
            "leaf 0 of a batch has dtype float64, the first example has int64",
        ),
        (lambda: pack_on_host([{"a": np.zeros(1)}, {"b": np.zeros(1)}], plan_padded(2, 1)), ValueError, "example 1"),
        (lambda: pack_on_host([3.0], plan_padded(1, 1)), ValueError, "must have a leading time axis"),
        (lambda: pack_on_host(["ab"], plan_padded(1, 2)), TypeError, "must hold numbers.*got dtype <U2"),
        (lambda: Form.of({}, None), ValueError, "holds no array"),
        (lambda: Form.of({"a": 1}, None), ValueError, "no leaf of an example varies in time"),
        (lambda: Form.of({"a": np.zeros(1)}, {"b": True}), ValueError, "time_varying must be a bool for each leaf"),
        (lambda: Form.of({"a": np.zeros(1)}, {"a": "yes"}), TypeError, "time_varying must hold bools"),
    ],
)
def test_bad_examples_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
