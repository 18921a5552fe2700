import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import strategies
from flax import nnx
from hypothesis import given, settings

import jaxpack
import jaxpack.linen
import jaxpack.nnx
from jaxpack import (
    GRU,
    LSTM,
    RNN,
    BucketPlan,
    pack_padded_sequence,
    pad_packed_sequence,
    plan_buckets,
    plan_exact,
    plan_padded,
    plan_rows,
)

F, H, P = 3, 4, 2
KINDS = ("tanh", "relu", "lstm", "projected", "gru")
PLANS = {
    "exact": plan_exact,
    "buckets": lambda lengths: plan_buckets(lengths, 3),
    "padded": lambda lengths: plan_padded(len(lengths), max(lengths)),
    "rows": lambda lengths: plan_rows(lengths, 2),
    "none": lambda lengths: None,
}
# For four sequences of at most 2, 4, 0 and 1 steps, or nothing.
LOOSE = {"stairs": BucketPlan((3, 6), (4, 2)), "rows": BucketPlan((6, 9), (2, 1), ((0, 5), (0, 4))), "none": None}
on_each_plan = pytest.mark.parametrize("plan", LOOSE.values(), ids=LOOSE)
LENGTHS = {
    "ties": [4, 6, 2, 4, 6, 1, 3],
    "equal": [3, 3, 3],
    "length one": [1, 1],
    "alone": [5],
    "distinct": [2, 5, 1, 4],
}


def make_layer(kind, **options):
    if kind in ("tanh", "relu"):
        return RNN(F, H, nonlinearity=kind, **options)
    return GRU(F, H, **options) if kind == "gru" else LSTM(F, H, proj_size=P * (kind == "projected"), **options)


def is_lstm(layer):
    return isinstance(layer, LSTM)


def torch_module(layer):
    options = {f: getattr(layer, f) for f in layer.__dataclass_fields__ if f not in ("input_size", "hidden_size")}
    return getattr(oracles.torch.nn, type(layer).__name__)(layer.input_size, layer.hidden_size, **options)


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


GRID = list(pairwise_cases(KINDS, (1, 2, 3), (False, True), (False, True), PLANS, LENGTHS))


def weighted(output, state, cotangents):
    """A scalar of every output and final state."""
    return sum((value * weight).sum() for value, weight in zip((output, *state), cotangents, strict=True))


def torch_values_and_gradients(layer, module, batch, lengths, states, cotangents):
    torch, rnn = oracles.torch, oracles.torch.nn.utils.rnn
    x, *states = (torch.tensor(np.nan_to_num(a), requires_grad=True) for a in (batch, *states))
    packed = rnn.pack_padded_sequence(x, torch.tensor(lengths), True, False)
    output, final = module(packed, tuple(states) if is_lstm(layer) else states[0])
    output, _ = rnn.pad_packed_sequence(output, True)
    final = final if is_lstm(layer) else (final,)
    weighted(output, final, [torch.tensor(c) for c in cotangents]).backward()
    values = [a.detach().numpy() for a in (output, *final)]
    weights = {name: p.grad.numpy() for name, p in module.named_parameters()}
    return values, [a.grad.numpy() for a in (x, *states)], weights


def our_values_and_gradients(layer, params, batch, lengths, states, cotangents, plan):
    def loss(params, batch, states, lengths):
        states = states if is_lstm(layer) else states[0]
        output, final = layer.apply(params, batch, states, lengths=lengths, plan=plan)
        final = final if is_lstm(layer) else (final,)
        return weighted(output, final, cotangents), (output, *final)

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, values), (weights, x, h) = gradient(params, batch, states, np.array(lengths))
    return values, [x, *h], layer.to_torch(weights)


