"""memax, memorax and mamba2-jax in `jaxpack bench`, whose numbers are oracles of the layers that they share."""

import functools
import importlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpack
from jaxpack.cli.bench.calls import Missing
from jaxpack.cli.bench.linear_libraries import end_to_end, mamba2_jax_calls, memax_calls, memorax_calls
from jaxpack.cli.bench.peers import PEERS
from jaxpack.cli.bench.workloads import Workload

LENGTHS = np.array([3, 8, 2])
FEATURES, HIDDEN = 32, 64


def tiny(cell, **options):
    return Workload(
        **{"name": "tiny", "lengths": LENGTHS, "cell": cell, "features": FEATURES, "hidden_size": HIDDEN, **options}
    )


def needs(package):
    """Skips a test without a package of the extra `peers`."""
    pytest.importorskip(package.replace("-", "_"), reason=f"{package} is not installed")


SAME = {
    "lru in memax": ("lru", memax_calls),
    "lru in memorax": ("lru", memorax_calls),
    "mamba2 in mamba2-jax": ("mamba2", mamba2_jax_calls),
}


@pytest.mark.parametrize("case", SAME)
def test_values_and_gradients_are_those_of_the_library(case):
    cell, build = SAME[case]
    needs(case.split()[-1])
    workload = tiny(cell)
    ours, theirs = PEERS["jaxpack-padded"](workload), build(workload)
    assert theirs.same_weights
    assert theirs.cells == (LENGTHS.sum() if cell == "lru" else LENGTHS.max() * len(LENGTHS))

    def real_steps(array):
        return np.asarray(array)[workload.mask] if cell == "mamba2" else np.reshape(array, (LENGTHS.sum(), -1))

    output = workload.layer.apply(workload.params, workload.inputs, lengths=LENGTHS)[0]
    np.testing.assert_allclose(np.asarray(output)[workload.mask], real_steps(theirs.forward()), atol=2e-5)
    (loss, (weights, inputs)), (expected, (their_weights, their_inputs)) = ours.training(), theirs.training()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    packed = jaxpack.pack_padded_sequence(workload.inputs, LENGTHS, batch_first=True, plan=workload.padded_plan)
    padded, _ = jaxpack.pad_packed_sequence(packed.replace(data=inputs), batch_first=True)
    np.testing.assert_allclose(np.asarray(padded)[workload.mask], real_steps(their_inputs), atol=2e-5)
    norms, their_norms = (sorted(map(np.linalg.norm, jax.tree.leaves(each))) for each in (weights, their_weights))
    np.testing.assert_allclose(np.array(norms), np.array(their_norms), rtol=1e-4)


def test_the_positive_mingru_is_memoraxs():
    needs("memorax")
    models: Any = importlib.import_module("memorax.networks.sequence_models")
    inputs, starts, _ = (array[None] for array in end_to_end(tiny("mingru")))
    module = models.Memoroid(cell=models.MinGRUCell(features=HIDDEN))
    params = module.init(jax.random.key(0), inputs, starts)
    kernels = params["params"]["cell"]
    weight = jnp.concatenate([kernels["z"]["kernel"], kernels["h"]["kernel"]], -1)
    layer = jaxpack.MinGRU(FEATURES, HIDDEN, candidate="positive", bias=False)
    output, _ = layer.apply({"weight": weight}, tiny("mingru").inputs, lengths=LENGTHS)
    theirs = module.apply(params, inputs, starts)[1][0]
    np.testing.assert_allclose(np.asarray(output)[tiny("mingru").mask], theirs, rtol=2e-5, atol=1e-6)


