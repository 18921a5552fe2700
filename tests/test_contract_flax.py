"""The contract of `contract.py`, kept by the subjects in `FLAX`, and modules that are their layer."""

import functools
import re

import jax
import numpy as np
import pytest
from contract import Contract, forward, operands, pulled_back
from contract_subjects import CALLS, FLAX, MODULES, B, T, calls_of, one_call


class TestFlax(Contract):
    subjects = FLAX


def text_of(run, name):
    """The text of a program, run(operands), without the addresses of functions and the names of parameters."""
    given = operands(name, (3, 5, 2))._replace(resets=np.zeros((B, T), bool))
    leaves, structure = jax.tree.flatten(given.params)

    def of_leaves(given, leaves):
        return jax.tree.leaves(run(given._replace(params=jax.tree.unflatten(structure, leaves))))

    return re.sub(r" at 0x[0-9a-f]+", "", str(jax.make_jaxpr(of_leaves)(given._replace(params=()), leaves)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("module", MODULES)
def test_a_module_runs_the_program_of_its_layer(module):
    layer, _ = MODULES[module]

    def outputs(name, call, given):
        return forward(name, CALLS[call])(given, given.params, given.x, given.state)

    for call in calls_of(layer):
        ours, theirs = (text_of(functools.partial(outputs, name, call), name) for name in (module, layer))
        assert ours == theirs
    ours, theirs = (text_of(pulled_back(name, CALLS[one_call(layer, 0)]), name) for name in (module, layer))
    assert ours == theirs
