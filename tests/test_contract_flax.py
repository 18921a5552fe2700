"""The contract of `contract.py`, kept by its subjects in `FLAX`."""

from contract import FLAX, Contract


class TestFlax(Contract):
    subjects = FLAX
