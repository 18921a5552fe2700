"""The contract of `contract.py`, kept by the subjects in `LINEAR`."""

from contract import Contract
from contract_subjects import LINEAR


class TestLinear(Contract):
    subjects = LINEAR
