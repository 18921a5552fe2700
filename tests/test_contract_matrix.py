"""The contract of `contract.py`, kept by the subjects in `MATRIX`."""

from contract import Contract
from contract_subjects import MATRIX


class TestMatrix(Contract):
    subjects = MATRIX
