from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import orbax.checkpoint
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxpack
import jaxpack.nnx
from jaxpack import BucketPlan, pack_padded_sequence, plan_padded

F, H = 3, 4
LENGTHS = [3, 6, 2, 4]
PLAN = BucketPlan((3, 6), (4, 2))
PADDED = plan_padded(4, 6)  # one loop, which compiles sooner
MODULES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "SimpleRNN": (jaxpack.nnx.SimpleRNN, jaxpack.RNN, {"nonlinearity": "relu", "num_layers": 2}),
    "LSTM": (jaxpack.nnx.LSTM, jaxpack.LSTM, {"proj_size": 2, "bidirectional": True}),
    "GRU": (jaxpack.nnx.GRU, jaxpack.GRU, {"bias": False}),
}
each_module = pytest.mark.parametrize("name", MODULES)


def batch():
    return oracles.random_batch(LENGTHS, F, dtype=np.float32)


def packed_batch(features=F, plan=PADDED):
    x = oracles.random_batch(LENGTHS, features, dtype=np.float32)
    return pack_padded_sequence(x, LENGTHS, batch_first=True, plan=plan)


def plain(module):
    """A module's parameters as the core takes them."""
    return nnx.to_pure_dict(nnx.state(module.params))


def assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def assert_close(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), ours, theirs)


def total(output):
    return (output.data**2).sum()


def loss_and_data(layer, params, packed):
    output, _ = layer.apply(params, packed)
    return total(output), output.data


@each_module
def test_a_module_is_its_layer(name):
    module_class, layer_class, options = MODULES[name]
    module = module_class(F, H, **options, rngs=nnx.Rngs(0))
    layer = layer_class(F, H, **options)
    assert module.layer == layer
    assert_equal(plain(module), layer.init(nnx.Rngs(0).params()))
    packed = packed_batch(plan=PLAN)
    expected = layer.apply(plain(module), packed)
    assert_equal(module(packed), expected)
    output, state = module(batch(), seq_lengths=LENGTHS, plan=PLAN)
    assert output.shape == (4, 6, layer.output_size)
    assert_equal(state, expected[1])
    initial = jax.tree.map(jnp.ones_like, state)
    assert_equal(module(packed, initial), layer.apply(plain(module), packed, initial))


@each_module
def test_gradients_are_the_layers_own(name):
    module_class, _, options = MODULES[name]
    module = module_class(F, H, **options, rngs=nnx.Rngs(0))
    packed = packed_batch()
    gradients = nnx.jit(nnx.grad(lambda m: total(m(packed)[0])))(module)
    expected = jax.jit(jax.grad(lambda p: total(module.layer.apply(p, packed)[0])))(plain(module))
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(expected))
    assert_close(nnx.to_pure_dict(gradients), expected)


def test_parameters_of_the_core_go_in_and_out():
    options: dict[str, Any] = {"proj_size": 2, "bidirectional": True, "kernel_metadata": {"note": "kept"}}
    module = jaxpack.nnx.LSTM(F, H, **options, rngs=nnx.Rngs(0))
    params = module.layer.init(jax.random.key(7))
    nnx.update(module.params, module.layer.from_torch(module.layer.to_torch(params)))
    assert_equal(plain(module), params)
    assert module.params.l0.weight_ih.get_metadata("note") == "kept"
    assert_equal(module(packed_batch(plan=PLAN)), module.layer.apply(params, packed_batch(plan=PLAN)))


class Classifier(nnx.Module):
    """What a user builds: a packed stack, pooled, with a head."""

    def __init__(self, rngs, **options):
        self.rnn = jaxpack.nnx.GRU(F, 8, num_layers=2, **options, rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, packed):
        output, _ = self.rnn(packed)
        return self.head(jaxpack.segment_mean(output))


