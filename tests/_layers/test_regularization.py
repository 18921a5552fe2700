"""Regularisers: against equations in NumPy that take the masks as given, under every plan, and off in evaluation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from contract_subjects import CALLS
from own_cell import LeakyRNN

import jaxpack
from jaxpack import (
    GRU,
    LSTM,
    RNN,
    IndRNN,
    Regularization,
    pack_padded_sequence,
    pad_packed_sequence,
    plan_padded,
)
from jaxpack._layers.regularization import OFF, Noise
from jaxpack._packed.dropout import Origins, draw_sequences, draw_steps, drop_weights

B, T, F, H = 3, 6, 3, 4
LENGTHS = np.array([3, 5, 2])
KEY = jax.random.key(5)
ALL = Regularization(
    input_dropout=0.3,
    output_dropout=0.4,
    recurrent_dropout=0.3,
    zoneout=(0.3, 0.2),
    weight_dropout=0.2,
)
EVERYTHING = LSTM(
    F, H, num_layers=2, dropout=0.2, bidirectional=True, regularization=dataclasses.replace(ALL, hidden_dropout=0.2)
)


@dataclasses.dataclass(frozen=True)
class OwnLayer(LeakyRNN):
    """A user's layer that takes regularisers."""

    regularization: Regularization | None = dataclasses.field(default=None, kw_only=True)


@pytest.fixture(autouse=True)
def _in_float64():
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        yield


def random_x():
    """A padded batch with NaN past each length."""
    return np.concatenate([oracles.random_batch(LENGTHS, F), np.full((B, T - max(LENGTHS), F), np.nan)], 1)


def drawn(noise, stream, index, rate, width, locked=True):
    """The mask of a stream, by which features are multiplied: [B, 1, width], or [B, T, width]."""
    draw = draw_sequences if locked else draw_steps
    dropped = jax.jit(draw, static_argnums=(1, 3))(noise.key_of(stream, index), rate, noise.origins, (width,))
    return np.asarray(dropped).reshape(B, -1, width)


def scale(dropped, rate):
    return np.where(dropped, 0, 1 / (1 - rate))


def gated_step(kind, params, seen, state, x):
    """A step whose gates see another h than that of the state, which passes them by."""
    if kind == "lstm":
        return oracles.cell_step(kind, params, (seen, state[1]), x)
    if kind == "leaky":
        (h,) = oracles.cell_step(kind, params, (seen,), x)
        return (h + 0.5 * (state[0] - seen),)
    get = {name: np.asarray(value) for name, value in params.items()}
    rx, zx, nx = np.split(x @ get["weight_ih"] + get["bias_ih"], 3)
    rh, zh, nh = np.split(seen @ get["weight_hh"] + get["bias_hh"], 3)
    r, z = 1 / (1 + np.exp(-rx - rh)), 1 / (1 + np.exp(-zx - zh))
    return ((1 - z) * np.tanh(nx + r * nh) + z * state[0],)