def check_against_torch(layer, lengths, plan, dtype, tolerance):
    oracles.torch.manual_seed(0)
    module = torch_module(layer).to(getattr(oracles.torch, np.dtype(dtype).name))
    batch = oracles.random_batch(lengths, F, dtype=dtype)
    states = initial_states(layer, len(lengths), dtype)
    rng = np.random.default_rng(5)
    shapes = [(*batch.shape[:2], layer.output_size), *(s.shape for s in states)]
    cotangents = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    theirs = torch_values_and_gradients(layer, module, batch, lengths, states, cotangents)
    params = layer.from_torch(module.state_dict())
    ours = our_values_and_gradients(layer, params, batch, lengths, states, cotangents, plan)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance), ours[0], tuple(theirs[0])
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance), ours[1], theirs[1])
    assert ours[2].keys() == theirs[2].keys()
    for name in ours[2]:
        np.testing.assert_allclose(ours[2][name], theirs[2][name], atol=tolerance, rtol=tolerance, err_msg=name)
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
    layer = make_layer(kind, num_layers=2, bidirectional=True)
    check_against_torch(layer, LENGTHS["ties"], plan_buckets(LENGTHS["ties"], 3), np.float32, 2e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", KINDS)
@on_each_plan
def test_equals_numpy_one_sequence_at_a_time(kind, plan):
    layer = make_layer(kind, num_layers=2, bidirectional=plan is not None)
    params = layer.init(jax.random.key(1))
    lengths = [3, 0, 5, 2]
    batch = oracles.random_batch(lengths, F)
    states = initial_states(layer, 4)
    states_in = states if is_lstm(layer) else states[0]
    output, final = layer.apply(params, batch, states_in, lengths=lengths, plan=plan)
    rows = [row[:n] for row, n in zip(batch, lengths, strict=True)]
    name = "lstm" if kind == "projected" else kind
    outputs, finals = oracles.layer(name, params, rows, states)
    for ours, theirs in zip(jaxpack.unpad_sequence(output, lengths, True), outputs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-13)
    for ours, theirs in zip(final if is_lstm(layer) else (final,), finals, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-13)


LAYER = LSTM(F, H, num_layers=2, bidirectional=True)
PARAMS = LAYER.init(jax.random.key(0))


@jax.jit
def run(packed):
    return LAYER.apply(PARAMS, packed)


@settings(max_examples=8)
@given(strategies.lengths_and_plan())
def test_batch_mates_and_plans_do_not_matter(lengths_and_plan):
    lengths, plan = lengths_and_plan
    batch = oracles.random_batch(lengths, F, dtype=np.float32)
    output, state = run(pack_padded_sequence(batch, lengths, batch_first=True, plan=plan))
    padded, _ = pad_packed_sequence(output, True)
    alone = plan_padded(1, 7)
    for row, length in enumerate(lengths):
        single = np.zeros((1, 7, F), np.float32)
        single[0, :length] = batch[row, :length]
        y, s = run(pack_padded_sequence(single, [length], batch_first=True, plan=alone))
        np.testing.assert_allclose(padded[row, :length], pad_packed_sequence(y, True)[0][0, :length], atol=1e-6)
        jax.tree.map(lambda a, b, row=row: np.testing.assert_allclose(a[:, row], b[:, 0], atol=1e-6), state, s)


@pytest.mark.parametrize("plan", ["buckets", "rows", "none"])
def test_permuting_the_batch_permutes_the_results(plan):
    lengths, order = np.array([2, 5, 0, 5, 3]), np.array([3, 0, 4, 1, 2])
    batch = oracles.random_batch(lengths, F, dtype=np.float32)
    states = initial_states(LAYER, 5, np.float32)
    apply = jax.jit(lambda x, n, s: LAYER.apply(PARAMS, x, s, lengths=n, plan=PLANS[plan](lengths)))
    output, final = apply(batch, lengths, states)
    permuted, final_permuted = apply(batch[order], lengths[order], tuple(s[:, order] for s in states))
    np.testing.assert_allclose(permuted, output[order], atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[:, order], atol=1e-6), final_permuted, final)


