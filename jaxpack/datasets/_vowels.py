"""Japanese Vowels: utterances of 7 to 29 frames by 9 speakers."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class LabelledSequences(NamedTuple):
    """Sequences of different lengths, each with a class.

    Examples:
      >>> LabelledSequences([np.ones((3, 2)), np.ones((1, 2))], labels=np.array([0, 1])).lengths.tolist()
      [3, 1]

    Attributes:
      sequences: an array [L_i, F] for each sequence.
      labels: int32 [N], the class of each sequence.
    """

    sequences: list[np.ndarray]
    labels: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """int32 [N]: the number of steps of each sequence."""
        return np.array([len(sequence) for sequence in self.sequences], np.int32)


def japanese_vowels() -> tuple[LabelledSequences, LabelledSequences]:
    """Loads the UCI Japanese Vowels data: the vowels /ae/, spoken by 9 men.

    Examples:
      >>> train, test = japanese_vowels()
      >>> train.sequences[0].shape, int(train.labels[0])
      ((20, 12), 0)

    Returns:
      The data's own split, with 270 utterances to train on and 370 to test on. Each is float32 [L_i, 12]: 7 to 29
      frames of 12 cepstrum coefficients. Labels 0 to 8 are the speakers. The arrays are new in each call.
    Source: Kudo, Toyama and Shimbo, UCI Machine Learning Repository, doi 10.24432/C5NS47, CC BY 4.0;
      japanese_vowels.md, beside the data, lists the changes.
    """
    file = importlib.resources.files("jaxpack.datasets") / "japanese_vowels.npz"
    with file.open("rb") as opened, np.load(opened) as arrays:
        return _split(arrays, "train"), _split(arrays, "test")


def _split(arrays: Mapping[str, np.ndarray], name: str) -> LabelledSequences:
    """Splits the frames of one half of the file, which are concatenated, into utterances."""
    starts = np.cumsum(arrays[f"{name}_lengths"])[:-1]
    return LabelledSequences(np.split(arrays[f"{name}_frames"], starts), arrays[f"{name}_labels"])
