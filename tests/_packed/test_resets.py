"""Resets that cannot be meant are refused by everything that takes them."""

import re

import jax
import numpy as np
import pytest
from flax import linen, nnx

import jaxpack
import jaxpack.linen
import jaxpack.nnx
from jaxpack import pack_sequence

F = 3
X = np.ones((2, 4, F), np.float32)
PACKED = pack_sequence([X[0], X[1, :2]])
FLAGS = np.zeros((2, 4), bool)
GRU = jaxpack.GRU(F, 2)
PARAMS = jax.tree.map(np.zeros, GRU.shapes, is_leaf=lambda node: isinstance(node, tuple))
BIDIRECTIONAL = jaxpack.nnx.Bidirectional(
    *(nnx.RNN(nnx.GRUCell(F, 2, rngs=nnx.Rngs(0))) for _ in range(2)),
)


def _scan(resets):
    return jaxpack.packed_scan(lambda carry, x: (carry, x), np.zeros((2, 1)), PACKED, resets=resets)


def _linen(inputs, resets):
    rnn = jaxpack.linen.RNN(linen.GRUCell(2))
    return rnn.apply({}, inputs, resets=resets)


PADDED = {
    "GRU": lambda resets: GRU.apply(PARAMS, X, resets=resets),
    "nnx.GRU": lambda resets: jaxpack.nnx.GRU(F, 2, rngs=nnx.Rngs(0))(X, resets=resets),
    "nnx.RNN": lambda resets: jaxpack.nnx.RNN(nnx.GRUCell(F, 2, rngs=nnx.Rngs(0)))(X, resets=resets),
    "linen.RNN": lambda resets: _linen(X, resets),
    "MinGRU": lambda resets: jaxpack.MinGRU(F, 2).apply(jaxpack.MinGRU(F, 2).init(jax.random.key(0)), X, resets=resets),
}
AS_PACKED = {
    "GRU": lambda resets: GRU.apply(PARAMS, PACKED, resets=resets),
    "nnx.RNN": lambda resets: jaxpack.nnx.RNN(nnx.GRUCell(F, 2, rngs=nnx.Rngs(0)))(PACKED, resets=resets),
    "linen.RNN": lambda resets: _linen(PACKED, resets),
    "packed_scan": _scan,
}


@pytest.mark.parametrize("run", PADDED.values(), ids=PADDED)
@pytest.mark.parametrize(
    ("resets", "error", "message"),
    [
        (FLAGS.astype(np.float32), TypeError, "one bool a step.*A done flag says.*resets_from_dones"),
        (FLAGS[..., None], TypeError, "one bool a step.*shape .*, 1\\]"),
        (FLAGS[:, :3], ValueError, r"resets must"),
        (FLAGS.T, ValueError, r"resets must"),
        (PACKED.replace(data=PACKED.mask), TypeError, "packed, but the inputs are not"),
    ],
)
def test_resets_of_padded_inputs(run, resets, error, message):
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        run(resets)


@pytest.mark.parametrize("run", AS_PACKED.values(), ids=AS_PACKED)
@pytest.mark.parametrize(
    ("resets", "error", "message"),
    [
        (FLAGS, TypeError, "resets must be packed too"),
        (PACKED.mask, TypeError, r"inputs.replace\(data=resets\)"),
        (PACKED, TypeError, "one bool a step"),
        (pack_sequence([FLAGS[0], FLAGS[1, :3]]), ValueError, "resets have the plan"),
        (PACKED.replace(data=PACKED.mask, lengths=PACKED.lengths[::-1]), ValueError, "sorted_indices|lengths"),
    ],
)
def test_resets_of_packed_inputs(run, resets, error, message):
    with pytest.raises(error, match=message):
        run(resets)


def test_resets_of_one_sequence():
    resets = np.array([False, False, True, False])
    output, final = GRU.apply(PARAMS, X[0], lengths=3, resets=resets)
    expected, finals = GRU.apply(PARAMS, X[:1], lengths=[3], resets=resets[None])
    np.testing.assert_array_equal(output, expected[0])
    np.testing.assert_array_equal(final, finals[:, 0])
    with pytest.raises(ValueError, match=r"shape \[4\]"):
        GRU.apply(PARAMS, X[0], resets=resets[:3])


def test_modules_of_flax_itself_do_not_take_resets():
    with pytest.raises(TypeError, match="need RNNs of jaxpack"):
        BIDIRECTIONAL(X, resets=FLAGS)


@pytest.mark.parametrize("scans", [False, True], ids=["GRU", "packed_scan"])
def test_traced_resets_of_other_sequences_make_those_alone_nan(scans):
    plan = jaxpack.plan_padded(2, 4)

    @jax.jit
    def run(lengths, others):
        packed = jaxpack.pack_padded_sequence(X, lengths, batch_first=True, plan=plan)
        resets = jaxpack.pack_padded_sequence(FLAGS, others, batch_first=True, plan=plan)
        if scans:
            return jaxpack.packed_scan(lambda h, x: (h + x, h), np.zeros((2, F), np.float32), packed, resets=resets)[0]
        return GRU.apply(PARAMS, packed, resets=resets)[1][0]

    found = run(np.array([4, 2]), np.array([4, 1]))
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1]).all()


@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize("kind", [nnx.GRUCell, type("Own", (nnx.GRUCell,), {})], ids=["known", "unknown"])
def test_dropins_take_resets_in_the_layout_of_their_inputs(kind, time_major):
    rnn = jaxpack.nnx.RNN(kind(F, 2, rngs=nnx.Rngs(0)), time_major=time_major, reverse=True, keep_order=True)
    x = np.random.default_rng(0).standard_normal((5, 2, 3, F)).astype(np.float32)  # [T, *batch, F]
    resets = np.random.default_rng(1).random((5, 2, 3)) < 0.5
    axes = (0, 1, 2) if time_major else (1, 2, 0)
    output = rnn(np.transpose(x, (*axes, 3)), resets=np.transpose(resets, axes))
    flat = jaxpack.nnx.RNN(rnn.cell, reverse=True, keep_order=True)(
        np.swapaxes(x.reshape(5, 6, F), 0, 1), resets=np.swapaxes(resets.reshape(5, 6), 0, 1)
    )
    by_time = output if time_major else np.moveaxis(output, 2, 0)
    np.testing.assert_allclose(by_time.reshape(5, 6, 2), np.swapaxes(flat, 0, 1), rtol=1e-6, atol=1e-6)


def test_an_export_with_symbolic_sizes_resets():
    b, t = jax.export.symbolic_shape("b, t")

    def run(x, resets):
        rnn = jaxpack.nnx.RNN(nnx.GRUCell(F, 2, rngs=nnx.Rngs(0)), reverse=True, keep_order=True)
        return rnn(x, resets=resets)

    shapes = jax.ShapeDtypeStruct((b, t, F), np.float32), jax.ShapeDtypeStruct((b, t), bool)
    exported = jax.export.export(jax.jit(run))(*shapes)
    x = np.random.default_rng(0).standard_normal((2, 4, F)).astype(np.float32)
    resets = np.array([[0, 1, 0, 1], [1, 0, 1, 1]], bool)
    np.testing.assert_allclose(exported.call(x, resets), run(x, resets), rtol=1e-5, atol=1e-6)
