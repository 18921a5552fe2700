"""Edit distances and error rates."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jaxpack._dtypes import without_torch
from jaxpack._extras import import_extra
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack.losses import Mean

Tokens = str | list[Any]


def edit_distance(hypothesis: Sequence[Any] | ArrayLike, reference: Sequence[Any] | ArrayLike) -> int:
    """Counts the fewest insertions, deletions and substitutions that turn one sequence into the other.

    Examples:
      >>> edit_distance("kitten", "sitting")
      3
      >>> edit_distance([1, 2, 3], jnp.array([1, 3]))
      1

    Args:
      hypothesis: a string, which is a sequence of characters; or a list or vector of tokens: whole numbers (also as 0-d
        arrays, or as floats), strings, or other hashable values. Tokens are compared by ==.
      reference: another one.

    Raises:
      ImportError: if rapidfuzz is not installed.
      TypeError: if one is not a sequence.
      ValueError: if one is nested (an array of more axes, a list of lists), or a number is not whole.
    Source: Levenshtein 1966; rapidfuzz.distance.Levenshtein.
    """
    return _distance(_tokens("hypothesis", hypothesis), _tokens("reference", reference))


def error_rate(hypotheses: Iterable[Any], references: Iterable[Any]) -> Mean:
    """Computes edits per reference token (phoneme, character, word) over all sequences.

    Examples:
      >>> error_rate(["ab", "c"], ["abc", "c"])
      Mean(total=1, weight=4)

    Args:
      hypotheses: sequences as `edit_distance` takes them.
      references: one for each hypothesis. For several right answers each use `best_error_rate`.

    Raises:
      ImportError: if rapidfuzz is not installed.
      ValueError: if the numbers of references and hypotheses differ, or as `edit_distance`.
      TypeError: if an argument is not a list of sequences, but for example a string.
    """
    guesses, answers = _all_tokens("hypotheses", hypotheses), _all_tokens("references", references)
    return _best(guesses, [[answer] for answer in answers])


def best_error_rate(hypotheses: Iterable[Any], references: Iterable[Iterable[Any]]) -> Mean:
    """Computes `error_rate` with the closest of several references for each hypothesis.

    Examples:
      >>> best_error_rate(["aab"], [["ab", "aabb"]])
      Mean(total=1, weight=4)

    Args:
      hypotheses: sequences as `edit_distance` takes them.
      references: for each hypothesis a list of one or more alternatives, such as the pronunciations of a word. The one
        with the fewest edits counts; of equals, the longest.

    Raises:
      ImportError: if rapidfuzz is not installed.
      ValueError: if the numbers of references and hypotheses differ, a hypothesis has none, or as `edit_distance`.
      TypeError: if an argument is not a list of sequences, but for example a string.
    """
    guesses = _all_tokens("hypotheses", hypotheses)
    groups = enumerate(_as_list("references", references))
    return _best(guesses, [_all_tokens(f"references[{i}]", alternatives) for i, alternatives in groups])


def _best(hypotheses: list[Tokens], references: list[list[Tokens]]) -> Mean:
    """Returns the edits from each hypothesis to the closest of its references, with the tokens of those."""
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
    # Tokens are numbered, because rapidfuzz compares hashes, and takes "a" for its code point 97.
    numbers: dict[Any, int] = {}
    pair = [[numbers.setdefault(token, len(numbers)) for token in tokens] for tokens in (hypothesis, reference)]
    return levenshtein.distance(*pair)


def _all_tokens(name: str, sequences: Any) -> list[Tokens]:
    return [_tokens(f"{name}[{i}]", sequence) for i, sequence in enumerate(_as_list(name, sequences))]


def _tokens(name: str, sequence: Any) -> Tokens:
    """Returns a string unchanged, and anything else as a list of hashable values."""
    if isinstance(sequence, str):
        return sequence
    sequence = without_torch(sequence)
    if getattr(sequence, "ndim", 1) != 1:
        raise ValueError(f"{name} must be a vector, got shape {sequence.shape}. Use error_rate for several sequences.")
    if isinstance(sequence, (Mapping, Set)) or not isinstance(sequence, Iterable):
        raise TypeError(f"{name} must be a string, or a list or vector of tokens, got {sequence!r}.")
    tokens = np.asarray(sequence).tolist() if hasattr(sequence, "ndim") else sequence
    return [_token(f"{name}[{i}]", token) for i, token in enumerate(tokens)]


def _token(name: str, token: Any) -> Any:
    """Returns a hashable value; a Python number for an array without axes."""
    token = without_torch(token)
    if getattr(token, "ndim", None) == 0:
        token = np.asarray(token).item()
    if isinstance(token, float) and not token.is_integer():
        raise ValueError(f"{name} = {token} is no whole number. Tokens are whole numbers, strings or other hashables.")
    if not isinstance(token, Hashable) or hasattr(token, "ndim"):
        raise ValueError(
            f"{name} must be one token, got the {type(token).__name__} {token!r}. Use error_rate for several sequences."
        )
    return token


def _as_list(name: str, sequences: Any) -> list[Any]:
    """Returns a list of sequences; raises TypeError for a string, a PackedSequence, or a value without order."""
    if isinstance(sequences, str):
        raise TypeError(f"{name} must be a list of sequences, got the string {sequences!r}.")
    if isinstance(sequences, PackedSequence):
        raise TypeError(f"{name} must be a list of sequences, got a PackedSequence (jaxpack.unpack_sequence unpacks).")
    if isinstance(sequences, (Mapping, Set)) or not isinstance(sequences, Iterable):
        raise TypeError(f"{name} must be a list of sequences, got {sequences!r}.")
    return list(sequences)