def by_equations(kind, layer, params, x, resets=None, training=True):
    """Each sequence alone, step by step: outputs [B, T, D*H], zero past each length, and the final states."""
    rates, directions = layer.regularization, layer.num_directions
    noise = Noise(OFF, 0.0, KEY, Origins.of_batch(B, T))
    sizes = jax.tree.leaves(layer.cell.state_sizes)
    groups, finals = list(params), [np.zeros((len(params), B, size)) for size in sizes]
    data = np.nan_to_num(x)
    if training and rates.input_dropout:
        data = data * scale(drawn(noise, "input_dropout", 0, rates.input_dropout, F), rates.input_dropout)
    for first in range(0, len(groups), directions):
        if first and training and layer.dropout:
            data = data * scale(
                drawn(noise, "dropout", first, layer.dropout, data.shape[-1], locked=False), layer.dropout
            )
        if first and training and rates.hidden_dropout:
            rate = rates.hidden_dropout
            data = data * scale(drawn(noise, "hidden_dropout", first, rate, data.shape[-1]), rate)
        outputs = np.zeros((B, T, directions, sizes[0]))
        for d in range(directions):
            index, weights = first + d, dict(params[groups[first + d]])
            if training and rates.weight_dropout:
                weights["weight_hh"] = drop_weights(
                    noise.key_of("weight_dropout", index), weights["weight_hh"], rates.weight_dropout
                )
            recurrent = np.ones((B, 1, sizes[0]))
            if training and rates.recurrent_dropout:
                rate = rates.recurrent_dropout
                recurrent = scale(drawn(noise, "recurrent_dropout", index, rate, sizes[0]), rate)
            zoneout = rates.zoneout_of(layer.cell) or (0.0,) * len(sizes)
            kept = [
                drawn(noise, f"zoneout of {part}", index, rate, size, locked=False) if training and rate else rate
                for part, rate, size in zip("hc", zoneout, sizes, strict=False)
            ]
            for b, length in enumerate(LENGTHS):
                state = tuple(np.zeros(size) for size in sizes)
                for k, t in enumerate(range(length)[::-1] if d else range(length)):
                    if resets is not None and (resets[b, t + 1 : t + 2].any() if d else resets[b, t]):
                        state = tuple(np.zeros(size) for size in sizes)
                    after = gated_step(kind, weights, state[0] * recurrent[b, 0], state, data[b, t])
                    share = [each[b, k] if isinstance(each, np.ndarray) else each for each in kept]
                    state = tuple(p * old + (1 - p) * new for p, old, new in zip(share, state, after, strict=True))
                    outputs[b, t, d] = state[0]
                for leaf, value in zip(finals, state, strict=True):
                    leaf[index, b] = value
        data = outputs.reshape(B, T, -1)
    if training and rates.output_dropout:
        data = data * scale(
            drawn(noise, "output_dropout", 0, rates.output_dropout, data.shape[-1]), rates.output_dropout
        )
    return data, tuple(finals) if len(finals) > 1 else finals[0]


def run(layer, params, x, call="padded", resets=None, **options):
    """A layer's padded output and final state, for one of the calls of the contract."""
    call = CALLS[call]
    if not call.packed:
        return layer.apply(params, x, lengths=LENGTHS, plan=call.plan, resets=resets, **options)
    packed = pack_padded_sequence(x, LENGTHS, batch_first=True, plan=call.plan)
    packed = packed.replace(data=jnp.where(packed.mask[:, None], packed.data, jnp.nan))
    output, final = layer.apply(params, packed, **options)
    return pad_packed_sequence(output, batch_first=True, total_length=T)[0], final


@functools.cache
def trained(call):
    """The outputs and gradients of a layer with everything on, as NumPy arrays."""
    params = oracles.random_params(EVERYTHING)

    @jax.jit
    def results(params, x, key):
        def loss(params, x):
            output, final = run(EVERYTHING, params, x, call, dropout_key=key)
            return sum(jnp.sin(leaf).sum() for leaf in (output, *final)), (output, final)

        gradients, (output, final) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return output, final, gradients

    return jax.device_get(results(params, random_x(), KEY))


def assert_close(ours, theirs):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), ours, theirs)


def test_everything_on_is_the_papers_equations():
    output, final, _ = trained("padded")
    assert_close((output, final), by_equations("lstm", EVERYTHING, oracles.random_params(EVERYTHING), random_x()))


@pytest.mark.parametrize("call", ["rows", "none"])
def test_plans_do_not_matter_to_outputs_and_gradients(call):
    assert_close(trained(call), trained("padded"))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained(call)))


@pytest.mark.parametrize(
    ("kind", "make", "training"), [("gru", GRU, True), ("gru", GRU, False), ("leaky", OwnLayer, True)]
)
def test_h_is_dropped_before_gates_alone_and_resets_keep_the_mask(kind, make, training):
    layer = make(F, H, bidirectional=True, regularization=Regularization(recurrent_dropout=0.5, zoneout=0.3))
    params, x = oracles.random_params(layer), random_x()
    resets = np.zeros((B, T), bool)
    resets[0, 1] = resets[1, 3] = True
    options = {"dropout_key": KEY} if training else {"deterministic": True}
    ours = jax.jit(lambda params, x: run(layer, params, x, resets=resets, **options))(params, x)
    assert_close(jax.device_get(ours), by_equations(kind, layer, params, x, resets, training))