def memax_delta_rule(starts, query, key, value, beta, decay):
    """One head in memax's algebra, with the elements of the paper: its layer GDN multiplies the other axis."""
    groups: Any = importlib.import_module("memax.equinox.groups")
    scans: Any = importlib.import_module("memax.equinox.scans")
    gdn: Any = importlib.import_module("memax.equinox.semigroups.gdn")
    algebra = groups.Resettable(gdn.GDNSemigroup(key.shape[-1]))
    kept = jnp.eye(key.shape[-1]) - beta[:, None, None] * key[:, :, None] * key[:, None]
    elements = decay[:, None, None] * kept, beta[:, None, None] * key[:, :, None] * value[:, None]
    (_, states), _ = scans.semigroup_scan(algebra, algebra.initialize_carry(), (elements, starts))
    return jnp.einsum("tkv,tk->tv", states, query)


def test_the_gated_delta_rule_is_memaxs_algebra_with_a_reset_where_each_sequence_begins():
    needs("memax")
    rng, size, steps = np.random.default_rng(0), 4, LENGTHS.sum()
    query, key, value = rng.standard_normal((3, steps, size)).astype(np.float32)
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    beta, decay = rng.uniform(0, 1, (2, steps)).astype(np.float32)
    _, starts, weights = end_to_end(tiny("gateddeltanet", features=size))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3, 4))
    def theirs(*arrays):
        return jnp.sum(memax_delta_rule(jnp.asarray(starts), *arrays) * weights)

    packed = jaxpack.pack_sequence(np.split(np.arange(steps), np.cumsum(LENGTHS)[:-1]), plan=jaxpack.plan_rows(LENGTHS))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3, 4))
    def ours(query, key, value, beta, decay):
        def pack(array):
            return packed.map(lambda steps: array[steps][:, None])  # one head

        output, _ = jaxpack.gated_delta_rule(pack(query), pack(key), pack(value), pack(beta), pack(jnp.log(decay)))
        return jnp.sum(output.data[:, 0] * packed.map(lambda steps: jnp.asarray(weights)[steps]).data)

    (found, gradients), (expected, their_gradients) = (run(query, key, value, beta, decay) for run in (ours, theirs))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(gradients, their_gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.optimized(code=False)
def test_training_takes_less_than_a_twentieth_of_memaxs_temporaries():
    """On one sequence of 1,024 steps, 8 heads of 64."""
    needs("memax")
    steps, heads, size = 1024, 8, 64
    array, gate = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((steps, heads, size), (steps, heads)))

    def ours(query, key, value, beta, decay):
        given = (each[None] for each in (query, key, value, beta, jnp.log(decay)))
        return jaxpack.gated_delta_rule(*given)[0]

    def theirs(*arrays):
        starts = jnp.zeros(steps, bool)
        return jax.vmap(functools.partial(memax_delta_rule, starts), 1, 1)(*arrays)

    def temporaries(rule):
        training = jax.grad(lambda *arrays: jnp.sum(rule(*arrays) ** 2), (0, 1, 2, 3, 4))
        compiled: Any = jax.jit(training).lower(array, array, array, gate, gate).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert 20 * temporaries(ours) < temporaries(theirs)


@pytest.mark.parametrize(("name", "cell"), [("memax", "gateddeltanet"), ("memorax", "mingru"), ("memorax", "mlstm")])
def test_layers_with_weights_of_their_own_train_on_every_real_step(name, cell):
    needs(name)
    calls = PEERS[name](tiny(cell))
    loss, (_, gradient) = calls.training()
    assert np.isfinite(loss)
    assert np.any(np.reshape(gradient, (-1, FEATURES)), -1).sum() == LENGTHS.sum() == calls.cells
    assert not calls.same_weights


@pytest.mark.parametrize("name", ["memax", "memorax", "mamba2-jax"])
def test_a_library_is_missing_for_other_layers_and_where_it_is_not_installed(name, monkeypatch):
    with pytest.raises(Missing, match=r"it is measured for .* in float32 alone"):
        PEERS[name](tiny("rglru"))
    module = name.replace("-", "_")
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "memorax.networks.sequence_models", None)
    with pytest.raises(ModuleNotFoundError) as error:
        PEERS[name](tiny("mamba2" if name == "mamba2-jax" else "lru"))
    assert str(error.value.name).split(".")[0] == module
