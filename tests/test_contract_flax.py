"""The contract of `contract.py`, kept by the subjects in `FLAX`."""

from contract import Contract
from contract_subjects import FLAX


class TestFlax(Contract):
    subjects = FLAX
