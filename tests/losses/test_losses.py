"""Losses against NumPy, PyTorch and brute force: values, gradients, weights, misfits and errors."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.special
import strategies
from hypothesis import given
from jax import lax
from jax.experimental import checkify

import jaxpack
from jaxpack import BucketPlan, pack_padded_sequence
from jaxpack.losses import Mean, ctc, ctc_min_frames, sequence_cross_entropy, token_cross_entropy
from jaxpack.metrics import accuracy, ctc_greedy_decode

C = 4
LENGTHS = [2, 5, 0, 3]
WEIGHTS = np.array([0.5, 2.0, 0.0, 1.0])
STAIRS = BucketPlan((3, 6), (4, 2))
ROWS = BucketPlan((11,), (2,), ((0, 6), (0, 6)))
on_each_plan = pytest.mark.parametrize("plan", [STAIRS, ROWS], ids=["stairs", "rows"])

# Labels for LENGTHS. 1 1 takes three frames, so the first row can only be aligned with two frames a step.
CTC_LABELS = np.array([[1, 1, 77], [2, 2, 3], [-5, 9, 0], [3, 1, 0]], np.int32)
CTC_LENGTHS = np.array([2, 3, 2, 1], np.int32)
ALIGNABLE = np.array([[1, 2, 77], [2, 2, 3], [-5, 9, 0], [3, 1, 0]], np.int32)


def logits_batch(lengths=LENGTHS, features=C, dtype=np.float64):
    return np.nan_to_num(oracles.random_batch(lengths, features, dtype=dtype, extra=1))


def labels_batch(lengths=LENGTHS):
    return np.random.default_rng(1).integers(0, C, (len(lengths), max(lengths) + 1))


def token_loss(packed, weights=None):
    labels = pack_padded_sequence(labels_batch(), packed.lengths, True, plan=packed.plan)
    return token_cross_entropy(packed, labels, weights)


def ctc_loss(packed, weights=None):
    return ctc(packed, ALIGNABLE, CTC_LENGTHS, weights)


each_loss = pytest.mark.parametrize("loss", [token_loss, ctc_loss], ids=["tokens", "ctc"])


def pack(batch, plan=STAIRS, lengths=LENGTHS):
    return pack_padded_sequence(batch, lengths, batch_first=True, plan=plan)


TRACED_PACK = jax.jit(pack, static_argnums=1)


@functools.partial(jax.jit, static_argnames="loss")
def total_and_gradient(loss, packed, weights=None):
    """A loss's sums, and the gradient of its total with respect to the packed logits."""

    def total(data):
        mean = loss(packed.replace(data=data), weights)
        return mean.total, mean

    gradient, mean = jax.grad(total, has_aux=True)(packed.data)
    return mean, gradient


def same(result, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), result, expected)


# Mean


def test_means_of_parts_add_up_to_the_mean_of_the_whole():
    whole = sum([Mean(6.0, 3), Mean(4.0, 1)])
    assert isinstance(whole, Mean)
    assert (whole.total, whole.weight, float(whole.value)) == (10, 4, 2.5)
    assert float((Mean() + whole).value) == 2.5
    assert lax.scan(lambda mean, x: (mean + Mean(x, 1.0), None), Mean(), jnp.arange(3.0))[0].value == 1


def test_a_mean_of_nothing_is_zero_with_a_gradient_of_zero():
    value, gradient = jax.value_and_grad(lambda total: Mean(total, jnp.zeros(())).value)(0.0)
    assert (value, gradient) == (0, 0)


@pytest.mark.parametrize(
    ("total", "expected"),
    [(2, np.inf), (-2.5, -np.inf), (0, 0), (np.nan, np.nan), (np.array([1, 0, -1]), [np.inf, 0, -np.inf])],
)
def test_a_total_beside_a_weight_of_zero_is_infinite_and_moves_nothing(total, expected):
    np.testing.assert_array_equal(Mean(total, 0).value, expected)
    np.testing.assert_array_equal(Mean({"a": jnp.asarray(total)}, np.float32(0)).value["a"], expected)
    run = jax.grad(lambda total, weight: jnp.sum(Mean(total, weight).value), argnums=(0, 1))
    for gradient in jax.jit(run)(jnp.asarray(total, jnp.float32), 0.0):
        assert not gradient.any()


def test_a_mean_of_counts_beyond_32_bits_has_a_value():
    mean = Mean(3_000_000_000, 2_000_000_000) + Mean(3_000_000_000, 2_000_000_000)
    assert mean.value == 1.5


def test_a_mean_of_nothing_meets_no_nan_on_its_way():
    with jax.debug_nans(True):
        assert jax.grad(lambda total: Mean(total, 0).value)(0.0) == 0


def test_a_mean_of_gradients_keeps_their_structure_and_dtypes():
    gradient = {"w": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(())}
    value = (Mean(gradient, 2.0) + Mean(gradient, jnp.float32(2))).value
    assert value["w"].tolist() == [0.5, 0.5]
    assert value["w"].dtype == jnp.bfloat16
    assert value["b"] == 0.5


@pytest.mark.parametrize("other", [1, 0.5, None])
def test_only_means_are_added_to_means(other):
    with pytest.raises(TypeError, match="unsupported operand"):
        other + Mean(1.0, 1)
    with pytest.raises(TypeError, match="unsupported operand"):
        Mean(1.0, 1) + other


# Parts of a batch: the examples of Mean's docstring

PARAMS = {"w": jnp.asarray(np.random.default_rng(2).standard_normal((3, C))), "b": jnp.arange(float(C))}
INPUTS = logits_batch([*LENGTHS, 1, 4, 0, 5], 3)
TARGETS = labels_batch([*LENGTHS, 1, 4, 0, 5])
ALL_LENGTHS = np.array([*LENGTHS, 1, 4, 0, 5])
ALL_WEIGHTS = np.array([1, 1, 0, 0.5, 2, 1, 0, 1])
WHOLE = BucketPlan((6,), (8,))


