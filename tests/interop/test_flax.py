"""Weights from and to Flax: values against Flax's own modules, round trips, refusals."""

import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import linen as nn
from flax import nnx

import jaxpack
from jaxpack import GRU, LSTM, MGU, RNN, BucketPlan
from jaxpack._flax.known import from_cell
from jaxpack.interop import from_linen, from_nnx, to_linen, to_nnx

F, H, T = 3, 4, 5
LENGTHS = [5, 3]

# By kind: the layer, and the cells of linen and nnx that run its weights.
KINDS = {
    "lstm": (LSTM(F, H), nn.OptimizedLSTMCell, nnx.OptimizedLSTMCell),
    "lstm by gates": (LSTM(F, H), None, nnx.LSTMCell),
    "gru": (GRU(F, H), nn.GRUCell, nnx.GRUCell),
    "tanh": (RNN(F, H), nn.SimpleCell, nnx.SimpleCell),
    "relu": (RNN(F, H, nonlinearity="relu"), nn.SimpleCell, nnx.SimpleCell),
    "stack": (GRU(F, H, num_layers=2, bidirectional=True), nn.GRUCell, nnx.GRUCell),
    "no bias": (LSTM(F, H, bias=False, bidirectional=True), nn.LSTMCell, nnx.OptimizedLSTMCell),
}
QUICK = {"kernel_init": nnx.initializers.zeros_init(), "recurrent_kernel_init": nnx.initializers.zeros_init()}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_kind_run = pytest.mark.parametrize("kind", ["lstm", "tanh", "relu", "stack"])  # the others run the same equations
each_kind_of_linen = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lstm by gates"])


def options(layer):
    return {"activation_fn": nn.relu} if getattr(layer, "nonlinearity", "tanh") == "relu" else {}


def linen_modules(kind):
    layer, cell, _ = KINDS[kind]

    def rnn():
        return nn.RNN(cell(H, param_dtype=float, **options(layer)))

    return [nn.Bidirectional(rnn(), rnn()) if layer.bidirectional else rnn() for _ in range(layer.num_layers)]


def nnx_modules(kind):
    layer, _, cell = KINDS[kind]
    dtypes = {"param_dtype": float, "dtype": float}
    rngs = nnx.Rngs(0)

    def rnn(size):
        return nnx.RNN(cell(size, H, **dtypes, **QUICK, **options(layer), rngs=rngs))

    sizes = [F, layer.output_size][: layer.num_layers]
    return [nnx.Bidirectional(rnn(size), rnn(size)) if layer.bidirectional else rnn(size) for size in sizes]


def nnx_params(layer, dtype=float):
    """Returns random parameters, without the bias b_hn of a GRU, which nnx.GRUCell lacks."""
    params = oracles.random_params(layer, dtype)
    if isinstance(layer, GRU):
        params = {
            group: entries | {"bias_hh": entries["bias_hh"].at[2 * H :].set(0)} for group, entries in params.items()
        }
    return params


def with_numbers(module, seed=0):
    """Sets an nnx module's parameters to random numbers, drawn by NumPy: Flax's initialisers compile for seconds."""
    rng = np.random.default_rng(seed)
    params = nnx.state(module, nnx.Param)
    nnx.update(module, jax.tree.map(lambda leaf: rng.uniform(-0.5, 0.5, leaf.shape).astype(leaf.dtype), params))
    return module


def trees_like(layer, trees):
    """Returns random trees of these shapes. Biases are zero only if the layer has none."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        none = path[-1].key == "bias" and not layer.bias
        return (np.zeros if none else rng.standard_normal)(leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, trees)


def flax_state(carries):
    """Returns Flax's carries of all layers and directions as jaxpack's final state: h, or (h, c) from (c, h)."""
    if isinstance(carries[0], tuple):
        return tuple(np.stack([carry[i] for carry in carries]) for i in (1, 0))
    return np.stack(carries)


@functools.cache
def jitted(layer):
    return jax.jit(functools.partial(layer.apply, lengths=LENGTHS, plan=BucketPlan((T,), (len(LENGTHS),))))


def check_outputs(layer, params, calls):
    """Compares output and final state with those of a stack of Flax's modules, each (inputs) -> (carry, outputs)."""
    x = oracles.random_batch(LENGTHS, F)
    output, state = jitted(layer)(params, x)
    carries, y = [], jnp.asarray(x)
    for call in calls:
        carry, y = call(y)
        carries += list(carry) if layer.bidirectional else [carry]
    real = np.arange(T)[None, :, None] < np.array(LENGTHS)[:, None, None]
    np.testing.assert_allclose(output, np.where(real, y, 0), atol=1e-10)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-10), state, flax_state(carries))


