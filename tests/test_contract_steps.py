"""The contract of `contract.py`, kept by its subjects in `STEPS`."""

from contract import STEPS, Contract


class TestSteps(Contract):
    subjects = STEPS