def model_loss(params, batch, plan=STAIRS, *, kind):
    inputs, targets, lengths, weights = batch
    logits = pack(inputs, plan, lengths).map(lambda x: x @ params["w"] + params["b"])
    if kind == "tokens":
        return token_cross_entropy(logits, pack(targets, plan, lengths), weights)
    if kind == "weighted tokens":
        of_tokens = pack(jnp.broadcast_to(jnp.asarray(weights)[:, None], targets.shape), plan, lengths)
        return token_cross_entropy(logits, pack(targets, plan, lengths), of_tokens, ignore_label=1)
    return ctc(logits, jnp.maximum(targets[:, :1], 1), jnp.minimum(lengths, 1), weights)


BATCH = (INPUTS, TARGETS, ALL_LENGTHS, ALL_WEIGHTS)
HALVES = [tuple(leaf[half] for leaf in BATCH) for half in (slice(0, 4), slice(4, 8))]
each_kind = pytest.mark.parametrize("kind", ["tokens", "ctc"])


@functools.cache
def one_batch(kind):
    return jax.jit(jax.value_and_grad(lambda p: model_loss(p, BATCH, WHOLE, kind=kind).value))(params64())


def params64():
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), PARAMS)


def micro_step(params, batch, kind):
    def total(params):
        mean = model_loss(params, batch, kind=kind)
        return mean.total, mean

    gradient, mean = jax.grad(total, has_aux=True)(params)
    return mean, Mean(gradient, mean.weight)


@each_kind
@pytest.mark.usefixtures("x64")
def test_two_micro_batches_equal_one_batch(kind):
    step = jax.jit(functools.partial(micro_step, kind=kind))
    means, gradients = zip(*(step(params64(), half) for half in HALVES), strict=True)
    same((sum(means).value, sum(gradients).value), one_batch(kind), atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "by_hand"), [("tokens", False), ("weighted tokens", False), ("ctc", False), ("tokens", True)]
)
@pytest.mark.usefixtures("x64")
def test_two_devices_equal_one_batch(kind, by_hand):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def differentiate_value(params, shard):
        return jax.value_and_grad(lambda p: model_loss(p, shard, kind=kind).psum("data").value)(params)

    def sum_by_hand(params, shard):
        mean, gradient = micro_step(params, shard, kind)
        return mean.psum("data").value, gradient.psum("data").value

    run = jax.shard_map(
        sum_by_hand if by_hand else differentiate_value,
        mesh=mesh,
        in_specs=(jax.P(), jax.P("data")),
        out_specs=jax.P(),
        check_vma=not by_hand,
    )
    same(jax.jit(run)(params64(), BATCH), one_batch(kind), atol=1e-10)


# Cross-entropy


@jax.jit
def weighted_loss(packed, labels, weights):
    """The loss of tokens, and its gradient."""
    return total_and_gradient(lambda packed, weights: token_cross_entropy(packed, labels, weights), packed, weights)


