"""causal_conv: NumPy's and PyTorch's convolution of each sequence alone, under every plan; carries; errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from strategies import FIXED_PLANS

import jaxpack
from jaxpack import BucketPlan

F, G = 3, 2
PLANS = FIXED_PLANS | {"stairs of rows": BucketPlan((4, 9), (3, 1), ((0, 7), (0, 2), (0,)))}
LENGTHS = [(7, 1, 3, 0, 1), (1, 0, 2, 2, 4)]
KERNELS = {"depthwise": ((3, F), 1), "dilated": ((3, F), 2), "full": ((2, F, G), 1), "one entry": ((1, F), 1)}

pytestmark = pytest.mark.usefixtures("x64")


def alone(x, kernel, carry, dilation):
    """The output for one sequence [L, F] in NumPy, and its carry: the definition, step by step."""
    reach = (len(kernel) - 1) * dilation
    x = np.concatenate([carry, x])
    terms = [[x[t + j * dilation] for j in range(len(kernel))] for t in range(len(x) - reach)]
    form = "tjf,jf->tf" if kernel.ndim == 2 else "tjf,jfg->tg"
    output = np.einsum(form, np.reshape(terms, (len(terms), len(kernel), x.shape[1])), kernel)
    return output, x[len(x) - reach :]


def inputs(kind, lengths):
    """Sequences, a kernel, a carry and the dilation."""
    shape, dilation = KERNELS[kind]
    rng = np.random.default_rng(sum(lengths))
    sequences = [rng.standard_normal((length, F)) for length in lengths]
    carry = rng.standard_normal((len(lengths), (shape[0] - 1) * dilation, F))
    return sequences, rng.standard_normal(shape), carry, dilation


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("plan", PLANS)
def test_values_are_those_of_each_sequence_alone(plan, kind):
    run = jax.jit(functools.partial(jaxpack.causal_conv, dilation=KERNELS[kind][1]))
    for lengths in LENGTHS:
        sequences, kernel, carry, dilation = inputs(kind, lengths)
        packed = jaxpack.pack_sequence(sequences, plan=PLANS[plan])
        for before in (None, carry):
            expected = [
                alone(x, kernel, c, dilation)
                for x, c in zip(sequences, 0 * carry if before is None else before, strict=True)
            ]
            output, after = run(packed, kernel, before)
            for ours, (theirs, _) in zip(jaxpack.unpack_sequence(output), expected, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13)
            np.testing.assert_allclose(after, np.stack([last for _, last in expected]), rtol=0, atol=0)


@oracles.needs_torch
@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("plan", ["stairs", "rows"])
def test_gradients_are_pytorchs(plan, kind):
    torch = oracles.torch
    sequences, kernel, carry, dilation = inputs(kind, LENGTHS[0])
    packed = jaxpack.pack_sequence(sequences, plan=PLANS[plan])

    def loss(data, kernel, carry):
        output, after = jaxpack.causal_conv(packed.replace(data=data), kernel, carry, dilation=dilation)
        return jnp.sin(output.data).sum() + jnp.cos(after).sum()

    ours = jax.jit(jax.grad(loss, (0, 1, 2)))(packed.data, kernel, carry)
    xs, k, cs = [[torch.tensor(x, requires_grad=True) for x in group] for group in (sequences, [kernel], carry)]
    weight = k[0].T[:, None] if kernel.ndim == 2 else k[0].permute(2, 1, 0)
    total = torch.zeros(())
    for x, c in zip(xs, cs, strict=True):
        joined = torch.cat([c, x])
        total = total + joined[len(x) :].cos().sum()
        if len(x):
            groups = F if kernel.ndim == 2 else 1
            total = total + torch.conv1d(joined.T[None], weight, groups=groups, dilation=dilation).sin().sum()
    total.backward()
    theirs = jaxpack.pack_sequence(
        [np.zeros((0, F)) if x.grad is None else x.grad.numpy() for x in xs], plan=PLANS[plan]
    )
    np.testing.assert_allclose(ours[0], theirs.data, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours[1], k[0].grad, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours[2], np.stack([c.grad for c in cs]), rtol=0, atol=1e-12)


def test_padded_inputs_are_laid_out_as_they_came():
    lengths = (4, 0, 2)
    batch = oracles.random_batch(lengths, F, extra=1)
    kernel = np.random.default_rng(0).standard_normal((3, F))
    output, carry = jax.jit(lambda x, n: jaxpack.causal_conv(x, kernel, lengths=n))(batch, jnp.array(lengths))
    assert output.shape == batch.shape
    for row, length in enumerate(lengths):
        expected, last = alone(batch[row, :length], kernel, np.zeros((2, F)), 1)
        np.testing.assert_allclose(output[row, :length], expected, rtol=0, atol=1e-13)
        np.testing.assert_array_equal(output[row, length:], 0)
        np.testing.assert_array_equal(carry[row], last)


def test_step_by_step_is_the_whole():
    sequences, kernel, _, dilation = inputs("dilated", (7, 7, 7))
    whole, last = jaxpack.causal_conv(np.stack(sequences), kernel, dilation=dilation)
    step = jax.jit(functools.partial(jaxpack.causal_conv, dilation=dilation))
    carry, outputs = jnp.zeros((3, 4, F)), []
    for t in range(7):
        output, carry = step(np.stack(sequences)[:, t : t + 1], kernel, carry)
        outputs.append(output)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), whole, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(carry, last)


def test_a_plan_of_one_bucket_is_convolved_without_a_gather():
    packed = jaxpack.pack_sequence([np.ones((3, F)), np.ones((2, F))], plan=jaxpack.plan_rows([3, 2], 1))
    stairs = packed.replace(plan=jaxpack.plan_exact([3, 2]))
    programs = [
        str(jax.make_jaxpr(lambda p: jaxpack.causal_conv(p, np.ones((2, F)))[0].data)(p)) for p in (packed, stairs)
    ]
    assert [text.count(f"f64[5,{F}] = gather") for text in programs] == [0, 1]


PACKED = jaxpack.pack_sequence([np.ones((3, F)), np.ones((1, F))])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: jaxpack.causal_conv(PACKED, np.ones((2, 4))),
            ValueError,
            r"kernel must be \[K, 3\] .* got shape \(2, 4",
        ),
        (lambda: jaxpack.causal_conv(PACKED, np.ones(3)), ValueError, r"kernel must be \[K, 3\]"),
        (lambda: jaxpack.causal_conv(PACKED, np.ones((4, F))), ValueError, "reaches back 3 steps.* more than 3"),
        (lambda: jaxpack.causal_conv(PACKED, np.ones((2, F)), dilation=0), ValueError, "dilation must be at least 1"),
        (lambda: jaxpack.causal_conv(PACKED, np.ones((2, F)), dilation="2"), TypeError, "an int, got '2'"),  # type: ignore[arg-type]
        (
            lambda: jaxpack.causal_conv(PACKED, np.ones((2, F)), np.ones((2, 2, F))),
            ValueError,
            r"\[2, 1, 3\], got shape",
        ),
        (lambda: jaxpack.causal_conv(PACKED, np.ones((2, F)), lengths=[1]), TypeError, "do not give lengths="),
        (lambda: jaxpack.causal_conv(np.ones((2, 3)), np.ones((2, F))), ValueError, "one axis of features"),
        (lambda: jaxpack.causal_conv(np.ones((2, 3, F)), np.ones((2, F)), lengths=[4, 1]), ValueError, "longer than"),
    ],
)
def test_errors_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()
