"""Small data sets that ship with the package, with their licences beside the data."""

from jaxpack._namespace import publish as _publish
from jaxpack.datasets._pronunciations import Pronunciations, cmudict
from jaxpack.datasets._vowels import LabelledSequences, japanese_vowels

__all__ = ["LabelledSequences", "Pronunciations", "cmudict", "japanese_vowels"]

_publish(__name__)
