import functools
import pickle
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import orbax.checkpoint
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxpack
import jaxpack.linen
from jaxpack import BucketPlan, pack_padded_sequence, plan_padded

F, H = 3, 4
LENGTHS = [3, 6, 2, 4]
PLAN = BucketPlan((3, 6), (4, 2))
PADDED = plan_padded(4, 6)  # one loop, which compiles sooner
KEY = jax.random.key(0)
MODULES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "SimpleRNN": (jaxpack.linen.SimpleRNN, jaxpack.RNN, {"nonlinearity": "relu", "num_layers": 2}),
    "LSTM": (jaxpack.linen.LSTM, jaxpack.LSTM, {"proj_size": 2, "bidirectional": True}),
    "GRU": (jaxpack.linen.GRU, jaxpack.GRU, {"bias": False}),
}
each_module = pytest.mark.parametrize("name", MODULES)


def batch():
    return oracles.random_batch(LENGTHS, F, dtype=np.float32)


def packed_batch(features=F, plan=PADDED):
    x = oracles.random_batch(LENGTHS, features, dtype=np.float32)
    return pack_padded_sequence(x, LENGTHS, batch_first=True, plan=plan)


def assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def assert_close(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), ours, theirs)


def total(output):
    return (output.data**2).sum()


@each_module
def test_a_module_is_its_layer(name):
    module_class, layer_class, options = MODULES[name]
    module, layer = module_class(H, **options), layer_class(F, H, **options)
    assert module.layer(F) == layer
    packed = packed_batch(plan=PLAN)
    (output, state), variables = module.init_with_output(KEY, packed)
    params = variables["params"]
    assert jax.tree.map(jnp.shape, params) == layer.shapes
    expected = layer.apply(params, packed)
    assert_equal((output, state), expected)
    assert_equal(module.apply(variables, packed), expected)
    output, state = module.apply(variables, batch(), seq_lengths=LENGTHS, plan=PLAN)
    assert output.shape == (4, 6, layer.output_size)
    assert_equal(state, expected[1])
    initial = jax.tree.map(jnp.ones_like, state)
    assert_equal(module.apply(variables, packed, initial), layer.apply(params, packed, initial))


@each_module
def test_gradients_are_the_layers_own(name):
    module_class, _, options = MODULES[name]
    module, packed = module_class(H, **options), packed_batch()
    params = module.layer(F).init(KEY)
    gradients = jax.jit(jax.grad(lambda params: total(module.apply({"params": params}, packed)[0])))(params)
    expected = jax.jit(jax.grad(lambda params: total(module.layer(F).apply(params, packed)[0])))(params)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(expected))
    assert_equal(gradients, expected)


@pytest.mark.parametrize("inputs", [packed_batch(), batch(), batch()[0], batch().tolist()])
def test_the_input_size_is_read_off_the_inputs(inputs):
    variables = jax.eval_shape(jaxpack.linen.GRU(H).init, KEY, inputs)
    assert jax.tree.map(jnp.shape, variables["params"]) == jaxpack.GRU(F, H).shapes


class Classifier(nn.Module):
    """What a user builds: a packed stack, pooled, with a head."""

    @nn.compact
    def __call__(self, packed, train=False):
        output, _ = jaxpack.linen.GRU(8, 2, dropout=0.1)(packed, deterministic=not train)
        return nn.Dense(2)(jaxpack.segment_mean(output))


def test_a_train_state_learns_with_one_program():
    model = Classifier()
    params = model.init(KEY, packed_batch())["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-2))
    labels = jnp.array([0, 1, 1, 0])
    traces = []

    @jax.jit
    def train_step(state, x, lengths):
        traces.append(lengths)
        rngs = {"dropout": jax.random.fold_in(KEY, state.step)}

        def loss(params):
            packed = pack_padded_sequence(x, lengths, batch_first=True, plan=PADDED)
            logits = state.apply_fn({"params": params}, packed, train=True, rngs=rngs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradients = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradients), value

    losses = []
    for i in range(60):
        state, value = train_step(state, batch(), jnp.array([3, 6 - i % 2, 2, 4]))
        losses.append(value)
    assert len(traces) == 1
    assert losses[-1] < 0.1 < losses[0]
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True))


