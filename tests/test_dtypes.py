"""One rule for dtypes: what a dtype holds is held, what it does not is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpack._dtypes import canonical, cast, common_dtype, jax_dtype

NUMBERS = ["bool", "uint8", "int16", "uint32", "int64", "float16", jnp.bfloat16, "float32", "float64", "complex64"]


@pytest.mark.parametrize("x64", [False, True])
def test_the_common_dtype_is_that_of_a_jax_concatenation(x64):
    with jax.enable_x64(x64):
        for first in NUMBERS:
            for second in NUMBERS:
                joined = jax.eval_shape(lambda *arrays: jnp.concatenate(arrays), np.zeros(1, first), np.ones(1, second))
                assert common_dtype([first, second]) == joined.dtype == common_dtype([second, first])


@pytest.mark.parametrize("dtype", [">i2", ">f4", ">i8", "<i8", ">f8"])
def test_both_byte_orders_are_numbers(dtype):
    array = np.array([1, 2, -3], dtype)
    held = canonical(array, "x")
    assert held.dtype == jnp.asarray(array.astype(array.dtype.newbyteorder("="))).dtype
    assert held.tolist() == [1, 2, -3]


@pytest.mark.parametrize("dtype", [object, "U3", "S3", "M8[s]", np.longdouble, [("a", int)]])
def test_dtypes_that_jax_cannot_compute_with_are_named(dtype):
    for call in (jax_dtype, lambda dtype, name: cast(np.zeros(1, dtype), np.float32, name)):
        with pytest.raises(TypeError, match="labels must hold numbers"):
            call(dtype, "labels")


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.array([3], np.uint32), np.int32),
        (np.array([2**31 - 1, -(2**31)]), np.int32),
        (np.array([2**31 - 1], np.uint64), np.int32),
        (np.array([2**24]), np.float32),
        (np.array([True, False]), np.uint8),
        (np.array([1.5, -0.5], np.float16), np.float32),
        (np.array([2**31], np.uint32), np.float32),
        (np.array([5]), np.complex64),
        (np.zeros((0, 3), np.int64), np.int32),
    ],
)
def test_values_that_are_held_are_the_same(array, dtype):
    held = cast(array, dtype, "x")
    assert held.dtype == dtype
    assert held.tolist() == array.tolist()


@pytest.mark.parametrize(
    ("array", "dtype", "value"),
    [
        (np.array([[1, 2**40]]), np.int32, "1099511627776 at .0, 1."),
        (np.array(-(2**31) - 1), np.int32, "-2147483649"),
        (np.array([3_000_000_000], np.uint32), np.int32, "3000000000"),
        (np.array([2**24 + 1]), np.float32, "16777217"),
        (np.array([70_000], np.int32), np.float16, "70000"),
        (np.array([2**64 - 1], np.uint64), np.float32, "18446744073709551615"),
    ],
)
def test_values_that_the_dtype_would_change_are_named(array, dtype, value):
    with pytest.raises(ValueError, match=f"labels holds {value}.*{np.dtype(dtype)} cannot hold"):
        cast(array, dtype, "labels")


@pytest.mark.parametrize(
    ("array", "dtype"),
    [(np.ones(1), np.int32), (np.ones(1, np.int32), np.int16), (np.ones(1, complex), np.float32)],
)
def test_another_kind_or_a_narrower_dtype_is_refused_whatever_the_values(array, dtype):
    with pytest.raises(TypeError, match=f"x has dtype {array.dtype}, which {np.dtype(dtype)} cannot hold"):
        cast(array, dtype, "x")


def test_64_bit_values_are_kept_where_jax_keeps_them(x64):
    assert canonical(np.array([2**40]), "x").tolist() == [2**40]
    assert canonical(np.array([0.1]), "x").tolist() == [0.1]
