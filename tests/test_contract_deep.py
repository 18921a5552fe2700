"""The contract of `contract.py`, kept by the subjects in `DEEP`."""

from contract import Contract
from contract_subjects import DEEP


class TestDeep(Contract):
    subjects = DEEP