def same(a, b):
    """Asserts equal structure, dtypes and bits. One may be NumPy's and the other JAX's."""
    assert jax.tree.map(lambda leaf: leaf.dtype, a) == jax.tree.map(lambda leaf: leaf.dtype, b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@each_kind_run
def test_linen_computes_what_the_layer_computes(kind, x64):
    layer, params = KINDS[kind][0], oracles.random_params(KINDS[kind][0])
    calls = [
        jax.jit(functools.partial(module.apply, {"params": tree}, seq_lengths=jnp.array(LENGTHS), return_carry=True))
        for module, tree in zip(linen_modules(kind), to_linen(layer, params), strict=True)
    ]
    check_outputs(layer, params, calls)


@each_kind_run
def test_nnx_computes_what_the_layer_computes(kind, x64):
    layer, params = KINDS[kind][0], nnx_params(KINDS[kind][0])
    modules = nnx_modules(kind)
    for module, tree in zip(modules, to_nnx(layer, params), strict=True):
        assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(module, nnx.Param)))
        nnx.update(module, tree)
    run = nnx.jit(lambda module, x: module(x, seq_lengths=jnp.array(LENGTHS), return_carry=True))
    check_outputs(layer, params, [functools.partial(run, module) for module in modules])


@each_kind_of_linen
def test_a_tree_of_linen_comes_back_bit_for_bit(kind):
    layer, sizes = KINDS[kind][0], [F, KINDS[kind][0].output_size]
    shapes = tuple(
        jax.eval_shape(module.init, jax.random.key(0), jnp.ones((2, T, size)))["params"]
        for size, module in zip(sizes[: layer.num_layers], linen_modules(kind), strict=True)
    )
    trees = trees_like(layer, shapes)
    params = from_linen(layer, trees)
    assert jax.tree.map(jnp.shape, params) == layer.shapes
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    same(to_linen(layer, params), trees)
    same(params, from_linen(layer, [{"params": tree} for tree in trees]))


@each_kind
def test_a_module_of_nnx_comes_back_bit_for_bit(kind):
    layer, modules = KINDS[kind][0], nnx_modules(kind)
    trees = trees_like(layer, tuple(nnx.to_pure_dict(nnx.state(module, nnx.Param)) for module in modules))
    for module, tree in zip(modules, trees, strict=True):
        nnx.update(module, tree)
    params = from_nnx(layer, modules)
    same(to_nnx(layer, params, optimized=kind != "lstm by gates"), trees)
    same(params, from_nnx(layer, trees))
    same(params, from_nnx(layer, [nnx.state(module) for module in modules]))  # with the random streams


@each_kind
def test_parameters_come_back_with_their_biases_summed(kind):
    layer = KINDS[kind][0]
    for make_params, there, back in ((oracles.random_params, to_linen, from_linen), (nnx_params, to_nnx, from_nnx)):
        params = make_params(layer)
        found = back(layer, there(layer, params))
        assert jax.tree.map(jnp.shape, found) == layer.shapes
        for group, given in params.items():
            for name in ("weight_ih", "weight_hh"):
                np.testing.assert_array_equal(found[group][name], given[name])
            if layer.bias:
                ours, theirs = (each["bias_ih"] + each["bias_hh"] for each in (found[group], given))
                np.testing.assert_array_equal(ours[: 2 * H], theirs[: 2 * H])
                for name in ("bias_ih", "bias_hh"):
                    if isinstance(layer, GRU):
                        np.testing.assert_array_equal(found[group][name][2 * H :], given[name][2 * H :])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_are_kept(dtype):
    for layer in (LSTM(F, H), GRU(F, H), RNN(F, H, bias=False)):
        params = nnx_params(layer, dtype)
        for trees, back in ((to_linen(layer, params), from_linen), (to_nnx(layer, params), from_nnx)):
            assert {leaf.dtype for leaf in jax.tree.leaves(trees)} == {jnp.dtype(dtype)}
            assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(trees))
            assert {leaf.dtype for leaf in jax.tree.leaves(back(layer, trees))} == {jnp.dtype(dtype)}