@given(strategies.fixed_plan_and_lengths())
def test_token_cross_entropy_and_its_gradient_equal_numpy(plan_and_lengths):
    plan, lengths = plan_and_lengths
    with jax.enable_x64(True):
        batch = np.nan_to_num(oracles.random_batch(lengths, C, extra=strategies.LONGEST - max(lengths)))
        labels = np.random.default_rng(1).integers(0, C, batch.shape[:2])
        weights = np.arange(len(lengths)) / 2
        real = np.arange(batch.shape[1]) < np.array(lengths)[:, None]
        weighted = weights[:, None] * real
        log_p = scipy.special.log_softmax(batch, -1)
        one_hot = np.eye(C)[labels]
        expected = weighted[..., None] * (np.exp(log_p) - one_hot)
        mean, gradient = weighted_loss(pack(batch, plan, lengths), pack(labels, plan, lengths), weights)
        same(mean, Mean(-(weighted * (log_p * one_hot).sum(-1)).sum(), weighted.sum()), rtol=1e-12)
        same(gradient, pack(expected, plan, lengths).data, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_sequence_cross_entropy_and_its_gradient_equal_numpy():
    logits, labels = logits_batch()[:, 0], labels_batch()[:, 0]
    logits[2], labels[2] = np.nan, -1  # of weight 0
    log_p = scipy.special.log_softmax(np.nan_to_num(logits), -1)
    one_hot = np.eye(C)[labels]
    run = jax.jit(jax.value_and_grad(lambda x: sequence_cross_entropy(x, labels, WEIGHTS).value))
    value, gradient = run(jnp.array(logits))
    same(value, -(WEIGHTS * (log_p * one_hot).sum(-1)).sum() / WEIGHTS.sum())
    same(gradient, WEIGHTS[:, None] * (np.exp(log_p) - one_hot) / WEIGHTS.sum(), atol=1e-12)


def test_labels_of_other_lengths_are_refused_and_nan_where_lengths_are_traced():
    logits, labels = pack(logits_batch(dtype=np.float32)), pack(labels_batch(), lengths=[2, 5, 1, 3])
    with pytest.raises(ValueError, match=r"labels have the lengths \[2 5 1 3\], logits have \[2 5 0 3\]"):
        token_cross_entropy(logits, labels)
    assert np.isnan(TOKEN_VALUE(logits, labels))
    assert np.isfinite(TOKEN_VALUE(logits, pack(labels_batch())))


TOKEN_VALUE = jax.jit(lambda *args: token_cross_entropy(*args).value)


# Weights of tokens, and labels that are ignored

IGNORED = -100
TOKEN_WEIGHTS = np.random.default_rng(3).integers(0, 3, (4, 6)) / 2


def ignoring_batch():
    """Logits that are NaN at ignored tokens, labels, and the mask of real tokens that are not ignored."""
    logits, labels = logits_batch(), labels_batch()
    ignored = np.random.default_rng(4).random(labels.shape) < 0.4
    logits[ignored], labels[ignored] = np.nan, IGNORED
    return logits, labels, (np.arange(6) < np.array(LENGTHS)[:, None]) & ~ignored


def tokens_ignoring(packed, labels, weights=None):
    return token_cross_entropy(packed, labels, weights, ignore_label=IGNORED)


def accuracy_ignoring(packed, labels, weights=None):
    return accuracy(packed, labels, weights, ignore_label=IGNORED)


each_token_mean = pytest.mark.parametrize("mean_of", [tokens_ignoring, accuracy_ignoring], ids=["loss", "accuracy"])


@on_each_plan
@pytest.mark.parametrize("per_token", [False, True], ids=["of rows", "of tokens"])
@pytest.mark.usefixtures("x64")
def test_weighted_tokens_with_an_ignored_label_equal_numpy(plan, per_token):
    logits, labels, counted = ignoring_batch()
    weights = TOKEN_WEIGHTS if per_token else WEIGHTS
    given = pack(np.where(counted, weights, np.nan), plan) if per_token else WEIGHTS
    full = np.where(counted, weights if per_token else weights[:, None], 0)
    log_p = scipy.special.log_softmax(np.nan_to_num(logits), -1)
    one_hot = np.eye(C)[np.where(counted, labels, 0)]

    def loss(packed, weights):
        return tokens_ignoring(packed, pack(labels, plan, packed.lengths), weights)

    mean, gradient = total_and_gradient(loss, pack(logits, plan), given)
    same(mean, Mean(-(full * (log_p * one_hot).sum(-1)).sum(), full.sum()), rtol=1e-12)
    same(gradient, pack(full[..., None] * (np.exp(log_p) - one_hot), plan).data, atol=1e-12)
    hits = full * (np.nan_to_num(logits).argmax(-1) == labels)
    same(jax.jit(accuracy_ignoring)(pack(logits, plan), pack(labels, plan), given), Mean(hits.sum(), full.sum()))


@oracles.needs_torch
@pytest.mark.usefixtures("x64")
def test_an_ignored_label_is_pytorchs_ignore_index():
    logits, labels, counted = ignoring_batch()
    tensor = oracles.torch.tensor(np.nan_to_num(logits).reshape(-1, C), requires_grad=True)
    target = oracles.torch.tensor(np.where(counted, labels, IGNORED).reshape(-1))
    expected = oracles.torch.nn.functional.cross_entropy(tensor, target, ignore_index=IGNORED)
    expected.backward()
    of_tokens = jax.jit(jax.value_and_grad(lambda data: tokens_ignoring(pack(data), pack(labels)).value))
    of_rows = jax.jit(
        jax.value_and_grad(lambda data: sequence_cross_entropy(data, target.numpy(), ignore_label=IGNORED).value)
    )
    value, gradient = of_tokens(logits)
    same((value, gradient.reshape(-1, C)), (expected.item(), tensor.grad.numpy()), rtol=1e-12, atol=1e-12)
    same(of_rows(logits.reshape(-1, C)), (expected.item(), tensor.grad.numpy()), rtol=1e-12, atol=1e-12)


@each_token_mean
def test_weights_of_tokens_may_be_bools_integers_or_narrow_floats(mean_of):
    packed, labels, weights = pack(logits_batch(dtype=np.float32)), pack(labels_batch()), pack(TOKEN_WEIGHTS > 0)

    @jax.jit
    def run(packed, labels, weights):
        dtypes = (np.float32, bool, np.int8, np.float16, jnp.bfloat16)
        return [mean_of(packed, labels, weights.astype(dtype)) for dtype in dtypes]

    expected, *means = run(packed, labels, weights)
    for mean in means:
        same(mean, expected, rtol=0)
        assert mean.total.dtype == mean.weight.dtype == np.float32


@each_token_mean
@pytest.mark.parametrize("nothing", ["ignored", "weights"])
def test_a_batch_whose_tokens_all_count_for_nothing_is_a_mean_of_nothing(mean_of, nothing):
    packed = pack(np.full((4, 6, C), np.nan, np.float32))
    labels = pack(np.full((4, 6), IGNORED if nothing == "ignored" else 99))
    weights = None if nothing == "ignored" else pack(np.zeros((4, 6)))
    mean, gradient = total_and_gradient(lambda packed, _: mean_of(packed, labels, weights), packed)
    assert (mean.total, mean.weight, mean.value) == (0, 0, 0)
    assert not gradient.any()


@each_token_mean
def test_a_traced_misfit_of_ignored_tokens_is_nan(mean_of):
    logits, labels = logits_batch(dtype=np.float32), labels_batch()
    labels[1] = IGNORED
    run = jax.jit(lambda lengths: mean_of(pack(logits, STAIRS, lengths), pack(labels, STAIRS, lengths)).value)
    assert np.isnan(run(jnp.array([2, 7, 0, 3])))
    assert np.isfinite(run(jnp.array([2, 5, 0, 3])))


@each_token_mean
def test_weights_of_tokens_of_other_lengths_are_refused_and_nan_where_lengths_are_traced(mean_of):
    packed, labels = pack(logits_batch(dtype=np.float32)), pack(labels_batch())
    with pytest.raises(ValueError, match=r"weights have the lengths \[2 5 1 3\], logits have \[2 5 0 3\]"):
        mean_of(packed, labels, pack(TOKEN_WEIGHTS, lengths=[2, 5, 1, 3]))
    run = jax.jit(lambda lengths: mean_of(packed, labels, pack(TOKEN_WEIGHTS, STAIRS, lengths)).value)
    assert np.isnan(run(jnp.array([2, 5, 1, 3])))
    assert np.isfinite(run(jnp.array(LENGTHS)))


@pytest.mark.parametrize(
    ("dtype", "label", "ignored"),
    [(np.int8, -100, -100), (np.uint8, 255, 255), (np.uint32, 7, 7), (np.int32, 0, 0), (np.int32, -1, np.int64(-1))],
)
def test_any_label_of_any_width_can_be_ignored(dtype, label, ignored):
    labels = np.array([1, label, 2], dtype)
    logits = jnp.eye(3)
    expected = sequence_cross_entropy(logits, np.array([1, 1, 2]), [1, 0, 1])
    same(sequence_cross_entropy(logits, labels, ignore_label=ignored), expected, rtol=0)
    assert accuracy(logits, labels, ignore_label=ignored).weight == 2


@pytest.mark.parametrize("ignored", [-100, 300, 2**40, 2**70])
def test_an_ignored_label_that_the_dtype_does_not_have_ignores_nothing(ignored):
    labels = np.array([1, 2], np.uint8)
    assert sequence_cross_entropy(jnp.eye(3)[:2], labels, ignore_label=ignored).weight == 2


def test_checkify_reports_a_label_that_is_no_class_and_no_ignored_one():
    logits, labels = (
        pack(logits_batch(dtype=np.float32)),
        pack(labels_batch()).map(lambda k: jnp.where(k == 1, -100, k)),
    )
    for ignored, message in [(None, "labels.data must be in 0 to 3"), (IGNORED, None)]:
        run = jax.jit(checkify.checkify(functools.partial(token_cross_entropy, ignore_label=ignored)))
        error = run(logits, labels)[0].get()
        assert error is None if message is None else message in error


# Promises of all losses of packed logits


@on_each_plan
@each_loss
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_slack_is_inert(loss, plan, value):
    packed = pack(logits_batch(dtype=np.float32), plan)
    dirty = packed.replace(data=jnp.where(packed.mask[:, None], packed.data, value))
    jax.tree.map(
        np.testing.assert_array_equal,
        total_and_gradient(loss, dirty, WEIGHTS),
        total_and_gradient(loss, packed, WEIGHTS),
    )


def test_labels_in_slack_are_inert():
    packed, labels = pack(logits_batch(dtype=np.float32)), pack(labels_batch())
    dirty = labels.replace(data=jnp.where(labels.mask, labels.data, 99))
    assert TOKEN_VALUE(packed, dirty) == TOKEN_VALUE(packed, labels)


@each_loss
def test_rows_of_weight_zero_count_for_nothing_whatever_they_hold(loss):
    batch, weights = logits_batch(dtype=np.float32), np.array([1.0, 0.0, 1.0, 1.0])
    clean = total_and_gradient(loss, pack(batch), weights)
    batch[1] = np.nan
    batch[1, 0] = np.inf
    dirty = total_and_gradient(loss, pack(batch), weights)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert not clean[1][pack(np.arange(4)[:, None] * np.ones(6, int)).data == 1].any()


@each_loss
def test_empty_rows_count_for_nothing_whatever_their_weight(loss):
    packed = pack(logits_batch(dtype=np.float32))
    mean, gradient = total_and_gradient(loss, packed, np.ones(4))
    same((mean, gradient), total_and_gradient(loss, packed, np.array([1, 1, 0, 1.0])), rtol=0)
    assert mean.weight == (3 if loss is ctc_loss else 10)


@each_loss
def test_a_batch_of_empty_sequences_has_loss_and_gradient_zero(loss):
    packed = pack(np.full((4, 6, C), np.nan, np.float32), lengths=[0, 0, 0, 0])
    mean, gradient = total_and_gradient(loss, packed, np.ones(4))
    assert (mean.total, mean.weight, mean.value) == (0, 0, 0)
    assert not gradient.any()


@on_each_plan
@each_loss
def test_a_traced_misfit_makes_the_loss_and_its_gradient_nan_whatever_its_weight(loss, plan):
    for weight, misfit in itertools.product((0, 1), (-1, 7)):
        packed = TRACED_PACK(logits_batch(dtype=np.float32), plan, jnp.array([2, misfit, 0, 3]))
        mean, gradient = total_and_gradient(loss, packed, np.array([1.0, weight, 0, 1]))
        assert np.isnan([mean.total, mean.weight, mean.value]).all()
        assert np.isnan(gradient).any()


@each_loss
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.usefixtures("x64")
def test_sums_are_float32_for_all_narrower_logits_and_in_64_bit_mode(loss, dtype):
    packed = pack(jnp.asarray(logits_batch(), dtype))
    mean, gradient = jax.eval_shape(functools.partial(total_and_gradient, loss), packed, WEIGHTS)
    assert mean.total.dtype == mean.weight.dtype == jnp.float32
    assert gradient.dtype == dtype


@each_loss
def test_weights_of_rows_may_be_bools_integers_or_narrow_floats(loss):
    packed, weights = pack(logits_batch(dtype=np.float32)), np.array([1, 0, 1, 1])
    given = [weights.astype(dtype) for dtype in (np.float32, bool, np.int8, np.float16)]
    expected, *means = jax.jit(lambda packed, given: [loss(packed, weights) for weights in given])(packed, given)
    for mean in means:
        same(mean, expected, rtol=0)
        assert mean.total.dtype == mean.weight.dtype == np.float32


def test_bfloat16_losses_of_many_tokens_do_not_saturate():
    logits = pack_padded_sequence(jnp.zeros((1, 4001, 2), jnp.bfloat16), [4001], True)
    labels = logits.replace(data=jnp.zeros(4001, int))
    mean = jax.jit(token_cross_entropy)(logits, labels)
    assert mean.weight == 4001
    np.testing.assert_allclose(mean.value, np.log(2), rtol=1e-5)


CALLS = {
    "tokens": lambda p: token_cross_entropy(p, pack(labels_batch()), pack(TOKEN_WEIGHTS), ignore_label=1),
    "rows of tokens": lambda p: token_cross_entropy(p, pack(labels_batch()), WEIGHTS),
    "sequences": lambda p: sequence_cross_entropy(p.data[:4], labels_batch()[:, 0], WEIGHTS, ignore_label=1),
    "ctc": lambda p: ctc(p, ALIGNABLE, CTC_LENGTHS, WEIGHTS),
    "accuracy": lambda p: accuracy(p, pack(labels_batch()), pack(TOKEN_WEIGHTS), ignore_label=1),
}


def test_stacked_batches_are_mapped_and_ranks_never_promoted():
    packed = pack(logits_batch(dtype=np.float32))
    batches = [packed.data, 2 * packed.data]

    def run(data):
        means = {name: call(packed.replace(data=data)) for name, call in CALLS.items()}
        return {name: (mean.total, mean.weight, mean.value) for name, mean in means.items()}

    with jax.numpy_rank_promotion("raise"):
        mapped = jax.jit(jax.vmap(run))(jnp.stack(batches))
    alone = jax.jit(run)
    for i, data in enumerate(batches):
        same(jax.tree.map(lambda leaf, i=i: leaf[i], mapped), alone(data), rtol=1e-6)


# CTC


def collapsed(path, blank):
    return tuple(k for k, _ in itertools.groupby(path) if k != blank)


def brute_force(frames, labels, blank):
    """-log of the summed probability of all paths that collapse to the labels."""
    log_p = scipy.special.log_softmax(frames, -1)
    paths = [p for p in itertools.product(range(C), repeat=len(frames)) if collapsed(p, blank) == tuple(labels)]
    with np.errstate(divide="ignore"):
        return -scipy.special.logsumexp([sum(log_p[t, k] for t, k in enumerate(p)) for p in paths]) if paths else np.inf


@pytest.mark.parametrize(("plan", "frames_per_step", "blank"), [(STAIRS, 1, 0), (ROWS, 2, 3)])
@pytest.mark.usefixtures("x64")
def test_ctc_equals_a_sum_over_all_paths(plan, frames_per_step, blank):
    lengths = [2, 3, 0, 1]
    batch = logits_batch(lengths, C * frames_per_step)
    labels = (ALIGNABLE + blank) % C if blank else ALIGNABLE
    label_lengths = np.array([2, 2 * frames_per_step - 1, 2, 0])
    frames = batch.reshape(4, -1, C)
    losses = [
        brute_force(frames[b, : n * frames_per_step], labels[b, : label_lengths[b]], blank) if n else 0
        for b, n in enumerate(lengths)
    ]
    weights = np.array([0.5, 2, 1, 3])
    run = jax.jit(functools.partial(ctc, blank_id=blank, frames_per_step=frames_per_step))
    mean = run(pack(batch, plan, lengths), labels, label_lengths, weights)
    same(mean, Mean(np.dot(weights, losses), 5.5), rtol=1e-12)


@oracles.needs_torch
@pytest.mark.parametrize(("plan", "frames_per_step"), [(ROWS, 1), (STAIRS, 3)])
@pytest.mark.usefixtures("x64")
def test_ctc_and_its_gradient_equal_pytorch(plan, frames_per_step):
    torch = oracles.torch
    batch, weights = logits_batch(features=C * frames_per_step), np.array([0.5, 2, 1, 1])

    def loss(packed, weights):
        return ctc(packed, ALIGNABLE, CTC_LENGTHS, weights, frames_per_step=frames_per_step)

    mean, gradient = total_and_gradient(loss, pack(batch, plan), weights)
    logits = torch.tensor(batch, requires_grad=True)
    losses = torch.nn.functional.ctc_loss(
        logits.reshape(4, -1, C).log_softmax(-1).transpose(0, 1),
        torch.tensor(np.clip(ALIGNABLE, 1, C - 1)),
        torch.tensor(LENGTHS) * frames_per_step,
        torch.tensor(np.where(np.array(LENGTHS), CTC_LENGTHS, 0)),
        reduction="none",
    )
    (losses * torch.tensor(weights)).sum().backward()
    expected = losses.detach().numpy()
    np.testing.assert_allclose(mean.total, expected @ (weights * [1, 1, 0, 1]), rtol=1e-12)
    assert mean.weight == 3.5
    np.testing.assert_allclose(gradient, pack(logits.grad.numpy(), plan).data, atol=1e-10)


@jax.jit
def ctc_of_each(frames, labels, label_lengths):
    """The loss of each sequence, and the gradients of their sum."""
    plan = BucketPlan((frames.shape[1],), (1,))

    def loss(frames, labels, length):
        packed = pack(frames[None], plan, [frames.shape[0]])
        return ctc(packed, labels[None], length[None]).value

    return jax.vmap(jax.value_and_grad(loss))(frames, labels, label_lengths)


def torch_ctc(frames, labels, label_lengths, lengths=None, reduction="none"):
    """PyTorch's losses and the gradients of their sum, in float64."""
    torch = oracles.torch
    tensor = torch.tensor(np.asarray(frames, np.float64), requires_grad=True)
    lengths = [frames.shape[1]] * len(frames) if lengths is None else lengths
    losses = torch.nn.functional.ctc_loss(
        tensor.log_softmax(-1).transpose(0, 1),
        torch.tensor(labels),
        torch.tensor(lengths),
        torch.tensor(label_lengths),
        reduction=reduction,
    )
    losses.sum().backward()
    return losses.detach().numpy(), tensor.grad.numpy()


def likely_frames(num_labels, dtype=np.float32):
    """Frames of 16 sequences whose labels, num_labels of class 1, have a probability of nearly 1 by many alignments.

    Of four frames two are blank, one is class 1, and one is either, which is the same label.
    """
    frames = np.full((16, 4 * num_labels, 3), -40.0)
    frames[:, 0::4, 0] = frames[:, 3::4, 0] = frames[:, 1::4, 1] = frames[:, 2::4, 0] = 0
    frames[:, 2::4, 1] = 2 * np.random.default_rng(0).standard_normal((16, num_labels))
    return np.asarray(frames, dtype)


@oracles.needs_torch
@pytest.mark.parametrize(("num_labels", "dtype"), [(1, np.float32), (100, np.float32), (12, jnp.bfloat16)])
def test_ctc_of_a_probability_near_one_is_not_below_zero_and_keeps_its_gradient(num_labels, dtype):
    frames, labels = likely_frames(num_labels, dtype), np.ones((16, num_labels), int)
    label_lengths = np.full(16, num_labels)
    losses, gradient = ctc_of_each(frames, labels, label_lengths)
    expected, expected_gradient = torch_ctc(frames, labels, label_lengths)
    assert not np.signbit(losses).any()
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)


