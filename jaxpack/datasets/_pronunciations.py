"""The CMU Pronouncing Dictionary: English words, and the phonemes that they are spoken with."""

from __future__ import annotations

import hashlib
import importlib.resources
import lzma
from typing import NamedTuple

Pronunciation = tuple[str, ...]
_STRESS = "012"  # none, primary, secondary: the digit that ends each vowel


class Pronunciations(NamedTuple):
    """Words, with all the ways to say each.

    Examples:
      >>> words = Pronunciations(["a"], [[("AH0",), ("EY1",)]])
      >>> words.without_stress().pronunciations
      [[('AH',), ('EY',)]]

    Attributes:
      words: in lower case.
      pronunciations: of each word one or more, the usual one first.
    """

    words: list[str]
    pronunciations: list[list[Pronunciation]]

    def without_stress(self) -> Pronunciations:
        """The same words with bare vowels (AH for AH0, AH1 and AH2); what then sounds alike is listed once."""
        bare = [[tuple(p.rstrip(_STRESS) for p in spoken) for spoken in ways] for ways in self.pronunciations]
        return Pronunciations(self.words, [list(dict.fromkeys(ways)) for ways in bare])


def cmudict() -> tuple[Pronunciations, Pronunciations, Pronunciations]:
    """The CMU Pronouncing Dictionary: how are 126,052 English words spoken?

    Vowels end in their stress, 0, 1 or 2, which `without_stress` takes off: 39 phonemes remain.

    Examples:
      >>> train, valid, test = cmudict()
      >>> train.pronunciations[train.words.index("either")]
      [('IY1', 'DH', 'ER0'), ('AY1', 'DH', 'ER0')]

    Returns:
      Nine tenths of the words to train on, and twice a twentieth to validate and to test on, in the order of the
      dictionary, in lists of the caller's own. A hash of the word alone says where it goes, so the split is the same
      everywhere and for good; all pronunciations of a word go with it.
    Source: Carnegie Mellon University, <https://github.com/cmusphinx/cmudict>, under the licence that is written in
      cmudict.md, beside the data.
    """
    train, valid, test = splits = [Pronunciations([], []) for _ in range(3)]
    for word, ways in _read().items():
        split = splits[_split_of(word)]
        split.words.append(word)
        split.pronunciations.append(ways)
    return train, valid, test


def _read() -> dict[str, list[Pronunciation]]:
    """All pronunciations of each word; a line is `word PH ON EMES # remark`, further ones of a word `word(2) ...`."""
    file = importlib.resources.files("jaxpack.datasets") / "cmudict.dict.xz"
    ways: dict[str, list[Pronunciation]] = {}
    for line in lzma.decompress(file.read_bytes()).decode().splitlines():
        entry, *phonemes = line.partition("#")[0].split()
        ways.setdefault(entry.partition("(")[0], []).append(tuple(phonemes))
    return {word: list(dict.fromkeys(each)) for word, each in ways.items()}


def _split_of(word: str) -> int:
    """0 to train, 1 to validate, 2 to test: a fixed function of the word, 18, 1 and 1 in 20."""
    digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
    return max(0, int.from_bytes(digest) % 20 - 17)
