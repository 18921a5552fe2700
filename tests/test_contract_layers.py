"""The contract of `contract.py`, kept by its subjects in `LAYERS`."""

from contract import LAYERS, Contract


class TestLayers(Contract):
    subjects = LAYERS