@oracles.needs_torch
@pytest.mark.parametrize("scale", [1, 1e4, 1e6, 1e20])
def test_ctc_of_huge_logits_equals_pytorch(scale):
    frames = np.random.default_rng(1).integers(-3, 3, (5, 6, 3)).astype(np.float32)
    frames[0], frames[1] = [[0, 1, -1]], [[1, 0, 0]]  # one alignment of probability 1; the blank alone
    labels, label_lengths = np.array([[1, 1, 1], [1, 2, 0], [2, 2, 0], [1, 2, 1], [1, 0, 0]]), np.array([1, 0, 2, 3, 1])
    losses, gradient = ctc_of_each(frames * np.float32(scale), labels, label_lengths)
    expected, _ = torch_ctc(scale * frames.astype(np.float64), labels, label_lengths)
    assert not np.signbit(losses).any()
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
    assert np.isfinite(gradient).all()


@oracles.needs_torch
@pytest.mark.parametrize("masked", [-np.inf, np.finfo(np.float32).min])
def test_ctc_takes_classes_that_cannot_be(masked):
    frames = np.random.default_rng(1).standard_normal((3, 6, 3)).astype(np.float32)
    frames[0, 1:4, 1] = frames[1, :, 2] = frames[2, :, 0] = masked
    labels, label_lengths = np.array([[1, 2], [2, 0], [1, 2]]), np.array([2, 1, 2])
    losses, gradient = ctc_of_each(frames, labels, label_lengths)
    with np.errstate(invalid="ignore"):
        expected, _ = torch_ctc(np.where(frames == masked, -np.inf, frames), labels, label_lengths)
    assert expected[1] == np.inf
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert not gradient[1].any()
    assert np.isfinite(gradient).all()
    assert not gradient[frames == masked].any()


