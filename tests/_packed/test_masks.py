"""compact and scatter_back: valid steps of padded batches first, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpack
from jaxpack import compact, losses, scatter_back

MASKS = [np.random.default_rng(seed).random((4, 7)) < 0.2 * seed for seed in range(6)]  # from no step to all of them
X = np.random.default_rng(0).standard_normal((4, 7, 3)).astype(np.float32)
each_mask = pytest.mark.parametrize("mask", MASKS)


@each_mask
def test_rows_hold_their_valid_steps_and_then_zeros(mask):
    dirty = np.where(mask[..., None], X, np.nan)
    for run in (compact, jax.jit(compact)):
        (batch, steps), lengths = run((dirty, np.arange(28).reshape(4, 7)), mask)
        assert lengths.dtype == np.int32
        assert lengths.tolist() == mask.sum(1).tolist()
        for row, valid in enumerate(mask):
            count = valid.sum()
            np.testing.assert_array_equal(batch[row, :count], X[row, valid])
            np.testing.assert_array_equal(steps[row, :count], 7 * row + np.flatnonzero(valid))
            assert not batch[row, count:].any()
            assert not steps[row, count:].any()


@each_mask
def test_each_function_is_the_inverse_and_the_transpose_of_the_other(mask):
    np.testing.assert_array_equal(scatter_back(compact(X, mask)[0], mask), np.where(mask[..., None], X, 0))
    cotangent = np.cos(X)
    _, pull_compact = jax.vjp(lambda x: compact(x, mask)[0], X)
    _, pull_scatter = jax.vjp(lambda x: scatter_back(x, mask), X)
    np.testing.assert_array_equal(pull_compact(cotangent)[0], scatter_back(cotangent, mask))
    np.testing.assert_array_equal(pull_scatter(cotangent)[0], compact(cotangent, mask)[0])
    _, tangents = jax.jvp(lambda x: compact(x, mask)[0], (X,), (cotangent,))
    np.testing.assert_array_equal(tangents, compact(cotangent, mask)[0])


@pytest.mark.parametrize("shape", [(0, 7), (4, 0)])
def test_batches_of_no_rows_or_steps_stay_empty(shape):
    batch, lengths = compact(np.ones((*shape, 3)), np.ones(shape, bool))
    assert batch.shape == (*shape, 3)
    assert lengths.tolist() == [0] * shape[0]
    assert scatter_back(batch, np.ones(shape, bool)).shape == (*shape, 3)


def test_neither_they_nor_their_derivatives_are_scatters():
    """A CPU runs a scatter row by row."""

    def loss(x, mask):
        batch, _ = compact(x, mask)
        return (scatter_back(batch**2, mask) ** 2).sum()

    program = jax.jit(jax.grad(loss)).lower(X, MASKS[3]).as_text()
    assert program.count("stablehlo.gather") >= 4
    assert "stablehlo.scatter" not in program


@each_mask
def test_pooling_and_losses_of_a_batch_packed_by_a_mask_count_its_valid_steps(mask):
    labels = np.arange(28).reshape(4, 7) % 3
    plan = jaxpack.plan_padded(4, 7)

    @jax.jit
    def run(x, labels, mask):
        (logits, targets), lengths = compact((x, labels), mask)
        packed = jaxpack.pack_padded_sequence((logits, targets), lengths, batch_first=True, plan=plan)
        logits, targets = (packed.replace(data=leaf) for leaf in packed.data)
        return jaxpack.segment_mean(logits), losses.token_cross_entropy(logits, targets).total

    means, total = run(np.where(mask[..., None], X, np.nan), labels, mask)
    expected = [X[row, valid].mean(0) if valid.any() else np.zeros(3) for row, valid in enumerate(mask)]
    np.testing.assert_allclose(means, expected, rtol=1e-5, atol=1e-6)
    logs = X - np.log(np.exp(X.astype(float)).sum(-1, keepdims=True))
    picked = np.take_along_axis(logs, labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(total, -picked[mask].sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [compact, scatter_back])
def test_bad_masks_are_errors(function):
    with pytest.raises(ValueError, match=r"mask must have a value for each step .* \[4, 7\], got \[4, 6\]"):
        function(X, MASKS[1][:, 1:])
    with pytest.raises(TypeError, match="mask must be one bool a step, True at valid steps, got dtype float32"):
        function(X, jnp.ones((4, 7)))
    with pytest.raises(ValueError, match="must have a batch and a time axis"):
        function(np.ones(4), MASKS[1])