def test_trains_inside_a_module_with_one_program():
    model = Classifier(nnx.Rngs(0), dropout=0.1)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    labels = jnp.array([0, 1, 1, 0])
    traces = []

    @nnx.jit
    def train_step(model, optimizer, x, lengths):
        traces.append(lengths)

        def loss(model):
            packed = pack_padded_sequence(x, lengths, batch_first=True, plan=PADDED)
            return optax.softmax_cross_entropy_with_integer_labels(model(packed), labels).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    losses = [train_step(model, optimizer, batch(), jnp.array([3, 6 - i % 2, 2, 4])) for i in range(60)]
    assert len(traces) == 1
    assert losses[-1] < 0.1 < losses[0]
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def test_eval_train_and_view_switch_dropout():
    model = Classifier(nnx.Rngs(0), dropout=0.5)
    packed = packed_batch()
    without = jaxpack.GRU(F, 8, 2).apply(plain(model.rnn), packed)
    assert (model(packed) != model(packed)).any()  # the dropout stream moves on
    view = nnx.view(model, deterministic=True)
    assert_equal(view.rnn(packed), without)
    assert (model(packed) != model(packed)).any()
    model.eval()
    assert_equal(model.rnn(packed), without)
    assert (model.rnn(packed, deterministic=False)[0].data != without[0].data).any()
    model.train()
    assert_equal(model.rnn(packed, deterministic=True), without)
    assert (model(packed) != model(packed)).any()
    assert_equal(jaxpack.nnx.LSTM(F, 8, rngs=nnx.Rngs(0), deterministic=True).deterministic, True)


def test_rngs_in_the_call_decide_the_dropout():
    regularization = jaxpack.Regularization(input_dropout=0.5)
    rnn = jaxpack.nnx.GRU(F, 8, 2, dropout=0.5, regularization=regularization, rngs=nnx.Rngs(0))
    packed = packed_batch()
    key = nnx.Rngs(dropout=7).dropout()
    expected = rnn.layer.apply(plain(rnn), packed, dropout_key=key)
    for rngs in (nnx.Rngs(dropout=7), nnx.Rngs(dropout=7).dropout, key):
        assert_equal(rnn(packed, rngs=rngs), expected)
    assert (rnn(packed, rngs=nnx.Rngs(dropout=8))[0].data != expected[0].data).any()


def test_initialisers_and_seeds_are_the_layers_own():
    options = {
        "kernel_init": nnx.initializers.lecun_normal(),
        "recurrent_kernel_init": nnx.initializers.orthogonal(),
        "bias_init": {"f": nnx.initializers.ones},
    }
    module = jaxpack.nnx.LSTM(F, H, 2, proj_size=2, **options, rngs=nnx.Rngs(0))
    assert_equal(plain(module), module.layer.init(nnx.Rngs(0).params(), **options))
    assert (module.params.l1.bias_ih[H : 2 * H] == 1).all()
    other = jaxpack.nnx.LSTM(F, H, 2, proj_size=2, **options, rngs=nnx.Rngs(1))
    assert (module.params.l0.weight_hh[...] != other.params.l0.weight_hh[...]).any()
    with pytest.raises(ValueError, match="bias_init names the gate 'x'"):
        jaxpack.nnx.LSTM(F, H, bias_init={"x": nnx.initializers.ones}, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"kernel_init must be an initialiser.*got 1\.0"):
        jaxpack.nnx.LSTM(F, H, kernel_init=1.0, rngs=nnx.Rngs(0))  # type: ignore[arg-type]


