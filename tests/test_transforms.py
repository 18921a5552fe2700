"""Transforms around layers that `contract.py` does not promise, and over every public function of packed batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax import lax

import jaxpack
from jaxpack import GRU, LSTM, RNN, BucketPlan, pack_padded_sequence, packed_scan, plan_padded

F, H, B, T = 3, 4, 4, 5
PLAN = BucketPlan((3, 5), (4, 2))
ROWS = BucketPlan((10,), (2,), ((0, 5), (0, 5)))
on_each_plan = pytest.mark.parametrize("plan", [PLAN, ROWS, None], ids=["stairs", "rows", "none"])
LENGTHS = jnp.array([2, 5, 0, 3])
BATCH = jnp.asarray(np.nan_to_num(oracles.random_batch(LENGTHS.tolist(), F, dtype=np.float32)))
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
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

    exported = jax.export.export(jax.jit(step), platforms=PLATFORMS)(params, optimizer.init(params), BATCH, LENGTHS)
    assert exported.platforms == PLATFORMS


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


# packed functions


def test_vmap_over_packed_batches():
    packed = jax.vmap(pack)(jnp.stack([BATCH, BATCH * 2]), jnp.stack([LENGTHS, LENGTHS]))
    sums = jax.vmap(jaxpack.segment_sum)(packed)
    np.testing.assert_allclose(sums[1], jaxpack.segment_sum(pack(BATCH * 2)), atol=1e-6)


FUNCTIONS = {
    "pack_padded_sequence": lambda p, x, n: pack(x, n).data,
    "pad_packed_sequence": lambda p, x, n: jaxpack.pad_packed_sequence(p, True, -1.0, 7),
    "pad_sequence": lambda p, x, n: jaxpack.pad_sequence([x[0], x[1, :2]]),
    "pack_sequence": lambda p, x, n: jaxpack.pack_sequence([x[0], x[1, :2]]).data,
    "reverse_sequences": lambda p, x, n: jaxpack.reverse_sequences(p).data,
    "first": lambda p, x, n: jaxpack.first(p),
    "last": lambda p, x, n: jaxpack.last(p),
    "segment_sum": lambda p, x, n: jaxpack.segment_sum(p),
    "segment_mean": lambda p, x, n: jaxpack.segment_mean(p),
    "segment_max": lambda p, x, n: jaxpack.segment_max(p),
    "segment_logsumexp": lambda p, x, n: jaxpack.segment_logsumexp(p),
    "segment_min": lambda p, x, n: jaxpack.segment_min(p),
    "segment_var": lambda p, x, n: jaxpack.segment_var(p),
    "segment_std": lambda p, x, n: jaxpack.segment_std(p),
    "segment_argmax": lambda p, x, n: jaxpack.segment_argmax(p),
    "segment_argmin": lambda p, x, n: jaxpack.segment_argmin(p),
    "mean": lambda p, x, n: jaxpack.mean(p),
    "var": lambda p, x, n: jaxpack.var(p),
    "std": lambda p, x, n: jaxpack.std(p),
    "broadcast_to_steps": lambda p, x, n: jaxpack.broadcast_to_steps(x[:, 0], p).data,
    "arithmetic": lambda p, x, n: ((p + p) * 2 - p / 3).data,
    "softmax": lambda p, x, n: jaxpack.softmax(p).data,
    "concatenate": lambda p, x, n: jaxpack.concatenate([p, p]).data,
    "map": lambda p, x, n: p.map(jnp.exp).data,
    "astype": lambda p, x, n: p.astype(jnp.bfloat16).data,
    "mask and fits": lambda p, x, n: (p.mask, p.fits),
    "packed_scan": lambda p, x, n: packed_scan(lambda c, x: (c + x, c), jnp.zeros((B, F)), p)[1].data,
    "rnn_cell": lambda p, x, n: jaxpack.rnn_cell(RNN(F, H).init(jax.random.key(0))["l0"], jnp.zeros((B, H)), x[:, 0]),
    "lstm_cell": lambda p, x, n: jaxpack.lstm_cell(
        LSTM(F, H).init(jax.random.key(0))["l0"], (jnp.zeros((B, H)),) * 2, x[:, 0]
    ),
    "gru_cell": lambda p, x, n: jaxpack.gru_cell(GRU(F, H).init(jax.random.key(0))["l0"], jnp.zeros((B, H)), x[:, 0]),
}


WITHOUT_GRADIENT = {"mask and fits", "astype", "segment_argmax", "segment_argmin"}


def test_every_public_jittable_function_is_lowered_below():
    host_side = {name for name in jaxpack.__all__ if name.startswith("plan_")}
    host_side |= {"BucketPlan", "CostModel", "PackedSequence"}
    host_side |= {"unchecked", "unpack_sequence", "unpad_sequence"}  # whose results have the lengths for shapes
    assert set(jaxpack.__all__) - host_side - {"RNN", "LSTM", "GRU"} <= set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_lowers_for_every_platform(name):
    def function(x, n):
        return [FUNCTIONS[name](pack(x, n, plan), x, n) for plan in (PLAN, ROWS)]

    exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(BATCH, LENGTHS)
    assert exported.platforms == PLATFORMS
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), atol=1e-6, rtol=1e-6
        ),
        exported.call(BATCH, LENGTHS),
        jax.jit(function)(BATCH, LENGTHS),
    )


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in WITHOUT_GRADIENT])
def test_is_differentiable_in_both_modes(name):
    def loss(x):
        leaves = jax.tree.leaves([FUNCTIONS[name](pack(x, plan=plan), x, LENGTHS) for plan in (PLAN, ROWS)])
        return sum(
            jnp.where(jnp.isfinite(leaf), jnp.sin(leaf), 0).sum()
            for leaf in leaves
            if jnp.issubdtype(leaf.dtype, jnp.floating)
        )

    tangent = jnp.cos(jnp.arange(BATCH.size)).reshape(BATCH.shape)
    gradient = jax.jit(jax.grad(loss))(BATCH)
    _, directional = jax.jit(lambda x: jax.jvp(loss, (x,), (tangent,)))(BATCH)
    np.testing.assert_allclose(directional, (gradient * tangent).sum(), rtol=1e-4, atol=1e-5)
    assert np.isfinite(gradient).all()
    assert (gradient != 0).any()


def test_a_padded_plan_and_a_tight_plan_lower_to_other_programs():
    run = jax.jit(lambda packed: jaxpack.segment_sum(packed))
    for plan in (PLAN, plan_padded(B, T), PLAN):
        run(pack_padded_sequence(BATCH, LENGTHS, True, plan=plan))
    assert run._cache_size() == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_promotes_no_ranks(name):
    with jax.numpy_rank_promotion("raise"):
        for plan in (PLAN, ROWS):
            jax.eval_shape(lambda x, n, plan=plan: FUNCTIONS[name](pack(x, n, plan), x, n), BATCH, LENGTHS)


@pytest.mark.parametrize("plan", [plan_padded(2, T), BucketPlan((2 * T,), (1,), ((0, T),))], ids=["padded", "rows"])
def test_a_scan_inside_shard_map_takes_a_constant_carry(plan):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
    def run(batch, lengths):
        carry = jnp.zeros((2, F)), jnp.zeros(2, int), jnp.zeros(2, bool)
        packed = pack_padded_sequence(batch, lengths, batch_first=True, plan=plan)
        (total, steps, odd), _ = packed_scan(lambda c, x: ((c[0] + x, c[1] + 1, ~c[2]), x), carry, packed)
        return total, steps, odd

    total, steps, odd = run(BATCH, LENGTHS)
    np.testing.assert_allclose(total, jaxpack.segment_sum(pack()), rtol=1e-5)
    assert steps.tolist() == LENGTHS.tolist()
    assert odd.tolist() == [False, True, False, True]


NONE = pack_padded_sequence(jnp.ones((0, T, F)), [], batch_first=True)


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if not n.endswith("_cell") and not n.startswith("pack_seq")])
def test_a_batch_of_no_sequences_gives_results_for_none(name):
    def run(packed, batch, lengths):
        if name in ("pack_padded_sequence", "pad_sequence"):
            return pack_padded_sequence(batch, np.zeros(0, int), batch_first=True).data
        if name == "packed_scan":
            return packed_scan(lambda c, x: (c + x, c), jnp.zeros((0, F)), packed)[1].data
        return FUNCTIONS[name](packed, batch, lengths)

    for function in (run, jax.jit(run)):
        for leaf in jax.tree.leaves(function(NONE, jnp.ones((0, T, F)), jnp.zeros(0, int))):
            assert 0 in leaf.shape or leaf.shape == (F,)
            assert np.isfinite(leaf).all()


EAGER = [n for n in FUNCTIONS if n not in ("pack_sequence", "pad_sequence", "packed_scan") and not n.endswith("_cell")]


@pytest.mark.parametrize("name", EAGER)
def test_outside_jit_a_function_is_few_programs(name):
    packed = pack()
    jaxpr = jax.make_jaxpr(lambda p, x: FUNCTIONS[name](p, x, np.asarray(LENGTHS)))(packed, BATCH)
    # Arithmetic makes four results, map calls exp in between, and the values to broadcast are sliced here.
    most = {"arithmetic": 4, "mask and fits": 2, "map": 3, "broadcast_to_steps": 3}.get(name, 1)
    assert len(jaxpr.eqns) <= most, jaxpr
