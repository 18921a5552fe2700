"""The final output of a layer: what both directions have made of each whole sequence."""

import functools
import re

import jax
import numpy as np
import oracles
import pytest
from flax import nnx

import jaxpack.linen
import jaxpack.nnx
from jaxpack import GRU, LSTM, RNN, BucketPlan, plan_padded, plan_rows

F, H = 3, 4
KINDS = ("tanh", "relu", "lstm", "projected", "gru")


def make_layer(kind, bidirectional):
    options = {"num_layers": 2, "bidirectional": bidirectional}
    if kind in ("tanh", "relu"):
        return RNN(F, H, nonlinearity=kind, **options)
    return GRU(F, H, **options) if kind == "gru" else LSTM(F, H, proj_size=2 * (kind == "projected"), **options)


@oracles.needs_torch
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_final_output_is_the_last_layers_h_n_of_torch_side_by_side(kind, bidirectional):
    layer = make_layer(kind, bidirectional)
    module = oracles.torch_layer(layer).double()
    params = layer.from_torch(module.state_dict())
    batch, lengths = oracles.random_batch([2, 4], F), [2, 4]
    theirs = []
    for row, length in zip(batch, lengths, strict=True):
        final = module(oracles.torch.tensor(row[:length]))[1]
        h_n = (final[0] if isinstance(layer, LSTM) else final).detach().numpy()
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


FINAL_ONLY = {
    "none": (GRU(F, H, num_layers=2, bidirectional=True), None),
    "rows": (LSTM(F, H, proj_size=2, bidirectional=True), plan_rows([2, 4, 0])),
    "stairs": (GRU(F, H), BucketPlan((1, 4), (3, 2))),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("layer", "plan"), FINAL_ONLY.values(), ids=FINAL_ONLY)
def test_without_sequences_the_output_is_the_final_output_with_its_derivatives(layer, plan):
    params, lengths = layer.init(jax.random.key(0)), np.array([2, 4, 0])
    batch, resets = oracles.random_batch([4, 4, 4], F), np.zeros((3, 4), bool)
    resets[1, 2] = True

    def full(params):
        state = layer.apply(params, batch, lengths=lengths, plan=plan, resets=resets)[1]
        return layer.final_output(state), state

    def final(params, **options):
        return layer.apply(params, batch, lengths=lengths, plan=plan, resets=resets, return_sequences=False, **options)

    def assert_equal(ours, theirs):
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-12), ours, theirs)

    weights = jax.tree.map(lambda leaf: np.random.default_rng(0).normal(size=leaf.shape), jax.eval_shape(full, params))
    expected, pull_back = jax.vjp(jax.jit(full), params)
    assert_equal(final(params), expected)
    ours, our_pull_back = jax.vjp(jax.jit(final), params)
    assert_equal(ours, expected)
    assert_equal(our_pull_back(weights), pull_back(weights))
    if plan is not None:
        assert_equal(final(params, forward_mode=True), expected)


def test_without_sequences_the_outputs_take_no_memory_and_masks_compact():
    layer = LSTM(F, 64)
    params, batch = layer.init(jax.random.key(0)), np.ones((2, 2048, F), np.float32)

    def bytes_of(**options):
        apply = jax.jit(lambda params, batch: layer.apply(params, batch, plan=plan_padded(2, 2048), **options)[1])
        return apply.lower(params, batch).compile().memory_analysis().temp_size_in_bytes  # type: ignore[union-attr]

    assert bytes_of() - bytes_of(return_sequences=False) >= batch.size // F * 64 * 4
    mask = np.array([[False, True, True], [True, False, False]])
    expected = layer.apply(params, batch[:, :2], lengths=[2, 1], return_sequences=False)
    masked = layer.apply(params, batch[:, :3], mask=mask, return_sequences=False)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), masked, expected)
    one = layer.apply(params, batch[0, :2], return_sequences=False)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs[..., 0, :], atol=1e-6), one, expected)


def test_states_of_steps_need_sequences():
    layer = GRU(F, H)
    with pytest.raises(ValueError, match="leave return_sequences at True"):
        layer.apply(layer.init(jax.random.key(0)), np.ones((2, F)), return_all_states=True, return_sequences=False)
