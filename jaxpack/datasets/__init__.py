"""The small data sets that ship with the package, one file each; their licences lie beside them."""

from jaxpack.datasets.pronunciations import Pronunciations, cmudict
from jaxpack.datasets.vowels import LabelledSequences, japanese_vowels

__all__ = ["LabelledSequences", "Pronunciations", "cmudict", "japanese_vowels"]