def test_a_single_layer_stands_alone_and_a_cell_or_an_rnn_is_the_same():
    layer = GRU(F, H)
    (tree,) = to_linen(layer, oracles.random_params(layer))
    for given in (tree, [tree], tree["cell"], {"params": tree}, {"params": tree["cell"]}):
        same(from_linen(layer, given), from_linen(layer, [tree]))
    cell = nnx.GRUCell(F, H, **QUICK, rngs=nnx.Rngs(0))
    for given in (cell, [cell], nnx.RNN(cell), nnx.state(cell)):
        same(from_nnx(layer, given), from_nnx(layer, [nnx.to_pure_dict(nnx.state(cell))]))
    both = {"forward_rnn": tree["cell"], "backward_rnn": tree["cell"]}  # cells that a compact module owns
    params = from_linen(GRU(F, H, bidirectional=True), both)
    same(params["l0"], params["l0_reverse"])


def test_two_directions_may_share_one_cell():
    rnn = nnx.RNN(nnx.GRUCell(F, H, **QUICK, rngs=nnx.Rngs(0)))
    params = from_nnx(GRU(F, H, bidirectional=True), nnx.Bidirectional(rnn, rnn))
    same(params["l0"], params["l0_reverse"])


def test_any_function_that_merges_as_the_layer_does_may_stand_between_layers():
    cells = [nnx.GRUCell(size, H, **QUICK, rngs=nnx.Rngs(size)) for size in (F, 2 * H)]
    below, above = (nnx.RNN(cell) for cell in cells)
    mine = nnx.Bidirectional(below, below, merge_fn=lambda a, b: jnp.concatenate([a, b], axis=-1))
    params = from_nnx(GRU(F, H, num_layers=2, bidirectional=True), [mine, nnx.Bidirectional(above, above)])
    same(params["l0"], from_nnx(GRU(F, H), below)["l0"])
    summed = nnx.Bidirectional(below, below, merge_fn=lambda a, b: a + b)
    above = nnx.RNN(nnx.GRUCell(H, H, **QUICK, rngs=nnx.Rngs(0)))
    layer = GRU(F, H, num_layers=2, bidirectional=True, merge="sum")
    same(from_nnx(layer, [summed, nnx.Bidirectional(above, above)])["l1"], from_nnx(GRU(H, H), above)["l0"])


MERGES = {"sum": lambda a, b: a + b, "swapped": lambda a, b: jnp.concatenate([b, a], axis=-1)}


@pytest.mark.parametrize("merge", MERGES)
def test_any_merge_fn_of_the_last_module_is_applied_to_the_halves(merge):
    layer = GRU(F, H, bidirectional=True)
    rnns = [nnx.RNN(with_numbers(nnx.GRUCell(F, H, **QUICK, rngs=nnx.Rngs(0)), seed)) for seed in (0, 1)]
    theirs = nnx.Bidirectional(*rnns, merge_fn=MERGES[merge])
    x = np.ones((2, T, F), np.float32) * np.arange(T)[:, None]
    output, _ = layer.apply(from_nnx(layer, theirs), x)
    np.testing.assert_allclose(MERGES[merge](output[..., :H], output[..., H:]), theirs(x), atol=1e-6)