@oracles.needs_torch
@pytest.mark.usefixtures("x64")
def test_weights_give_pytorchs_default_mean_of_ctc():
    lengths, label_lengths = np.array([6, 5, 2, 3]), np.array([2, 3, 0, 1])
    logits, labels = logits_batch(), np.maximum(ALIGNABLE % C, 1)
    total = ctc(pack(logits, WHOLE_OF_FOUR, lengths), labels, label_lengths, 1 / jnp.maximum(label_lengths, 1)).total
    expected, _ = torch_ctc(logits, labels, label_lengths, lengths, reduction="mean")
    np.testing.assert_allclose(Mean(total, 4).value, expected, rtol=1e-12)


WHOLE_OF_FOUR = BucketPlan((6,), (4,))


def test_ctc_of_labels_that_cannot_be_aligned_is_infinite_with_gradient_zero():
    packed = pack(logits_batch(dtype=np.float32))

    def loss(packed, weights):
        return ctc(packed, CTC_LABELS, CTC_LENGTHS, weights)

    mean, gradient = total_and_gradient(loss, packed, np.ones(4))
    aligned = packed.lengths >= ctc_min_frames(CTC_LABELS, CTC_LENGTHS)
    assert aligned.tolist() == [False, True, False, True]
    expected, expected_gradient = total_and_gradient(loss, packed, np.asarray(aligned, float))
    assert mean.total == np.inf
    assert mean.weight == 3
    assert np.isfinite(expected.value)
    np.testing.assert_array_equal(gradient, expected_gradient)


