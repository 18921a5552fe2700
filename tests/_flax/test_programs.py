"""The drop-ins under shard_map and symbolic shapes, of nothing, and outside jit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_apis import APIS, F, H
from flax_batch import BUCKETS, LENGTHS, ROWS, B, T, assert_close, batch

from jaxpack import pack_padded_sequence

pytestmark = pytest.mark.usefixtures("x64")


def module_of(api, kind):
    """A drop-in that gives its carries too: of a known cell, of another, both ways; or of both directions."""
    face = APIS[api]
    if kind == "pair":
        pair = (face.ours.RNN(face.cell("LSTMCell")) for _ in range(2))
        return face.ours.Bidirectional(*pair, return_carry=True)
    cell = face.cell("GRUCell" if kind.startswith("known") else face.unknown)
    return face.ours.RNN(cell, return_carry=True, reverse="reversed" in kind, keep_order="in order" in kind)


KINDS = ("known", "known, reversed in order", "any, reversed", "any", "pair")
each_kind = pytest.mark.parametrize(("api", "kind"), [(api, kind) for api in APIS for kind in KINDS])


@each_kind
def test_each_device_has_its_share_of_a_batch(api, kind):
    apply, params = APIS[api].pure(module_of(api, kind), jit=False)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    lengths = (LENGTHS,) if "reversed" in kind else ()  # `contract.py` has the other kinds with lengths

    def run(params, x, *lengths):
        return apply(params, x, **({"seq_lengths": lengths[0]} if lengths else {}))

    specs = (jax.sharding.PartitionSpec(), spec, *[spec] * len(lengths))
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=spec))
    x = batch(nan=bool(lengths))
    assert_close(sharded(params, x, *lengths), jax.jit(run)(params, x, *lengths))


@each_kind
def test_each_device_has_parameters_of_its_own(api, kind):
    apply, params = APIS[api].pure(module_of(api, kind), jit=False)
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("model")
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf / 2]), params)
    x = batch(nan=False)

    def one(params):
        return jax.tree.map(lambda leaf: leaf[None], apply(jax.tree.map(lambda leaf: leaf[0], params), x))

    outputs = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec))(several)
    assert_close(outputs, jax.jit(jax.vmap(lambda params: apply(params, x)))(several))


def symbolic_call(api, kind, with_lengths):
    """The call for any batch and time, exported; as it is; and its parameters."""
    apply, params = APIS[api].pure(module_of(api, kind), jit=False)

    def run(params, x, *lengths):
        return apply(params, x, **({"seq_lengths": lengths[0]} if lengths else {}))

    b, t = jax.export.symbolic_shape("b, t")
    args = [jax.ShapeDtypeStruct((b, t, F), jnp.float64), jax.ShapeDtypeStruct((b,), jnp.int32)]
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    return jax.export.export(jax.jit(run))(like, *args[: 1 + with_lengths]).call, jax.jit(run), params


@pytest.mark.parametrize("with_lengths", [False, True], ids=["full", "lengths"])
@each_kind
def test_one_export_is_for_every_batch_and_time(api, kind, with_lengths):
    exported, run, params = symbolic_call(api, kind, with_lengths)
    batches = [(batch(), LENGTHS), (batch()[:2, :3], np.array([3, 0]))]
    for x, lengths in batches if with_lengths else [(np.nan_to_num(x), None) for x, _ in batches]:
        args = (x,) if lengths is None else (x, lengths.astype(np.int32))
        actual, expected = exported(params, *args), run(params, *args)
        assert_close(actual, expected)


@pytest.mark.parametrize("api", APIS)
def test_in_an_export_lengths_that_do_not_fit_are_nan_and_slack_is_inert_to_it(api):
    exported, _, params = symbolic_call(api, "any", True)
    _, outputs = exported(params, batch(), np.array([3, 7, 2, -1], np.int32))
    assert np.isnan(outputs[np.array([1, 3])]).all()
    assert np.isfinite(outputs[np.array([0, 2])]).all()


@pytest.mark.parametrize("api", APIS)
def test_a_plan_for_a_symbolic_batch_is_refused(api):
    face = APIS[api]
    b, t = jax.export.symbolic_shape("b, t")
    x = jax.ShapeDtypeStruct((b, t, F), jnp.float64)
    for module in (face.ours.RNN(face.cell("GRUCell"), plan=ROWS), face.ours.RNN(face.cell(face.unknown), plan=ROWS)):
        apply, params = face.pure(module, jit=False)
        with pytest.raises(ValueError, match=r"shape \(b, t, 3\) is symbolic in b, t, .* Export without a plan"):
            jax.export.export(jax.jit(lambda x, apply=apply, params=params: apply(params, x)))(x)


@pytest.mark.parametrize(("shape", "axes"), [((0, T), ()), ((0, 0), ()), ((B, 0), ()), ((2, 0, T), (2,))])
@pytest.mark.parametrize("with_lengths", [False, True], ids=["full", "lengths"])
@each_kind
def test_a_batch_of_nothing_gives_nothing(api, kind, with_lengths, shape, axes):
    apply, params = APIS[api].pure(module_of(api, kind), jit=False)
    options = {"seq_lengths": np.zeros(shape[:-1], int)} if with_lengths else {}
    x = jnp.zeros((*shape, F))

    def loss(params, x):
        carry, outputs = apply(params, x, **options)
        return sum(map(jnp.sum, jax.tree.leaves((carry, outputs)))), (carry, outputs)

    gradients, (carry, outputs) = jax.eval_shape(jax.grad(loss, argnums=(0, 1), has_aux=True), params, x)
    assert (outputs.shape, outputs.dtype) == ((*shape, H * (1 + (kind == "pair"))), jnp.float64)
    assert {leaf.shape for leaf in jax.tree.leaves(carry)} == {(*shape[:-1], H)}
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, (params, x))


@each_kind
def test_a_batch_of_nothing_has_zero_gradients_and_keeps_what_it_is_given(api, kind):
    apply, params = APIS[api].pure(module_of(api, kind), jit=False)

    def loss(params, x):
        carry, outputs = apply(params, x, seq_lengths=np.zeros(0, int))
        return sum(map(jnp.sum, jax.tree.leaves((carry, outputs))))

    gradients = jax.jit(jax.grad(loss))(params, jnp.zeros((0, T, F)))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients))
    with pytest.raises(ValueError, match="the plan is for 4 sequences, but the batch has 0"):
        apply(params, jnp.zeros((0, T, F)), seq_lengths=[], plan=ROWS)
    packed = pack_padded_sequence(jnp.zeros((0, T, F)), [], batch_first=True)
    carry, outputs = apply(params, packed, return_carry=True)
    assert outputs.data.shape[0] == 0
    assert all(leaf.shape[0] == 0 for leaf in jax.tree.leaves(carry))


@each_kind
def test_ranks_need_no_promotion(api, kind):
    plan = (None, ROWS, BUCKETS)[KINDS.index(kind) % 3]
    apply, params = APIS[api].pure(module_of(api, kind), jit=False)
    packed = pack_padded_sequence(batch(), LENGTHS, batch_first=True, plan=ROWS if plan is None else plan)

    def loss(params, x):
        padded = apply(params, x, seq_lengths=LENGTHS, plan=plan)
        carry, outputs = apply(params, packed.replace(data=packed.data * 2))
        return sum(map(jnp.sum, jax.tree.leaves((padded, carry, outputs.data))))

    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(jax.value_and_grad(loss, argnums=(0, 1)), params, batch(nan=False))


@pytest.mark.parametrize("planned", [False, True], ids=["no plan", "plan"])
@each_kind
def test_a_call_outside_jit_does_not_wait_for_results(api, kind, planned, monkeypatch):
    apply, params = APIS[api].pure(module_of(api, kind), jit=False)
    lengths, x = np.array(LENGTHS), batch(nan=False)
    options = {"plan": BUCKETS} if planned else {}
    read = []
    array: Any = type(jnp.zeros(()))
    value = array._value

    def watched(self):
        read.append(self.shape)
        return value.fget(self)

    apply(params, x, seq_lengths=lengths, **options)
    monkeypatch.setattr(array, "_value", property(watched))
    apply(params, x, seq_lengths=lengths, **options)
    assert read == []