@pytest.mark.parametrize("keep_order", [False, True])
def test_a_reversed_rnn_of_nnx_runs_on_reversed_sequences(keep_order):
    layer, lengths = GRU(F, H), [5, 3]
    cell = with_numbers(nnx.GRUCell(F, H, **QUICK, rngs=nnx.Rngs(0)))
    theirs = nnx.RNN(cell, reverse=True, keep_order=keep_order)
    x = oracles.random_batch(lengths, F, dtype=np.float32)
    packed = jaxpack.pack_padded_sequence(x, lengths, batch_first=True)
    output, _ = layer.apply(from_nnx(layer, theirs), jaxpack.reverse_sequences(packed))
    output = jaxpack.reverse_sequences(output) if keep_order else output
    expected = theirs(jnp.nan_to_num(x), seq_lengths=jnp.array(lengths))
    for ours, flax, length in zip(jaxpack.unpack_sequence(output), expected, lengths, strict=True):
        np.testing.assert_allclose(ours, flax[:length], atol=1e-6)


def test_both_directions_may_come_as_a_pair():
    layer = GRU(F, H, bidirectional=True)
    (both,) = to_linen(layer, oracles.random_params(layer))
    trees = [both["forward_rnn"]["cell"], both["backward_rnn"]["cell"]]
    expected = from_linen(layer, both)
    for given in (trees, tuple(trees), [trees], [{"params": {"cell": tree}} for tree in trees]):
        same(from_linen(layer, given), expected)
    cells = [with_numbers(nnx.GRUCell(F, H, **QUICK, rngs=nnx.Rngs(0)), seed) for seed in (0, 1)]
    expected = from_nnx(layer, nnx.Bidirectional(*(nnx.RNN(cell) for cell in cells)))
    for given in (cells, [cells], [nnx.RNN(cell) for cell in cells], [nnx.state(cell) for cell in cells]):
        same(from_nnx(layer, given), expected)


def test_functions_are_known_by_their_values():
    options = {"gate_fn": lambda x: 1 / (1 + jnp.exp(-x)), "activation_fn": lambda x: jnp.tanh(x)}
    from_nnx(LSTM(F, H), nnx.LSTMCell(F, H, **options, **QUICK, rngs=nnx.Rngs(0)))
    almost = nnx.SimpleCell(F, H, activation_fn=nnx.relu6, **QUICK, rngs=nnx.Rngs(0))
    refused(from_nnx, RNN(F, H, nonlinearity="relu"), almost, match="activation_fn is relu6.* has relu")


def test_boxes_of_partitioned_parameters_are_opened():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    variables = nn.SimpleCell(H, kernel_init=init, recurrent_kernel_init=nn.initializers.zeros_init()).init(
        jax.random.key(0), jnp.ones((2, H)), jnp.ones((2, F))
    )
    assert isinstance(variables["params"]["i"]["kernel"], nn.Partitioned)
    params = from_linen(RNN(F, H), variables)
    np.testing.assert_array_equal(params["l0"]["weight_ih"], variables["params"]["i"]["kernel"].unbox())


def test_a_cells_parameters_convert_inside_transformations():
    layer = LSTM(F, H)
    (tree,) = to_linen(layer, oracles.random_params(layer))
    gradient = jax.jit(jax.grad(lambda cell: sum(leaf.sum() for leaf in from_cell(layer.cell, cell).values())))
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(gradient(tree["cell"])))


def refused(function, *args, error=ValueError, match, **kwargs):
    with pytest.raises(error, match=match):
        function(*args, **kwargs)


def test_nnx_has_no_place_for_a_grus_recurrent_candidate_bias():
    layer = GRU(F, H)
    refused(
        to_nnx,
        layer,
        oracles.random_params(layer),
        match=r"params\['l0'\]\['bias_hh'\] has b_hn .*flax#5594.*use to_linen",
    )


def test_projections_and_other_objects_are_refused():
    layer = LSTM(F, H, proj_size=2)
    match = r"projects h, and no cell of (Flax|flax.nnx) does.*proj_size=0"
    for function in (to_linen, to_nnx, from_linen, from_nnx):
        refused(function, layer, oracles.random_params(layer), match=match)
        refused(function, nn.LSTMCell(H), {}, error=TypeError, match=r"jaxpack.RNN, LSTM or GRU, got LSTMCell")


