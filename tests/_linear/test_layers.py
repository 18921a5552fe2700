"""LRU, MinGRU, MinLSTM and RGLRU: what the contract does not ask of everything recurrent."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from strategies import FIXED_PLANS

import jaxpack
import jaxpack.linen
import jaxpack.nnx
from jaxpack._linear import chunks
from jaxpack._linear.solve import Block

F, H = 4, 4
LAYERS: dict[str, Any] = {
    "lru": jaxpack.LRU(F, 5, r_min=0.5, r_max=0.9),
    "min_gru": jaxpack.MinGRU(F, H),
    "min_lstm": jaxpack.MinLSTM(F, H),
    "rglru": jaxpack.RGLRU(F, F, num_heads=2),
}
LENGTHS = np.array([3, 6, 0, 2, 5], np.int32)
B, T = 5, 7


@pytest.fixture
def _x64(x64):
    """Runs in float64."""


def batch_for(layer, seed=0):
    """A batch [B, T, F] and an initial state."""
    rng = np.random.default_rng(seed)
    state = jax.tree.map(lambda leaf: rng.standard_normal((B, *leaf.shape)), layer.state_like(float))
    return rng.standard_normal((B, T, F)), state


def oracle(kind, params, batch, state, resets=None, reverse=False, lengths=LENGTHS):
    """Outputs and final states in NumPy float64, sequence by sequence."""
    layer = LAYERS[kind]
    outputs, final = np.zeros((B, T, layer.output_size)), np.array(state)
    for row, length in enumerate(lengths):
        for t in range(length)[::-1] if reverse else range(length):
            at = t + 1 if reverse else t
            begins = resets is not None and at < length and resets[row, at]
            before = state[row] if begins else final[row]
            final[row], outputs[row, t] = oracles.linear_step(kind, layer, params, before, batch[row, t])
    return outputs, final


@pytest.mark.usefixtures("_x64")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_are_numpys_in_both_directions_with_resets(kind, reverse, monkeypatch):
    monkeypatch.setattr(chunks, "CPU", chunks.Schedule(4, False))  # several chunks, the last of which is short
    layer, resets = LAYERS[kind], np.random.default_rng(5).random((B, T)) < 0.3
    params, (batch, state) = oracles.random_params(layer), batch_for(layer)
    plan = jaxpack.BucketPlan((11,), (2,), ((0, 6, 9), (0, 5)))

    @jax.jit
    def run(params, batch, state):
        return layer.apply(params, batch, state, lengths=LENGTHS, plan=plan, resets=resets, reverse=reverse)

    for ours, theirs in zip(
        run(params, batch, state), oracle(kind, params, batch, state, resets, reverse), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("_x64")
@pytest.mark.parametrize("kind", ["lru", "rglru"])
def test_chunks_platforms_and_no_plan_give_the_same_gradients(kind, monkeypatch):
    layer = LAYERS[kind]
    params, (batch, state) = oracles.random_params(layer), batch_for(layer)
    found = []
    padded, ladder = FIXED_PLANS["padded"], chunks.Schedule(10, False, follow_lengths=True)
    for schedule, plan in ((chunks.Schedule(4, False), padded), (ladder, None), (chunks.ACCELERATOR, padded)):
        monkeypatch.setattr(chunks, "CPU", schedule)
        for reverse in (False, True):

            @jax.jit
            def gradients(params, batch, state, plan=plan, reverse=reverse):
                def loss(*operands):
                    output, final = layer.apply(*operands, lengths=jnp.asarray(LENGTHS), plan=plan, reverse=reverse)
                    return jnp.sum(jnp.sin(output)) + jnp.sum(final**2)

                return jax.value_and_grad(loss, (0, 1, 2))(params, batch, state)

            jax.clear_caches()
            found.append(gradients(params, batch, state))
    for i, results in enumerate(found):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), results, found[i % 2])


@pytest.mark.usefixtures("_x64")
@pytest.mark.parametrize("kind", LAYERS)
def test_steps_equal_the_whole(kind):
    layer = LAYERS[kind]
    params, (batch, _) = layer.init(jax.random.key(0)), batch_for(layer)
    output, final = jax.device_get(jax.jit(layer.apply)(params, batch))
    step: Any = jax.jit(layer.step)
    state: Any = None
    for t in range(T):
        state, y = step(params, state, batch[:, t])
        np.testing.assert_allclose(y, output[:, t], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(state, final, rtol=1e-12, atol=1e-12)
    state = jax.device_get(state)
    _, alone = step(params, state[1], batch[1, 0])
    _, together = jax.device_get(step(params, state, batch[:, 0]))
    np.testing.assert_allclose(alone, together[1], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("_x64")
def test_rglru_leaves_the_first_input_unscaled_on_request_also_after_resets():
    layer = jaxpack.RGLRU(F, F, scale_first=False)
    params, (batch, _) = oracles.random_params(layer), batch_for(layer)
    resets = np.zeros((B, T), bool)
    resets[1, 3] = True
    output, final = jax.jit(lambda *given: layer.apply(*given, lengths=LENGTHS, resets=resets))(params, batch)
    gate = 1 / (1 + np.exp(-(batch @ params["input_gate"]["w"][0] + params["input_gate"]["b"][0])))
    for row, t in ((0, 0), (1, 0), (1, 3), (3, 0)):
        np.testing.assert_allclose(output[row, t], (gate * batch)[row, t], rtol=1e-12)
    state: Any = None
    for t in range(2):
        state, _ = layer.step(params, state, batch[:, t])
    np.testing.assert_allclose(state[3], final[3], rtol=1e-12)


@pytest.mark.parametrize("kind", ["min_gru", "min_lstm", "rglru"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gates_at_50_are_stable_in_values_and_gradients(kind, dtype):
    layer = LAYERS[kind]
    params = jax.tree.map(jnp.ones_like, layer.init(jax.random.key(0)))
    # Ones sum the features: gates are at +50 in two sequences, at -50 in the next two, and change in the last.
    signs = np.stack([np.ones(T), np.ones(T), -np.ones(T), -np.ones(T), np.where(np.arange(T) % 2, 1, -1)])
    batch = np.broadcast_to(signs[..., None] * 50.0 / F, (B, T, F)).astype(dtype)

    @jax.jit
    def run(params, batch):
        def loss(params, batch):
            output, _ = layer.apply(params, batch, dtype=dtype)
            return jnp.sum(jnp.asarray(output, jnp.float32)), output

        return jax.grad(loss, (0, 1), has_aux=True)(params, batch)

    gradients, output = run(params, batch)
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves((gradients, output)))
    exact: Any = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, batch))
    start, lengths = np.zeros((B, layer.hidden_size)), np.full(B, T)
    expected, _ = oracle(kind, exact[0], exact[1], start, lengths=lengths)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(np.asarray(output, np.float64), expected, rtol=tolerance, atol=1e-30)


@pytest.mark.usefixtures("_x64")
@pytest.mark.parametrize("kind", ["min_gru", "min_lstm"])
def test_a_positive_candidate_keeps_the_state_positive(kind):
    layer = type(LAYERS[kind])(F, H, candidate="positive", bias=False)
    params, (batch, _) = oracles.random_params(layer), batch_for(layer)
    output, _ = jax.jit(layer.apply)(params, batch)
    *gates, v = np.split(batch @ params["weight"], layer.num_gates, -1)
    candidate = np.where(v >= 0, v + 0.5, 1 / (1 + np.exp(-v)))
    gates = [1 / (1 + np.exp(-gate)) for gate in gates]
    share = gates[0] if kind == "min_gru" else gates[1] / sum(gates)
    h = np.zeros((B, H))
    for t in range(T):
        h = (1 - share[:, t]) * h + share[:, t] * candidate[:, t]
        np.testing.assert_allclose(output[:, t], h, rtol=1e-12)
    assert (output > 0).all()


def test_lru_starts_on_its_ring():
    layer = jaxpack.LRU(3, 4096, r_min=0.4, r_max=0.8, max_phase=0.3)
    params = layer.init(jax.random.key(0))
    radius, phase = np.exp(-np.exp(params["nu_log"])), np.exp(params["theta_log"])
    assert (radius.min(), radius.max()) == pytest.approx((0.4, 0.8), abs=1e-2)
    assert (phase.min(), phase.max()) == pytest.approx((0, 0.3), abs=1e-2)
    assert np.mean(radius**2) == pytest.approx((0.4**2 + 0.8**2) / 2, abs=1e-2)  # even over the area
    np.testing.assert_allclose(np.exp(params["gamma_log"]), np.sqrt(1 - radius**2), rtol=1e-4)
    assert np.std(params["B_re"]) == pytest.approx(1 / np.sqrt(6), rel=0.05)
    assert np.std(params["C_im"]) == pytest.approx(1 / 64, rel=0.05)


def test_rglru_starts_in_its_ring():
    params = jaxpack.RGLRU(4096, 4096, num_heads=256).init(jax.random.key(0), jnp.float32)
    decay = np.exp(-np.log1p(np.exp(np.asarray(params["a_param"], np.float64))))
    assert (decay.min(), decay.max()) == pytest.approx((0.9, 0.999), abs=1e-3)
    assert np.std(params["a_gate"]["w"]) == pytest.approx(1 / 4, rel=0.05)
    assert not params["input_gate"]["b"].any()


@pytest.mark.optimized(code=False)
@pytest.mark.parametrize("kind", ["lru", "min_gru"])
def test_memory_of_training_does_not_grow_with_gates_or_states(kind):
    layer = type(LAYERS[kind])(64, 64)
    plan = jaxpack.plan_padded(16, 512)
    packed = jaxpack.pack_padded_sequence(np.ones((16, 512, 64), np.float32), [512] * 16, True, plan=plan)

    def loss(params, data, weights):
        output, _ = layer.apply(params, packed.replace(data=data))
        return jnp.sum(output.data * weights)

    params = layer.init(jax.random.key(0))
    compiled: Any = jax.jit(jax.grad(loss, (0, 1))).lower(params, packed.data, packed.data).compile()
    # The inputs without slack, the gradient of inputs by chunk, and chunks; decays or states of all steps would add
    # one array each, and those of LRU two.
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * packed.data.nbytes


def test_without_a_plan_most_of_the_padding_is_left_out():
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(50), 0.7, 64), 1, 200).astype(int)
    padded = jaxpack.plan_padded(64, int(lengths.max()))
    assert padded.size > 2.5 * lengths.sum()
    assert lengths.sum() <= chunks.ladder_cells(padded, lengths) < 1.35 * lengths.sum()
    assert chunks.ladder_cells(jaxpack.plan_padded(64, 200), np.full(64, 200)) == 64 * 200


def test_chunks_divide_a_block_where_they_can():
    assert [chunks.chunk_steps(Block(0, steps, 18), 512) for steps in (7, 208, 211)] == [7, 26, 27]
    assert chunks.chunk_steps(Block(0, 100, 4096), 512) == 1
    assert chunks.chunk_steps(Block(0, 208, 18), None) == 208


CONVERTED: dict[str, Any] = {
    "minimal-lru": (jaxpack.LRU(2, 3), "from_minimal_lru", lambda p: p),
    "minGRU": (
        jaxpack.MinGRU(2, 3, candidate="positive", bias=False),
        "from_mingru_pytorch",
        lambda p: {"to_hidden_and_gate.weight": np.concatenate(np.split(p["weight"].T, 2)[::-1])},
    ),
    "minLSTM": (
        jaxpack.MinLSTM(2, 3, candidate="positive", bias=False),
        "from_mingru_pytorch",
        lambda p: {"to_hidden_and_f_i_gate.weight": np.roll(p["weight"].T, 3, axis=0)},  # v before f and i
    ),
    "recurrentgemma": (jaxpack.RGLRU(4, 4, 2, scale_first=False), "from_recurrentgemma", lambda p: p),
    "transformers": (
        jaxpack.RGLRU(4, 4, 2, scale_first=False),
        "from_recurrentgemma",
        lambda p: {
            "recurrent_param": p["a_param"],
            "input_gate_weight": p["input_gate"]["w"],
            "input_gate_bias": p["input_gate"]["b"],
            "recurrent_gate_weight": p["a_gate"]["w"],
            "recurrent_gate_bias": p["a_gate"]["b"],
        },
    ),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_converters_are_exact_or_refuse(name):
    layer, method, theirs_of = CONVERTED[name]
    params = jax.tree.map(np.asarray, oracles.random_params(layer, np.float32))
    theirs = theirs_of(params)
    convert = getattr(layer, method)
    jax.tree.map(np.testing.assert_array_equal, convert(theirs), params)
    with pytest.raises(KeyError, match=r"not known \['other'\]"):
        convert({**theirs, "other": np.zeros(2)})
    first = next(name for name, value in theirs.items() if not isinstance(value, dict))
    with pytest.raises(KeyError, match=f"missing .*{first}"):
        convert({name: array for name, array in theirs.items() if name != first})
    with pytest.raises(ValueError, match="must have shape"):
        convert({**theirs, first: np.zeros((2, 2), np.float32)})
    with pytest.raises(ValueError, match="JAX would round"):
        convert({**theirs, first: np.asarray(theirs[first], np.float64)})


def test_flax_modules_decode_and_share_parameters_with_their_layer():
    x = np.ones((2, 3, F), np.float32)
    module = jaxpack.nnx.RGLRU(F, F, num_heads=2, rngs=nnx.Rngs(0))
    nnx.update(module.params, module.layer.init(jax.random.key(1)))
    expected, state = module.layer.apply(module.layer.init(jax.random.key(1)), x, lengths=[3, 1])
    np.testing.assert_allclose(module(x, seq_lengths=[3, 1])[0], expected, rtol=1e-6)
    expected, _ = module.layer.step(nnx.to_pure_dict(nnx.state(module.params)), None, x[:, 0])
    np.testing.assert_array_equal(module.step(None, x[:, 0])[0], expected)
    linen = jaxpack.linen.RGLRU(F, num_heads=2)
    variables = linen.init(jax.random.key(0), x)
    params = linen.layer(F).init(jax.random.key(1))
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(jnp.shape, params)
    state, _ = linen.apply({"params": params}, None, x[:, 0], method="step")
    np.testing.assert_array_equal(state, expected)


ANY: Any = jaxpack  # whose arguments have wrong types here
PARAMS = LAYERS["min_gru"].init(jax.random.key(0))
X = np.ones((2, 3, F), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ANY.MinGRU(0, 2), ValueError, "input_size must be at least 1"),
        (lambda: ANY.MinGRU(2, 2.0), TypeError, "hidden_size must be an int"),
        (lambda: ANY.MinGRU(2, 2, candidate="g"), ValueError, "candidate must be one of 'identity', 'positive'"),
        (lambda: ANY.MinLSTM(2, 2, bias=1), TypeError, "bias must be a bool"),
        (lambda: ANY.RGLRU(2, 3), ValueError, "hidden_size must be input_size"),
        (lambda: ANY.RGLRU(6, 6, num_heads=4), ValueError, "num_heads must divide hidden_size=6, got 4"),
        (lambda: ANY.RGLRU(2, 2, scale_first=0), TypeError, "scale_first must be a bool"),
        (lambda: ANY.LRU(2, 2, r_min=0.9, r_max=0.5), ValueError, "0 <= r_min < r_max <= 1"),
        (lambda: ANY.LRU(2, 2, max_phase=7.0), ValueError, "max_phase must be"),
        (lambda: ANY.LRU(2, 2).init(0), TypeError, "key must be a JAX random key"),
        (lambda: ANY.LRU(2, 2).init(jax.random.key(0), int), TypeError, "dtype must be a floating dtype"),
        (lambda: ANY.RGLRU(2, 2).from_recurrentgemma({}), ValueError, "scale_first=False"),
        (lambda: ANY.MinGRU(2, 2).from_mingru_pytorch({}), ValueError, "bias=False"),
        (lambda: LAYERS["min_gru"].apply(PARAMS, np.ones((2, 3, F + 1))), ValueError, r"\(B, T, 5\)"),
        (lambda: LAYERS["min_gru"].apply(PARAMS, X.astype(complex)), TypeError, "inputs must be real"),
        (lambda: LAYERS["min_gru"].apply(PARAMS, X, np.ones((2, H), complex)), TypeError, "initial_state must be real"),
        (
            lambda: LAYERS["min_gru"].apply(jax.tree.map(lambda leaf: leaf + 0j, PARAMS), X),
            TypeError,
            "params must be real",
        ),
        (lambda: LAYERS["min_gru"].step(PARAMS, None, X[0].astype(complex)), TypeError, "x must be real"),
        (lambda: LAYERS["min_gru"].step(PARAMS, np.ones((3, H), complex), X[0]), TypeError, "must be real"),
        (lambda: LAYERS["min_gru"].apply(PARAMS, X, np.ones((3, H))), ValueError, r"\(2, 4\) \(B first\)"),
        (lambda: LAYERS["min_gru"].apply(PARAMS, X, resets=np.ones((2, 3))), TypeError, "resets must be one bool"),
        (lambda: LAYERS["min_gru"].apply(PARAMS, X[0], lengths=[3]), ValueError, "are one sequence"),
        (lambda: LAYERS["min_gru"].apply({}, X), TypeError, "weight is missing"),
        (lambda: LAYERS["min_gru"].step(PARAMS, None, X[0, :, :2]), ValueError, "x must be"),
        (lambda: ANY.nnx.MinGRU(2, 3, rngs=nnx.Rngs(0), width=3), TypeError, "width"),
    ],
)
def test_errors_say_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_one_sequence_needs_no_batch_axis():
    layer = LAYERS["min_gru"]
    output, final = layer.apply(PARAMS, X[0], lengths=2, resets=np.array([False, True, False]))
    expected, finals = layer.apply(PARAMS, X[:1], lengths=[2], resets=np.array([[False, True, False]]))
    np.testing.assert_array_equal(output, expected[0])
    np.testing.assert_array_equal(final, finals[0])
    assert not output[2].any()