def test_dropout_is_decided_by_the_attribute_or_the_call_as_in_flax():
    regularization = jaxpack.Regularization(input_dropout=0.5)
    make = functools.partial(jaxpack.linen.GRU, 8, 2, dropout=0.5, regularization=regularization)
    variables = {"params": make().layer(F).init(KEY)}
    packed = packed_batch()
    without = jaxpack.GRU(F, 8, 2).apply(variables["params"], packed)
    assert_equal(make().apply(variables, packed, deterministic=True), without)
    assert_equal(make(deterministic=True).apply(variables, packed), without)

    def run(seed):
        return make(deterministic=False).apply(variables, packed, rngs={"dropout": jax.random.key(seed)})

    assert_equal(run(1), run(1))
    assert_equal(make().apply(variables, packed, deterministic=False, rngs={"dropout": jax.random.key(1)}), run(1))
    assert (run(1)[0].data != run(2)[0].data).any()
    assert (run(1)[0].data != without[0].data).any()
    with pytest.raises(ValueError, match="deterministic"):
        make().apply(variables, packed)
    with pytest.raises(ValueError, match="deterministic"):
        make(deterministic=True).apply(variables, packed, deterministic=True)
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        make().apply(variables, packed, deterministic=False)


def test_initialisers_reach_the_layer():
    module = jaxpack.linen.LSTM(
        H,
        num_layers=2,
        kernel_init=nn.initializers.constant(2),
        recurrent_kernel_init=nn.initializers.orthogonal(),
        bias_init={"f": nn.initializers.ones},
    )
    params = module.init(KEY, packed_batch())["params"]
    for group in params.values():
        assert (group["weight_ih"] == 2).all()
        for gate in np.split(np.asarray(group["weight_hh"]), 4, axis=1):
            np.testing.assert_allclose(gate @ gate.T, np.eye(H), atol=1e-6)
        assert (group["bias_ih"][H : 2 * H] == 1).all()
        assert (group["bias_hh"][H : 2 * H] == 0).all()
        assert (abs(group["bias_ih"][:H]) <= 0.5).all()
    assert (params["l0"]["weight_hh"] != params["l1"]["weight_hh"]).any()
    assert (
        params["l0"]["weight_hh"] != module.init(jax.random.key(1), packed_batch())["params"]["l0"]["weight_hh"]
    ).any()
    assert hash(module) == hash(module.clone())  # a mapping does not cost a module its hash


def test_dtype_is_computed_in_and_param_dtype_kept():
    mixed, packed = jaxpack.linen.GRU(H, dtype=jnp.bfloat16), packed_batch()
    (output, h_n), variables = mixed.init_with_output(KEY, packed)
    assert (output.dtype, h_n.dtype) == (jnp.bfloat16, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert_equal((output, h_n), mixed.layer(F).apply(variables["params"], packed, dtype=jnp.bfloat16))
    half = jax.eval_shape(jaxpack.linen.GRU(H, param_dtype=jnp.bfloat16).init_with_output, KEY, packed)
    assert {leaf.dtype for leaf in jax.tree.leaves(half[1])} == {jnp.dtype("bfloat16")}
    assert half[0][0].dtype == jnp.float32
    with pytest.raises(TypeError, match="dtype must be a floating dtype, got int"):
        jaxpack.linen.GRU(H, param_dtype=int).init(KEY, packed)


SPECS = {
    "weight_ih": PartitionSpec(None, "model"),
    "weight_hh": PartitionSpec("model", None),
    "weight_hr": PartitionSpec(None, "model"),
    "bias_ih": PartitionSpec("model"),
    "bias_hh": PartitionSpec("model"),
}


def sharded_lstm(wrap=nn.with_partitioning, model="model"):
    return jaxpack.linen.LSTM(
        H,
        proj_size=2,
        kernel_init=wrap(nn.initializers.lecun_normal(), (None, model)),
        recurrent_kernel_init=wrap(nn.initializers.orthogonal(), (model, None)),
        bias_init={"f": wrap(nn.initializers.ones, (model,))},
    )


def test_partitioned_initialisers_give_partitioned_variables():
    module = sharded_lstm()
    variables = jax.eval_shape(module.init, KEY, packed_batch())
    assert nn.get_partition_spec(variables)["params"] == {"l0": SPECS}
    logical = jax.eval_shape(sharded_lstm(nn.with_logical_partitioning, "units").init, KEY, packed_batch())
    assert logical["params"]["l0"]["weight_ih"].names == (None, "units")
    rules = [("units", "model")]
    assert nn.logical_to_mesh(nn.get_partition_spec(logical), rules)["params"] == {"l0": SPECS}


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_parameters_lie_where_their_boxes_say_and_results_are_the_same(axes):
    module, packed = sharded_lstm(), packed_batch()
    mesh = jax.make_mesh((2,), ("model",), axis_types=(axes,))
    boxed = module.init(KEY, packed)
    variables = jax.device_put(boxed, nn.get_sharding(boxed, mesh))
    for name, box in variables["params"]["l0"].items():
        assert box.value.sharding == NamedSharding(mesh, SPECS[name])
        assert len({str(shard.index) for shard in box.value.addressable_shards}) == 2  # each device has its own half

    def value_and_gradient(variables):
        return jax.value_and_grad(lambda variables: total(module.apply(variables, packed)[0]))(variables)

    expected = value_and_gradient(nn.meta.unbox(boxed))
    with jax.set_mesh(mesh):
        if axes == AxisType.Auto:
            value, gradients = jax.jit(value_and_gradient)(variables)
            assert nn.get_partition_spec(gradients)["params"] == {"l0": SPECS}
            assert_close(jax.tree.map(np.asarray, (value, nn.meta.unbox(gradients))), expected)
        else:
            with pytest.raises(ValueError, match="under an explicit mesh"):
                jax.jit(module.apply)(nn.meta.unbox(variables), packed)


def scanned(num, **options):
    """A stack of modules as one, whose parameters have a leading axis."""
    return nn.scan(
        jaxpack.linen.GRU,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=num,
        metadata_params={nn.meta.PARTITION_NAME: "layers"},
    )(H, **options)


def parts_of(variables, num):
    """The parameters of each module, which differ."""
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i], nn.meta.unbox(variables)["params"]) for i in range(num)]
    assert jax.tree.map(jnp.shape, parts[0]) == jaxpack.GRU(H, H).shapes
    assert (parts[0]["l0"]["weight_hh"] != parts[1]["l0"]["weight_hh"]).any()
    return parts