def test_biases_need_a_layer_with_biases():
    tree = to_linen(GRU(F, H), oracles.random_params(GRU(F, H)))
    refused(from_linen, GRU(F, H, bias=False), tree, match=r"trees\[0\] has biases up to 0\.\d+, .*Use bias=True")
    tree[0]["cell"]["hn"]["bias"][:] = 0
    for name in ("ir", "iz", "in"):
        tree[0]["cell"][name]["bias"][:] = 0
    from_linen(GRU(F, H, bias=False), tree)
    tree[0]["cell"]["hn"]["bias"][0] = -tree[0]["cell"]["ir"]["kernel"][0, 0]
    refused(from_linen, GRU(F, H, bias=False), tree, match="Use bias=True")


def test_traced_weights_are_refused():
    layer = GRU(F, H)
    params = oracles.random_params(layer)
    tree = to_linen(layer, params)
    traced = r"trees\[0\]\['.*'\]\['.*'\] is traced, but a conversion reads values: call it outside jit"
    refused(jax.jit(lambda tree: from_linen(layer, tree)), tree, error=TypeError, match=traced)
    cell = nnx.GRUCell(F, H, **QUICK, rngs=nnx.Rngs(0))
    bidirectional = GRU(F, H, num_layers=2, bidirectional=True)
    stack = nnx.List([nnx.Bidirectional(nnx.RNN(cell), nnx.RNN(cell)) for _ in range(2)])
    for spec, modules in ((layer, cell), (bidirectional, stack)):
        refused(
            nnx.jit(lambda modules, spec=spec: from_nnx(spec, modules)),
            modules,
            error=TypeError,
            match=r"modules.* is traced, but a conversion reads values: call it outside jit",
        )
    traced = r"params\['l0'\]\['.*'\] is traced"
    for function in (to_linen, to_nnx):
        refused(jax.jit(lambda params, f=function: f(layer, params)), params, error=TypeError, match=traced)


def test_trees_of_other_cells_and_counts_are_refused():
    layer = GRU(F, H)
    lstm = to_linen(LSTM(F, H), oracles.random_params(LSTM(F, H)))
    missing = re.escape(
        "trees[0] is not the tree of such a Flax cell: it lacks ['ir', 'iz', 'in'], and has ['hf', 'hg'"
    )
    refused(from_linen, layer, lstm, error=KeyError, match=missing)
    tree = to_linen(layer, oracles.random_params(layer))
    refused(from_linen, GRU(F, H, num_layers=2), tree, match="trees must have an entry for each layer, 2 in all, got 1")
    both = r"trees\[0\] holds \['cell'\], but GRU.* has both directions. .*'forward_rnn'"
    refused(from_linen, GRU(F, H, bidirectional=True), tree, match=both)
    refused(from_linen, GRU(F + 1, H), tree, match=r"trees\[0\]: weight_ih must have shape \(4, 12\).*got \(3, 12\)")
    refused(from_linen, layer, nn.GRUCell(H), error=TypeError, match=r"trees must be a tree of parameters, got GRUCell")
    refused(to_linen, layer, {}, error=TypeError, match=r"l0.weight_ih is missing")
    two = to_linen(GRU(F, H, bidirectional=True), oracles.random_params(GRU(F, H, bidirectional=True)))
    refused(from_linen, layer, two, match=r"holds \['backward_rnn', 'forward_rnn'\], but GRU.* has one direction")


def test_weights_that_jax_would_round_are_refused():
    layer = RNN(F, H)
    (tree,) = to_linen(layer, oracles.random_params(layer))
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), tree)
    rounds = r"trees\['h'\]\['kernel'\] has dtype float64, which JAX would round. Convert under `with jax.enable_x64"
    refused(from_linen, layer, wide, match=rounds)
    whole = jax.tree.map(lambda leaf: leaf.astype(np.int32), tree)
    refused(from_linen, layer, whole, error=TypeError, match="must have a floating dtype, got int32")