@pytest.mark.usefixtures("x64")
@on_each_plan
@pytest.mark.parametrize("kind", ["relu", "projected", "gru"])
def test_slack_and_padding_are_inert_to_nan_and_inf(kind, plan):
    layer = make_layer(kind, num_layers=2, bidirectional=True)
    params = layer.init(jax.random.key(0))
    lengths = np.array([2, 4, 0, 1])
    batch = oracles.random_batch(lengths, F, extra=2)
    mask = (np.arange(batch.shape[1]) < lengths[:, None])[..., None]
    states = initial_states(layer, 4)

    @jax.jit
    def pull_back(batch, cotangent, lengths):
        def run(params, batch, states):
            return layer.apply(params, batch, states if is_lstm(layer) else states[0], lengths=lengths, plan=plan)

        (output, final), vjp = jax.vjp(run, params, batch, states)
        return output, final, vjp((cotangent, jax.tree.map(jnp.ones_like, final)))

    cotangent = np.random.default_rng(0).standard_normal((*batch.shape[:2], layer.output_size))
    clean = pull_back(np.where(mask, batch, 0), np.where(mask, cotangent, 0), lengths)
    for poison in (np.nan, np.inf, -np.inf):
        dirty = pull_back(np.where(mask, batch, poison), np.where(mask, cotangent, poison), lengths)
        for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
            np.testing.assert_array_equal(a, b)
    output, final, (_, by_batch, by_states) = clean
    assert (output[~mask[..., 0]] == 0).all()
    assert (by_batch[~mask[..., 0]] == 0).all()
    # The empty sequence: its final state is its initial state, and passes the cotangent through.
    for state, last, grad in zip(states, final if is_lstm(layer) else (final,), by_states, strict=True):
        np.testing.assert_array_equal(last[:, 2], state[:, 2])
        np.testing.assert_array_equal(grad[:, 2], np.ones_like(state[:, 2]))


@pytest.mark.parametrize("plan", [BucketPlan((3, 6), (4, 2)), BucketPlan((6, 9), (2, 1), ((0, 5), (0, 4)))])
def test_what_lies_in_slack_of_packed_data_is_inert(plan):
    packed = pack_padded_sequence(jnp.ones((4, 4, F)), [2, 4, 0, 1], batch_first=True, plan=plan)
    dirty = packed.replace(data=jnp.where(packed.mask[:, None], packed.data, jnp.nan))
    clean, dirty = run(packed), run(dirty)
    assert (clean[0].data[~packed.mask] == 0).all()
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


def test_a_batch_of_empty_sequences_is_legal():
    states = initial_states(LAYER, 2, np.float32)
    batch = jnp.full((2, 3, F), jnp.nan)
    value, gradient = jax.value_and_grad(
        lambda params: LAYER.apply(params, batch, states, lengths=jnp.zeros(2, int))[0].sum()
    )(PARAMS)
    assert value == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
    np.testing.assert_array_equal(LAYER.apply(PARAMS, batch, states, lengths=[0, 0])[1][0], states[0])


MISFITS = {
    "stairs": (BucketPlan((2, 4), (3, 1)), ([2, 3, 4], [2, -1, 4], [2, 5, 1])),
    "rows": (BucketPlan((4,), (2,), ((0,), (0, 2))), ([2, 3, 4], [2, -1, 4], [2, 5, 1])),
    "none": (None, ([2, 6, 4], [2, -1, 4], [0, 9, 1])),
}


