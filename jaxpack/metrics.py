"""Metrics of packed outputs and of decoded sequences, each a `jaxpack.losses.Mean`, so that those of batches add up."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxpack.extras import import_extra
from jaxpack.inputs import without_torch
from jaxpack.losses import Mean
from jaxpack.losses._ctc import check_frames, split_frames
from jaxpack.losses._weighted import over_sequences, over_tokens
from jaxpack.packed import pad_packed_sequence
from jaxpack.sequence import PackedSequence, poison

__all__ = ["accuracy", "best_error_rate", "ctc_greedy_decode", "edit_distance", "error_rate", "perplexity"]

Tokens = str | list[Any]


def perplexity(mean: Mean) -> jax.Array:
    """Returns exp of a mean cross-entropy, such as token_cross_entropy's: of C classes all as likely it is C.

    Examples:
      >>> round(float(perplexity(Mean(2 * np.log(8), 2))), 3)
      8.0
      >>> float(perplexity(Mean(0.0, 0)))
      nan

    Args:
      mean: of a cross-entropy in nats.

    Returns:
      exp(mean.value); NaN for a mean of nothing (weight 0, total 0), where exp(0) = 1 would be a perfect score.
    """
    nothing = (jnp.asarray(mean.weight) == 0) & (jnp.asarray(mean.total) == 0)
    return jnp.where(nothing, jnp.nan, jnp.exp(mean.value))


def accuracy(
    logits: PackedSequence | ArrayLike,
    labels: PackedSequence | ArrayLike,
    weights: ArrayLike | PackedSequence | None = None,
    *,
    ignore_label: int | None = None,
) -> Mean:
    """The share of tokens, or of sequences, whose largest logit is the label's; of equal logits the first is taken.

    Examples:
      >>> labels = jaxpack.pack_sequence([[1, 2, 3], [4]])
      >>> logits = labels.replace(data=np.eye(5)[[1, 4, 2, 0]])  # labels.data is [1, 4, 2, 3]
      >>> mean = jax.jit(accuracy)(logits, labels)
      >>> float(mean.total), float(mean.weight)
      (3.0, 4.0)

    Args:
      logits: packed data [S, C] for tokens; an array [B, C] for sequences. NaN in what counts makes the result NaN.
      labels: whole numbers in [0, C): packed alike, data [S]; or [B].
      weights: [B], in the caller's order, the weight of a sequence or of each of its tokens; or of each token, data
        [S], packed as the logits are. Default: 1.
      ignore_label: a label that counts for nothing, as in jaxpack.losses.token_cross_entropy. Default: none.

    Raises:
      TypeError: as jaxpack.losses.token_cross_entropy and sequence_cross_entropy.
      ValueError: as those.
    """
    over = over_tokens if isinstance(logits, PackedSequence) else over_sequences
    return over(_hits, logits, labels, weights, ignore_label, "accuracy")


def ctc_greedy_decode(
    logits: PackedSequence, *, blank_id: int = 0, frames_per_step: int = 1
) -> tuple[jax.Array, jax.Array]:
    """The labels of each sequence's best path: the likeliest class of each frame, repeats merged, blanks removed.

    Examples:
      >>> frames = np.eye(3)[[1, 1, 0, 1, 2, 2]]  # a a _ a b b, where _ is the blank
      >>> labels, lengths = jax.jit(ctc_greedy_decode)(jaxpack.pack_sequence([frames]))
      >>> labels.tolist(), lengths.tolist()
      ([[1, 1, 2, 0, 0, 0]], [3])

    Args:
      logits: floating data [S, K * C], for K frames a step, as for jaxpack.losses.ctc.
      blank_id: the class that stands for no label.
      frames_per_step: K.

    Returns:
      int32 [B, plan.max_length * K], labels from the left and blank_id past them; and int32 [B], how many there are,
      -1 for a sequence that does not fit its plan. As a list: jaxpack.unpad_sequence(labels, lengths, True).

    Raises:
      TypeError: if logits are not packed, or not floating.
      ValueError: if K does not divide the features, or blank_id is no class.
    Source: Graves et al., Connectionist temporal classification, ICML 2006, "best path decoding".
    """
    return _greedy_decode(*check_frames(logits, blank_id, frames_per_step, "ctc_greedy_decode"))


@functools.partial(jax.jit, static_argnames=("blank_id", "frames_per_step"))
def _greedy_decode(logits: PackedSequence, blank_id: int, frames_per_step: int) -> tuple[jax.Array, jax.Array]:
    """`ctc_greedy_decode`, checked."""
    frames = split_frames(logits.data, frames_per_step)
    classes = logits.replace(data=jnp.argmax(frames, -1).astype(jnp.int32))
    path = pad_packed_sequence(classes, batch_first=True, padding_value=blank_id)[0]
    path = path.reshape(len(path), logits.plan.max_length * frames_per_step)
    starts = jnp.pad(path[:, 1:] != path[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    kept = starts & (path != blank_id)
    places = jnp.where(kept, jnp.cumsum(kept, 1) - 1, path.shape[1])
    labels = lax.full_like(path, blank_id).at[jnp.arange(len(path))[:, None], places].set(path, mode="drop")
    return labels, jnp.where(logits.fits, kept.sum(1), -1).astype(jnp.int32)


def edit_distance(hypothesis: Sequence[Any] | ArrayLike, reference: Sequence[Any] | ArrayLike) -> int:
    """Returns the fewest insertions, deletions and substitutions that turn one sequence into the other.

    Examples:
      >>> edit_distance("kitten", "sitting")
      3
      >>> edit_distance([1, 2, 3], jnp.array([1, 3]))
      1

    Args:
      hypothesis: a string, which is the sequence of its characters; or a list or vector of tokens: whole numbers (also
        as 0-d arrays, or as floats), strings, or whatever else has a hash. Tokens are compared by ==.
      reference: another.

    Raises:
      ImportError: if rapidfuzz is not installed.
      TypeError: if one is no sequence.
      ValueError: if one is nested (an array is no vector, a list holds lists), or a number is not whole.
    Source: Levenshtein 1966; rapidfuzz.distance.Levenshtein.
    """
    return _distance(_tokens("hypothesis", hypothesis), _tokens("reference", reference))


def error_rate(hypotheses: Sequence[Any], references: Sequence[Any]) -> Mean:
    """Edits over all sequences, beside the tokens of all references: a rate per token (phoneme, character, word).

    Examples:
      >>> error_rate(["ab", "c"], ["abc", "c"])
      Mean(total=1, weight=4)

    Args:
      hypotheses: sequences as `edit_distance` takes them.
      references: as many. For several right answers to each use `best_error_rate`.

    Raises:
      ImportError: if rapidfuzz is not installed.
      ValueError: if there are not as many references as hypotheses, or as `edit_distance`.
      TypeError: if one is no list of sequences, such as a bare string.
    """
    guesses, answers = _all_tokens("hypotheses", hypotheses), _all_tokens("references", references)
    return _best(guesses, [[answer] for answer in answers])


def best_error_rate(hypotheses: Sequence[Any], references: Sequence[Sequence[Any]]) -> Mean:
    """As `error_rate`, where each hypothesis is held against the closest of several references.

    Examples:
      >>> best_error_rate(["aab"], [["ab", "aabb"]])
      Mean(total=1, weight=4)

    Args:
      hypotheses: sequences as `edit_distance` takes them.
      references: for each a list of one or more alternatives, such as the pronunciations of a word. The one of fewest
        edits counts, of several such the longest.

    Raises:
      ImportError: if rapidfuzz is not installed.
      ValueError: if there are not as many references as hypotheses, a hypothesis has none, or as `edit_distance`.
      TypeError: if one is no list of sequences, such as a bare string.
    """
    guesses = _all_tokens("hypotheses", hypotheses)
    groups = enumerate(_as_list("references", references))
    return _best(guesses, [_all_tokens(f"references[{i}]", alternatives) for i, alternatives in groups])


def _best(hypotheses: list[Tokens], references: list[list[Tokens]]) -> Mean:
    """The edits from each hypothesis to the closest of its references, beside the tokens of those."""
    if len(hypotheses) != len(references):
        raise ValueError(f"got {len(hypotheses)} hypotheses for {len(references)} references: one each is needed.")
    edits = tokens = 0
    for i, (hypothesis, alternatives) in enumerate(zip(hypotheses, references, strict=True)):
        if not alternatives:
            raise ValueError(f"references[{i}] is empty: a hypothesis needs at least one reference.")
        fewest, length = min((_distance(hypothesis, other), -len(other)) for other in alternatives)
        edits, tokens = edits + fewest, tokens - length
    return Mean(edits, tokens)


def _distance(hypothesis: Tokens, reference: Tokens) -> int:
    levenshtein = import_extra("rapidfuzz.distance.Levenshtein", "data", "edit distances")
    if isinstance(hypothesis, str) and isinstance(reference, str):
        return levenshtein.distance(hypothesis, reference)
    # By number, since rapidfuzz compares hashes, and takes "a" for its code point 97.
    numbers: dict[Any, int] = {}
    pair = [[numbers.setdefault(token, len(numbers)) for token in tokens] for tokens in (hypothesis, reference)]
    return levenshtein.distance(*pair)


def _hits(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1 where the largest logit is the label's, 0 where it is not, NaN where a logit is."""
    hits = (jnp.argmax(logits, -1) == labels).astype(logits.dtype)
    return poison(hits, ~jnp.isnan(logits).any(-1))


