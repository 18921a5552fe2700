"""The contract of masks: a masked batch gives what the valid steps of each row give as a sequence of their own.

Each subject runs under one of its plans, in turn, in one program for all tests.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import CALLS, Results, assert_close, dot, operands, oracle, rows_of, tangent_like
from contract_subjects import ALIKE, DEEP, FLAX, LAYERS, LINEAR, B, F, T, one_call, subject_of
from flax import linen as nn
from flax import nnx
from test_contract_resets import by_episodes

import jaxpack
import jaxpack.linen
import jaxpack.nnx

# Padding on the left, a hole, and both; 2, 5 and 2 valid steps.
MASK = np.array([[0, 0, 0, 0, 1, 1], [1, 1, 0, 1, 1, 1], [0, 1, 0, 0, 1, 0]], bool)
RESETS = np.array([[1, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 1], [0, 0, 1, 1, 1, 1]], bool)
SUBJECTS = [name for name in (*LAYERS, *FLAX, *LINEAR, *DEEP) if name not in ALIKE] + ["Mamba2"]
each_subject = pytest.mark.parametrize("subject", SUBJECTS)


@pytest.fixture(autouse=True)
def _strictly():
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        yield


@functools.cache
def masked(name):
    """The program of a subject that is given a mask and resets, forward and backward."""
    run, plan = subject_of(name).run, CALLS[one_call(name, 0)].plan

    @jax.jit
    def derivatives(given, mask):
        def apply(params, x, state):
            return run(params, x, state, mask=mask, plan=plan, resets=given.resets)

        (outputs, final), vjp = jax.vjp(apply, given.params, given.x, given.state)
        return Results(outputs, final, *vjp((given.doutputs, given.dfinal)))

    return derivatives


def compacted(array, mask):
    """The valid steps of each row first, then zeros, row by row in NumPy."""
    result = np.zeros_like(array)
    for row, valid in enumerate(mask):
        result[row, : valid.sum()] = array[row][valid]
    return result


def spread(array, mask):
    """The inverse of `compacted`."""
    result = np.zeros_like(array)
    for row, valid in enumerate(mask):
        result[row, valid] = array[row, : valid.sum()]
    return result


def compacted_resets(resets, mask):
    """The resets of valid steps: a step begins an episode if one of the steps since the last valid one does."""
    result = np.zeros_like(resets)
    for row, valid in enumerate(mask):
        places = np.flatnonzero(valid)
        for i, (start, stop) in enumerate(zip([0, *(places[:-1] + 1)], places + 1, strict=True)):
            result[row, i] = resets[row, start:stop].any()
    return result


def operands_on(name, mask, resets=None, poison=0.0):
    """Random operands, with `poison` at masked steps."""
    given = operands(name, (T,) * B)

    def poisoned(leaf):
        return np.where(mask.reshape(mask.shape + (1,) * (leaf.ndim - 2)), leaf, poison)

    x, doutputs = poisoned(given.x), jax.tree.map(poisoned, given.doutputs)
    return given._replace(x=x, doutputs=doutputs, resets=np.zeros((B, T), bool) if resets is None else resets)


def alone(given, mask):
    """The operands with valid steps first, and lengths."""
    x, doutputs, resets = compacted(given.x, mask), compact_tree(given.doutputs, mask), given.resets
    lengths = mask.sum(1).astype(np.int32)
    return given._replace(x=x, doutputs=doutputs, lengths=lengths, resets=compacted_resets(resets, mask))


def compact_tree(tree, mask):
    return jax.tree.map(lambda leaf: compacted(leaf, mask), tree)


def assert_spread(subject, found, expected, mask):
    """Results are those of the valid steps alone, put back."""
    outputs = jax.tree.map(lambda leaf: spread(np.asarray(leaf), mask), expected.outputs)
    expected = expected._replace(outputs=outputs, x=spread(np.asarray(expected.x), mask))
    assert_close(found._replace(params=subject_of(subject).plain(found.params)), expected)


@each_subject
def test_values_and_gradients_are_those_of_valid_steps_alone_whatever_is_masked(subject):
    given = operands_on(subject, MASK)
    expected = oracle(subject, alone(given, MASK)._replace(resets=None))
    clean = masked(subject)(given, MASK)
    assert_spread(subject, clean, expected, MASK)
    for poison in (np.nan, np.inf):
        dirty = masked(subject)(operands_on(subject, MASK, poison=poison), MASK)
        jax.tree.map(np.testing.assert_array_equal, dirty, clean)


@each_subject
def test_a_row_without_a_valid_step_is_an_empty_sequence_in_the_same_program(subject):
    mask = MASK & np.array([[True], [False], [True]])
    given = operands_on(subject, mask, poison=np.nan)
    found = masked(subject)(given, mask)
    assert_close(rows_of(found, 1).final, jax.tree.map(lambda leaf: leaf[1], given.state), 0)
    assert_close(rows_of(found, 1).state, jax.tree.map(lambda leaf: leaf[1], given.dfinal), 0)
    assert all((leaf[1] == 0).all() for leaf in jax.tree.leaves((found.outputs, found.x)))
    others = np.array([0, 2])
    assert_close(rows_of(found, others), rows_of(masked(subject)(operands_on(subject, MASK), MASK), others))
    assert masked(subject)._cache_size() == 1


@pytest.mark.parametrize("subject", ["LSTM bidirectional", "MinLSTM", "nnx.RNN(GRUCell)", "nnx.GRU"])
def test_a_reset_at_a_masked_step_acts_at_the_next_valid_one(subject):
    given = operands_on(subject, MASK, RESETS, poison=np.nan)
    expected = by_episodes(subject, alone(jax.tree.map(np.nan_to_num, given), MASK)._replace(resets=EPISODES))
    assert_spread(subject, masked(subject)(given, MASK), expected, MASK)


EPISODES = np.array(
    [[1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0]], bool
)  # RESETS at valid steps, by hand


def test_the_resets_of_the_tests_are_those_written_by_hand():
    np.testing.assert_array_equal(compacted_resets(RESETS, MASK), EPISODES)


@pytest.mark.parametrize("subject", ["LSTM bidirectional", "linen.RNN(MGUCell)", "nnx.MinGRU"])
def test_vmap_changes_no_result(subject):
    masks = np.stack([MASK, MASK[::-1]])
    each = [operands_on(subject, mask, resets) for mask, resets in zip(masks, (RESETS, ~RESETS), strict=True)]
    run = masked(subject).__wrapped__
    together = jax.jit(jax.vmap(run))(jax.tree.map(lambda *leaves: np.stack(leaves), *each), masks)
    for i, given in enumerate(each):
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], together), masked(subject)(given, masks[i]))


@pytest.mark.parametrize("subject", ["LSTM projected", "linen.RNN(MGUCell)"])
def test_masks_alone_may_vary_over_devices(subject):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    masks, given = [MASK, MASK[::-1]], operands_on(subject, np.ones((B, T), bool))

    def run(mask):
        return subject_of(subject).run(given.params, given.x, given.state, mask=mask)[0]

    found = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data")))(
        np.concatenate(masks)
    )
    for i, mask in enumerate(masks):
        expected = masked(subject)(given, mask).outputs
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i * B : (i + 1) * B], found), expected)


def test_forward_mode_equals_finite_differences():
    layer = jaxpack.GRU(F, 2)
    params, x = layer.init(jax.random.key(0)), np.random.default_rng(0).standard_normal((B, T, F))

    @jax.jit
    def run(x):
        return layer.apply(params, x, mask=MASK, forward_mode=True)

    _, slopes = jax.jvp(run, (x,), (np.cos(x),))
    differences = jax.tree.map(lambda a, b: (a - b) / 2e-6, run(x + 1e-6 * np.cos(x)), run(x - 1e-6 * np.cos(x)))
    assert_close(slopes, differences, 1e-8)


@pytest.mark.parametrize("layer", [jaxpack.LSTM(F, 2, num_layers=2, bidirectional=True), jaxpack.RNN(F, 2)])
def test_states_after_each_step_are_put_back_and_one_sequence_needs_no_batch_axis(layer):
    params, x = layer.init(jax.random.key(0)), np.random.default_rng(0).standard_normal((B, T, F))
    whole = layer.apply(params, x, mask=MASK, return_all_states=True)
    first = layer.apply(params, x[0], mask=MASK[0], return_all_states=True)
    for row, valid in enumerate(MASK):
        output, final, states = layer.apply(params, x[row, valid], return_all_states=True)
        pairs = [(whole[0], output), *zip(*map(jax.tree.leaves, (whole[2], states)), strict=True)]
        for found, expected in pairs:
            np.testing.assert_allclose(found[row, valid], expected, atol=1e-12)
            assert (found[row, ~valid] == 0).all()
        assert_close(jax.tree.map(lambda leaf, row=row: leaf[:, row], whole[1]), final, 1e-12)
    assert_close(jax.tree.map(lambda leaf: leaf[0], (whole[0], whole[2])), (first[0], first[2]), 1e-12)


def drop_in(api):
    """A drop-in RNN as run(x, **options), and its parameters bound."""
    if api == "nnx":
        return jaxpack.nnx.RNN(nnx.GRUCell(F, 2, rngs=nnx.Rngs(0)), return_carry=True)
    rnn = jaxpack.linen.RNN(nn.GRUCell(2), return_carry=True)
    variables = rnn.init(jax.random.key(0), np.ones((B, T, F), np.float32), mask=MASK)
    return functools.partial(rnn.apply, variables)


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_drop_ins_take_masks_with_the_axes_of_their_inputs(api):
    rnn, x = drop_in(api), np.random.default_rng(0).standard_normal((B, T, F)).astype(np.float32)
    carry, outputs = rnn(x, mask=MASK)
    (several, major), (several_outputs, major_outputs) = zip(
        rnn(x[:, None], mask=MASK[:, None]), rnn(x.swapaxes(0, 1), mask=MASK.T, time_major=True), strict=True
    )
    assert_close((several[:, 0], several_outputs[:, 0]), (carry, outputs), 1e-6)
    assert_close((major, major_outputs.swapaxes(0, 1)), (carry, outputs), 1e-6)


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_outputs_in_the_order_of_reading_fill_the_valid_steps_in_turn(api):
    rnn, x = drop_in(api), np.random.default_rng(0).standard_normal((B, T, F)).astype(np.float32)
    _, read = rnn(x, mask=MASK, reverse=True)
    _, kept = rnn(x, mask=MASK, reverse=True, keep_order=True)
    for row, valid in enumerate(MASK):
        np.testing.assert_allclose(read[row, valid], kept[row, valid][::-1], atol=1e-6)


def _scanned(h, decay, inputs):
    h = decay * h + inputs
    return h, h


def _attended(state, query, key, value, log_decay):
    """Gated linear attention, a group of heads with one key and query."""
    state = np.exp(log_decay)[:, None, None] * state + key[0][:, None] * value[:, None]
    return state, np.einsum("hkv,k->hv", state, query[0])


def _replaced(state, query, key, value, beta, log_decay):
    """The gated delta rule, in the same layout."""
    held = np.einsum("hkv,k->hv", state, key[0])
    state = np.exp(log_decay)[:, None, None] * (state - beta[:, None, None] * key[0][:, None] * held[:, None])
    state = state + beta[:, None, None] * key[0][:, None] * value[:, None]
    return state, np.einsum("hkv,k->hv", state, query[0])


# A function, the shapes of its arguments at each step, that of its state, and one step of it in NumPy.
FUNCTIONS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], tuple[int, ...], Callable[..., Any]]] = {
    "linear_scan": (jaxpack.linear_scan, [(2,), (2,)], (2,), _scanned),
    "linear_attention": (jaxpack.linear_attention, [(1, 2), (1, 2), (2, 3), (2,)], (2, 2, 3), _attended),
    "gated_delta_rule": (jaxpack.gated_delta_rule, [(1, 2), (1, 2), (2, 3), (2,), (2,)], (2, 2, 3), _replaced),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_padded_arrays_see_valid_steps_alone(name):
    function, shapes, state_shape, step = FUNCTIONS[name]
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((B, T, *shape)) for shape in shapes] + [rng.standard_normal((B, *state_shape))]
    poisoned = [np.where(MASK.reshape(B, T, *[1] * (a.ndim - 2)), a, np.nan) for a in arrays[:-1]] + arrays[-1:]
    resets = RESETS if name == "linear_scan" else np.zeros((B, T), bool)
    options = {"resets": resets} if name == "linear_scan" else {}

    @jax.jit
    def run(arrays, mask):
        def loss(arrays):
            outputs, final = function(*arrays, mask=mask, **options)
            return jnp.sum(jnp.sin(outputs)) + jnp.sum(final**2), (outputs, final)

        return jax.value_and_grad(loss, has_aux=True)(arrays)

    (_, (outputs, final)), gradient = jax.device_get(run(poisoned, MASK))
    for row, begins in enumerate(compacted_resets(resets, MASK)):
        state = arrays[-1][row]
        for t, begin in zip(np.flatnonzero(MASK[row]), begins, strict=False):
            state = arrays[-1][row] if begin else state
            state, expected = step(state, *(array[row, t] for array in arrays[:-1]))
            np.testing.assert_allclose(outputs[row, t], expected, atol=1e-10)
        np.testing.assert_allclose(final[row], state, atol=1e-10)
    assert (outputs[~MASK] == 0).all()
    tangents = tangent_like(arrays)
    high, low = (
        run([a + eps * d for a, d in zip(poisoned, tangents, strict=True)], MASK)[0][0] for eps in (1e-6, -1e-6)
    )
    np.testing.assert_allclose(dot(gradient, tangents), (high - low) / 2e-6, rtol=1e-6)
    assert all((leaf[~MASK] == 0).all() for leaf in gradient[:-1])


LSTM = jaxpack.LSTM(F, 2)
PARAMS = LSTM.init(jax.random.key(0), np.float32)
ENTRANCES: dict[str, Callable[..., Any]] = {
    "layer": functools.partial(LSTM.apply, PARAMS),
    "linear layer": functools.partial(
        jaxpack.MinGRU(F, 2).apply, jaxpack.MinGRU(F, 2).init(jax.random.key(0), np.float32)
    ),
    "linear_scan": functools.partial(jaxpack.linear_scan, 0.5),
    "nnx stack": jaxpack.nnx.LSTM(F, 2, rngs=nnx.Rngs(0)),
    "nnx.RNN": jaxpack.nnx.RNN(nnx.GRUCell(F, 2, rngs=nnx.Rngs(0))),
}
X = np.ones((B, T, F), np.float32)
PLAN = jaxpack.plan_exact([3, 2, 2])


@pytest.mark.parametrize("name", ENTRANCES)
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"mask": MASK[:, :-1]}, ValueError, r"mask must have a value for each step .* \[3, 6\], got \[3, 5\]"),
        ({"mask": MASK[..., None]}, ValueError, r"\[3, 6\], got \[3, 6, 1\]"),
        ({"mask": MASK.astype(int)}, TypeError, r"mask must be one bool a step, .* got dtype int\d+. Write mask != 0"),
        ({"mask": MASK, "lengths": [2, 5, 2]}, TypeError, r"mask= takes the place of (seq_)?lengths="),
        ({"mask": MASK, "plan": PLAN}, ValueError, r"lengths\[1\] = 5 does not fit"),
    ],
)
def test_bad_masks_are_errors_that_say_what_to_do(name, given, error, message):
    if "nnx" in name and "lengths" in given:
        given = {"mask": given["mask"], "seq_lengths": given["lengths"]}
    with pytest.raises(error, match=message):
        ENTRANCES[name](X, **given)


@pytest.mark.parametrize("name", ENTRANCES)
def test_packed_inputs_take_no_mask(name):
    with pytest.raises(TypeError, match=r"inputs are packed, .* do not give mask="):
        ENTRANCES[name](jaxpack.pack_sequence([X[0]]), mask=MASK)


def test_a_traced_mask_that_does_not_fit_the_plan_makes_its_row_nan():
    outputs = jax.jit(lambda mask: LSTM.apply(PARAMS, X, mask=mask, plan=PLAN)[0])(MASK)
    assert np.isnan(outputs[1][MASK[1]]).all()
    assert np.isfinite(outputs[np.array([0, 2])]).all()


def test_bidirectional_of_flaxs_own_rnns_takes_no_mask():
    rnns = [nnx.RNN(nnx.GRUCell(F, 2, rngs=nnx.Rngs(0))) for _ in range(2)]
    with pytest.raises(TypeError, match="a mask need RNNs of jaxpack"):
        jaxpack.nnx.Bidirectional(*rnns)(X, mask=MASK)


def test_symbolic_sizes_take_no_mask():
    (batch_size,) = jax.export.symbolic_shape("b")
    shapes = jax.ShapeDtypeStruct((batch_size, T, F), np.float32), jax.ShapeDtypeStruct((batch_size, T), bool)
    rnn = ENTRANCES["nnx.RNN"]
    with pytest.raises(ValueError, match=r"is symbolic.*seq_lengths=mask.sum"):
        jax.export.export(jax.jit(lambda x, mask: rnn(x, mask=mask)))(*shapes)


def test_variables_with_a_time_axis_take_no_mask():
    rnn = jaxpack.linen.RNN(
        nn.GRUCell(2), variable_axes={"params": 0}, variable_broadcast=(), split_rngs={"params": True}
    )
    variables = rnn.init(jax.random.key(0), jnp.asarray(X))
    with pytest.raises(ValueError, match="time axis, along which a mask would move steps"):
        rnn.apply(variables, X, mask=MASK)


@pytest.mark.parametrize(
    "module",
    [
        jaxpack.linen.GRU(2),
        jaxpack.linen.MinGRU(2),
        jaxpack.linen.Bidirectional(*(jaxpack.linen.RNN(nn.SimpleCell(2)) for _ in range(2))),
    ],
    ids=lambda module: type(module).__name__,
)
def test_linen_initialises_and_captures_with_a_mask(module):
    variables = module.init(jax.random.key(0), X, mask=MASK)
    found, _ = module.apply(variables, X, mask=MASK, mutable=["intermediates"])
    assert_close(found, module.apply(variables, X, mask=MASK), 1e-6)
    outputs = jax.tree.leaves(found)[0]
    assert (outputs[~MASK] == 0).all()
    assert (outputs[MASK] != 0).any()