@pytest.mark.parametrize(("plan", "misfits"), MISFITS.values(), ids=MISFITS)
@pytest.mark.parametrize("kind", ["relu", "lstm", "gru"])
def test_traced_misfits_alone_are_nan_and_so_are_the_gradients_of_parameters(kind, plan, misfits):
    batch, layer = jnp.ones((3, 5, F)), make_layer(kind, num_layers=2, bidirectional=True)
    params = layer.init(jax.random.key(0))

    @jax.jit
    def gradient(lengths):
        def loss(params, batch):
            output, state = layer.apply(params, batch, lengths=lengths, plan=plan)
            return output.sum(), (output, state)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, batch)

    fine, _ = gradient(jnp.array([2, 1, 4]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(fine))
    for lengths in misfits:
        (weights, by_batch), (output, state) = gradient(jnp.array(lengths))
        assert np.isnan(by_batch).any((1, 2)).tolist() == [False, True, False]
        assert np.isnan(output).all((1, 2)).tolist() == [False, True, False]
        assert np.isnan(output).any((1, 2)).tolist() == [False, True, False]
        for leaf in jax.tree.leaves(state):
            assert np.isnan(leaf).all((0, 2)).tolist() == [False, True, False]
            assert np.isnan(leaf).any((0, 2)).tolist() == [False, True, False]
        assert all(np.isnan(leaf).any() for leaf in jax.tree.leaves(weights))


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


def test_one_program_for_all_lengths_under_a_plan():
    traces = []

    @jax.jit
    def train(params, packed):
        traces.append(packed)
        return jax.grad(lambda p: (LAYER.apply(p, packed)[0].data ** 2).sum())(params)

    for lengths in ([4, 4, 2], [1, 2, 3], [4, 0, 0]):
        batch = np.ones((3, 4, F), np.float32)
        train(PARAMS, pack_padded_sequence(batch, lengths, True, plan=BucketPlan((2, 4), (3, 2))))
    assert len(traces) == 1
    assert train._cache_size() == 1


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


def test_padded_input_with_traced_lengths_is_one_program():
    apply = jax.jit(lambda x, n: LAYER.apply(PARAMS, x, lengths=n)[0])
    for lengths in ([1, 2], [2, 3]):
        output = apply(jnp.ones((2, 3, F)), jnp.array(lengths))
        for row, length in enumerate(lengths):
            assert (output[row, length:] == 0).all()
            assert (output[row, :length] != 0).all()
    assert apply._cache_size() == 1


@oracles.needs_torch
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", KINDS)
def test_unbatched_input_as_in_torch(kind):
    layer = make_layer(kind, num_layers=2, bidirectional=True)
    module = torch_module(layer).double()
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
    output, h_n = layer.apply(params, batch, jnp.zeros((2, 2, H)), lengths=[3, 1])
    assert output.dtype == h_n.dtype == expected
    reference, _ = layer.apply(jax.tree.map(jnp.float32, params), batch.astype(jnp.float32), lengths=[3, 1])
    np.testing.assert_allclose(output.astype(jnp.float32), reference, atol=3e-2)


def as_dtype(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_casts_inputs_parameters_and_states_and_so_the_results(kind):
    layer = make_layer(kind, num_layers=2)
    params, batch = layer.init(jax.random.key(0)), oracles.random_batch([3, 1], F, dtype=np.float32)
    states = tuple(jnp.asarray(s) for s in initial_states(layer, 2, np.float32))
    states = states if is_lstm(layer) else states[0]
    half = jnp.bfloat16
    expected = layer.apply(as_dtype(params, half), batch.astype(half), as_dtype(states, half), lengths=[3, 1])
    found = layer.apply(params, batch, states, lengths=[3, 1], dtype=half)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(half)}
    packed = pack_padded_sequence(batch, [3, 1], batch_first=True, plan=plan_padded(2, 3))
    assert layer.apply(params, packed, dtype=half)[0].data.dtype == half
    assert layer.apply(params, batch[0], dtype=half)[0].dtype == half  # one sequence
    assert layer.apply(as_dtype(params, half), batch, lengths=[3, 1], dtype=jnp.float32)[0].dtype == jnp.float32


def test_parameters_keep_their_dtype_in_gradients_under_another_dtype():
    def loss(params, dtype):
        return LAYER.apply(params, jnp.ones((2, 3, F)), lengths=[3, 1], dtype=dtype)[0].astype(jnp.float32).sum()

    mixed, plain = (jax.grad(loss)(PARAMS, dtype) for dtype in (jnp.bfloat16, None))
    for ours, theirs in zip(jax.tree.leaves(mixed), jax.tree.leaves(plain), strict=True):
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


def test_dropout_without_a_key_is_an_error_in_training():
    layer = GRU(F, H, num_layers=2, dropout=0.5)
    with pytest.raises(ValueError, match=r"dropout=0.5 is on.*dropout_key=.*deterministic=True"):
        layer.apply(layer.init(jax.random.key(0)), jnp.ones((2, 3, F)))


@pytest.mark.parametrize("layer_class", [RNN, LSTM, GRU])
def test_dropout_in_a_single_layer_warns_where_the_user_makes_it(layer_class):
    with pytest.warns(UserWarning, match="dropout acts between layers") as caught:
        layer_class(F, H, dropout=0.5)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LSTM(0, H), ValueError, "input_size must be at least 1, got 0"),
        (lambda: LSTM(F, -1), ValueError, "hidden_size must be at least 1, got -1"),
        (lambda: LSTM(F, 2.5), TypeError, "hidden_size must be an int, got 2.5"),
        (lambda: GRU(F, H, num_layers=0), ValueError, "num_layers must be at least 1, got 0"),
        (lambda: GRU(F, H, 2, bias=1), TypeError, "bias must be a bool, got 1"),
        (lambda: GRU(F, H, 2, True, 1.5), ValueError, r"dropout must be a number in \[0, 1\].*got 1.5"),
        (lambda: GRU(F, H, 2, True, "a"), ValueError, r"dropout must be a number in \[0, 1\].*got 'a'"),
        (lambda: RNN(F, H, 1, ["tanh"]), ValueError, r"got \['tanh'\]"),
        (lambda: RNN(F, H, nonlinearity="sigmoid"), ValueError, """must be "tanh" or "relu", got 'sigmoid'"""),
        (lambda: LSTM(F, H, proj_size=H), ValueError, "proj_size must be 0 .* below hidden_size=4, got 4"),
        (lambda: LSTM(F, H, proj_size=-1), ValueError, "proj_size must be 0 .* got -1"),
        (lambda: LSTM(F, H).init(jax.random.key(0), int), TypeError, "dtype must be a floating dtype, got int"),
    ],
)
def test_bad_options_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