def test_scan_runs_over_layers():
    module = scanned(3, recurrent_kernel_init=nn.with_partitioning(nn.initializers.orthogonal(), (None, "model")))
    packed = packed_batch(H)
    variables = module.init(KEY, packed)
    assert variables["params"]["l0"]["weight_hh"].names == ("layers", None, "model")
    output, states = jax.jit(module.apply)(variables, packed)
    expected = packed
    for part, state in zip(parts_of(variables, 3), states, strict=True):
        expected, final = jaxpack.GRU(H, H).apply(part, expected)
        assert_close(state, final)
    assert_close(output, expected)


def test_vmap_runs_an_ensemble_and_grad_goes_through_it():
    ensemble = nn.vmap(
        jaxpack.linen.GRU, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2
    )(H)
    packed = packed_batch(H)
    variables = ensemble.init(KEY, packed)

    def loss(module, variables):
        output, _ = module.apply(variables, packed)
        return total(output), output.data

    value_and_gradient = jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True), static_argnums=0)
    (_, output), gradients = value_and_gradient(ensemble, variables)
    for i, part in enumerate(parts_of(variables, 2)):
        (_, data), expected = value_and_gradient(jaxpack.linen.GRU(H), {"params": part})
        np.testing.assert_allclose(output[i], data, atol=1e-6)
        found = jax.tree.map(lambda leaf, i=i: leaf[i], gradients)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), found, expected)


def test_remat_changes_no_gradient():
    options = {"num_layers": 2, "dropout": 0.5, "deterministic": False}
    packed = packed_batch()
    params = jaxpack.linen.GRU(8, **options).layer(F).init(KEY)

    def run(module, params):
        return total(module.apply({"params": params}, packed, rngs={"dropout": KEY})[0])

    modules = jaxpack.linen.GRU(8, **options), nn.remat(jaxpack.linen.GRU)(8, **options)
    plainly, again = (jax.jit(jax.value_and_grad(functools.partial(run, module)))(params) for module in modules)
    assert_close(again, plainly)
    program = jax.make_jaxpr(functools.partial(run, modules[1]))(params)
    assert "remat2" in {equation.primitive.name for equation in program.eqns}


def test_orbax_saves_and_restores(tmp_path):
    module = sharded_lstm()
    variables = module.init(KEY, packed_batch())
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "variables", variables)
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(module.init, jax.random.key(1), packed_batch())
        restored = checkpointer.restore(tmp_path / "variables", abstract)
    assert restored["params"]["l0"]["weight_ih"].names == (None, "model")
    assert_equal(restored, variables)
    assert_equal(module.apply(restored, packed_batch()), module.apply(variables, packed_batch()))


