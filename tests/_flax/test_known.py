"""Which cells of Flax run in jaxpack's own recurrence, in one program for all lengths."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_apis import APIS, CELLS
from flax_batch import LENGTHS, REAL, assert_close, batch

from jaxpack._flax import run as flax_run

run_known: Any = flax_run.run_known
pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("api", APIS)
def test_concrete_lengths_make_one_program(api):
    face = APIS[api]
    apply, params = face.pure(face.ours.RNN(face.cell("GRUCell"), return_carry=True), jit=False)
    apply(params, batch(nan=False), seq_lengths=LENGTHS)
    programs = run_known._cache_size()
    for lengths in ([1, 2, 3, 6], [6, 6, 6, 6], [0, 0, 0, 0]):
        apply(params, batch(nan=False), seq_lengths=np.array(lengths))
    assert run_known._cache_size() == programs > 0


def takes_the_fast_way(face, cell, x=None, **options):
    apply, params = face.pure(face.ours.RNN(cell, **options))
    x = batch(nan=False) if x is None else x
    return "custom_vjp" in str(jax.make_jaxpr(lambda params, x: apply(params, x, seq_lengths=LENGTHS))(params, x))


@pytest.mark.parametrize(("api", "cell"), CELLS)
def test_known_cells_take_the_fast_way(api, cell):
    face = APIS[api]
    assert takes_the_fast_way(face, face.cell(cell)) == (cell != face.unknown)


@pytest.mark.parametrize("api", APIS)
def test_cells_that_do_something_else_run_as_they_are(api):
    face = APIS[api]

    def agrees(cell, fast):
        assert takes_the_fast_way(face, cell) == fast
        apply, params = face.pure(face.ours.RNN(cell, unroll=2))
        flax_apply, _ = face.pure(face.flax.RNN(cell))
        expected = np.where(REAL[..., None], flax_apply(params, batch(nan=False), seq_lengths=LENGTHS), 0)
        assert_close(apply(params, batch(), seq_lengths=LENGTHS), expected)

    agrees(face.cell("LSTMCell", gate_fn=jax.nn.hard_sigmoid), False)
    agrees(face.cell("GRUCell", activation_fn=jax.nn.relu), False)
    agrees(face.cell("SimpleCell", activation_fn=jax.nn.relu), True)
    agrees(face.cell("SimpleCell", activation_fn=jax.nn.softplus), False)
    agrees(face.cell("SimpleCell", residual=True), True)
    if api == "linen":
        agrees(face.cell("MGUCell", reset_gate=False), True)
        agrees(face.cell("MGUCell", gate_fn=jax.nn.hard_sigmoid), False)
    kind = type(face.cell("GRUCell"))
    subclass = type("Doubled", (kind,), {"__call__": lambda self, carry, x: kind.__call__(self, carry, 2 * x)})
    agrees(face.of_kind(subclass, param_dtype=jnp.float64), False)


@pytest.mark.parametrize("api", APIS)
def test_mixed_precision_is_flax_own(api):
    face = APIS[api]
    cell = face.cell("LSTMCell", dtype=jnp.float32)
    assert not takes_the_fast_way(face, cell)