def test_ctc_min_frames_counts_labels_and_equal_neighbours():
    assert ctc_min_frames([[1, 2, 2], [3, 3, 3], [3, 3, 3]], [3, 1, 0]).tolist()[:2] == [4, 1]
    assert ctc_min_frames(np.ones((2, 0), int), np.zeros(2, int)).tolist() == [0, 0]


def test_ctc_of_no_labels_at_all_is_that_of_blanks():
    logits = pack(np.zeros((4, 6, C), np.float32))
    mean = jax.jit(ctc)(logits, np.zeros((4, 0), int), np.zeros(4, int))
    np.testing.assert_allclose(mean.total, 10 * np.log(C), rtol=1e-6)
    assert mean.weight == 3


def test_ctc_multiplies_in_full_precision():
    jaxpr = str(jax.make_jaxpr(lambda packed: total_and_gradient(ctc_loss, packed))(PACKED))
    assert jaxpr.count("precision=(Precision.HIGHEST") == jaxpr.count("dot_general[") > 0


def test_labels_may_be_narrow_integers():
    logits = pack(np.zeros((4, 6, 300), np.float32))
    labels = logits.replace(data=np.full(18, 255, np.uint8))
    run = jax.jit(
        lambda logits, labels: (tokens(logits, labels), ctc(logits, CTC_NARROW, CTC_NARROW[:, 0], blank_id=299))
    )
    np.testing.assert_allclose(run(logits, labels)[0].value, np.log(300), rtol=1e-6)
    assert np.isfinite(run(logits, labels)[1].value)


CTC_NARROW = np.ones((4, 1), np.int8)


# Errors

