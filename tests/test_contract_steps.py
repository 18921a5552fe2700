"""The contract of `contract.py`, kept by the subjects in `STEPS`."""

from contract import Contract
from contract_subjects import STEPS


class TestSteps(Contract):
    subjects = STEPS
