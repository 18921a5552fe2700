"""The contract of `contract.py`, kept by the subjects in `LAYERS`."""

from contract import Contract
from contract_subjects import LAYERS


class TestLayers(Contract):
    subjects = LAYERS