SINGLE = LSTM(F, H)
SINGLE_PARAMS = SINGLE.init(jax.random.key(0))
PACKED = pack_padded_sequence(jnp.ones((2, 3, F)), [3, 2], batch_first=True)


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (jnp.ones(F), {}, ValueError, r"PackedSequence, \[B, T, 3\] or one sequence \[T, 3\], got shape \(3,\)"),
        (jnp.ones((2, 3, F + 1)), {}, ValueError, r"3 features .*got shape \(2, 3, 4\)"),
        (jnp.ones((3, F + 1)), {}, ValueError, r"3 features .*got shape \(3, 4\)"),
        (PACKED.map(lambda x: x[:, :2]), {}, ValueError, r"\[S, 3\].*got shape \(5, 2\)"),
        (PACKED.replace(data={"a": PACKED.data, "b": PACKED.data}), {}, ValueError, "one array of data"),
        (jnp.ones((2, 3, F)) * 1j, {}, TypeError, "inputs must be real, got dtype complex64"),
        (None, {}, ValueError, "inputs holds no array, got None"),
        (PACKED, {"lengths": [3, 2]}, TypeError, "carry their lengths and plan"),
        (PACKED, {"plan": PACKED.plan}, TypeError, "carry their lengths and plan"),
        (jnp.ones((2, 3, F)), {"lengths": [4, 1]}, ValueError, r"lengths\[0\] = 4 is longer"),
        (jnp.ones((2, 3, F)), {"lengths": [-1, 1]}, ValueError, "negative"),
        (
            jnp.ones((2, 3, F)),
            {"lengths": [1, 1, 1]},
            ValueError,
            "each sequence of inputs, got 3 lengths for a batch of 2",
        ),
        (jnp.ones((2, 3, F)), {"lengths": [2.5, 1]}, ValueError, "whole numbers"),
        (jnp.ones((2, 3, F)), {"lengths": [3, 1], "plan": plan_padded(2, 2)}, ValueError, "does not fit the plan"),
        (jnp.ones((2, 3, F)), {"plan": plan_padded(3, 3)}, ValueError, "plan is for 3 sequences, but the batch has 2"),
        (jnp.ones((3, F)), {"lengths": [3]}, ValueError, "one sequence without a batch axis"),
        (PACKED, {"dtype": int}, TypeError, "dtype must be a floating dtype, got int"),
        (PACKED, {"initial_state": jnp.zeros((1, 2, H))}, ValueError, r"\(h_0 \[1, 2, 4\], c_0 \[1, 2, 4\]\)"),
        (
            PACKED,
            {"initial_state": (jnp.zeros((1, 3, H)),) * 2},
            ValueError,
            r"got shapes \[\(1, 3, 4\), \(1, 3, 4\)\]",
        ),
    ],
)
def test_bad_inputs_are_named(inputs, options, error, message):
    with pytest.raises(error, match=message):
        SINGLE.apply(SINGLE_PARAMS, inputs, **options)


