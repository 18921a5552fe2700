"""Metrics: accuracy, perplexity, greedy decoding, edit distances and error rates."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpack import BucketPlan, pack_padded_sequence, unpad_sequence
from jaxpack.losses import Mean, token_cross_entropy
from jaxpack.metrics import accuracy, best_error_rate, ctc_greedy_decode, edit_distance, error_rate, perplexity

LENGTHS = [2, 4, 0, 1]
PLAN = BucketPlan((3, 5), (4, 1))
ROWS = BucketPlan((9,), (2,), ((0, 5), (0, 5)))
on_each_plan = pytest.mark.parametrize("plan", [PLAN, ROWS], ids=["stairs", "rows"])


def pack(batch, lengths=LENGTHS, plan=PLAN):
    return pack_padded_sequence(batch, lengths, batch_first=True, plan=plan)


def test_perplexity_of_equal_logits_is_the_number_of_classes():
    logits, labels = pack(jnp.zeros((4, 5, 7))), pack(jnp.ones((4, 5), int))
    run = jax.jit(lambda *args: perplexity(token_cross_entropy(*args)))
    np.testing.assert_allclose(run(logits, labels), 7, rtol=1e-6)


def test_perplexity_of_nothing_is_nan():
    nothing = token_cross_entropy(pack(jnp.zeros((4, 5, 7))), pack(jnp.ones((4, 5), int)), np.zeros(4))
    assert np.isnan(perplexity(nothing))
    assert perplexity(Mean(1.0, 0)) == np.inf
    assert perplexity(nothing + Mean(0.0, 1)) == 1


@pytest.mark.parametrize("rate", [lambda a, b: error_rate([a], [b]), lambda a, b: best_error_rate([a], [[b]])])
def test_edits_without_reference_tokens_are_an_infinite_rate(rate):
    assert rate("abc", "").value == np.inf
    assert rate("", "").value == 0
    assert (rate("abc", "") + rate("ab", "ab")).value == 1.5


def test_accuracy_of_nothing_is_zero():
    mean = accuracy(jnp.ones((2, 3)), jnp.zeros(2, int), jnp.zeros(2))
    assert (mean.total, mean.weight, mean.value) == (0, 0, 0)


# Accuracy


@on_each_plan
def test_accuracy_of_tokens_equals_numpy(plan):
    batch = oracles.random_batch(LENGTHS, 3, dtype=np.float32, extra=1)
    labels = np.random.default_rng(0).integers(0, 3, batch.shape[:2])
    weights = np.array([0.5, 1, 2, 3])
    real = np.arange(batch.shape[1]) < np.array(LENGTHS)[:, None]
    hits = (np.nan_to_num(batch).argmax(-1) == labels) & real
    mean = jax.jit(accuracy)(pack(batch, plan=plan), pack(labels, plan=plan), weights)
    assert mean.total == (weights[:, None] * hits).sum() > 0
    assert mean.weight == (weights[:, None] * real).sum()


def test_accuracy_of_sequences_leaves_rows_of_weight_zero_out():
    logits = jnp.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [jnp.nan, jnp.nan]])
    mean = accuracy(logits, jnp.array([1, 1, 1, -1]), jnp.array([1, 1, 1, 0]))
    assert (mean.total, mean.weight) == (2, 3)
    assert np.isnan(accuracy(logits, jnp.ones(4, int)).value)


def test_accuracy_is_inert_to_slack_and_nan_for_misfits():
    batch, labels = jnp.ones((4, 5, 3)), jnp.zeros((4, 5), int)
    packed = pack(batch)
    dirty = packed.replace(data=jnp.where(packed.mask[:, None], packed.data, jnp.nan))
    assert accuracy(dirty, pack(labels)).value == 1
    run = jax.jit(lambda lengths: accuracy(pack(batch, lengths), pack(labels, lengths)).value)
    assert np.isnan(run(jnp.array([2, 6, 0, 1])))
    assert run(jnp.array([2, 4, 0, 1])) == 1


@pytest.mark.parametrize("swap", [False, True])
def test_accuracy_refuses_packed_beside_padded(swap):
    logits, labels = pack(jnp.ones((4, 5, 3))), pack(jnp.zeros((4, 5), int))
    pair = (logits.data, labels) if swap else (logits, labels.data)
    with pytest.raises(TypeError, match=r"accuracy.*PackedSequence"):
        accuracy(*pair)


# Decoding


def best_path(frames, blank):
    return [int(k) for k, _ in itertools.groupby(frames.argmax(-1)) if k != blank]


@on_each_plan
@pytest.mark.parametrize(("frames_per_step", "blank"), [(1, 0), (3, 2)])
def test_greedy_decoding_merges_repeats_and_drops_blanks(plan, frames_per_step, blank):
    decode = jax.jit(lambda p: ctc_greedy_decode(p, blank_id=blank, frames_per_step=frames_per_step))
    for seed in range(4):
        batch = oracles.random_batch(LENGTHS, 3 * frames_per_step, seed, np.float32, extra=1)
        packed = pack(batch, plan=plan)
        dirty = packed.replace(data=jnp.where(packed.mask[:, None], packed.data, jnp.nan))
        labels, lengths = decode(dirty)
        assert labels.shape == (4, plan.max_length * frames_per_step)
        for row, length in enumerate(LENGTHS):
            frames = batch[row, :length].reshape(-1, 3)
            assert labels[row, : lengths[row]].tolist() == best_path(frames, blank)
            assert (labels[row, lengths[row] :] == blank).all()


def test_greedy_decoding_of_an_example():
    path = jnp.array([[1, 1, 0, 1, 2, 2]])
    labels, lengths = jax.jit(ctc_greedy_decode)(pack_padded_sequence(jnp.eye(3)[path], [6], batch_first=True))
    assert labels.tolist() == [[1, 1, 2, 0, 0, 0]]
    assert [row.tolist() for row in unpad_sequence(labels, lengths, True)] == [[1, 1, 2]]


def test_greedy_decoding_of_stacked_batches_promotes_no_ranks():
    packed = pack(oracles.random_batch(LENGTHS, 3, dtype=np.float32, extra=1))
    stacked = jnp.stack([packed.data, -packed.data])
    with jax.numpy_rank_promotion("raise"):
        labels, lengths = jax.jit(jax.vmap(lambda data: ctc_greedy_decode(packed.replace(data=data))))(stacked)
    for i in range(2):
        expected = ctc_greedy_decode(packed.replace(data=stacked[i]))
        assert (labels[i] == expected[0]).all()
        assert (lengths[i] == expected[1]).all()


def test_greedy_decoding_of_a_traced_misfit_has_length_minus_one():
    run = jax.jit(lambda lengths: ctc_greedy_decode(pack(jnp.ones((4, 5, 3)), lengths), blank_id=1)[1])
    assert run(jnp.array([2, 6, 0, 1])).tolist() == [1, -1, 0, 1]


# Edit distance


def dynamic_programme(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, above = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


words = st.lists(st.integers(0, 3), max_size=8)


@settings(max_examples=100)
@given(words, words)
def test_edit_distance_equals_the_dynamic_programme(a, b):
    assert edit_distance(a, b) == dynamic_programme(a, b)


def test_edit_distance_takes_strings_tokens_and_arrays():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance(["HH", "AH", "L"], ("HH", "EH", "L", "OW")) == 2
    assert edit_distance(jnp.array([1, 2, 300]), np.array([1, 300], np.int64)) == 1
    assert edit_distance(np.array([1, 2], np.int32), [1, 2]) == 0


def as_items(kind):
    """The numbers of a list as elements of a kind, as they come out of iterating over an array."""
    if kind == "torch":
        return lambda tokens: list(pytest.importorskip("torch").tensor(tokens))
    return lambda tokens: [kind(token) for token in tokens]


each_kind_of_item = pytest.mark.parametrize(
    "kind",
    [np.array, jnp.array, np.int64, np.uint8, float, jnp.bfloat16, "torch"],
    ids=["np.array", "jnp.array", "int64", "uint8", "float", "bfloat16", "torch"],
)


@each_kind_of_item
def test_equal_numbers_of_any_type_are_equal_tokens(kind):
    items = as_items(kind)
    assert edit_distance(items([1, 2, 30]), [1, 30]) == 1
    assert edit_distance([1, 2, 30], items([1, 2, 3])) == 1
    assert edit_distance([*items([1, 2]), 3], [1, *items([2, 3])]) == 0
    assert error_rate([items([1, 2])], [[1, 2]]).total == 0
    assert best_error_rate([[1, 2]], [[items([1, 3]), items([1, 2])]]).total == 0


@pytest.mark.parametrize(
    ("hypothesis", "reference", "edits"),
    [
        (["a"], [97], 1),  # rapidfuzz alone takes a character for its code point,
        ([-1], [-2], 1),  # and in Python these two have one hash,
        ([0], [2**61 - 1], 1),  # as these
        ("abc", ["a", "b", "c"], 0),
        ("ab", ["ab"], 2),
        (["the", "cat"], ("the", "hat"), 1),
        ([("AH", 1)], [("AH", 0)], 1),
        (np.array(["HH", "AH"]), ["HH"], 1),
        (np.array([1.0, 2.0]), [1, 3], 1),
        (map(int, "123"), [1, 2, 3], 0),
        (b"ab", b"b", 1),
        ([], "", 0),
        (np.zeros(0), [1], 1),
    ],
)
def test_tokens_are_compared_as_python_compares_them(hypothesis, reference, edits):
    assert edit_distance(hypothesis, reference) == edits


each_rate = pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda tokens: edit_distance(tokens, [1]), "hypothesis"),
        (lambda tokens: edit_distance([1], tokens), "reference"),
        (lambda tokens: error_rate([[1], tokens], [[1], [1]]), r"hypotheses\[1\]"),
        (lambda tokens: error_rate([[1], [1]], [[1], tokens]), r"references\[1\]"),
        (lambda tokens: best_error_rate([[1]], [[[1], tokens]]), r"references\[0\]\[1\]"),
    ],
    ids=["hypothesis", "reference", "hypotheses", "references", "alternatives"],
)


@each_rate
@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([1, [2, 3]], ValueError, r"\[1\] must be one token, got the list \[2, 3\]"),
        ([np.ones(2)], ValueError, r"\[0\] must be one token, got the ndarray"),
        (np.ones((2, 2)), ValueError, r" must be a vector, got shape \(2, 2\)"),
        (jnp.ones(()), ValueError, r" must be a vector, got shape \(\)"),
        ([1, 0.5], ValueError, r"\[1\] = 0.5 is no whole number"),
        (np.array([np.nan]), ValueError, r"\[0\] = nan is no whole number"),
        (7, TypeError, " must be a string, or a list or vector of tokens, got 7"),
        (None, TypeError, " must be a string, or a list or vector of tokens, got None"),
        ({1, 2}, TypeError, " must be a string, or a list or vector of tokens, got {1, 2}"),
    ],
)
def test_errors_name_the_argument_that_is_not_a_sequence_of_tokens(call, name, tokens, error, message):
    with pytest.raises(error, match=f"^{name}{message}"):
        call(tokens)


def test_error_rate_is_edits_over_the_tokens_of_references():
    mean = error_rate(["ab", "c", ""], ["abc", "c", "d"])
    assert (mean.total, mean.weight) == (2, 5)
    np.testing.assert_allclose(sum([mean, error_rate([[1]], [np.array([1, 2, 3])])], Mean()).value, 4 / 8)
    assert error_rate([], []).value == 0
    assert error_rate(["a"], [""]).total == 1
    assert error_rate(map(str, [12, 3]), iter(["1", "3"])).total == 1
    assert error_rate(np.array([[1, 2], [3, 4]]), jnp.array([[1, 2], [3, 3]])).total == 1


def test_best_error_rate_takes_the_closest_reference_and_of_equals_the_longest():
    mean = best_error_rate(["aab", "x"], [["b", "ab", "aabb"], ["xyz", "x"]])
    assert (mean.total, mean.weight) == (1, 5)
    assert isinstance(mean, Mean)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: error_rate("abc", ["abc"]), TypeError, "hypotheses must be a list of sequences, got the string 'abc'"),
        (lambda: error_rate(["abc"], "abc"), TypeError, "references must be a list"),
        (lambda: error_rate(["a", "b"], ["a"]), ValueError, "2 hypotheses for 1 references"),
        (lambda: best_error_rate(["a"], [[]]), ValueError, r"references\[0\] is empty"),
        (lambda: best_error_rate(["a"], ["a"]), TypeError, r"references\[0\] must be a list of sequences"),
        (lambda: error_rate({"a": 1}, ["a"]), TypeError, "hypotheses must be a list of sequences, got {'a': 1}"),
        (lambda: error_rate(["a"], 7), TypeError, "references must be a list of sequences, got 7"),  # type: ignore[arg-type]
        (lambda: error_rate(pack(np.ones((4, 5))), ["a"]), TypeError, "got a PackedSequence .jaxpack.unpack_sequence"),
    ],
)
def test_error_rates_name_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_without_rapidfuzz_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance.Levenshtein", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxpack\[data\]'"):
        edit_distance("a", "b")


def test_decoding_no_sequences_gives_none():
    logits = pack_padded_sequence(jnp.ones((0, 4, 6)), [], batch_first=True)
    labels, lengths = ctc_greedy_decode(logits, frames_per_step=2)
    assert labels.shape == (0, 8)
    assert lengths.shape == (0,)