PACKED = pack(logits_batch(dtype=np.float32))
LABELS = pack(labels_batch())
ROW = jnp.ones((4, C))
ROW_LABELS = jnp.zeros(4, int)
OTHER = pack(labels_batch(), ROWS)
tokens, sequences = token_cross_entropy, sequence_cross_entropy


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tokens(PACKED.data, LABELS), TypeError, "token_cross_entropy takes a PackedSequence"),
        (lambda: tokens(PACKED, LABELS.data), TypeError, r"token_cross_entropy\(labels=...\) takes a PackedSequence"),
        (lambda: tokens(PACKED, OTHER), ValueError, "labels have the plan .* logits have"),
        (lambda: tokens(PACKED, PACKED), ValueError, r"logits must be \[S, C\] and labels \[S\], got shapes"),
        (lambda: tokens(LABELS, LABELS), ValueError, r"logits must be \[S, C\]"),
        (lambda: tokens(PACKED, LABELS.astype(float)), TypeError, "labels integers, got dtypes float32 and float32"),
        (lambda: tokens(PACKED, LABELS, jnp.ones(3)), ValueError, r"weights must be one per sequence, \[4\], got .*3"),
        (lambda: tokens(PACKED, LABELS, jnp.ones(4, complex)), TypeError, "weights must be real"),
        (lambda: tokens(PACKED, LABELS.map(lambda k: k + 1)), ValueError, r"labels.data must be in 0 to 3.* = 4\."),
        (lambda: tokens(PACKED, pack(np.full((4, 6), -100))), ValueError, r"give ignore_label\), got .* = -100\."),
        (lambda: tokens(LABELS, PACKED), ValueError, "Logits come first: are the two swapped"),
        (lambda: tokens(PACKED, column(LABELS)), ValueError, r"Drop the last axis of the labels: labels.map"),
        (lambda: tokens(PACKED, PACKED.astype(int)), ValueError, r"not one-hot: labels.map\(lambda data: jnp.argmax"),
        (lambda: tokens(PACKED, LABELS, jnp.ones((4, 1))), ValueError, r"Drop the last axis: weights\[:, 0\]"),
        (
            lambda: tokens(PACKED, LABELS, jnp.ones((4, 6))),
            ValueError,
            r"per token.*pack_padded_sequence\(weights",
        ),
        (
            lambda: tokens(PACKED, LABELS, [[1, 0], [1]]),
            ValueError,
            r"rows have different lengths.*pack_sequence",
        ),
        (lambda: tokens(PACKED, LABELS, OTHER), ValueError, "weights have the plan .* logits have"),
        (lambda: tokens(PACKED, LABELS, column(LABELS)), ValueError, r"one per token, data \[S\].*weights.map"),
        (lambda: tokens(PACKED, LABELS, LABELS.astype(complex)), TypeError, "weights must be real"),
        (lambda: tokens(PACKED, LABELS, "abcd"), TypeError, "weights must be an array of numbers, got str 'abcd'"),
        (lambda: tokens(PACKED, LABELS, ignore_label=-100.0), TypeError, "ignore_label must be an int, got -100.0"),  # type: ignore[arg-type]
        (lambda: sequences(ROW, ROW_LABELS, ignore_label=True), TypeError, "ignore_label must be an int, got True"),
        (lambda: sequences(ROW, ROW_LABELS, LABELS), TypeError, "weights must be one per sequence.*PackedSequence"),
        (lambda: sequences(ROW, ROW_LABELS[:, None]), ValueError, r"Drop the last axis of the labels: labels\[:, 0\]"),
        (lambda: sequences(ROW, ROW_LABELS, ROW[:, :1]), ValueError, r"Drop the last axis: weights\[:, 0\]"),
        (lambda: sequences(ROW_LABELS, ROW), ValueError, "Logits come first: are the two swapped"),
        (lambda: sequences(ROW, ROW), ValueError, r"not one-hot: jnp.argmax\(labels, -1\)"),
        (lambda: sequences(ROW, ROW_LABELS * 1.0), TypeError, r"If they are whole numbers: labels.astype\(int\)"),
        (lambda: sequences(ROW, ROW_LABELS == 0), TypeError, r"If they are whole numbers: labels.astype\(int\)"),
        (lambda: sequences(ROW, LABELS), TypeError, "got a PackedSequence. Reduce it"),
        (lambda: sequences(ROW, [[1, 2], [3]]), ValueError, "labels is a list whose rows have different lengths"),
        (lambda: sequences(ROW, np.array([0, 1, 2, 2**32])), ValueError, "labels holds 4294967296 at"),
        (lambda: sequences(jnp.ones((4, 5, C)), jnp.zeros((4, 5), int)), ValueError, "call the function of tokens"),
        (lambda: sequences(jnp.ones((4, 0)), ROW_LABELS), ValueError, r"logits must be \[B, C\]"),
        (lambda: sequences(PACKED, jnp.zeros(4, int)), TypeError, "got a PackedSequence. Reduce it"),
        (lambda: sequences(jnp.ones((4, C)), jnp.zeros(3, int)), ValueError, r"\[B, C\] and labels \[B\]"),
        (lambda: sequences(jnp.ones((1, C)), jnp.array([-1])), ValueError, r"labels\[0\] = -1"),
        (lambda: ctc(PACKED.data, CTC_LABELS, CTC_LENGTHS), TypeError, "ctc takes a PackedSequence"),
        (lambda: ctc(LABELS, CTC_LABELS, CTC_LENGTHS), TypeError, "logits must be floating"),
        (lambda: ctc(PACKED, LABELS, CTC_LENGTHS), TypeError, r"labels must be padded, \[B, N\]"),
        (lambda: ctc(PACKED, CTC_LABELS[:2], CTC_LENGTHS), ValueError, r"labels must be \[4, N\]"),
        (
            lambda: ctc(PACKED, CTC_LABELS * 1.0, CTC_LENGTHS),
            TypeError,
            r"labels must be integers.*labels.astype\(int\)",
        ),
        (lambda: ctc(PACKED, CTC_LABELS, CTC_LENGTHS * 1.0), TypeError, r"integers.*label_lengths.astype\(int\)"),
        (lambda: ctc(PACKED, CTC_LABELS, CTC_LENGTHS[:, None]), ValueError, r"last axis: label_lengths\[:, 0\]"),
        (lambda: ctc(PACKED, CTC_LABELS[:, 0], CTC_LENGTHS), ValueError, "one after the other.*pad_sequence"),
        (lambda: ctc(PACKED, CTC_LABELS, CTC_LENGTHS, LABELS), TypeError, "weights must be one per sequence"),
        (lambda: ctc(PACKED, CTC_LABELS, CTC_LENGTHS + 1), ValueError, r"label_lengths\[1\] = 4"),
        (lambda: ctc(PACKED, CTC_LABELS, [3, 3, 2, 1]), ValueError, r"labels\[0, 2\] = 77"),
        (
            lambda: ctc(PACKED, CTC_LABELS, CTC_LENGTHS, blank_id=2),
            ValueError,
            r"not be the blank 2, got labels\[1, 0\]",
        ),
        (lambda: ctc(PACKED, CTC_LABELS, CTC_LENGTHS, blank_id=4), ValueError, "blank_id = 4 is none of the 4"),
        (lambda: ctc(PACKED, CTC_LABELS, CTC_LENGTHS, frames_per_step=3), ValueError, "frames_per_step = 3"),
    ],
)
def test_errors_name_arguments_that_do_not_match(call, error, message):
    with pytest.raises(error, match=message):
        call()