def test_parameters_of_another_layer_are_named():
    with pytest.raises(ValueError, match=r"l0.weight_ih has shape \(3, 12\), not \(3, 16\)"):
        SINGLE.apply(GRU(F, H).init(jax.random.key(0)), PACKED)
    with pytest.raises(TypeError, match=r"l0.bias_ih is not known"):
        LSTM(F, H, bias=False).apply(SINGLE_PARAMS, PACKED)
    with pytest.raises(TypeError, match=r"l0.weight_ih is missing"):
        SINGLE.apply({}, PACKED)


def test_a_parameter_sharded_under_an_explicit_mesh_is_named_with_the_way_out():
    spec = jax.sharding.PartitionSpec(None, "model")
    expected = SINGLE.apply(SINGLE_PARAMS, PACKED)
    mesh = jax.make_mesh((2,), ("model",))
    assert mesh.axis_types == (jax.sharding.AxisType.Explicit,)
    with jax.set_mesh(mesh):
        params = jax.tree.map(jnp.asarray, SINGLE_PARAMS)
        params["l0"]["weight_hh"] = jax.device_put(params["l0"]["weight_hh"], jax.sharding.NamedSharding(mesh, spec))
        with pytest.raises(ValueError, match=r"l0.weight_hh is sharded by .*'model'.*AxisType.Auto.*auto_axes"):
            SINGLE.apply(params, PACKED)
        automatic = jax.sharding.auto_axes(SINGLE.apply, out_sharding=jax.sharding.PartitionSpec())
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), automatic(params, PACKED), expected)


def test_gru_and_rnn_return_output_and_h():
    for layer in (GRU(F, H), RNN(F, H)):
        output, h_n = layer.apply(layer.init(jax.random.key(0)), PACKED)
        assert output.shape == (5, H)
        assert h_n.shape == (1, 2, H)
        np.testing.assert_array_equal(jaxpack.last(output), h_n[0])


@oracles.needs_torch
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_final_output_is_the_last_layers_h_n_of_torch_side_by_side(kind, bidirectional):
    layer = make_layer(kind, num_layers=2, bidirectional=bidirectional)
    module = torch_module(layer).double()
    params = layer.from_torch(module.state_dict())
    batch, lengths = oracles.random_batch([2, 4], F), [2, 4]
    theirs = []
    for row, length in zip(batch, lengths, strict=True):
        final = module(oracles.torch.tensor(row[:length]))[1]
        h_n = (final[0] if is_lstm(layer) else final).detach().numpy()
        theirs.append(np.concatenate(h_n[-layer.num_directions :]))
    state = layer.apply(params, batch, lengths=lengths, plan=plan_padded(2, 4))[1]
    ours = layer.final_output(state)
    assert ours.shape == (2, layer.output_size)
    np.testing.assert_allclose(ours, theirs, atol=1e-12)
    np.testing.assert_array_equal(jax.jit(layer.final_output)(state), ours)
    each_row = jax.vmap(layer.final_output, 1)(state)  # of one sequence, without the batch axis
    np.testing.assert_array_equal(each_row, ours)