def test_nnx_modules_that_compute_something_else_are_refused():
    rngs = nnx.Rngs(0)
    way_out = ".*pass nnx.state"
    hard = nnx.LSTMCell(F, H, gate_fn=nnx.hard_sigmoid, **QUICK, rngs=rngs)
    refused(from_nnx, LSTM(F, H), [hard], match=r"modules\[0\].gate_fn is hard_sigmoid.* has sigmoid" + way_out)
    cell = nnx.GRUCell(F, H, activation_fn=nnx.relu, **QUICK, rngs=rngs)
    refused(from_nnx, GRU(F, H), nnx.RNN(cell), match=r"modules.cell.activation_fn is relu.* has tanh" + way_out)
    from_nnx(GRU(F, H), nnx.state(cell, nnx.Param))
    cell = nnx.SimpleCell(F, H, **QUICK, rngs=rngs)
    refused(from_nnx, RNN(F, H, nonlinearity="relu"), cell, match=r"activation_fn is tanh.* has relu" + way_out)
    cell = nnx.SimpleCell(F, H, residual=True, **QUICK, rngs=rngs)
    refused(from_nnx, RNN(F, H), cell, match=r"residual=True.*Add the identity to its dense_h.kernel")
    refused(from_nnx, GRU(F, H), cell, error=TypeError, match=r"must be nnx.GRUCell .*got SimpleCell" + way_out)
    rnn = nnx.RNN(nnx.GRUCell(F, H, **QUICK, rngs=rngs))
    apart = "Convert each module by itself, .* num_layers=1, and "
    layer = GRU(F, H, num_layers=2, bidirectional=True)
    for merge_fn in (lambda a, b: a + b, lambda a, b: jnp.concatenate([b, a], axis=-1)):
        merged = nnx.Bidirectional(rnn, rnn, merge_fn=merge_fn)
        match = r"modules\[0\].merge_fn is <lambda>, but GRU.* by merge='concat' for.*" + apart + "merge"
        refused(from_nnx, layer, [merged, nnx.Bidirectional(rnn, rnn)], match=match)
    backwards = nnx.RNN(nnx.GRUCell(H, H, **QUICK, rngs=rngs), reverse=True)
    match = r"modules\[1\] has reverse=True, but GRU.* in one order. " + apart + "call jaxpack.reverse_sequences"
    refused(from_nnx, GRU(F, H, num_layers=2), [rnn, backwards], match=match)


def test_importing_interop_imports_no_library_but_flax():
    code = "import sys, jaxpack.interop; print([m for m in ('keras', 'haiku', 'safetensors') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("reset", ["after", None])
def test_an_mgu_is_linens(reset, x64):
    layer, rnn = MGU(F, H, reset=reset), nn.RNN(nn.MGUCell(H, reset_gate=reset == "after", param_dtype=float))
    params = oracles.random_params(layer)
    x = oracles.random_batch([T, T], F)
    (tree,) = to_linen(layer, params)
    np.testing.assert_allclose(rnn.apply({"params": tree}, x), layer.apply(params, x)[0], atol=1e-12)
    shapes = jax.tree.map(jnp.shape, rnn.init(jax.random.key(0), x)["params"])
    assert jax.tree.map(jnp.shape, tree) == shapes
    (back,) = to_linen(layer, from_linen(layer, tree))
    jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_what_flax_does_not_have_is_refused():
    before = r"not convertible: Flax's GRUCell multiplies r with the recurrent product. Use reset_after=True"
    mgu = r"Flax's MGUCell multiplies f with the recurrent product, or with nothing. Use reset=\"after\" or None"
    for function in (from_linen, to_linen):
        with pytest.raises(ValueError, match=before):
            function(GRU(F, H, reset_after=False), {})
        with pytest.raises(ValueError, match=mgu):
            function(MGU(F, H), {})
    for converter in (from_nnx, to_nnx):
        with pytest.raises(ValueError, match=r"flax.nnx has no cell that computes what MGU\(.* does"):
            converter(MGU(F, H, reset="after"), {})
