"""The words of `jaxpack demo g2p`: letters and phonemes as numbers, and the training examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxpack.datasets import Pronunciations
from jaxpack.losses import ctc_min_frames

FRAMES_PER_LETTER = 2  # CTC emits at most one phoneme per frame: x is K S, and u may be Y UW
BLANK = 0  # the class of frames that emit no phoneme
TIME_VARYING = {"letters": True, "phonemes": False, "num_phonemes": False}  # for the leaves of a training example

Example = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Alphabets:
    """The letters and phonemes. A letter's number is its place, a phoneme's is one more, since the blank is 0."""

    letters: tuple[str, ...]
    phonemes: tuple[str, ...]

    @classmethod
    def of(cls, splits: Iterable[Pronunciations]) -> Alphabets:
        """Collects the letters and phonemes that occur in splits."""
        letters, phonemes = set[str](), set[str]()
        for split in splits:
            letters.update(*split.words)
            phonemes.update(*(spoken for ways in split.pronunciations for spoken in ways))
        return cls(tuple(sorted(letters)), tuple(sorted(phonemes)))

    @property
    def num_classes(self) -> int:
        """The number of phonemes, plus one for the blank."""
        return len(self.phonemes) + 1

    def spell(self, words: Iterable[str]) -> list[np.ndarray]:
        """Returns the letters int32 [L] of each word."""
        numbers = {letter: number for number, letter in enumerate(self.letters)}
        return [np.array([numbers[letter] for letter in word], np.int32) for word in words]

    def number(self, pronunciations: Iterable[tuple[str, ...]]) -> list[np.ndarray]:
        """Returns the phonemes int32 [N] of each pronunciation."""
        numbers = {phoneme: number for number, phoneme in enumerate(self.phonemes, start=1)}
        return [np.array([numbers[phoneme] for phoneme in spoken], np.int32) for spoken in pronunciations]

    def name(self, numbers: np.ndarray) -> tuple[str, ...]:
        """Returns the phonemes with these numbers, none of which is the blank."""
        return tuple(self.phonemes[number - 1] for number in numbers)


def training_examples(split: Pronunciations, alphabets: Alphabets) -> tuple[list[Example], int]:
    """Makes an example for each pronunciation of each word, and counts the pronunciations left out.

    Pronunciations that no alignment of CTC can emit are left out: mostly abbreviations, such as "fyi", spoken in full.

    Returns:
      Examples of letters int32 [L], phonemes int32 [N], padded to the longest, and num_phonemes int32; and the count.
    """
    pairs = [(word, spoken) for word, ways in zip(*split, strict=True) for spoken in ways]
    letters = alphabets.spell(word for word, _ in pairs)
    phonemes = alphabets.number(spoken for _, spoken in pairs)
    lengths = np.array([len(numbers) for numbers in phonemes], np.int32)
    padded = np.full((len(pairs), lengths.max()), BLANK, np.int32)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.concatenate(phonemes)
    frames = FRAMES_PER_LETTER * np.array([len(word) for word, _ in pairs])
    kept = np.flatnonzero(np.asarray(ctc_min_frames(padded, lengths)) <= frames)
    padded = padded[:, : lengths[kept].max()]
    examples: list[Any] = [
        {"letters": letters[i], "phonemes": padded[i], "num_phonemes": lengths[i]} for i in kept.tolist()
    ]
    return examples, len(pairs) - len(kept)
