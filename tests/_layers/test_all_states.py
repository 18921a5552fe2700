"""return_all_states: h and c after each step, of every layer and direction."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx

import jaxpack.linen
import jaxpack.nnx
from jaxpack import GRU, LSTM, BucketPlan, pack_padded_sequence, pad_packed_sequence, plan_rows

F, H, B, T = 3, 4, 3, 6
LENGTHS = [6, 0, 4]
CASES = {
    "LSTM, rows": (LSTM(F, H, bidirectional=True, proj_size=2), plan_rows(LENGTHS)),
    "LSTM, stairs": (LSTM(F, H, num_layers=2), BucketPlan((4, 6), (3, 1))),
    "LSTM, none": (LSTM(F, H, bidirectional=True), None),
    "GRU, none": (GRU(F, H, bidirectional=True, num_layers=2), None),
}
RESETS = np.random.default_rng(2).random((B, T)) < 0.4


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CASES)
def test_they_are_those_of_the_plain_loop_with_all_gradients(name):
    layer, plan = CASES[name]
    params, x = oracles.random_params(layer), oracles.random_batch(LENGTHS, F)
    rng = np.random.default_rng(1)
    count = layer.num_layers * layer.num_directions
    initial = jax.tree.map(lambda size: rng.standard_normal((count, B, size)), layer.cell.state_sizes)
    kind = type(layer).__name__.lower()
    weights = jax.tree.map(lambda size: rng.standard_normal((B, T, count, size)), layer.cell.state_sizes)

    def loss(params, x, initial, forward_mode=False):
        options: dict[str, Any] = {"lengths": LENGTHS, "plan": plan, "resets": RESETS, "return_all_states": True}
        output, final, states = layer.apply(params, x, initial, forward_mode=forward_mode, **options)
        dotted = jax.tree.map(lambda a, b: (a * b).sum(), states, weights)
        return sum(jax.tree.leaves(dotted)) + (output**2).sum() + (jax.tree.leaves(final)[-1] ** 3).sum(), states

    def run(**options):
        differentiated = jax.value_and_grad(lambda *args: loss(*args, **options), (0, 1, 2), has_aux=True)
        return jax.jit(differentiated)(params, x, initial)

    (_, states), gradients = run()
    (_, plain_states), plain_gradients = run(forward_mode=True)
    for ours, theirs in zip(
        jax.tree.leaves((states, gradients)), jax.tree.leaves((plain_states, plain_gradients)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-12)
    expected = stepped(kind, layer, params, x, jax.tree.leaves(initial))
    for ours, theirs in zip(jax.tree.leaves(states), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def stepped(kind, layer, params, x, initial):
    """The states after each step [B, T, num_layers * D, size], by NumPy, one step of one direction at a time."""
    sizes = jax.tree.leaves(layer.cell.state_sizes)
    result = [np.zeros((B, T, len(layer.shapes), size)) for size in sizes]
    for b, length in enumerate(LENGTHS):
        inputs = x[b, :length]
        for first in range(0, len(layer.shapes), layer.num_directions):
            for i in range(first, first + layer.num_directions):
                group, backward = list(layer.shapes)[i], i > first
                state = start = tuple(leaf[i, b] for leaf in initial)
                for t in reversed(range(length)) if backward else range(length):
                    border = t + 1 if backward else t
                    state = start if border < length and RESETS[b, border] else state
                    state = oracles.cell_step(kind, params[group], state, inputs[t])
                    for whole, leaf in zip(result, state, strict=True):
                        whole[b, t, i] = leaf
            inputs = result[0][b, :length, first : first + layer.num_directions].reshape(length, layer.output_size)
    return result


def test_they_have_the_layout_of_the_inputs():
    layer, plan = CASES["LSTM, rows"]
    params = layer.init(jax.random.key(0))
    x = np.random.default_rng(0).standard_normal((B, T, F)).astype(np.float32)
    packed = pack_padded_sequence(x, LENGTHS, batch_first=True, plan=plan)
    _, _, states = layer.apply(params, x, lengths=LENGTHS, plan=plan, return_all_states=True)
    _, _, as_packed = layer.apply(params, packed, return_all_states=True)
    assert isinstance(as_packed, jaxpack.PackedSequence)
    for i, name in enumerate("hc"):
        data = as_packed.replace(data=as_packed.data[i])
        padded, _ = pad_packed_sequence(data, batch_first=True, total_length=T)
        np.testing.assert_array_equal(padded, states[i], err_msg=name)
    _, _, alone = layer.apply(params, x[0], return_all_states=True)
    for ours, theirs in zip(alone, states, strict=True):
        np.testing.assert_allclose(ours, theirs[0], rtol=1e-5, atol=1e-6)
    _, _, empty = layer.apply(params, x[:0], return_all_states=True)
    assert [leaf.shape for leaf in empty] == [(0, T, 2, 2), (0, T, 2, H)]


def test_a_sequence_goes_on_from_a_stored_state():
    layer = LSTM(F, H, num_layers=2)
    params, x = layer.init(jax.random.key(0)), np.random.default_rng(0).standard_normal((B, T, F)).astype(np.float32)
    output, _, states = layer.apply(params, x, return_all_states=True)
    stored = jax.tree.map(lambda leaf: jnp.swapaxes(leaf[:, 2], 0, 1), states)
    rest, _ = layer.apply(params, x[:, 3:], stored)
    np.testing.assert_allclose(rest, output[:, 3:], rtol=1e-5, atol=1e-6)


def test_modules_of_flax_return_them():
    x = np.ones((B, T, F), np.float32)
    gru, stack = jaxpack.nnx.GRU(F, H, rngs=nnx.Rngs(0)), jaxpack.linen.GRU(H)
    output, _, states = gru(x, return_all_states=True)
    np.testing.assert_array_equal(states[:, :, 0], output)
    (output, _, states), _ = stack.init_with_output(jax.random.key(0), x, return_all_states=True)
    np.testing.assert_array_equal(states[:, :, 0], output)