def test_dtype_is_computed_in_and_param_dtype_kept():
    mixed = jaxpack.nnx.GRU(F, H, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    packed = packed_batch()
    output, h_n = mixed(packed)
    assert (output.dtype, h_n.dtype) == (jnp.bfloat16, jnp.float32)
    assert_equal((output, h_n), mixed.layer.apply(plain(mixed), packed, dtype=jnp.bfloat16))
    gradients = nnx.eval_shape(nnx.grad(lambda m: total(m(packed)[0].astype(jnp.float32))), mixed)
    assert {leaf.dtype for leaf in jax.tree.leaves((plain(mixed), gradients))} == {jnp.dtype("float32")}
    half = jaxpack.nnx.GRU(F, H, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(plain(half))} == {jnp.dtype("bfloat16")}
    assert half(packed)[0].dtype == jnp.float32
    with pytest.raises(TypeError, match="dtype must be a floating dtype, got int"):
        jaxpack.nnx.GRU(F, H, param_dtype=int, rngs=nnx.Rngs(0))


SPECS = {
    "weight_ih": PartitionSpec(None, "model"),
    "weight_hh": PartitionSpec("model", None),
    "weight_hr": PartitionSpec(None, "model"),
    "bias_ih": PartitionSpec("model"),
    "bias_hh": PartitionSpec("model"),
}


def with_metadata():
    return {
        "kernel_metadata": {"out_sharding": (None, "model"), "note": "kept"},
        "recurrent_kernel_metadata": {"out_sharding": ("model", None)},
        "bias_metadata": {"out_sharding": ("model",)},
    }


def with_initialisers():
    wrap, init = nnx.with_partitioning, nnx.initializers
    return {
        "kernel_init": wrap(init.lecun_normal(), (None, "model"), note="kept"),
        "recurrent_kernel_init": wrap(init.orthogonal(), ("model", None)),
        "bias_init": {"f": wrap(init.ones, ("model",))},
    }


def auto_mesh():
    return jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize("options", [with_metadata(), with_initialisers()], ids=["metadata", "initialisers"])
def test_sharding_metadata_reaches_the_parameters(options):
    with nnx.use_eager_sharding(False):
        module = jaxpack.nnx.LSTM(F, H, 2, proj_size=2, **options, rngs=nnx.Rngs(0))
    specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(module.params)))
    assert specs == dict.fromkeys(("l0", "l1"), SPECS)
    assert module.params.l0.weight_ih.get_metadata("note") == "kept"
    assert "note" not in module.params.l0.weight_hh.get_metadata()
    unsharded = {name: init for name, init in options.items() if name.endswith("init")}
    assert_equal(plain(module), module.layer.init(nnx.Rngs(0).params(), **raw(unsharded)))


def raw(options):
    """The same initialisers without what nnx.with_partitioning has put around their results."""
    return {
        name: {gate: lambda *a, f=f: f(*a).raw_value for gate, f in init.items()}
        if isinstance(init, dict)
        else lambda *a, f=init: f(*a).raw_value
        for name, init in options.items()
    }


@pytest.mark.parametrize("options", [with_metadata(), with_initialisers()], ids=["metadata", "initialisers"])
def test_on_a_mesh_parameters_lie_where_their_metadata_says_and_results_are_the_same(options):
    @nnx.jit
    def create():
        return jaxpack.nnx.LSTM(F, H, proj_size=2, **options, rngs=nnx.Rngs(0))

    with jax.set_mesh(auto_mesh()):
        module = create()
        for name, spec in SPECS.items():
            param = module.params.l0[name][...]
            assert param.sharding.is_equivalent_to(NamedSharding(auto_mesh(), spec), param.ndim)
            assert len({str(shard.index) for shard in param.addressable_shards}) == 2  # each device has its own half
        output, state = nnx.jit(lambda module, packed: module(packed))(module, packed_batch())
    params = jax.tree.map(np.asarray, plain(module))
    assert_close(jax.tree.map(np.asarray, (output, state)), module.layer.apply(params, packed_batch()))


def stack_and_parts(num):
    """Modules as one whose parameters have a leading axis, their layer, and the parameters of each."""

    @nnx.split_rngs(splits=num)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs):
        return jaxpack.nnx.GRU(H, H, recurrent_kernel_init=nnx.initializers.orthogonal(), rngs=rngs)

    stack = create(nnx.Rngs(0))
    layer = jaxpack.GRU(H, H)
    assert jax.tree.map(jnp.shape, plain(stack)["l0"]["weight_hh"]) == (num, H, 3 * H)
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i], plain(stack)) for i in range(num)]
    assert (parts[0]["l0"]["weight_hh"] != parts[1]["l0"]["weight_hh"]).any()
    return stack, layer, parts


def test_scan_runs_over_layers():
    stack, layer, parts = stack_and_parts(3)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def run(packed, module):
        return module(packed)

    output, states = nnx.jit(run)(packed_batch(H), stack)
    expected = packed_batch(H)
    for part, state in zip(parts, states, strict=True):
        expected, final = layer.apply(part, expected)
        assert_close(state, final)
    assert_close(output, expected)


def test_vmap_runs_an_ensemble_and_grad_goes_through_it():
    ensemble, layer, parts = stack_and_parts(2)
    packed = packed_batch(H)

    @nnx.jit
    def value_and_gradient(ensemble, packed):
        def loss(ensemble):
            data = nnx.vmap(lambda module, packed: module(packed)[0].data, in_axes=(0, None))(ensemble, packed)
            return (data**2).sum(), data

        return nnx.value_and_grad(loss, has_aux=True)(ensemble)

    (_, output), gradients = value_and_gradient(ensemble, packed)
    expected = jax.jit(jax.value_and_grad(lambda params: loss_and_data(layer, params, packed), has_aux=True))
    for i, part in enumerate(parts):
        (_, data), gradient = expected(part)
        np.testing.assert_allclose(output[i], data, atol=1e-6)
        found = jax.tree.map(lambda leaf, i=i: leaf[i], nnx.to_pure_dict(gradients))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), found, gradient)


