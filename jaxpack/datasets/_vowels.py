"""Japanese Vowels: utterances of 7 to 29 frames by 9 speakers."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class LabelledSequences(NamedTuple):
    """Sequences of different lengths, with a class each.

    Examples:
      >>> LabelledSequences([np.ones((3, 2)), np.ones((1, 2))], labels=np.array([0, 1])).lengths.tolist()
      [3, 1]

    Attributes:
      sequences: arrays [L_i, F], one per sequence.
      labels: int32 [N], the class of each sequence.
    """

    sequences: list[np.ndarray]
    labels: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """int32 [N]: how many steps each sequence has."""
        return np.array([len(sequence) for sequence in self.sequences], np.int32)


def japanese_vowels() -> tuple[LabelledSequences, LabelledSequences]:
    """The UCI Japanese Vowels data: which of 9 men says the vowels /ae/?

    Examples:
      >>> train, test = japanese_vowels()
      >>> train.sequences[0].shape, int(train.labels[0])
      ((20, 12), 0)

    Returns:
      The data's own split, 270 utterances to train on and 370 to test on: each float32 [L_i, 12], 7 to 29 frames of
      12 cepstrum coefficients, in arrays of the caller's own; labels 0 to 8 are the speakers.
    Source: Kudo, Toyama and Shimbo, UCI Machine Learning Repository, doi 10.24432/C5NS47, CC BY 4.0; what was changed
      is written in japanese_vowels.md, beside the data.
    """
    file = importlib.resources.files("jaxpack.datasets") / "japanese_vowels.npz"
    with file.open("rb") as opened, np.load(opened) as arrays:
        return _split(arrays, "train"), _split(arrays, "test")


def _split(arrays: Mapping[str, np.ndarray], name: str) -> LabelledSequences:
    """One half of the file, whose frames lie one utterance after the other."""
    starts = np.cumsum(arrays[f"{name}_lengths"])[:-1]
    return LabelledSequences(np.split(arrays[f"{name}_frames"], starts), arrays[f"{name}_labels"])