@pytest.mark.parametrize("layer", [RNN(F, H, bidirectional=True), IndRNN(F, H)])
def test_weight_dropout_drops_recurrent_weights_once_a_call_and_keeps_the_fast_derivative(layer):
    dropped = dataclasses.replace(layer, regularization=Regularization(weight_dropout=0.5))
    params, x = oracles.random_params(layer), jnp.nan_to_num(random_x())
    noise = Noise(OFF, 0.0, KEY, Origins.of_batch(B, T))
    masked = {
        group: entries | {"weight_hh": drop_weights(noise.key_of("weight_dropout", i), entries["weight_hh"], 0.5)}
        for i, (group, entries) in enumerate(params.items())
    }
    zeros = [np.asarray(entries["weight_hh"] == 0) for entries in masked.values()]
    for name, zero in zip(params, zeros, strict=True):
        np.testing.assert_array_equal(masked[name]["weight_hh"], np.where(zero, 0, 2 * params[name]["weight_hh"]))
    assert all(each.any() and not each.all() for each in zeros)
    assert len({each.tobytes() for each in zeros}) == len(zeros)  # a mask of its own for each direction
    (ours, _), (theirs, _) = run(dropped, params, x, dropout_key=KEY), run(layer, masked, x)
    np.testing.assert_array_equal(ours, theirs)
    assert "custom_vjp_call" in str(jax.make_jaxpr(lambda x: run(dropped, params, x, dropout_key=KEY))(x))


def test_evaluation_drops_nothing():
    layer = LSTM(F, H, regularization=dataclasses.replace(ALL, zoneout=0.0))
    plain = LSTM(F, H)
    params, x = oracles.random_params(layer), random_x()
    results = (run(each, params, x, deterministic=True) for each in (layer, plain))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_a_regulariser_does_not_change_the_masks_of_another():
    output, _, _ = trained("padded")
    alone = LSTM(F, H, bidirectional=True, regularization=Regularization(output_dropout=ALL.output_dropout))
    other, _ = run(alone, oracles.random_params(alone), random_x(), dropout_key=KEY)
    real = (np.arange(T) < LENGTHS[:, None])[..., None]
    assert (((other == 0) & real).any(), (output == 0)[other == 0].all()) == (True, True)
    assert ((output == 0) & (other != 0)).mean() < 0.1  # where zoneout has kept the initial state
    streams = [(stream, index) for stream in ("dropout", "hidden_dropout", "recurrent_dropout") for index in range(4)]
    noise = Noise(OFF, 0.0, KEY, Origins.of_batch(B, T))
    assert len({jax.random.bits(noise.key_of(*each)).item() for each in streams}) == len(streams)


def test_states_after_each_step_are_not_dropped_with_the_output():
    layer = RNN(F, H, regularization=Regularization(output_dropout=0.5, zoneout=0.5))
    output, h_n, states = layer.apply(
        oracles.random_params(layer), random_x(), lengths=LENGTHS, dropout_key=KEY, return_all_states=True
    )
    real = (np.arange(T) < LENGTHS[:, None])[..., None]
    assert ((states[:, :, 0] != 0) == real).any(-1).all()
    np.testing.assert_allclose(output[output != 0], 2 * states[:, :, 0][output != 0])
    np.testing.assert_array_equal(states[np.arange(B), LENGTHS - 1, 0], h_n[0])
    np.testing.assert_array_equal(layer.final_output(h_n), h_n[0])


def test_misfits_stay_nan_where_the_output_is_dropped():
    layer = RNN(F, H, regularization=Regularization(output_dropout=0.5, recurrent_dropout=1.0, zoneout=1.0))
    run = jax.jit(lambda x, n: layer.apply(oracles.random_params(layer), x, dropout_key=KEY, lengths=n)[0])
    output = run(np.nan_to_num(random_x()), jnp.array([3, T + 1, 2]))
    np.testing.assert_array_equal(np.isnan(output).all((1, 2)), [False, True, False])
    np.testing.assert_array_equal(np.isnan(output).any((1, 2)), [False, True, False])


@pytest.mark.parametrize("params_dtype", [jnp.float32, jnp.bfloat16])
def test_masks_promote_no_dtype(params_dtype):
    layer = LSTM(F, H, regularization=ALL)

    def apply(params, x):
        return layer.apply(params, x, dropout_key=KEY, dtype=jnp.bfloat16)

    params = layer.init(KEY, params_dtype)
    output, final = jax.eval_shape(apply, params, jnp.ones((B, T, F), jnp.bfloat16))
    assert output.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in final} == {jnp.dtype(params_dtype)}
    gradient = jax.eval_shape(jax.grad(lambda *args: apply(*args)[0].astype(float).sum()), params, jnp.ones((B, T, F)))
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(params_dtype)}


