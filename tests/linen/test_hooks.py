"""What Flax does to linen modules by itself (tables, interceptors, lifted transforms, bridges), done to ours."""

import copy
import dataclasses
import functools
import pickle
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import oracles
import pytest
import treescope
from flax import linen as nn
from flax import nnx
from flax_apis import OwnLinenCell

import jaxpack
import jaxpack.linen

F, H = 3, 3
LENGTHS = np.array([3, 4])
X = np.nan_to_num(oracles.random_batch(LENGTHS, F, dtype=np.float32))
PACKED = jaxpack.pack_padded_sequence(X, LENGTHS, batch_first=True, plan=jaxpack.plan_padded(2, 4))
KEYS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
STACK = {"num_layers": 2, "dropout": 0.5, "deterministic": False}
MODULES: dict[str, Any] = {
    "SimpleRNN": jaxpack.linen.SimpleRNN(H, **STACK),
    "LSTM": jaxpack.linen.LSTM(H, **STACK),
    "GRU": jaxpack.linen.GRU(H, **STACK),
    "RNN": jaxpack.linen.RNN(nn.GRUCell(H)),
    "RNN of any cell": jaxpack.linen.RNN(OwnLinenCell(H)),
    "Bidirectional": jaxpack.linen.Bidirectional(*(jaxpack.linen.RNN(nn.LSTMCell(H)) for _ in range(2))),
}
each_module = pytest.mark.parametrize("name", MODULES)
each_input = pytest.mark.parametrize("inputs", [X, PACKED], ids=["padded", "packed"])


class Outer(nn.Module):
    """A user's model around one of ours."""

    inner: nn.Module
    around: Callable[..., Any] = staticmethod(lambda inner, x: inner(x))

    @nn.compact
    def __call__(self, x):
        return self.around(self.inner, x)


def shapes(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def made(module, inputs):
    """The outputs and variables of init, as shapes, since values cost a compilation each."""
    return jax.eval_shape(module.init_with_output, KEYS, inputs)


def applied(module, variables, inputs, **options):
    return jax.eval_shape(lambda v, x: module.apply(v, x, rngs=KEYS, **options), variables, inputs)


def options_of(module):
    names = [field.name for field in dataclasses.fields(module) if field.name not in ("parent", "name")]
    return {name: getattr(module, name) for name in names}


@each_module
@each_input
def test_tabulate_counts_each_parameter_once(name, inputs):
    module = MODULES[name]
    _, variables = made(module, inputs)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables))
    for model in (module, Outer(module)):
        table = model.tabulate(KEYS, inputs, console_kwargs={"width": 200, "force_terminal": False})
        assert f"Total Parameters: {count:,} " in table
        assert "_direction" not in table


@each_module
def test_tabulate_counts_operations(name):
    assert "vjp_flops" in MODULES[name].tabulate(
        KEYS, X, compute_flops=True, compute_vjp_flops=True, console_kwargs={"width": 250, "force_terminal": False}
    )


def test_both_directions_have_rows_and_paths_as_in_flax():
    flax = nn.Bidirectional(*(nn.RNN(nn.LSTMCell(H)) for _ in range(2)))
    assert set(MODULES["Bidirectional"].module_paths(KEYS, X)) == set(flax.module_paths(KEYS, X))


@each_module
@each_input
def test_paths_begin_with_the_module(name, inputs):
    assert type(MODULES[name].module_paths(KEYS, inputs)[""]) is type(MODULES[name])


@each_module
@each_input
def test_interceptors_see_the_methods_that_flax_calls(name, inputs):
    module = MODULES[name]
    _, variables = made(module, inputs)
    seen = []

    def interceptor(method, args, kwargs, context):
        seen.append((type(context.module).__name__, context.method_name))
        return method(*args, **kwargs)

    def run(variables, inputs):
        with nn.intercept_methods(interceptor):
            return module.apply(variables, inputs, rngs=KEYS)

    outputs = jax.eval_shape(run, variables, inputs)
    assert shapes(outputs) == shapes(applied(module, variables, inputs))
    assert not any(method.startswith("_") and method != "__call__" for _, method in seen)
    if "RNN" in name or name == "Bidirectional":
        assert any(kind.endswith("Cell") or kind == "SimpleRNN" for kind, _ in seen)


def test_what_an_interceptor_does_to_a_known_cell_is_done():
    module = jaxpack.linen.RNN(nn.LSTMCell(H))
    variables = module.init(KEYS, X)

    def halve(method, args, kwargs, context):
        y = method(*args, **kwargs)
        return y / 2 if isinstance(context.module, nn.Dense) else y

    with nn.intercept_methods(halve):
        actual = module.apply(variables, X)
        expected = nn.RNN(nn.LSTMCell(H)).apply(variables, X)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@each_module