def _all_tokens(name: str, sequences: Any) -> list[Tokens]:
    return [_tokens(f"{name}[{i}]", sequence) for i, sequence in enumerate(_as_list(name, sequences))]


def _tokens(name: str, sequence: Any) -> Tokens:
    """A string as it is; a list of values that have a hash from anything else."""
    if isinstance(sequence, str):
        return sequence
    sequence = without_torch(sequence)
    if getattr(sequence, "ndim", 1) != 1:
        raise ValueError(f"{name} must be a vector, got shape {sequence.shape}. Many sequences go to error_rate.")
    if isinstance(sequence, (Mapping, Set)) or not isinstance(sequence, Iterable):
        raise TypeError(f"{name} must be a string, or a list or vector of tokens, got {sequence!r}.")
    tokens = np.asarray(sequence).tolist() if hasattr(sequence, "ndim") else sequence
    return [_token(f"{name}[{i}]", token) for i, token in enumerate(tokens)]


def _token(name: str, token: Any) -> Any:
    """A value that has a hash; a Python number from an array of no axes."""
    token = without_torch(token)
    if getattr(token, "ndim", None) == 0:
        token = np.asarray(token).item()
    if isinstance(token, float) and not token.is_integer():
        raise ValueError(f"{name} = {token} is no whole number. Tokens are whole numbers, strings and the like.")
    if not isinstance(token, Hashable) or hasattr(token, "ndim"):
        raise ValueError(
            f"{name} must be one token, got the {type(token).__name__} {token!r}. Many sequences go to error_rate."
        )
    return token


def _as_list(name: str, sequences: Any) -> list[Any]:
    """A list of sequences; raises TypeError for a string, which is a sequence of characters, and for what is none."""
    if isinstance(sequences, str):
        raise TypeError(f"{name} must be a list of sequences, got the string {sequences!r}.")
    if isinstance(sequences, PackedSequence):
        raise TypeError(f"{name} must be a list of sequences, got a PackedSequence (jaxpack.unpack_sequence unpacks).")
    if isinstance(sequences, (Mapping, Set)) or not isinstance(sequences, Iterable):
        raise TypeError(f"{name} must be a list of sequences, got {sequences!r}.")
    return list(sequences)