def test_transformations_compose():
    layer = RNN(F, H, regularization=Regularization(recurrent_dropout=0.3, zoneout=0.2, output_dropout=0.2))
    params, x = oracles.random_params(layer), jnp.nan_to_num(random_x()).repeat(2, 0)
    plan, lengths, keys = plan_padded(B, T), jnp.array([*LENGTHS, *LENGTHS[::-1]]), jax.random.split(KEY, 2)

    def gradient(params, x, lengths, key):
        def loss(params):
            return jnp.sin(layer.apply(params, x, None, key, lengths=lengths, plan=plan)[0]).sum()

        return jax.tree.map(lambda leaf: jnp.expand_dims(leaf, 0), jax.grad(loss)(params))

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data, whole = jax.P("data"), jax.P()
    varying = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)

    def on_device(params, x, lengths, keys):
        params = jax.tree.map(lambda leaf: leaf[0], params)
        return jax.vmap(gradient, (None, None, None, 0), 1)(params, x, lengths, keys)

    spread = jax.shard_map(on_device, mesh=mesh, in_specs=(data, data, data, whole), out_specs=data)
    found = jax.jit(spread)(varying, x, lengths, keys)
    one = jax.jit(gradient)
    for i, half in enumerate((slice(0, B), slice(B, None))):
        for j, key in enumerate(keys):
            expected = one(params, x[half], lengths[half], key)
            assert_close(
                jax.tree.map(lambda leaf, i=i, j=j: leaf[i, j], found), jax.tree.map(lambda leaf: leaf[0], expected)
            )


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Regularization)])
@pytest.mark.parametrize("rate", [-0.1, 1.5, "a", True, float("nan")])
def test_a_rate_outside_0_to_1_is_named(name, rate):
    with pytest.raises(ValueError, match=rf"^{name} must be a number in \[0, 1\].*got"):
        Regularization(**{name: rate})


def test_zoneout_is_a_number_or_a_pair_and_its_memory_exists():
    assert Regularization(zoneout=[0.1, 0.2]).zoneout == (0.1, 0.2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"zoneout\[1\] must be a number in \[0, 1\].*got 2"):
        Regularization(zoneout=(0.1, 2))
    with pytest.raises(ValueError, match=r"zoneout must be a number in \[0, 1\], or a pair .*got \(0.1,\)"):
        Regularization(zoneout=(0.1,))  # type: ignore[arg-type]
    GRU(F, H, regularization=Regularization(zoneout=(0.1, 0.0)))
    with pytest.raises(ValueError, match=r"zoneout=\(0.1, 0.2\) is for h and a memory c, which the cell does not have"):
        GRU(F, H, regularization=Regularization(zoneout=(0.1, 0.2)))


def test_training_needs_a_key_and_the_error_names_what_is_on():
    layer = LSTM(F, H, 2, dropout=0.5, regularization=Regularization(zoneout=0.1))
    with pytest.raises(ValueError, match=r"^dropout=0.5, zoneout=0.1 are on, .*dropout_key=.*deterministic=True"):
        layer.apply(oracles.random_params(layer), random_x())
    nothing = LSTM(F, H, regularization=Regularization())
    assert not nothing.has_dropout
    nothing.apply(oracles.random_params(nothing), random_x(), lengths=LENGTHS)


def test_what_does_nothing_warns_and_what_is_not_one_is_refused():
    with pytest.warns(UserWarning, match="hidden_dropout acts between layers, so hidden_dropout=0.5") as caught:
        layer = GRU(F, H, regularization=Regularization(hidden_dropout=0.5))
    assert [warning.filename for warning in caught] == [__file__]
    assert not layer.has_dropout
    with pytest.raises(TypeError, match=r"regularization must be a jaxpack.Regularization, got 0.5"):
        GRU(F, H, regularization=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no learned initial state or regularization"):
        jaxpack.TimeDecay(GRU(F, H, regularization=Regularization(zoneout=0.1)))