def column(packed):
    return packed.replace(data=packed.data[:, None])


@pytest.mark.parametrize(
    "call", [lambda labels: ctc(PACKED, labels, [2, 1, 1, 1]), lambda labels: ctc_min_frames(labels, [2, 1, 1, 1])]
)
@pytest.mark.parametrize("row", [list, np.array, jnp.array])
def test_ragged_lists_of_labels_are_told_to_be_padded(call, row):
    labels = [row([1, 2]), row([3]), row([3]), row([3])]
    with pytest.raises(ValueError, match=r"jaxpack.pad_sequence\(labels, batch_first=True\).*label_lengths"):
        call(labels)
    call(jaxpack.pad_sequence(labels, batch_first=True))


@pytest.mark.parametrize("mean_of", [sequence_cross_entropy, accuracy], ids=["loss", "accuracy"])
@pytest.mark.parametrize("labels", [[], np.zeros(0), np.zeros(0, int)], ids=["list", "floats", "integers"])
def test_a_batch_of_no_sequences_is_a_mean_of_nothing(mean_of, labels):
    mean = mean_of(jnp.ones((0, C)), labels, weights=np.ones(0))
    assert (mean.total, mean.weight, mean.value) == (0, 0, 0)


def test_logits_of_one_class_have_no_loss():
    logits = pack(1e4 * logits_batch(features=1, dtype=np.float32))
    mean, gradient = total_and_gradient(lambda packed, _: tokens(packed, pack(np.zeros((4, 6), int))), logits)
    assert (mean.total, mean.weight) == (0, 10)
    assert not gradient.any()


@pytest.mark.parametrize("bad", [-1, 4])
def test_a_traced_label_that_is_no_class_makes_the_loss_and_its_gradient_nan(bad):
    logits = logits_batch()[:, 0]
    run = jax.jit(jax.value_and_grad(lambda x, labels: sequence_cross_entropy(x, labels).value))
    value, gradient = run(logits, jnp.array([0, bad, 1, 2]))
    assert np.isnan(value)
    assert np.isnan(gradient[1]).all()


@pytest.mark.parametrize(("row", "length"), [([0, 1, 1], 2), ([4, 1, 1], 2), ([1, 1, 1], 4), ([1, 1, 1], -1)])
def test_a_traced_ctc_label_or_length_out_of_range_makes_the_loss_nan(row, length):
    labels, lengths = jnp.asarray(ALIGNABLE).at[1].set(jnp.array(row)), jnp.asarray(CTC_LENGTHS).at[1].set(length)
    assert np.isnan(TRACED_CTC(PACKED, labels, lengths))


TRACED_CTC = jax.jit(lambda *args: ctc(*args).value)


def test_losses_of_no_packed_sequences_are_means_of_nothing():
    logits = jaxpack.pack_padded_sequence(jnp.ones((0, 4, 3)), [], batch_first=True)
    labels = logits.map(lambda data: jnp.zeros(len(data), int))
    for mean in (token_cross_entropy(logits, labels), ctc(logits, jnp.ones((0, 2), int), jnp.zeros(0, int))):
        assert (mean.total, mean.weight, mean.value) == (0, 0, 0)


def test_outside_jit_a_loss_or_metric_is_one_program():
    logits = pack_padded_sequence(jnp.ones((2, 4, 3)), [4, 2], batch_first=True)
    labels = logits.map(lambda data: jnp.ones(len(data), int))
    weights = logits.map(lambda data: data[:, 0])
    rows, classes, columns = jnp.ones((2, 3)), jnp.ones(2, int), jnp.ones((2, 1), int)
    calls = {
        "tokens": lambda: token_cross_entropy(logits, labels),
        "weighted tokens": lambda: token_cross_entropy(logits, labels, weights, ignore_label=2),
        "sequences": lambda: sequence_cross_entropy(rows, classes, classes),
        "accuracy": lambda: accuracy(logits, labels),
        "ctc": lambda: ctc(logits, columns, classes),
        "frames": lambda: ctc_min_frames(columns, classes),
        "decoding": lambda: ctc_greedy_decode(logits),
    }
    for name, call in calls.items():
        assert [eqn.primitive.name for eqn in jax.make_jaxpr(call)().eqns] == ["jit"], name


@pytest.mark.optimized
def test_a_loss_does_not_wait_for_its_logits():
    logits = pack_padded_sequence(jnp.ones((2, 4, 3)), [4, 2], batch_first=True)
    labels = logits.map(lambda data: jnp.ones(len(data), int))
    wait = jax.jit(lambda d, x: d + lax.fori_loop(0, 300, lambda _, y: jnp.tanh(y @ y), x).sum() * 0)
    slow = wait.lower(logits.data, jnp.zeros((500, 500))).compile()
    expected = token_cross_entropy(logits, labels), accuracy(logits, labels)
    jax.block_until_ready((expected, labels))
    late = logits.replace(data=slow(logits.data, jnp.zeros((500, 500))))
    means = token_cross_entropy(late, labels), accuracy(late, labels)
    assert not late.data.is_ready()
    jax.tree.map(np.testing.assert_allclose, means, expected)
    with pytest.raises(ValueError, match=r"labels.data must be in 0 to 2.*got labels.data\[0\] = 3"):
        token_cross_entropy(late, labels + 2)
