import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import jaxpack
from jaxpack import (
    GRU,
    LSTM,
    MGU,
    RNN,
    IndRNN,
    LayerNormGRU,
    LayerNormLSTM,
    PeepholeLSTM,
    gru_cell,
    ind_rnn_cell,
    layer_norm_gru_cell,
    layer_norm_lstm_cell,
    lstm_cell,
    mgu_cell,
    peephole_lstm_cell,
    rnn_cell,
)

F, H, P, T = 3, 4, 2, 5
relu_cell = functools.partial(rnn_cell, nonlinearity="relu")
CELLS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "tanh": (rnn_cell, RNN(F, H), (H,)),
    "relu": (relu_cell, RNN(F, H, nonlinearity="relu"), (H,)),
    "lstm": (lstm_cell, LSTM(F, H), (H, H)),
    "projected lstm": (lstm_cell, LSTM(F, H, proj_size=P), (P, H)),
    "lstm without bias": (lstm_cell, LSTM(F, H, bias=False), (H, H)),
    "gru": (gru_cell, GRU(F, H), (H,)),
    "gru without bias": (gru_cell, GRU(F, H, bias=False), (H,)),
    "gru before": (functools.partial(gru_cell, reset_after=False), GRU(F, H, reset_after=False), (H,)),
    "mgu": (mgu_cell, MGU(F, H), (H,)),
    "mgu after": (functools.partial(mgu_cell, reset="after"), MGU(F, H, reset="after"), (H,)),
    "mgu none": (functools.partial(mgu_cell, reset=None), MGU(F, H, reset=None, bias=False), (H,)),
    "ind_rnn": (ind_rnn_cell, IndRNN(F, H, bias=False), (H,)),
    "ind_rnn tanh": (functools.partial(ind_rnn_cell, nonlinearity="tanh"), IndRNN(F, H, nonlinearity="tanh"), (H,)),
    "peephole": (peephole_lstm_cell, PeepholeLSTM(F, H), (H, H)),
    "layer_norm_lstm": (layer_norm_lstm_cell, LayerNormLSTM(F, H), (H, H)),
    "layer_norm_lstm without bias": (layer_norm_lstm_cell, LayerNormLSTM(F, H, bias=False), (H, H)),
    "layer_norm_gru": (layer_norm_gru_cell, LayerNormGRU(F, H), (H,)),
    "layer_norm_gru without bias": (layer_norm_gru_cell, LayerNormGRU(F, H, bias=False), (H,)),
}
each_cell = pytest.mark.parametrize("name", CELLS)


@each_cell
@pytest.mark.usefixtures("x64")
def test_step_by_step_equals_the_layer_and_numpy(name):
    cell, layer, sizes = CELLS[name]
    params = oracles.random_params(layer)
    rng = np.random.default_rng(0)
    sequence = rng.standard_normal((T, F))
    state = tuple(rng.standard_normal(size) for size in sizes)
    kind = name.removesuffix(" without bias").removeprefix("projected ")
    carry, reference = state if len(sizes) == 2 else state[0], state
    outputs = []
    for x in sequence:
        carry, y = cell(params["l0"], carry, x)
        reference = oracles.cell_step(kind, params["l0"], reference, x)
        outputs.append(y)
        np.testing.assert_allclose(y, reference[0], atol=1e-14)
    initial = tuple(s[None] for s in state) if len(sizes) == 2 else state[0][None]
    expected, final = layer.apply(params, sequence, initial)
    np.testing.assert_allclose(outputs, expected, atol=1e-14)
    jax.tree.map(lambda ours, layers: np.testing.assert_allclose(ours, layers[0], atol=1e-14), carry, final)


@each_cell
@pytest.mark.usefixtures("x64")
def test_cells_say_whether_gates_may_see_another_h(name):
    cell, rng = CELLS[name][1].cell, np.random.default_rng(0)
    fused = cell.fuse(oracles.random_params(CELLS[name][1])["l0"])
    seen, *carry = (rng.standard_normal((2, size)) for size in (cell.output_size, *CELLS[name][2]))
    projected = cell.project(fused, rng.standard_normal((2, F)))

    def activate(seen, carry):
        return cell.activate_from(fused, projected, (seen, *carry[1:]))

    after, pull_back = jax.vjp(
        lambda seen, carry: cell.advance(fused, activate(seen, carry), carry), seen, tuple(carry)
    )
    cotangents = tuple(rng.standard_normal(leaf.shape) for leaf in after)
    dseen, (dh, *dmemory) = pull_back(cotangents)
    at = cell.linearize(fused, activate(seen, carry), carry, after)
    transposed = jax.tree.map(lambda weights: weights.T, fused)
    through = at._replace(dh_dh=jnp.zeros_like(at.dh_dh))
    _, ours = cell.step_back(transposed, through, cotangents[0], [*cotangents, None][1])
    pairs = zip((*ours, at.dh_dh * cotangents[0]), (dseen, *dmemory, dh), strict=True)
    assert cell.gates_apart == all(np.allclose(a, b, atol=1e-12) for a, b in pairs)


