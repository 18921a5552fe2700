import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.nn.initializers import ones, orthogonal, zeros

from jaxpack import GRU, LSTM, RNN

F, H, P = 3, 4, 2
KEY = jax.random.key(0)
LAYERS = {
    "rnn": RNN(F, H, num_layers=2, bidirectional=True),
    "lstm": LSTM(F, H, num_layers=2, bidirectional=True),
    "projected": LSTM(F, H, num_layers=2, proj_size=P),
    "gru": GRU(F, H),
    "no bias": GRU(F, H, bias=False),
}


def by_gate(layer, array):
    """A parameter's gates, under their names."""
    gates = layer.cell.gates
    return dict(zip(gates, np.split(np.asarray(array), len(gates), axis=-1), strict=True))


def constant(value):
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_by_default_a_key_gives_the_uniform_draw_it_always_gave(layer):
    leaves, structure = jax.tree.flatten(layer.shapes, is_leaf=lambda node: isinstance(node, tuple))
    bound = 1 / math.sqrt(H)
    keys = jax.random.split(KEY, len(leaves))
    drawn = [jax.random.uniform(k, s, jnp.float32, -bound, bound) for k, s in zip(keys, leaves, strict=True)]
    jax.tree.map(np.testing.assert_array_equal, layer.init(KEY), jax.tree.unflatten(structure, drawn))


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_each_initialiser_sets_its_own_parameters_and_no_others(layer):
    default = layer.init(KEY)
    given = {"kernel_init": {"weight_ih", "weight_hr"}, "recurrent_kernel_init": {"weight_hh"}}
    for option, names in given.items():
        params = layer.init(KEY, **{option: constant(7)})
        for group, entries in params.items():
            for name, value in entries.items():
                expected = jnp.full_like(value, 7) if name in names else default[group][name]
                np.testing.assert_array_equal(value, expected)
    for group, entries in layer.init(KEY, bias_init=constant(7)).items():
        for name, value in entries.items():
            expected = {"bias_ih": jnp.full_like(value, 7), "bias_hh": jnp.zeros_like(value)}
            np.testing.assert_array_equal(value, expected.get(name, default[group][name]))


def test_a_named_gate_alone_changes():
    layer = LAYERS["lstm"]
    default = layer.init(KEY)
    params = layer.init(KEY, kernel_init={"g": constant(3)}, bias_init={"f": ones, "o": constant(5)})
    for group, entries in params.items():
        for name, expected in (
            ("weight_ih", {"g": 3}),
            ("weight_hh", {}),
            ("bias_ih", {"f": 1, "o": 5}),
            ("bias_hh", {"f": 0, "o": 0}),
        ):
            before = by_gate(layer, default[group][name])
            for gate, value in by_gate(layer, entries[name]).items():
                np.testing.assert_array_equal(value, np.full_like(value, expected.get(gate, before[gate])))


def test_a_mapping_leaves_the_projection_as_it_is():
    layer = LAYERS["projected"]
    params = layer.init(KEY, kernel_init=dict.fromkeys("ifgo", constant(3)))
    assert (params["l1"]["weight_ih"] == 3).all()
    np.testing.assert_array_equal(params["l1"]["weight_hr"], layer.init(KEY)["l1"]["weight_hr"])


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
def test_orthogonal_is_orthogonal_gate_by_gate_and_no_two_draws_are_the_same(name):
    layer = LAYERS[name]
    params = layer.init(KEY, recurrent_kernel_init=orthogonal())
    gates = [gate for group in params.values() for gate in by_gate(layer, group["weight_hh"]).values()]
    for i, gate in enumerate(gates):
        np.testing.assert_allclose(gate @ gate.T, np.eye(H), atol=1e-6)
        assert all((gate != other).any() for other in gates[:i])


def test_an_initialiser_sees_the_shape_of_one_gate_and_the_dtype():
    seen = set()

    def record(key, shape, dtype):
        seen.add((shape, jnp.dtype(dtype)))
        return np.ones(shape)  # in another dtype, which is cast

    options: Any = dict.fromkeys(("kernel_init", "recurrent_kernel_init", "bias_init"), record)
    params = LSTM(F, H, proj_size=P).init(KEY, jnp.bfloat16, **options)
    bfloat16 = jnp.dtype("bfloat16")
    assert seen == {((F, H), bfloat16), ((P, H), bfloat16), ((H, P), bfloat16), ((H,), bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {bfloat16}


def test_what_an_initialiser_wraps_around_its_array_stays_around_the_parameter():
    layer = LAYERS["gru"]
    wrapped = nn.with_partitioning(orthogonal(), (None, "model"))
    plain = layer.init(KEY, recurrent_kernel_init=orthogonal(), bias_init={"r": ones})
    params: Any = layer.init(
        KEY, recurrent_kernel_init=wrapped, bias_init={"r": nn.with_logical_partitioning(ones, ("units",))}
    )
    assert params["l0"]["weight_hh"].names == (None, "model")
    assert params["l0"]["bias_ih"].names == params["l0"]["bias_hh"].names == ("units",)
    jax.tree.map(np.testing.assert_array_equal, nn.meta.unbox(params), plain)


def model_axis(initializer):
    return nn.with_partitioning(initializer, ("model",))


@pytest.mark.parametrize(
    ("layer", "options", "error", "message"),
    [
        (LSTM(F, H), {"bias_init": {"x": ones}}, ValueError, "bias_init names the gate 'x'.*gates are i, f, g, o"),
        (GRU(F, H), {"kernel_init": {"f": ones}}, ValueError, "kernel_init names the gate 'f'.*gates are r, z, n"),
        (GRU(F, H, bias=False), {"bias_init": {"f": ones}}, ValueError, "bias_init names the gate 'f'"),
        (RNN(F, H), {"bias_init": {"": ones}}, ValueError, "one gate has no name: give a function"),
        (GRU(F, H), {"kernel_init": 1.0}, TypeError, r"kernel_init must be an initialiser, a function of .*got 1\.0"),
        (GRU(F, H), {"bias_init": {"r": 1.0}}, TypeError, r"bias_init must be an initialiser, .*got 1\.0"),
        (GRU(F, H), {"bias_init": [ones]}, TypeError, r"bias_init must be an initialiser, .*got \[<function"),
        (
            GRU(F, H),
            {"bias_init": lambda key, shape, dtype: jnp.ones(3)},
            ValueError,
            r"bias_init must return an array of shape \(4,\) for a gate of bias_hh, got \(3,\)",
        ),
        (GRU(F, H), {"kernel_init": lambda *_: None}, ValueError, r"kernel_init must return an array .*got \[\]"),
        (GRU(F, H), {"recurrent_kernel_init": orthogonal}, ValueError, r"kernel_init must return .*got <function"),
        (
            GRU(F, H),
            {"bias_init": {"r": model_axis(zeros), "n": nn.with_partitioning(zeros, (None,))}},
            ValueError,
            "gate 'r' is .*model.* and gate 'n' is .*None.*Wrap their initialisers alike",
        ),
        (GRU(F, H), {"bias_init": {"r": model_axis(zeros), "n": zeros}}, ValueError, "one metadata.*'r'.*'n'"),
    ],
)
def test_bad_initialisers_are_named(layer, options, error, message):
    with pytest.raises(error, match=message):
        layer.init(KEY, **options)