@pytest.mark.parametrize("plan", [None, plan_rows([2, 3]), plan_padded(2, 3)], ids=["none", "rows", "padded"])
def test_final_output_has_both_directions_whole_sequence_under_every_plan(plan):
    layer = GRU(F, H, bidirectional=True)
    params = layer.init(jax.random.key(0))
    batch = oracles.random_batch([2, 3], F, dtype=np.float32)
    state = jax.jit(functools.partial(layer.apply, plan=plan))(params, batch, lengths=np.array([2, 3]))[1]
    whole = [layer.apply(params, batch[i, :n])[0] for i, n in enumerate((2, 3))]
    expected = [np.concatenate([each[-1, :H], each[0, H:]]) for each in whole]
    np.testing.assert_allclose(layer.final_output(state), expected, atol=1e-6)


def test_the_stacks_of_flax_hold_the_layer_whose_final_output_theirs_is():
    x = oracles.random_batch([3, 3], F, dtype=np.float32)
    theirs = jaxpack.nnx.GRU(F, H, bidirectional=True, rngs=nnx.Rngs(0))
    output, state = theirs(x)
    both_ends = np.concatenate([output[:, -1, :H], output[:, 0, H:]], axis=-1)
    np.testing.assert_array_equal(theirs.layer.final_output(state), both_ends)
    linen = jaxpack.linen.GRU(H, bidirectional=True)
    np.testing.assert_array_equal(linen.layer(F).final_output(state), both_ends)


@pytest.mark.parametrize(
    ("layer", "state", "got"),
    [
        (LSTM(F, H), np.zeros((1, 2, H)), "shape (1, 2, 4)"),
        (LSTM(F, H), (np.zeros((1, 2, H)), np.zeros((1, 3, H))), "shapes [(1, 2, 4), (1, 3, 4)]"),
        (LSTM(F, H, proj_size=2), (np.zeros((1, 2, H)), np.zeros((1, 2, H))), "shapes [(1, 2, 4), (1, 2, 4)]"),
        (GRU(F, H), (np.zeros((1, 2, H)),), "shape (1, 2, 4)"),
        (GRU(F, H, num_layers=2), np.zeros((1, 2, H)), "shape (1, 2, 4)"),
        (GRU(F, H, bidirectional=True), np.zeros((2, 2, 2 * H)), "shape (2, 2, 8)"),
        (GRU(F, H), np.zeros((7, 1, 2, H)), "shape (7, 1, 2, 4)"),
        (GRU(F, H), np.zeros(H), "shape (4,)"),
        (GRU(F, H), None, "shapes []"),
    ],
    ids=str,
)
def test_final_output_refuses_what_is_not_the_final_state(layer, state, got):
    with pytest.raises(ValueError, match=rf"beside the output, h_n \[.*, got {re.escape(got)}. Under more axes"):
        layer.final_output(state)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_sequence_may_have_any_initial_state(kind):
    layer = make_layer(kind)
    params = layer.init(jax.random.key(0))
    states = tuple(s.at[:, 1].set(jnp.nan) for s in map(jnp.asarray, initial_states(layer, 2, np.float32)))
    gradient = jax.grad(
        lambda p: layer.apply(p, jnp.ones((2, 3, F)), states if is_lstm(layer) else states[0], lengths=[3, 0])[0].sum()
    )(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("params", [None, {}, {"l0": {}}, [jnp.ones(3)]])
def test_what_is_no_parameters_is_refused(params):
    with pytest.raises(TypeError, match=r"params do not match LSTM.*l0.weight_ih is missing"):
        SINGLE.apply(params, PACKED)


def test_a_seed_is_no_key():
    with pytest.raises(TypeError, match=r"random key, such as jax.random.key\(0\), got 7"):
        SINGLE.init(7)
