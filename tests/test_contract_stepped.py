"""The contract of `contract.py`, kept by the subjects in `STEPPED`."""

from contract import Contract
from contract_subjects import STEPPED


class TestStepped(Contract):
    subjects = STEPPED
