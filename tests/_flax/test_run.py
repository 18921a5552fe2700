"""The drop-in RNN and Bidirectional of both Flax APIs, beside Flax's own, where `contract.py` does not hold them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_apis import APIS, CELLS, F, H
from flax_batch import BUCKETS, LENGTHS, REAL, ROWS, B, T, assert_close, batch, carry_like

import jaxpack
from jaxpack import pack_padded_sequence, pad_packed_sequence, plan_buckets

pytestmark = pytest.mark.usefixtures("x64")

LOOSE = jaxpack.plan_exact([7, 5, 5, 3])

# What a call is given: how inputs lie, and options; each is held against Flax itself for every cell.
CALLS: dict[str, dict[str, Any]] = {
    "no plan": {"seq_lengths": LENGTHS},
    "rows, reversed in order": {"seq_lengths": LENGTHS, "plan": ROWS, "reverse": True, "keep_order": True},
    "buckets, time major, reversed": {"seq_lengths": LENGTHS, "plan": BUCKETS, "reverse": True, "time_major": True},
    "equal lengths": {},
}


def weights(tree):
    """Fixed numbers of a tree's shapes, to make a loss of it."""
    generator = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: generator.standard_normal(leaf.shape), tree)


def losses(apply, options, time_major):
    """The values and gradients of a function of parameters, inputs and initial carry, all real outputs in the loss."""
    real = REAL if "seq_lengths" in options else np.ones_like(REAL)
    real = (real.T if time_major else real)[..., None]

    def loss(params, x, carry):
        carry, outputs = apply(params, x, initial_carry=carry, return_carry=True, **options)
        kept = jnp.where(real, outputs, 0)
        weighted = jax.tree.map(lambda leaf, w: jnp.sum(leaf * w), (kept, carry), weights((kept, carry)))
        return sum(jax.tree.leaves(weighted)), (kept, outputs, carry)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


# Every call meets a cell with a memory, one without, and one that is not known; any other cell meets one call in turn.
COVER = [
    (api, cell, call)
    for i, (api, cell) in enumerate(CELLS)
    for j, call in enumerate(CALLS)
    if (api, cell) in (("linen", "LSTMCell"), ("nnx", "GRUCell"), ("linen", "OwnCell")) or i % len(CALLS) == j
]


@pytest.mark.parametrize(("api", "cell", "call"), COVER)
def test_values_carries_and_gradients_are_those_of_flax(api, cell, call):
    face, options = APIS[api], CALLS[call]
    apply, params = face.pure(face.ours.RNN(face.cell(cell)))
    flax_apply, _ = face.pure(face.flax.RNN(face.cell(cell)))
    time_major = options.get("time_major", False)
    x, clean = (np.swapaxes(a, 0, 1) if time_major else a for a in (batch(), batch(nan=False)))
    x = x if options else clean
    carry = carry_like(face, cell)
    in_flax = {name: value for name, value in options.items() if name != "plan"}
    (_, (kept, outputs, final)), gradients = losses(apply, options, time_major)(params, x, carry)
    (_, (expected, _, flax_final)), flax_gradients = losses(flax_apply, in_flax, time_major)(params, clean, carry)
    assert_close((kept, final, gradients), (expected, flax_final, flax_gradients))
    np.testing.assert_array_equal(outputs, kept)  # zero past each length


@pytest.mark.parametrize(("api", "cell"), [("linen", "LSTMCell"), ("linen", "OwnCell"), ("nnx", "GRUCell")])
def test_any_number_of_batch_axes(api, cell):
    face = APIS[api]
    apply, params = face.pure(face.ours.RNN(face.cell(cell), return_carry=True, reverse=True))
    flat_carry, flat = apply(params, batch(), seq_lengths=LENGTHS)
    x = batch().reshape(2, 2, T, F)
    carry, outputs = apply(params, x, seq_lengths=LENGTHS.reshape(2, 2))
    assert_close((carry, outputs), jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), (flat_carry, flat)))
    carry, outputs = apply(params, np.moveaxis(x, 2, 0), seq_lengths=LENGTHS.reshape(2, 2), time_major=True, plan=ROWS)
    assert_close(outputs, np.moveaxis(flat.reshape(2, 2, T, H), 2, 0))
    carry, outputs = apply(params, batch()[1], seq_lengths=LENGTHS[1])
    assert_close((carry, outputs), jax.tree.map(lambda leaf: leaf[1], (flat_carry, flat)))


@pytest.mark.parametrize(
    ("api", "cell", "plan"),
    [("linen", "OptimizedLSTMCell", ROWS), ("nnx", "LSTMCell", BUCKETS), ("linen", "OwnCell", LOOSE)],
    ids=["rows", "buckets", "loose"],
)
def test_packed_inputs_give_packed_outputs(api, cell, plan):
    face = APIS[api]
    apply, params = face.pure(face.ours.RNN(face.cell(cell), return_carry=True, plan=BUCKETS))
    packed = pack_padded_sequence(batch(), LENGTHS, batch_first=True, plan=plan)
    carry, outputs = apply(params, packed, reverse=True)
    expected = apply(params, batch(), seq_lengths=LENGTHS, reverse=True)
    assert outputs.plan == plan
    assert_close((carry, pad_packed_sequence(outputs, batch_first=True, total_length=T)[0]), expected)