def test_a_module_called_twice_shares_its_parameters():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, packed):
            rnn = jaxpack.linen.SimpleRNN(F)
            return rnn(rnn(packed)[0])[0]

    packed = packed_batch()
    output, variables = Twice().init_with_output(KEY, packed)
    layer, (params,) = jaxpack.RNN(F, F), variables["params"].values()
    assert_close(output, layer.apply(params, layer.apply(params, packed)[0])[0])


def test_frozen_variables_and_pickled_modules_work():
    module = jaxpack.linen.GRU(H, bias_init={"z": nn.initializers.ones})
    variables = module.init(KEY, packed_batch())
    assert pickle.loads(pickle.dumps(module)) == module
    frozen = flax.core.freeze(variables)
    assert_equal(module.apply(frozen, packed_batch()), module.apply(variables, packed_batch()))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: jaxpack.linen.LSTM(H, proj_size=9), ValueError, "proj_size must be 0 .* got 9"),
        (lambda: jaxpack.linen.GRU(0), ValueError, "hidden_size must be at least 1, got 0"),
        (lambda: jaxpack.linen.SimpleRNN(H, nonlinearity="sin"), ValueError, "nonlinearity must be .* got 'sin'"),
        (lambda: jaxpack.linen.GRU(H).init(KEY, None), ValueError, "inputs holds no array"),
        (lambda: jaxpack.linen.GRU(H).init(KEY, 3.0), ValueError, "inputs must be a PackedSequence, .*got shape"),
        (lambda: jaxpack.linen.GRU(H).apply({}, batch()), flax.errors.ScopeCollectionNotFound, "l0"),
        (lambda: apply(batch()[..., :2]), ValueError, "inputs must have 3 features"),
        (lambda: apply(batch(), seq_lengths=[1, 2]), ValueError, "2 lengths for a batch of 4"),
        (lambda: apply(batch(), num_layers=2), TypeError, "l1.weight_ih is missing"),
        (
            lambda: jaxpack.linen.GRU(H, bias_init={"x": nn.initializers.ones}).init(KEY, batch()),
            ValueError,
            "bias_init names the gate 'x'",
        ),
    ],
)
def test_errors_are_the_layers_own(make, error, message):
    with pytest.raises(error, match=message):
        make()


def apply(inputs, seq_lengths=None, **options):
    variables = {"params": jaxpack.GRU(F, H).init(KEY)}
    return jaxpack.linen.GRU(H, **options).apply(variables, inputs, seq_lengths=seq_lengths)


def test_a_warning_points_at_the_user():
    with pytest.warns(UserWarning, match="dropout acts between layers") as caught:
        jaxpack.linen.GRU(H, dropout=0.5)
    assert [warning.filename for warning in caught] == [__file__]


@each_module
def test_a_symbolic_batch_is_refused_with_the_way_out(name):
    module_class, layer_class, _ = MODULES[name]
    variables = {"params": layer_class(F, H).init(KEY)}
    b, t = jax.export.symbolic_shape("b, t")
    for shape, axis in (((b, t, F), "batch axis, b"), ((2, t, F), "time axis, t"), ((b, 3, F), "batch axis, b")):
        with pytest.raises(ValueError, match=rf"symbolic {axis}, .* take RNN\(cell\) and Bidirectional"):
            jax.export.export(jax.jit(functools.partial(module_class(H).apply, variables)))(
                jax.ShapeDtypeStruct(shape, jnp.float32)
            )


@each_module
def test_ranks_need_no_promotion_with_dropout_between_layers(name):
    plan = {"SimpleRNN": None, "LSTM": PLAN, "GRU": jaxpack.plan_rows(LENGTHS)}[name]
    module_class, _, options = MODULES[name]
    module = module_class(H, **{"num_layers": 2, "dropout": 0.5, "bidirectional": True} | options)
    packed, keys = packed_batch(plan=plan or PADDED), {"params": KEY, "dropout": KEY}

    def loss(data):
        packed_inputs = packed.replace(data=data)
        (output, state), variables = module.init_with_output(keys, packed_inputs, deterministic=False)
        padded = module.apply(variables, batch(), seq_lengths=LENGTHS, plan=plan, deterministic=False, rngs=keys)
        return sum(map(jnp.sum, jax.tree.leaves((padded, output.data, state))))

    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(jax.value_and_grad(loss), packed.data)
