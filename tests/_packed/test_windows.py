"""Functions that change lengths: values and gradients of a loop over sequences, of jax.lax and of PyTorch; errors."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from strategies import FIXED_PLANS

import jaxpack
from jaxpack import BucketPlan

F, G = 3, 2
# Both ends of what a plan can be; test_promises.py has plans between them.
PLANS = {"padded": FIXED_PLANS["padded"], "stairs of rows": BucketPlan((4, 9), (3, 1), ((0, 7), (0, 2), (0,)))}
LENGTHS = [(7, 1, 3, 0, 1), (1, 0, 2, 2, 4)]

pytestmark = pytest.mark.usefixtures("x64")


def placed(x, size, stride, padding=(0, 0), ceil=False, dilation=1):
    """The windows over one sequence: a list of steps for each, None outside of the sequence."""
    span = (size - 1) * dilation + 1
    if padding == "SAME":
        count = -(-len(x) // stride)
        before = max((count - 1) * stride + span - len(x), 0) // 2
        after = span  # the count says where to stop
    else:
        before, after = padding
        count = len(x) + before + after if len(x) else 0
    windows: list[list[Any]] = []
    for start in range(-before, len(x) + after, stride):
        steps = [start + j * dilation for j in range(size)]
        whole = steps[-1] < len(x) + after or (ceil and start < len(x))
        if len(windows) < count and whole:
            windows.append([x[step] if 0 <= step < len(x) else None for step in steps])
    return windows


def pooled(reduce, *args, **options):
    """Reduces the real steps of each window with a function of jax.numpy."""

    def run(x, kernel):
        windows = placed(x, *args, **options)
        return [reduce(jnp.stack([v for v in steps if v is not None]), 0) for steps in windows]

    return run


def stacked(*args, **options):
    def run(x, kernel):
        windows = placed(x, *args, **options)
        return [jnp.concatenate([jnp.zeros(F) if v is None else v for v in steps]) for steps in windows]

    return run


def convolved(*args, **options):
    def run(x, kernel):
        found = []
        for steps in placed(x, *args, **options):
            terms = [v * k if k.ndim == 1 else v @ k for v, k in zip(steps, kernel, strict=True) if v is not None]
            found.append(sum(terms, jnp.zeros(kernel.shape[-1])))
        return found

    return run


# name: our function of a batch and a kernel, the shape of the kernel, and the definition for one sequence.
CASES = {
    "subsample": (lambda p, k: jaxpack.subsample(p, 3), (1, F), lambda x, k: list(x[::3])),
    "stack": (lambda p, k: jaxpack.stack_steps(p, 2), (1, F), stacked(2, 2)),
    "stack all": (
        lambda p, k: jaxpack.stack_steps(p, 3, stride=2, ceil_mode=True), (1, F),
        lambda x, k: stacked(3, 2, ceil=True)(x, k)[: max(-(-(len(x) - 3) // 2) + 1, 1)],
    ),
    "sum": (lambda p, k: jaxpack.sum_pool(p, 2, ceil_mode=True), (1, F), pooled(jnp.sum, 2, 2, ceil=True)),
    "mean": (lambda p, k: jaxpack.avg_pool(p, 2), (1, F), pooled(jnp.mean, 2, 2)),
    "mean same": (
        lambda p, k: jaxpack.avg_pool(p, 4, stride=2, padding="SAME"), (1, F), pooled(jnp.mean, 4, 2, "SAME")
    ),
    "max": (lambda p, k: jaxpack.max_pool(p, 2, ceil_mode=True), (1, F), pooled(jnp.max, 2, 2, ceil=True)),
    "max padded": (
        lambda p, k: jaxpack.max_pool(p, 3, stride=2, padding=(1, 2)), (1, F), pooled(jnp.max, 3, 2, (1, 2))
    ),
    "conv": (lambda p, k: jaxpack.conv(p, k), (3, F, G), convolved(3, 1, "SAME")),
    "conv same stride": (lambda p, k: jaxpack.conv(p, k, stride=2), (3, F), convolved(3, 2, "SAME")),
    "conv valid": (
        lambda p, k: jaxpack.conv(p, k, padding="valid", dilation=2), (2, F, G), convolved(2, 1, dilation=2)
    ),
    "conv padded": (lambda p, k: jaxpack.conv(p, k, stride=3, padding=(3, 0)), (4, F), convolved(4, 3, (3, 0))),
    "repeat": (lambda p, k: jaxpack.repeat_steps(p, 3), (1, F), lambda x, k: [v for v in x for _ in range(3)]),
    "there and back": (
        lambda p, k: jaxpack.repeat_steps(jaxpack.avg_pool(p, 2), 2, like=p), (1, F),
        lambda x, k: (lambda m: [m[min(t // 2, len(m) - 1)] if m else jnp.zeros(F) for t in range(len(x))])(
            pooled(jnp.mean, 2, 2)(x, k)
        ),
    ),
}  # fmt: skip


def inputs(name, lengths):
    """Sequences and a kernel."""
    rng = np.random.default_rng(sum(lengths))
    return [rng.standard_normal((length, F)) for length in lengths], rng.standard_normal(CASES[name][1])


@functools.cache
def program(name):
    """Returns lengths, values and gradients of a sum over them, in one program for a plan."""
    run = CASES[name][0]

    def loss(data, kernel, packed):
        found = run(packed.replace(data=data), kernel)
        return jnp.sin(found.data).sum(), found

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


@functools.cache
def expected(name, lengths):
    """The values for each sequence, and the gradients of the same sum with respect to sequences and kernel."""
    alone = CASES[name][2]

    def loss(sequences, kernel):
        found = [alone(x, kernel) for x in sequences]
        return sum((jnp.sin(v).sum() for each in found for v in each), jnp.zeros(())), found

    sequences, kernel = inputs(name, lengths)
    return jax.value_and_grad(loss, (0, 1), has_aux=True)([jnp.asarray(x) for x in sequences], kernel)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_each_sequence_alone(name, plan):
    for lengths in LENGTHS:
        sequences, kernel = inputs(name, lengths)
        packed = jaxpack.pack_sequence(sequences, plan=PLANS[plan])
        data = jnp.where(packed.mask[:, None], packed.data, jnp.nan)
        (_, output), (of_data, of_kernel) = program(name)(data, kernel, packed)
        (_, values), (of_sequences, of_their_kernel) = expected(name, lengths)
        anew = jaxpack.pack_sequence([np.zeros(len(each)) for each in values], plan=output.plan)
        for index in ("lengths", "sorted_indices", "unsorted_indices"):
            np.testing.assert_array_equal(getattr(output, index), getattr(anew, index))
        for ours, theirs in zip(jaxpack.unpack_sequence(output), values, strict=True):
            np.testing.assert_allclose(ours, np.reshape(theirs, ours.shape), rtol=0, atol=1e-12)
        of_theirs = jaxpack.pack_sequence([np.asarray(each) for each in of_sequences], plan=PLANS[plan])
        np.testing.assert_allclose(of_data, of_theirs.data, rtol=0, atol=1e-10)
        np.testing.assert_allclose(of_kernel, of_their_kernel, rtol=0, atol=1e-10)


@pytest.mark.parametrize("length", range(1, 8))
def test_same_and_valid_are_those_of_jax_lax(length):
    x, kernel = jnp.asarray(np.random.default_rng(length).standard_normal((length, F))), jnp.ones((3, F, G))
    for padding, stride in (("SAME", 2), ("SAME", 3), ("VALID", 2)):
        theirs = jax.lax.conv_general_dilated(
            x[None], kernel, (stride,), padding, dimension_numbers=("NWC", "WIO", "NWC")
        )
        ours = jaxpack.conv(jaxpack.pack_sequence([x]), kernel, stride=stride, padding=padding)
        assert ours.lengths.tolist() == [theirs.shape[1]]
        np.testing.assert_allclose(ours.data[: theirs.shape[1]], theirs[0], rtol=0, atol=1e-12)


@oracles.needs_torch
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_pools_are_pytorchs(ceil_mode):
    functional = oracles.torch.nn.functional
    for length in range(3, 9):
        x = np.random.default_rng(length).standard_normal((length, F))
        packed, signal = jaxpack.pack_sequence([x]), oracles.torch.tensor(x.T[None])
        options = {"stride": 2, "padding": 1, "ceil_mode": ceil_mode}
        means = functional.avg_pool1d(signal, 3, count_include_pad=False, **options)
        largest = functional.max_pool1d(signal, 3, **options)
        for ours, theirs in ((jaxpack.avg_pool, means), (jaxpack.max_pool, largest)):
            found = ours(packed, 3, stride=2, padding=(1, 1), ceil_mode=ceil_mode)
            np.testing.assert_allclose(found.data, theirs[0].T, rtol=0, atol=1e-12)


def test_misfits_of_which_fewer_steps_would_fit_stay_misfits():
    plan = BucketPlan((5,), (3,))
    packed = jax.jit(lambda x, n: jaxpack.pack_padded_sequence(x, n, True, plan=plan))(
        np.ones((3, 6, F)), jnp.array([2, 6, 5])
    )
    short = jax.jit(lambda p: jaxpack.avg_pool(p, 2, ceil_mode=True))(packed)  # 3 windows, as many as there is room for
    assert short.lengths.tolist() == [1, -1, 3]
    assert np.isnan(jax.jit(jaxpack.segment_sum)(short)).all(1).tolist() == [False, True, False]
    back = jax.jit(lambda p: jaxpack.repeat_steps(p, 2))(short)
    assert back.lengths.tolist() == [2, -1, 6]


def test_the_new_plan_is_the_same_in_and_outside_jit():
    packed = jaxpack.pack_sequence([np.ones((7, F)), np.ones((4, F))])
    assert jax.jit(jaxpack.stack_steps, static_argnums=1)(packed, 2).plan == jaxpack.stack_steps(packed, 2).plan
    assert jaxpack.stack_steps(packed, 2).plan == jaxpack.plan_exact([3, 2])


def test_integers_and_trees_are_pooled_too():
    tree = {"byte": np.array([200, 100, 3], np.uint8), "flag": np.array([False, True, False])}
    packed = jaxpack.pack_sequence([tree])
    assert jax.tree.map(lambda leaf: leaf.tolist(), jaxpack.sum_pool(packed, 2, ceil_mode=True).data["byte"]) == [
        300,
        3,
    ]
    largest = jaxpack.max_pool(packed, 2, ceil_mode=True).data
    assert largest["byte"].dtype == np.uint8
    assert (largest["byte"].tolist(), largest["flag"].tolist()) == ([200, 3], [True, False])


PACKED = jaxpack.pack_sequence([np.ones((3, F)), np.ones((1, F))])


def test_a_stride_beyond_all_steps_leaves_one_window():
    assert jaxpack.subsample(PACKED, 2**40).lengths.tolist() == [1, 1]
    assert jaxpack.avg_pool(PACKED, 2, stride=2**40).lengths.tolist() == [1, 0]


def test_a_kernel_wider_than_all_sequences_leaves_them_empty():
    output = jaxpack.conv(PACKED, np.ones((5, F)), padding="VALID")
    assert output.lengths.tolist() == [0, 0]
    np.testing.assert_array_equal(jaxpack.segment_sum(output), np.zeros((2, F)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jaxpack.subsample(PACKED, 0), ValueError, "stride must be at least 1, got 0"),
        (lambda: jaxpack.subsample(np.ones((2, 3, F)), 2), TypeError, "subsample takes a PackedSequence"),  # type: ignore[arg-type]
        (lambda: jaxpack.stack_steps(PACKED, 0), ValueError, "size must be at least 1"),
        (lambda: jaxpack.stack_steps(PACKED, 2, ceil_mode="all"), TypeError, "ceil_mode must be a bool, got 'all'"),  # type: ignore[arg-type]
        (lambda: jaxpack.avg_pool(PACKED, 2, stride=1.5), TypeError, "stride must be an int, got 1.5"),  # type: ignore[arg-type]
        (lambda: jaxpack.max_pool(PACKED, 2, padding=(0, 2)), ValueError, r"below the size of a window, which is 2"),
        (lambda: jaxpack.max_pool(PACKED, 2, padding="FULL"), ValueError, '"VALID", "SAME" or a pair .* got \'FULL\''),
        (lambda: jaxpack.conv(PACKED, np.ones((2, F)), padding=1), TypeError, "a pair of ints .*got 1"),  # type: ignore[arg-type]
        (lambda: jaxpack.conv(PACKED, np.ones((2, F)), padding=(-1, 0)), ValueError, "must not be negative"),
        (lambda: jaxpack.conv(PACKED, np.ones((2, F)), stride=0), ValueError, "stride must be at least 1"),
        (lambda: jaxpack.conv(PACKED, np.ones((2, 4))), ValueError, r"kernel must be \[K, 3\] .* got shape \(2, 4"),
        (lambda: jaxpack.conv(PACKED.replace(data=PACKED.data[:, 0]), np.ones((2, F))), ValueError, r"\[S, F\], got"),
        (lambda: jaxpack.repeat_steps(PACKED, 0), ValueError, "repeats must be at least 1"),
        (
            lambda: jaxpack.repeat_steps(PACKED, 2, like=jaxpack.pack_sequence([np.ones(2)])),
            ValueError,
            "like has 1 sequences, the batch 2",
        ),
    ],
)
def test_errors_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()