PAIRS = {
    "of a kind": ("LSTMCell", "LSTMCell", {}),
    "of two kinds": ("GRUCell", "SimpleCell", {}),
    "added": ("GRUCell", "GRUCell", {"merge_fn": jnp.add}),
}
PAIRED = [("linen", "of a kind"), ("nnx", "of two kinds"), ("nnx", "added"), ("linen", "of two kinds")]


@pytest.mark.parametrize(("api", "pair"), PAIRED)
def test_bidirectional_is_that_of_flax(api, pair):
    face, (forward, backward, options) = APIS[api], PAIRS[pair]

    def layer(module):
        return module.Bidirectional(
            module.RNN(face.cell(forward)), module.RNN(face.cell(backward)), return_carry=True, **options
        )

    apply, params = face.pure(layer(face.ours))
    flax_apply, _ = face.pure(layer(face.flax))
    carry = carry_like(face, forward), carry_like(face, backward)
    time_major = {"of a kind": {}, "added": {"plan": ROWS}}.get(pair, {"plan": BUCKETS, "time_major": True})
    call = {"seq_lengths": LENGTHS, **time_major}
    x, clean = (np.swapaxes(a, 0, 1) if "time_major" in call else a for a in (batch(), batch(nan=False)))
    in_flax = {name: value for name, value in call.items() if name != "plan"}
    (_, (kept, outputs, final)), gradients = losses(apply, call, "time_major" in call)(params, x, carry)
    (_, (expected, _, flax_final)), flax_gradients = losses(flax_apply, in_flax, "time_major" in call)(
        params, clean, carry
    )
    assert_close((kept, final, gradients), (expected, flax_final, flax_gradients))
    np.testing.assert_array_equal(outputs, kept)
    packed = pack_padded_sequence(batch(), LENGTHS, batch_first=True, plan=ROWS)
    merged = apply(params, packed, initial_carry=carry, return_carry=False)
    padded = pad_packed_sequence(merged, batch_first="time_major" not in call, total_length=T)[0]
    assert_close(padded, kept)
    assert_close(apply(params, clean), flax_apply(params, clean))


@pytest.mark.parametrize("api", APIS)
def test_directions_of_a_kind_share_their_steps(api):
    face = APIS[api]

    def directions(*cells):
        apply, params = face.pure(
            face.ours.Bidirectional(*(face.ours.RNN(face.cell(cell)) for cell in cells)), jit=False
        )
        call = {"seq_lengths": LENGTHS, "plan": ROWS}
        jaxpr = jax.make_jaxpr(lambda params, x: apply(params, x, **call))(params, batch(nan=False))
        return [e.params["name"] for e in jaxpr.eqns if e.primitive.name in ("jit", "pjit")].count("run_known")

    assert directions("LSTMCell", "LSTMCell") == 1
    assert directions("LSTMCell", "GRUCell") == 2


@pytest.mark.parametrize("api", APIS)
def test_bad_input_in_flax_places(api):
    face = APIS[api]
    for cell in ("GRUCell", "LSTMCell"):
        apply, params = face.pure(face.ours.RNN(face.cell(cell)))
        with pytest.raises(ValueError, match=r"inputs must be \[\*batch, time, feature\].*got shape \(3,\)"):
            apply(params, np.zeros(F))
        with pytest.raises(ValueError, match=r"one length for each sequence, shape \(4,\), got shape \(2,\)"):
            apply(params, batch(), seq_lengths=[1, 2])
        with pytest.raises(ValueError, match=r"lengths\[1\] = 7 is longer than the padded batch, which has 6 steps"):
            apply(params, batch(), seq_lengths=[1, 7, 2, 3])
        with pytest.raises(ValueError, match="the plan is for 3 sequences, but the batch has 4"):
            apply(params, batch(), seq_lengths=LENGTHS, plan=plan_buckets([3, 2, 1]))
        with pytest.raises(ValueError, match=r"lengths\[1\] = 6 does not fit the plan"):
            apply(params, batch(), seq_lengths=LENGTHS, plan=plan_buckets([5, 4, 3, 2]))
        with pytest.raises(ValueError, match=r"begin with the batch axes \(4,\), got shape \(2, 3\)"):
            apply(
                params, batch(), seq_lengths=LENGTHS, initial_carry=jax.tree.map(lambda a: a[:2], carry_like(0, cell))
            )
        packed = pack_padded_sequence(batch(), LENGTHS, batch_first=True)
        with pytest.raises(TypeError, match="do not give seq_lengths= or plan="):
            apply(params, packed, seq_lengths=LENGTHS)
    with pytest.raises(ValueError, match=r"initial_carry must be \(c, h\), each \[\*batch, 3\]"):
        apply(params, batch(), seq_lengths=LENGTHS, initial_carry=jnp.zeros((B, H)))
    flax_rnn = face.flax.RNN(face.cell("GRUCell"))
    apply, params = face.pure(face.ours.Bidirectional(flax_rnn, face.flax.RNN(face.cell("GRUCell"))))
    assert apply(params, batch(nan=False), seq_lengths=LENGTHS).shape == (B, T, 2 * H)  # as Flax runs them
    with pytest.raises(TypeError, match="need RNNs of jaxpack, got flax"):
        apply(params, batch(), seq_lengths=LENGTHS, plan=ROWS)
