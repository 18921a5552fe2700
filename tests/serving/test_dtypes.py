"""Values that the example's dtypes hold reach server and queue unchanged; all others are refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpack
from jaxpack.serving import Queue, Server

DTYPES = {
    name: jnp.dtype(name) for name in ("bool", "uint8", "int16", "int32", "float16", "bfloat16", "float32", "complex64")
}
SOON = 20  # seconds within which an answer must come


@pytest.fixture(scope="module")
def server():
    """A server that returns its input: a leaf per dtype, and pairs of int32."""
    example = {**{name: np.zeros(1, dtype) for name, dtype in DTYPES.items()}, "pairs": np.zeros((1, 2), np.int32)}
    return Server(lambda _, packed: packed, None, [jaxpack.plan_padded(3, 4)], example)


@pytest.fixture(scope="module")
def lists():
    """A server that returns lists of token ids."""
    return Server(lambda _, packed: packed, None, [jaxpack.plan_padded(3, 4)], np.zeros(1, np.int32))


def request(steps=2, **leaves):
    """Returns a request of zeros with some other leaves."""
    zeros = {**{name: np.zeros(steps, dtype) for name, dtype in DTYPES.items()}, "pairs": np.zeros((steps, 2), int)}
    return {**zeros, **leaves}


def call(server, requests):
    return server(requests)


def submit(server, requests):
    with Queue(server, max_wait=0.01) as queue:
        futures = [queue.submit(each) for each in requests]
        return [future.result(SOON) for future in futures]


both = pytest.mark.parametrize("serve", [call, submit])

HELD = [
    ("uint8", np.array([0, 255], np.int64)),
    ("uint8", np.array([True, False])),
    ("int16", np.array([-32768, 32767], np.int64)),
    ("int16", np.array([0, 255], np.uint8)),
    ("int32", np.array([-(2**31), 2**31 - 1], np.int64)),
    ("int32", np.array([0, 2**31 - 1], np.uint64)),
    ("float16", np.array([1.5, 65504], np.float32)),
    ("float16", np.array([np.nan, -np.inf], np.float64)),
    ("float16", np.array([2048, -2048])),
    ("bfloat16", np.array([0.5, 2.0**100], np.float32)),
    ("float32", np.array([2**24, -1], np.int64)),
    ("float32", np.array([0.5, 65504], np.float16)),
    ("float32", np.array([np.inf, np.nan])),
    ("complex64", np.array([0.5, np.inf], np.float32)),
]


@both
@pytest.mark.parametrize(("name", "values"), HELD, ids=lambda value: str(value).replace(" ", ""))
@pytest.mark.parametrize("x64", [False, True])
def test_values_that_the_dtype_holds_arrive_as_they_were_sent(server, serve, name, values, x64):
    with jax.enable_x64(x64):  # of the sending thread, which the server ignores
        (result,) = serve(server, [request(**{name: values})])
    assert result[name].dtype == DTYPES[name]
    np.testing.assert_array_equal(result[name].astype(complex), values.astype(complex))


WRONG = [
    ("bool", np.array([1, 0]), TypeError, "has dtype int64, which bool cannot hold"),
    ("uint8", np.array([1, 300]), ValueError, "has dtype int64 and holds 300 at [1], which uint8 cannot hold"),
    ("uint8", np.array([-1, 0], np.int8), ValueError, "has dtype int8 and holds -1 at [0], which uint8 cannot hold"),
    ("uint8", np.array([0, 1.0]), TypeError, "has dtype float64, which uint8 cannot hold"),
    ("int16", np.array([0, 40000], np.uint16), ValueError, "holds 40000 at [1], which int16 cannot hold"),
    ("int32", np.array([0, 2**31]), ValueError, "has dtype int64 and holds 2147483648 at [1], which int32 cannot hold"),
    ("int32", np.array([2**31, 0], np.uint32), ValueError, "has dtype uint32 and holds 2147483648 at [0], which int32"),
    ("int32", np.array([2**64 - 1, 0], np.uint64), ValueError, "holds 18446744073709551615 at [0], which int32"),
    ("int32", np.array([0.5, 1], np.float32), TypeError, "has dtype float32, which int32 cannot hold"),
    ("pairs", np.array([[1, 2], [3, 2**40]]), ValueError, "holds 1099511627776 at [1, 1], which int32 cannot hold"),
    (
        "float16",
        np.array([1, 7e4], np.float32),
        ValueError,
        "has dtype float32 and holds 70000.0 at [1], which float16",
    ),
    ("float16", np.array([0.1, 0], np.float32), ValueError, "at [0], which float16 cannot hold"),
    ("float16", np.array([2049, 0]), ValueError, "holds 2049 at [0], which float16 cannot hold"),
    (
        "bfloat16",
        np.array([257, 0], np.float16),
        ValueError,
        "has dtype float16 and holds 257.0 at [0], which bfloat16",
    ),
    ("float32", np.array([0, 2**24 + 1]), ValueError, "holds 16777217 at [1], which float32 cannot hold"),
    ("float32", np.array([1e39, 0]), ValueError, "has dtype float64 and holds 1e+39 at [0], which float32 cannot hold"),
    ("float32", np.array([1j, 0]), TypeError, "has dtype complex128, which float32 cannot hold"),
    ("float32", np.array(["1", "2"]), TypeError, "must hold numbers, got dtype <U1, where the server's example has fl"),
    ("int32", np.array([None, 1]), TypeError, "must hold numbers, got dtype object, where the server's example has in"),
]


@pytest.mark.parametrize(("name", "values", "error", "message"), WRONG)
@pytest.mark.parametrize("x64", [False, True])
def test_values_that_the_dtype_does_not_hold_are_refused_by_name(server, name, values, error, message, x64):
    with jax.enable_x64(x64), pytest.raises(error, match=re.escape(message)) as caught:
        server([request(), request(**{name: values})])
    assert str(caught.value).startswith(f"sequences[1]['{name}'] ")


@pytest.mark.parametrize(("name", "values", "error", "message"), WRONG)
def test_a_request_that_is_refused_leaves_its_batch_mates_alone(server, name, values, error, message):
    with Queue(server, max_wait=0.01) as queue:
        requests = [request(), request(**{name: values}), request(int16=np.array([7, 8]))]
        futures = [queue.submit(each) for each in requests]
        with pytest.raises(error, match=re.escape(message)):
            futures[1].result(SOON)
        assert futures[0].result(SOON)["int16"].tolist() == [0, 0]
        assert futures[2].result(SOON)["int16"].tolist() == [7, 8]


@both
def test_an_empty_list_is_a_sequence_of_whatever_is_expected(lists, serve):
    results = serve(lists, [[], [1, 2, 3], np.array([]), (), np.zeros(0, np.float16)])
    assert [result.tolist() for result in results] == [[], [1, 2, 3], [], [], []]
    assert {result.dtype for result in results} == {np.dtype(np.int32)}


def test_an_empty_list_has_the_features_of_the_example():
    def function(_, packed):
        return jaxpack.segment_sum(packed)

    server = Server(function, None, [jaxpack.plan_padded(2, 3)], np.zeros((1, 2), np.float32))
    assert [result.tolist() for result in server([[], [[1, 2], [3, 4]]])] == [[0, 0], [4, 6]]
    with pytest.raises(ValueError, match=re.escape("sequences[0] must have shape [L, 2] for its L steps, got [0]")):
        server([np.zeros(0, np.float32)])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float16, jnp.bfloat16, np.float32])
def test_numbers_of_python_are_taken_in_every_dtype_that_holds_them(dtype):
    server = Server(lambda _, packed: packed, None, [jaxpack.plan_padded(1, 2)], np.zeros(1, dtype))
    assert server([[1, 200]])[0].tolist() == [1, 200]
    if jnp.issubdtype(dtype, jnp.floating):
        assert server([[0.1, 1 / 3]])[0].tolist() == np.array([0.1, 1 / 3]).astype(dtype).tolist()
        with pytest.raises(ValueError, match=r"sequences\[0\] has dtype float64 and holds 1e\+40 at \[1\], which"):
            server([[0.1, 1e40]])
    else:
        with pytest.raises(ValueError, match=r"sequences\[0\] has dtype int64 and holds 40000 at \[1\], which"):
            server([[1, 40000]])


def test_float64_is_rounded_as_jax_rounds_it(server):
    values = np.array([0.1, 1 / 3])
    for x64 in (False, True):
        with jax.enable_x64(x64):
            (result,) = server([request(float32=values, complex64=1j * values)])
        np.testing.assert_array_equal(result["float32"], values.astype(np.float32))
        np.testing.assert_array_equal(result["complex64"], (1j * values).astype(np.complex64))


@pytest.mark.parametrize("weight", [np.array([1, 2**31]), np.int64(2**31), np.array([2**32], np.uint64)])
def test_parameters_that_jax_does_not_hold_are_refused_by_name(weight):
    with pytest.raises(ValueError, match=re.escape("params['w'] holds ")):
        Server(lambda _, packed: packed, {"w": weight}, [jaxpack.plan_padded(1, 2)], np.zeros(1))