def test_remat_changes_no_gradient():
    module = jaxpack.nnx.GRU(F, 8, 2, dropout=0.5, rngs=nnx.Rngs(0))
    rngs, packed = nnx.Rngs(dropout=1).dropout(), packed_batch()

    def run(module, packed):
        return total(module(packed, rngs=rngs)[0])

    plainly, again = (nnx.jit(nnx.value_and_grad(f))(module, packed) for f in (run, nnx.remat(run)))
    assert_close(again[0], plainly[0])
    assert_close(nnx.to_pure_dict(again[1]), nnx.to_pure_dict(plainly[1]))
    graphdef, state = nnx.split(module)
    program = jax.make_jaxpr(lambda state: nnx.remat(run)(nnx.merge(graphdef, state), packed))(state)
    assert "remat2" in {equation.primitive.name for equation in program.eqns}


def test_orbax_saves_and_restores(tmp_path):
    module = jaxpack.nnx.GRU(F, 8, 2, dropout=0.5, rngs=nnx.Rngs(0))
    module(packed_batch())  # the dropout stream has moved on
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(module))
        checkpointer.wait_until_finished()
        abstract = nnx.eval_shape(lambda: jaxpack.nnx.GRU(F, 8, 2, dropout=0.5, rngs=nnx.Rngs(1)))
        graphdef, state = nnx.split(abstract)
        restored = nnx.merge(graphdef, checkpointer.restore(tmp_path / "state", state))
    assert_equal(plain(restored), plain(module))
    assert_equal(restored(packed_batch()), module(packed_batch()))  # with the same dropout


def test_errors_are_the_layers_own():
    with pytest.raises(ValueError, match="proj_size"):
        jaxpack.nnx.LSTM(F, H, proj_size=9, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="unexpected keyword argument 'kernel'"):
        jaxpack.nnx.LSTM(F, H, kernel=None, rngs=nnx.Rngs(0))  # type: ignore[call-arg]
    module = jaxpack.nnx.GRU(F, H, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="2 lengths for a batch of 4"):
        module(batch(), seq_lengths=np.array([1, 2]))
    with pytest.warns(UserWarning, match="dropout acts between layers") as caught:
        jaxpack.nnx.GRU(F, H, dropout=0.5, rngs=nnx.Rngs(0))
    assert [warning.filename for warning in caught] == [__file__]


@each_module
def test_a_symbolic_batch_is_refused_with_the_way_out(name):
    module = MODULES[name][0](F, H, rngs=nnx.Rngs(0))
    b, t = jax.export.symbolic_shape("b, t")
    for shape, axis in (((b, t, F), "batch axis, b"), ((2, t, F), "time axis, t"), ((b, 3, F), "batch axis, b")):
        with pytest.raises(ValueError, match=rf"symbolic {axis}, .* take RNN\(cell\) and Bidirectional"):
            jax.export.export(jax.jit(module))(jax.ShapeDtypeStruct(shape, jnp.float32))


@each_module
def test_ranks_need_no_promotion_with_dropout_between_layers(name):
    plan = {"SimpleRNN": None, "LSTM": PLAN, "GRU": jaxpack.plan_rows(LENGTHS)}[name]
    module_class, _, options = MODULES[name]
    module = module_class(F, H, **{"num_layers": 2, "dropout": 0.5, "bidirectional": True} | options, rngs=nnx.Rngs(0))
    packed = packed_batch(plan=plan or PADDED)

    def loss(module, data):
        padded = module(batch(), seq_lengths=LENGTHS, plan=plan)
        output, state = module(packed.replace(data=data))
        return sum(map(jnp.sum, jax.tree.leaves((padded, output.data, state))))

    with jax.numpy_rank_promotion("raise"):
        nnx.eval_shape(nnx.value_and_grad(loss, argnums=(0, 1)), module, packed.data)