@each_cell
def test_a_cell_is_a_step_for_packed_scan(name):
    cell, layer, sizes = CELLS[name]
    params = layer.init(jax.random.key(0))
    packed = jaxpack.pack_sequence([jnp.ones((2, F)), jnp.ones((3, F))])
    carry = tuple(jnp.zeros((2, size)) for size in sizes)
    final, output = jaxpack.packed_scan(
        functools.partial(cell, params["l0"]), carry if len(sizes) == 2 else carry[0], packed
    )
    expected, state = layer.apply(params, packed)
    np.testing.assert_allclose(output.data, expected.data, atol=1e-6)
    jax.tree.map(lambda ours, layers: np.testing.assert_allclose(ours, layers[0], atol=1e-6), final, state)


def test_batch_axes_are_free():
    params = LSTM(F, H).init(jax.random.key(0))["l0"]
    (h, c), y = lstm_cell(params, (jnp.zeros((2, 3, H)), jnp.zeros((2, 3, H))), jnp.ones((2, 3, F)))
    assert h.shape == c.shape == y.shape == (2, 3, H)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: lstm_cell(p, (jnp.zeros(H),) * 2, jnp.ones(F + 1)), ValueError, r"x must have 3 features.*\(4,\)"),
        (
            lambda p: lstm_cell(p, (jnp.zeros(H), jnp.zeros(H + 1)), jnp.ones(F)),
            ValueError,
            r"size 4, got shape \(5,\)",
        ),
        (
            lambda p: lstm_cell(p, (jnp.zeros((5, H)),) * 2, jnp.ones((2, F))),
            ValueError,
            r"batch axes must be those of x, \(2, 3\), got shape \(5, 4\)",
        ),
        (lambda p: lstm_cell(p, jnp.zeros(H), jnp.ones(F)), TypeError, r"carry must be a pair \(h, c\)"),  # type: ignore[arg-type]
        (lambda p: rnn_cell(p, (jnp.zeros(H),) * 2, jnp.ones(F)), TypeError, "carry must be an array h"),  # type: ignore[arg-type]
        (lambda p: rnn_cell(p, jnp.zeros(H), jnp.ones(F), "sin"), ValueError, "nonlinearity must be .* got 'sin'"),
        (lambda p: ind_rnn_cell(p, jnp.zeros(H), jnp.ones(F), "sin"), ValueError, "nonlinearity must be .* got 'sin'"),
        (lambda p: mgu_cell(p, jnp.zeros(H), jnp.ones(F), reset="x"), ValueError, "reset must be .* got 'x'"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(LSTM(F, H).init(jax.random.key(0))["l0"])


def one_step(name):
    """A function of x, and x [2, F]."""
    cell, layer, sizes = CELLS[name]
    params = layer.init(jax.random.key(0))["l0"]
    carry = tuple(jnp.ones((2, size)) for size in sizes)
    return lambda x: cell(params, carry if len(sizes) == 2 else carry[0], x), jnp.ones((2, F))


@each_cell
def test_a_step_lowers_for_every_platform(name):
    step, x = one_step(name)
    exported = jax.export.export(jax.jit(step), platforms=oracles.PLATFORMS)(x)
    assert exported.platforms == oracles.PLATFORMS
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), exported.call(x), jax.jit(step)(x))


@each_cell
def test_a_step_is_differentiable_in_both_modes(name):
    step, x = one_step(name)
    tangent = jnp.cos(jnp.arange(x.size)).reshape(x.shape)
    _, directional = jax.jit(lambda x: jax.jvp(lambda x: jnp.sin(step(x)[1]).sum(), (x,), (tangent,)))(x)
    gradient = jax.jit(jax.grad(lambda x: jnp.sin(step(x)[1]).sum()))(x)
    np.testing.assert_allclose(directional, (gradient * tangent).sum(), rtol=1e-4, atol=1e-6)


@each_cell
def test_a_step_promotes_no_ranks(name):
    step, x = one_step(name)
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(step, x)