@each_input
def test_intermediates_are_captured(name, inputs):
    module = Outer(MODULES[name])
    outputs, variables = made(module, inputs)
    options = {"capture_intermediates": True, "mutable": ["intermediates"]}
    found, state = applied(module, variables, inputs, **options)
    assert shapes(found) == shapes(outputs)
    captured = state["intermediates"]["inner"]
    assert shapes(captured["__call__"][0]) == shapes(outputs)
    if name == "Bidirectional":
        assert {"forward_rnn", "backward_rnn"} <= set(captured)


AROUND = {
    "remat": nn.remat(lambda inner, x: inner(x)),
    "jit": nn.jit(lambda inner, x: inner(x)),
    "share_scope": lambda inner, x: inner(x),
    "vjp": lambda inner, x: nn.vjp(lambda inner, x: inner(x), inner, x)[0],
}
OF_LIFTED = [(name, transform) for name in MODULES for transform in AROUND]
STACKS = ("SimpleRNN", "LSTM", "GRU")  # Flax's nn.vjp takes no module that holds others


@pytest.mark.parametrize(("name", "transform"), [each for each in OF_LIFTED if each[1] != "vjp" or each[0] in STACKS])
@each_input
def test_lifted_functions_leave_outputs_and_variables_as_they_are(name, inputs, transform):
    module = Outer(MODULES[name], AROUND[transform])
    if transform == "share_scope":
        module = Sharing(MODULES[name])
    outputs, variables = made(module, inputs)
    expected, inner = made(MODULES[name], inputs)
    assert shapes(outputs) == shapes(expected)
    found = variables["params"] if transform == "share_scope" else variables["params"]["inner"]
    assert shapes(found) == shapes(inner["params"])
    assert shapes(applied(module, variables, inputs)) == shapes(expected)


class Sharing(nn.Module):
    inner: nn.Module

    def setup(self):
        nn.share_scope(self, self.inner)

    def __call__(self, x):
        return self.inner(x)


@each_module
@pytest.mark.parametrize("lift", [nn.remat, nn.jit], ids=["remat", "jit"])
def test_lifted_classes_too(name, lift):
    module = MODULES[name]
    lifted = lift(type(module))(**options_of(module))
    outputs, variables = made(lifted, PACKED)
    assert shapes((outputs, variables)) == shapes(made(module, PACKED))
    assert shapes(applied(lifted, variables, PACKED)) == shapes(outputs)


@each_module
@each_input
def test_vmap_and_scan_stack_parameters(name, inputs):
    module = MODULES[name]
    _, plain = made(module, inputs)
    split = {"variable_axes": {"params": 0}, "split_rngs": {"params": True, "dropout": True}}
    several = nn.vmap(type(module), in_axes=None, axis_size=2, **split)(**options_of(module))
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), plain)
    if inputs is X:  # a packed output would be stacked, lengths and all
        assert shapes(made(several, inputs)[1]) == shapes(stacked)

    class Block(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x, _):
            y = self.inner(x)
            y = y[0] if isinstance(y, tuple) else y
            narrow = lambda data: data[..., :F]  # noqa: E731
            return (y.map(narrow) if isinstance(y, jaxpack.PackedSequence) else narrow(y)), None

    scan = nn.scan(Block, length=2, **split)(module)
    (outputs, _), variables = jax.eval_shape(scan.init_with_output, KEYS, inputs, None)
    assert shapes(outputs) == shapes(inputs)
    assert shapes(variables["params"]["inner"]) == shapes(stacked["params"])


@each_module
def test_copies_are_the_module(name):
    module = MODULES[name]
    for twin in (module.clone(), module.copy(), copy.deepcopy(module)):
        assert shapes(made(twin, PACKED)) == shapes(made(module, PACKED))
    assert hash(module.clone()) == hash(module)
    if isinstance(module, jaxpack.linen.LSTM):  # Flax's cells hold functions that pickle does not find
        assert pickle.loads(pickle.dumps(module)) == module
    assert "features" in repr(module) or "hidden_size" in repr(module)
    treescope.render_to_text(module)


@each_module
@each_input
def test_to_nnx_calls_it(name, inputs):
    module = MODULES[name]
    expected, _ = made(module, inputs)

    def run(inputs):
        bridged = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(params=0, dropout=1)).lazy_init(inputs)
        graph, state = nnx.split(bridged)
        return nnx.merge(graph, state)(inputs)

    assert shapes(jax.eval_shape(run, inputs)) == shapes(expected)


@each_module
def test_shapes_are_enough_to_initialise(name):
    module = MODULES[name]
    _, variables = made(module, PACKED)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PACKED)
    assert shapes(jax.eval_shape(functools.partial(module.lazy_init, KEYS), like)) == shapes(variables)
