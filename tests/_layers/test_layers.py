"""Layers beside their oracles, over all options; what every layer promises besides is in `contract.py`."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import jaxpack
from jaxpack import GRU, LSTM, RNN, pack_padded_sequence, pad_packed_sequence, plan_exact, plan_padded

F, H, P = 3, 4, 2
KINDS = ("tanh", "relu", "lstm", "projected", "gru")
PLANS = {
    "exact": plan_exact,
    "padded": lambda lengths: plan_padded(len(lengths), max(lengths)),
    "none": lambda lengths: None,
}
LENGTHS = {
    "ties": [4, 6, 2, 4, 6],
    "length one": [1, 1],
    "alone": [5],
    "distinct": [2, 5, 1],
}


def make_layer(kind, **options):
    if kind in ("tanh", "relu"):
        return RNN(F, H, nonlinearity=kind, **options)
    return GRU(F, H, **options) if kind == "gru" else LSTM(F, H, proj_size=P * (kind == "projected"), **options)


def is_lstm(layer):
    return isinstance(layer, LSTM)


def initial_states(layer, batch_size, dtype=np.float64):
    rng = np.random.default_rng(3)
    sizes = jax.tree.leaves(layer.cell.state_sizes)
    return tuple(
        rng.standard_normal((layer.num_layers * layer.num_directions, batch_size, size)).astype(dtype) for size in sizes
    )


def pairwise_cases(*axes):
    """A small set of cases in which every pair of values of two axes meets (greedy)."""

    def pairs(case):
        return set(itertools.combinations(enumerate(case), 2))

    everything = list(itertools.product(*axes))
    missing = set().union(*(pairs(case) for case in everything))
    while missing:
        best = max(everything, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        yield best


GRID = list(pairwise_cases(KINDS, (1, 2), (False, True), (False, True), PLANS, LENGTHS))


def check_against_torch(layer, lengths, plan, dtype, tolerance):
    batch = oracles.random_batch(lengths, F, dtype=dtype)
    states, params = initial_states(layer, len(lengths), dtype), oracles.random_params(layer, dtype)
    rng = np.random.default_rng(5)
    shapes = [(*batch.shape[:2], layer.output_size), *(s.shape for s in states)]
    cotangents = [rng.standard_normal(shape).astype(dtype) for shape in shapes]

    @jax.jit
    def run(params, batch, states, lengths):
        def apply(params, batch, *states):
            states = states if is_lstm(layer) else states[0]
            output, final = layer.apply(params, batch, states, lengths=lengths, plan=plan)
            return output, *(final if is_lstm(layer) else (final,))

        values, vjp = jax.vjp(apply, params, batch, *states)
        return list(values), list(vjp(tuple(cotangents)))

    ours = run(params, batch, states, np.array(lengths))
    theirs = oracles.torch_gradients(layer, params, batch, lengths, states, cotangents)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance), ours, theirs)
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {np.dtype(dtype)}


@oracles.needs_torch
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "num_layers", "bidirectional", "bias", "plan", "lengths"), GRID)
def test_float64_values_and_gradients_equal_torch(kind, num_layers, bidirectional, bias, plan, lengths):
    layer = make_layer(kind, num_layers=num_layers, bidirectional=bidirectional, bias=bias)
    check_against_torch(layer, LENGTHS[lengths], PLANS[plan](LENGTHS[lengths]), np.float64, 1e-10)


@oracles.needs_torch
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.optimized
def test_float32_values_and_gradients_equal_torch(kind):
    layer = make_layer(kind, bidirectional=True)
    check_against_torch(layer, LENGTHS["distinct"], plan_padded(3, 5), np.float32, 2e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", KINDS)
def test_equals_numpy_one_sequence_at_a_time(kind):
    layer = make_layer(kind, num_layers=2, bidirectional=True)
    params = layer.init(jax.random.key(1))
    lengths = np.array([3, 0, 5])
    batch = oracles.random_batch(lengths, F)
    states = initial_states(layer, 3)
    output, final = jax.jit(layer.apply)(params, batch, states if is_lstm(layer) else states[0], lengths=lengths)
    rows = [row[:n] for row, n in zip(batch, lengths, strict=True)]
    name = "lstm" if kind == "projected" else kind
    outputs, finals = oracles.layer(name, params, rows, states)
    for ours, theirs in zip(jaxpack.unpad_sequence(output, lengths, True), outputs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-13)
    for ours, theirs in zip(final if is_lstm(layer) else (final,), finals, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-13)


LAYER = LSTM(F, H, bidirectional=True)
PARAMS = LAYER.init(jax.random.key(0))


def test_exactly_45_cell_steps_where_padding_takes_64():
    lengths = [4, 6, 8, 5, 4, 3, 7, 8]
    layer = LSTM(F, H, bidirectional=True)
    params = layer.init(jax.random.key(0))

    def count(plan):
        packed = pack_padded_sequence(jnp.ones((8, 8, F)), lengths, True, plan=plan)
        return oracles.count_cell_steps(
            jax.make_jaxpr(lambda p: layer.apply(params, p, forward_mode=True))(packed).jaxpr
        )

    assert count(plan_exact(lengths)) == 45  # both directions share each step; test_recurrence counts the fast loops
    assert count(plan_padded(8, 8)) == 64


@pytest.mark.parametrize("lengths", [None, [5, 2, 0], jnp.array([1, 5, 3])])
@pytest.mark.parametrize("plan", [None, plan_padded(3, 5), plan_padded(3, 9)])
def test_padded_in_padded_out_with_the_same_steps(lengths, plan):
    batch = np.ones((3, 5, F), np.float32)
    output, (h_n, _) = LAYER.apply(PARAMS, batch, lengths=lengths, plan=plan)
    assert output.shape == (3, 5, LAYER.output_size)
    packed = pack_padded_sequence(batch, [5] * 3 if lengths is None else lengths, True, plan=plan_padded(3, 5))
    expected, state = LAYER.apply(PARAMS, packed)
    np.testing.assert_allclose(output, pad_packed_sequence(expected, True)[0], atol=1e-6)
    np.testing.assert_allclose(h_n, state[0], atol=1e-6)


@oracles.needs_torch
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", KINDS)
def test_unbatched_input_as_in_torch(kind):
    layer = make_layer(kind, bidirectional=True)
    module = oracles.torch_layer(layer).double()
    params = layer.from_torch(module.state_dict())
    sequence = oracles.random_batch([4], F)[0]
    states = tuple(s[:, 0] for s in initial_states(layer, 1))
    tensors = tuple(oracles.torch.tensor(s) for s in states)
    theirs, theirs_final = module(oracles.torch.tensor(sequence), tensors if is_lstm(layer) else tensors[0])
    ours, ours_final = layer.apply(params, sequence, states if is_lstm(layer) else states[0])
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-12)
    for a, b in zip(jax.tree.leaves(ours_final), theirs_final if is_lstm(layer) else (theirs_final,), strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), atol=1e-12)


@pytest.mark.parametrize("data", ["float16", "bfloat16", "float32", "int32"])
@pytest.mark.parametrize("weights", ["float16", "bfloat16", "float32"])
def test_computes_in_the_result_type_of_data_and_parameters(data, weights):
    layer = GRU(F, H, bidirectional=True)
    params = layer.init(jax.random.key(0), weights)
    expected = jnp.result_type(jnp.dtype(data), jnp.dtype(weights))
    batch = jnp.ones((2, 3, F)).astype(data)
    apply = jax.jit(functools.partial(layer.apply, plan=plan_padded(2, 3)))
    lengths = np.array([3, 1])
    output, h_n = apply(params, batch, jnp.zeros((2, 2, H)), lengths=lengths)
    assert output.dtype == h_n.dtype == expected
    reference, _ = apply(jax.tree.map(jnp.float32, params), batch.astype(jnp.float32), lengths=lengths)
    np.testing.assert_allclose(output.astype(jnp.float32), reference, atol=3e-2)


def as_dtype(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_is_that_of_the_output_and_states_stay_in_float32_if_parameters_are(kind):
    layer, lengths = make_layer(kind), np.array([3, 1])
    params, batch = layer.init(jax.random.key(0)), oracles.random_batch([3, 1], F, dtype=np.float32)
    leaves = tuple(jnp.asarray(s) for s in initial_states(layer, 2, np.float32))
    states = leaves if is_lstm(layer) else leaves[0]
    half = jnp.bfloat16
    apply = functools.partial(layer.apply, lengths=lengths, plan=plan_padded(2, 3))
    output, state = apply(params, batch, states, dtype=half)
    assert (output.dtype, {leaf.dtype for leaf in jax.tree.leaves(state)}) == (half, {jnp.dtype("float32")})
    for a, b in zip(jax.tree.leaves((output, state)), jax.tree.leaves(apply(params, batch, states)), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02)
    found = apply(as_dtype(params, half), batch, states, dtype=half)
    jax.tree.map(np.testing.assert_array_equal, found, apply(as_dtype(params, half), batch.astype(half), states))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(half)}

    def dtype(params, inputs, **options):
        return jax.tree.leaves(jax.eval_shape(functools.partial(layer.apply, **options), params, inputs))[0].dtype

    packed = pack_padded_sequence(batch, [3, 1], batch_first=True, plan=plan_padded(2, 3))
    assert dtype(params, packed, dtype=half) == half
    assert dtype(params, batch[0], dtype=half) == half  # one sequence
    assert dtype(as_dtype(params, half), batch, lengths=lengths, dtype=jnp.float32) == jnp.float32


@pytest.mark.parametrize(("weights", "data"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_gradients_have_the_dtypes_of_data_and_parameters_that_differ(weights, data):
    params, batch = LAYER.init(jax.random.key(0), weights), jnp.ones((2, 3, F), data)
    run = jax.grad(lambda *each: LAYER.apply(*each, plan=plan_padded(2, 3))[0].sum(), (0, 1))
    by_params, by_batch = jax.jit(run)(params, batch)
    assert ({leaf.dtype for leaf in jax.tree.leaves(by_params)}, by_batch.dtype) == ({jnp.dtype(weights)}, data)


def test_parameters_keep_their_dtype_in_gradients_under_another_dtype():
    def loss(params, dtype):
        packed = pack_padded_sequence(jnp.ones((2, 3, F)), [3, 1], batch_first=True, plan=plan_padded(2, 3))
        return LAYER.apply(params, packed, dtype=dtype)[0].data.astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    for ours, theirs in zip(*(jax.tree.leaves(gradient(PARAMS, each)) for each in (jnp.bfloat16, None)), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, atol=0.05, rtol=0.05)


def test_init_is_pytorchs_uniform_in_the_default_float():
    params = LSTM(64, 100).init(jax.random.key(0))
    for leaf in jax.tree.leaves(params):
        assert leaf.dtype == jnp.float32
        assert abs(leaf).max() <= 0.1
        assert abs(leaf).max() > 0.095
        assert abs(leaf.mean()) < 0.02
    assert LSTM(3, 4).init(jax.random.key(0), jnp.bfloat16)["l0"]["bias_ih"].dtype == jnp.bfloat16
    with jax.enable_x64(True):
        assert LSTM(3, 4).init(jax.random.key(0))["l0"]["bias_ih"].dtype == jnp.float64


def test_more_than_ten_layers_keep_their_order():
    layer = RNN(F, H, num_layers=12)
    params = layer.init(jax.random.key(0))
    sequence = np.ones((2, F), np.float32)
    _, h_n = layer.apply(params, sequence)
    _, finals = oracles.layer("tanh", params, [sequence], [np.zeros((12, 1, H))])
    np.testing.assert_allclose(h_n, finals[0][:, 0], atol=1e-6)


def test_dropout_acts_between_layers_and_only_there():
    layer = LSTM(F, 64, num_layers=2, dropout=0.5)
    params = layer.init(jax.random.key(0))
    packed = pack_padded_sequence(jnp.ones((4, 6, F)), [6, 5, 3, 1], batch_first=True)
    plain, (h_plain, _) = layer.apply(params, packed, deterministic=True)
    one, (h_one, _) = layer.apply(params, packed, dropout_key=jax.random.key(1))
    again, _ = layer.apply(params, packed, dropout_key=jax.random.key(1))
    other, _ = layer.apply(params, packed, dropout_key=jax.random.key(2))
    np.testing.assert_array_equal(one.data, again.data)
    assert (one.data != other.data).any()
    assert (one.data != plain.data).any()
    assert (one.data != 0).all()  # not after the last layer
    np.testing.assert_array_equal(h_one[0], h_plain[0])  # not within the first
    undropped = LSTM(F, 64, num_layers=2).apply(params, packed)[0]
    np.testing.assert_array_equal(undropped.data, plain.data)


def test_gru_and_rnn_return_output_and_h():
    packed = pack_padded_sequence(jnp.ones((2, 3, F)), [3, 2], batch_first=True)
    for layer in (GRU(F, H), RNN(F, H)):
        output, h_n = layer.apply(layer.init(jax.random.key(0)), packed)
        assert output.shape == (5, H)
        assert h_n.shape == (1, 2, H)
        np.testing.assert_array_equal(jaxpack.last(output), h_n[0])
