"""Mamba2, GatedDeltaNet and MLSTM: decoding, episodes, directions, converters, errors. The contract tests the rest."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from matrix_oracles import matrix_step

import jaxpack

F, T = 3, 7
LAYERS: dict[str, Any] = {
    "mamba2": jaxpack.Mamba2(F, 4, head_size=2, state_size=2),
    "gated_delta_net": jaxpack.GatedDeltaNet(F, 4, 2, key_size=3, num_key_heads=1, kernel_size=3),
    "mlstm": jaxpack.MLSTM(F, 4, 2, block_size=2),
}
each_layer = pytest.mark.parametrize("kind", LAYERS)


def alone(kind, params, xs, state):
    """The outputs and the final state of one episode, by the equations."""
    ys = []
    for x in xs:
        state, y = matrix_step(kind, LAYERS[kind], params, state, x)
        ys.append(y)
    return np.reshape(ys, (len(ys), F)), state


def random_state(kind, rows, rng):
    return jax.tree.map(lambda leaf: np.abs(rng.standard_normal((*rows, *leaf.shape))), LAYERS[kind].state_like(float))


@pytest.mark.usefixtures("x64")
@each_layer
def test_step_by_step_is_the_whole(kind):
    layer, params = LAYERS[kind], oracles.random_params(LAYERS[kind])
    x = np.random.default_rng(0).standard_normal((2, T, F))
    whole, final = jax.jit(layer.apply)(params, x)
    step, state, outputs = jax.jit(layer.step), None, []
    for t in range(T):
        state, y = step(params, state, x[:, t])
        outputs.append(y)
    np.testing.assert_allclose(np.stack(outputs, 1), whole, rtol=0, atol=1e-12)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12), state, final)
    state = jax.device_get(state)
    one, y = step(params, jax.tree.map(lambda leaf: leaf[0], state), x[0, 0])
    both, ys = jax.device_get(step(params, state, x[:, 0]))
    np.testing.assert_allclose(y, ys[0], rtol=0, atol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[0], rtol=0, atol=1e-12), one, both)


@pytest.mark.usefixtures("x64")
@each_layer
def test_episodes_begin_anew_in_both_directions(kind):
    layer, params = LAYERS[kind], oracles.random_params(LAYERS[kind])
    rng = np.random.default_rng(0)
    x, initial = rng.standard_normal((2, T, F)), random_state(kind, (2,), rng)
    resets = np.zeros((2, T), bool)
    resets[0, [0, 1, 4]] = resets[1, [3, 5]] = True
    for reverse in (False, True):
        run = jax.jit(functools.partial(layer.apply, reverse=reverse))
        for plan in (jaxpack.plan_padded(2, T), jaxpack.plan_rows([T, T], 1)):
            output, final = run(
                params,
                jaxpack.pack_padded_sequence(x, [T, T], True, plan=plan),
                initial,
                resets=(jaxpack.pack_padded_sequence(resets, [T, T], True, plan=plan)),
            )
            for row, ours in enumerate(jaxpack.unpack_sequence(output)):
                pieces = np.split(x[row], np.flatnonzero(resets[row]))
                pieces = [piece[::-1] for piece in pieces] if reverse else pieces
                state = jax.tree.map(lambda leaf, row=row: leaf[row], initial)
                found = [alone(kind, params, piece, state) for piece in pieces]
                ys = [y[::-1] if reverse else y for y, _ in found]
                np.testing.assert_allclose(ours, np.concatenate(ys), rtol=0, atol=1e-12)
                last = found[0 if len(pieces[0]) else 1] if reverse else found[-1]
                jax.tree.map(
                    lambda a, b, row=row: np.testing.assert_allclose(a[row], b, rtol=0, atol=1e-12), final, last[1]
                )


@each_layer
def test_initial_parameters_have_their_shapes_and_run_in_float32(kind):
    layer = LAYERS[kind]
    params = layer.init(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == layer.shapes
    output, _ = jax.jit(layer.apply)(params, np.ones((2, 600, F), np.float32))
    assert np.isfinite(output).all()
    assert (np.abs(output) > 0).any()


EXTREME: dict[str, dict[str, tuple[float, float]]] = {
    "mamba2": {"dt_bias": (50, -50)},
    "gated_delta_net": {"dt_bias": (50, -50)},
    "mlstm": {"igate_bias": (50, -50), "fgate_bias": (50, -50)},
    "mlstm, gates apart": {"igate_bias": (50, -50), "fgate_bias": (-50, 50)},
}


@pytest.mark.parametrize("case", EXTREME)
def test_gates_at_50_are_stable_in_values_and_gradients(case):
    kind = case.split(",")[0]
    layer, drawn = LAYERS[kind], LAYERS[kind].init(jax.random.key(0))
    params = drawn | {
        name: jnp.asarray(np.resize(gates, drawn[name].shape), jnp.float32) for name, gates in EXTREME[case].items()
    }
    if kind == "gated_delta_net":
        params["b_proj"] = 50 * jnp.sign(params["b_proj"])
    x = np.random.default_rng(0).standard_normal((2, T, F)).astype(np.float32)

    @jax.jit
    def run(params, x):
        def loss(params, x):
            output, _ = layer.apply(params, x)
            return output.sum(), output

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    gradients, output = run(params, x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradients, output)))
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), layer.state_like(np.float64))
    for row, ours in enumerate(output):
        np.testing.assert_allclose(ours, alone(kind, exact, np.float64(x[row]), zeros)[0], rtol=1e-4, atol=1e-5)


CONVERTERS: dict[str, Any] = {
    "mamba2": (
        LAYERS["mamba2"].from_mamba_ssm,
        {
            "in_proj": "in_proj.weight",
            "conv_kernel": "conv1d.weight",
            "conv_bias": "conv1d.bias",
            "norm": "norm.weight",
            "out_proj": "out_proj.weight",
        },
    ),
    "gated_delta_net": (
        LAYERS["gated_delta_net"].from_fla,
        {f"{name}_proj": f"{name}_proj.weight" for name in "qkvabgo"}
        | {f"{name}_conv": f"{name}_conv1d.weight" for name in "qkv"}
        | {"o_norm": "o_norm.weight"},
    ),
    "mlstm": (
        LAYERS["mlstm"].from_xlstm,
        {f"{name}": f"{name}.weight" for name in ("proj_up", "q_proj", "k_proj", "v_proj", "proj_down")}
        | {"conv_kernel": "conv1d.conv.weight", "conv_bias": "conv1d.conv.bias", "outnorm": "mlstm_cell.outnorm.weight"}
        | {f"{name}gate": f"mlstm_cell.{name}gate.weight" for name in "if"}
        | {f"{name}gate_bias": f"mlstm_cell.{name}gate.bias" for name in "if"},
    ),
}


@each_layer
def test_the_names_of_the_reference_implementation_convert_exactly_or_are_refused(kind):
    convert, names = CONVERTERS[kind]
    params = LAYERS[kind].init(jax.random.key(1))
    state_dict = {}
    for name, value in params.items():
        array = np.asarray(value).T
        state_dict[names.get(name, name)] = array[:, None] if "conv" in name and array.ndim == 2 else array
    jax.tree.map(np.testing.assert_array_equal, convert(state_dict), params)
    some = next(iter(names.values()))
    with pytest.raises(KeyError, match=r"missing.*not known"):
        convert({("other" if key == some else key): value for key, value in state_dict.items()})
    with pytest.raises(ValueError, match="must have shape"):
        convert(state_dict | {some: state_dict[some][:-1]})
    with pytest.raises(ValueError, match="round"):
        convert(state_dict | {some: state_dict[some].astype(np.float64)})


@oracles.needs_torch
def test_headwise_projections_of_xlstm_are_pytorchs_einsum():
    layer, torch = LAYERS["mlstm"], oracles.torch
    weight, x = np.random.default_rng(0).standard_normal((2, 2, 2)), np.random.default_rng(1).standard_normal((5, 4))
    theirs = torch.einsum("...hd,hod->...ho", torch.tensor(x).reshape(5, 2, 2), torch.tensor(weight)).reshape(5, 4)
    with jax.enable_x64(True):
        np.testing.assert_allclose(layer._blocks(jnp.asarray(weight.T), jnp.asarray(x)), theirs, rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jaxpack.Mamba2(4, 9, 2), ValueError, "head_size=2 does not divide hidden_size=9"),
        (lambda: jaxpack.Mamba2(4, 8, 2, num_groups=3), ValueError, "num_groups=3 does not divide the number of heads"),
        (lambda: jaxpack.Mamba2(4, 8, 2, kernel_size=0), ValueError, "kernel_size must be at least 1"),
        (lambda: jaxpack.GatedDeltaNet(4, 9, 2), ValueError, "num_heads=2 does not divide hidden_size=9"),
        (lambda: jaxpack.GatedDeltaNet(4, 8, 4, num_key_heads=3), ValueError, "num_key_heads=3 does not divide"),
        (lambda: jaxpack.MLSTM(4, 6, 2, 4), ValueError, "block_size=4 does not divide hidden_size=6"),
        (lambda: LAYERS["mlstm"].init(7), TypeError, "key must be a JAX random key"),
        (
            lambda: LAYERS["mlstm"].step(LAYERS["mlstm"].init(jax.random.key(0)), None, np.ones(4)),
            ValueError,
            r"x must be \[B, 3\] or \[3\]",
        ),
    ],
)
def test_errors_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()
