"""Transforms around layers that `contract.py` does not promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax import lax

import jaxpack
from jaxpack import GRU, LSTM, BucketPlan, pack_padded_sequence, plan_padded

F, H, B, T = 3, 4, 4, 5
PLAN = BucketPlan((3, 5), (4, 2))
ROWS = BucketPlan((10,), (2,), ((0, 5), (0, 5)))
on_each_plan = pytest.mark.parametrize("plan", [PLAN, ROWS, None], ids=["stairs", "rows", "none"])
LENGTHS = jnp.array([2, 5, 0, 3])
BATCH = jnp.asarray(np.nan_to_num(oracles.random_batch(LENGTHS.tolist(), F, dtype=np.float32)))
LAYERS = {
    "lstm": LSTM(F, H, bidirectional=True),
    "projected": LSTM(F, H, proj_size=2),
    "gru": GRU(F, H),
}


def pack(batch=BATCH, lengths=LENGTHS, plan=PLAN):
    return pack_padded_sequence(batch, lengths, batch_first=True, plan=plan)


def first_state(state):
    return state[0] if isinstance(state, tuple) else state


def scalar(layer, params, packed, **options):
    output, state = layer.apply(params, packed, **options)
    return (getattr(output, "data", output) ** 2).sum() + jnp.sin(first_state(state)).sum()


def padded_scalar(layer, params, batch, lengths, plan):
    return scalar(layer, params, batch, lengths=lengths, plan=plan)


@pytest.mark.usefixtures("x64")
def test_jacfwd_and_hessian():
    layer, packed = LSTM(F, 2), pack(BATCH.astype(jnp.float64), plan=plan_padded(B, T))
    params = layer.init(jax.random.key(0))

    def loss(bias, **options):
        return scalar(layer, {"l0": {**params["l0"], "bias_ih": bias}}, packed, **options)

    bias = params["l0"]["bias_ih"]
    forward = jax.jit(jax.jacfwd(functools.partial(loss, forward_mode=True)))(bias)
    np.testing.assert_allclose(forward, jax.jit(jax.jacrev(loss))(bias), rtol=1e-12)
    hessian = jax.jit(jax.hessian(loss))(bias)
    np.testing.assert_allclose(hessian, jax.jit(jax.jacrev(jax.jacrev(loss)))(bias), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-12)


@pytest.mark.parametrize("plan", [PLAN, ROWS], ids=["stairs", "rows"])
def test_checkpoint_and_scan_around_a_packed_layer(plan):
    layer = LSTM(F, F)
    params = layer.init(jax.random.key(0))

    def residual(packed, params):
        output, _ = layer.apply(params, packed)
        return packed.replace(data=packed.data + output.data), None

    def loss(params, body):
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf * 0.5]), params)
        return (lax.scan(body, pack(plan=plan), stacked)[0].data ** 2).sum()

    def unrolled(params):
        packed = pack(plan=plan)
        for factor in (1, 0.5):
            packed, _ = residual(packed, jax.tree.map(lambda leaf, factor=factor: leaf * factor, params))
        return (packed.data**2).sum()

    expected = jax.jit(jax.grad(unrolled))(params)
    for body in (residual, jax.checkpoint(residual)):
        gradient = jax.jit(jax.grad(functools.partial(loss, body=body)))(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, expected)


def test_layers_run_under_an_explicit_mesh_with_replicated_batches():
    layer = LAYERS["lstm"]
    params = layer.init(jax.random.key(0))
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        output, _ = jax.jit(lambda x, n: layer.apply(params, x, lengths=n))(BATCH, LENGTHS)
    np.testing.assert_allclose(output, layer.apply(params, BATCH, lengths=LENGTHS)[0], atol=1e-6)


@on_each_plan
@pytest.mark.parametrize("name", ["projected", "gru"])
def test_a_training_step_lowers_for_every_platform(name, plan):
    layer, optimizer = LAYERS[name], optax.adam(1e-3)
    params = layer.init(jax.random.key(0))

    def step(params, state, batch, lengths):
        loss, gradients = jax.value_and_grad(lambda p: padded_scalar(layer, p, batch, lengths, plan))(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    exported = jax.export.export(jax.jit(step), platforms=oracles.PLATFORMS)(
        params, optimizer.init(params), BATCH, LENGTHS
    )
    assert exported.platforms == oracles.PLATFORMS


@pytest.mark.optimized
def test_lengths_that_are_still_computed_are_not_waited_for():
    layer = LAYERS["gru"]
    params = layer.init(jax.random.key(0))

    def run(lengths):
        packed = pack(lengths=lengths)
        return layer.apply(params, packed), layer.apply(params, BATCH, lengths=lengths, plan=PLAN), jaxpack.last(packed)

    late_by = jax.jit(lambda n, x: n + (lax.fori_loop(0, 300, lambda _, y: jnp.tanh(y @ y), x).sum() * 0).astype(int))
    slow = late_by.lower(LENGTHS, jnp.zeros((500, 500))).compile()
    expected = jax.block_until_ready(run(LENGTHS))  # and all is compiled
    late = slow(LENGTHS, jnp.zeros((500, 500)))
    results = run(late)
    assert not late.is_ready()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), results, expected)


def test_an_ensemble_has_a_member_on_each_device():
    mesh = jax.make_mesh((2,), ("member",), axis_types=(jax.sharding.AxisType.Auto,))
    layer = LAYERS["projected"]
    ensemble = jax.vmap(layer.init)(jax.random.split(jax.random.key(0), 2))

    def gradient(params):
        return jax.grad(lambda p: padded_scalar(layer, p, BATCH, LENGTHS, plan_padded(B, T)))(params)

    def member(params):
        return jax.tree.map(lambda leaf: leaf[None], gradient(jax.tree.map(lambda leaf: leaf[0], params)))

    spread = jax.jit(jax.shard_map(member, mesh=mesh, in_specs=jax.P("member"), out_specs=jax.P("member")))(ensemble)
    expected = jax.jit(jax.vmap(gradient))(ensemble)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), spread, expected)


def test_vmap_over_sequences_and_their_lengths_is_a_batch():
    layer = LAYERS["gru"]
    params = layer.init(jax.random.key(0))

    def loss(params, run):
        output, state = run(params)
        return (output**2).sum() + jnp.sin(state).sum(), (output, state)

    def alone(params):
        output, state = jax.vmap(lambda x, n: layer.apply(params, x, lengths=n))(BATCH, LENGTHS)
        return output, jnp.moveaxis(state, 0, 1)

    def together(params):
        return layer.apply(params, BATCH, lengths=LENGTHS)

    results = [jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)(params, run) for run in (alone, together)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)


def test_one_sequence_takes_its_length():
    layer = LAYERS["lstm"]
    params = layer.init(jax.random.key(0))
    output, _ = layer.apply(params, BATCH[1], lengths=3)
    np.testing.assert_allclose(output[:3], layer.apply(params, BATCH[1, :3])[0], rtol=1e-5, atol=1e-6)
    assert (output[3:] == 0).all()
    assert (layer.apply(params, BATCH[1], lengths=0)[0] == 0).all()
    with pytest.raises(ValueError, match=r"lengths\[0\] = 6 is longer than the padded batch, which has 5 steps"):
        layer.apply(params, BATCH[1], lengths=6)


def test_a_symbolic_shape_is_refused_with_the_way_out():
    layer = LAYERS["gru"]
    params = layer.init(jax.random.key(0))
    for shape in ("b, 5, 3", "4, t, 3"):
        batch = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), jnp.float32)
        with pytest.raises(ValueError, match=r"symbolic (batch|time) axis, (b|t), but a plan has static shapes"):
            jax.export.export(jax.jit(lambda x: layer.apply(params, x)))(batch)


def test_no_eager_call_waits_for_what_another_computes():
    layer = LAYERS["lstm"]
    params, packed = layer.init(jax.random.key(0)), pack()
    output, _ = layer.apply(params, packed)
    for result in (output, output.map(jnp.exp), jaxpack.reverse_sequences(output), jaxpack.softmax(output) + output):
        assert result.lengths is packed.lengths
        assert result.sorted_indices is packed.sorted_indices
        assert result.unsorted_indices is packed.unsorted_indices
