"""The CMU Pronouncing Dictionary: English words with their phonemes."""

from __future__ import annotations

import hashlib
import importlib.resources
import lzma
from typing import NamedTuple

Pronunciation = tuple[str, ...]
_STRESS = "012"  # the digit at the end of each vowel: none, primary, secondary


class Pronunciations(NamedTuple):
    """Words with all their pronunciations.

    Examples:
      >>> words = Pronunciations(["a"], [[("AH0",), ("EY1",)]])
      >>> words.without_stress().pronunciations
      [[('AH',), ('EY',)]]

    Attributes:
      words: the words, in lower case.
      pronunciations: one or more for each word, the usual one first.
    """

    words: list[str]
    pronunciations: list[list[Pronunciation]]

    def without_stress(self) -> Pronunciations:
        """Returns the words with bare vowels (AH for AH0, AH1 and AH2), without repeated pronunciations."""
        bare = [[tuple(p.rstrip(_STRESS) for p in spoken) for spoken in ways] for ways in self.pronunciations]
        return Pronunciations(self.words, [list(dict.fromkeys(ways)) for ways in bare])


def cmudict() -> tuple[Pronunciations, Pronunciations, Pronunciations]:
    """Loads the CMU Pronouncing Dictionary: 126,052 English words with their phonemes.

    Vowels end in their stress, 0, 1 or 2. `without_stress` removes it: 39 phonemes remain.

    Examples:
      >>> train, valid, test = cmudict()
      >>> train.pronunciations[train.words.index("either")]
      [('IY1', 'DH', 'ER0'), ('AY1', 'DH', 'ER0')]

    Returns:
      Nine tenths of the words to train on, and a twentieth each to validate and to test on, in the order of the
      dictionary. The lists are new in each call. A hash of the word alone determines its split, so the splits never
      change; all pronunciations of a word are in the same one.
    Source: Carnegie Mellon University, <https://github.com/cmusphinx/cmudict>, under the licence in cmudict.md, beside
      the data.
    """
    train, valid, test = splits = [Pronunciations([], []) for _ in range(3)]
    for word, ways in _read().items():
        split = splits[_split_of(word)]
        split.words.append(word)
        split.pronunciations.append(ways)
    return train, valid, test


def _read() -> dict[str, list[Pronunciation]]:
    """Reads all pronunciations of each word from lines `word PH ON EMES # remark`, the second `word(2) ...`."""
    file = importlib.resources.files("jaxpack.datasets") / "cmudict.dict.xz"
    ways: dict[str, list[Pronunciation]] = {}
    for line in lzma.decompress(file.read_bytes()).decode().splitlines():
        entry, *phonemes = line.partition("#")[0].split()
        ways.setdefault(entry.partition("(")[0], []).append(tuple(phonemes))
    return {word: list(dict.fromkeys(each)) for word, each in ways.items()}


def _split_of(word: str) -> int:
    """Returns the split of a word: 0 to train, 1 to validate, 2 to test, for 18, 1 and 1 words in 20."""
    digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
    return max(0, int.from_bytes(digest) % 20 - 17)
