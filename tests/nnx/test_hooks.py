"""What Flax does to nnx modules by itself (tables, captures, transforms, bridges), done to ours."""

import copy
import pickle
from typing import Any

import jax
import numpy as np
import oracles
import pytest
import treescope
from flax import nnx

import jaxpack
import jaxpack.linen
import jaxpack.nnx

F, H = 3, 3
LENGTHS = np.array([3, 4])
X = np.nan_to_num(oracles.random_batch(LENGTHS, F, dtype=np.float32))
PACKED = jaxpack.pack_padded_sequence(X, LENGTHS, batch_first=True, plan=jaxpack.plan_padded(2, 4))
KEYS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}


class Doubled(nnx.GRUCell):
    def __call__(self, carry, x):
        return super().__call__(carry, 2 * x)


def rnn(cell, rngs):
    return jaxpack.nnx.RNN(cell(F, H, rngs=rngs))


STACKS = {name: getattr(jaxpack.nnx, name) for name in ("SimpleRNN", "LSTM", "GRU")}


def maker(kind):
    return lambda rngs: kind(F, H, 2, dropout=0.5, rngs=rngs)


MAKERS: dict[str, Any] = {
    **{name: maker(kind) for name, kind in STACKS.items()},
    "RNN": lambda rngs: rnn(nnx.GRUCell, rngs),
    "RNN of any cell": lambda rngs: rnn(Doubled, rngs),
    "Bidirectional": lambda rngs: jaxpack.nnx.Bidirectional(rnn(nnx.LSTMCell, rngs), rnn(nnx.LSTMCell, rngs)),
}
each_module = pytest.mark.parametrize("name", MAKERS)
each_stack = pytest.mark.parametrize("name", STACKS)
each_input = pytest.mark.parametrize("inputs", [X, PACKED], ids=["padded", "packed"])


class Outer(nnx.Module):
    """A user's model around one of ours."""

    def __init__(self, name, rngs):
        self.inner = MAKERS[name](rngs)

    def __call__(self, x, scale=1):
        y = self.inner(x)
        y = y[0] if isinstance(y, tuple) else y
        return (
            y.map(lambda data: scale * data[..., :F]) if isinstance(y, jaxpack.PackedSequence) else scale * y[..., :F]
        )


def shapes(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def module_of(name):
    return MAKERS[name](nnx.Rngs(0))


def outputs_of(name, inputs, call=lambda module, x: module(x)):
    """What a call gives, as shapes, since values cost a compilation each."""
    return shapes(nnx.eval_shape(call, module_of(name), inputs))


@pytest.fixture
def _methods():
    """Puts back the methods that nnx.tabulate replaces and, if it fails, leaves so."""
    kinds = [Outer, nnx.Rngs, nnx.RngStream, *STACKS.values()]
    before = [dict(vars(kind)) for kind in kinds]
    yield
    for kind, attributes in zip(kinds, before, strict=True):
        for name in set(vars(kind)) - set(attributes):
            delattr(kind, name)
        for name, value in attributes.items():
            if callable(value) and vars(kind)[name] is not value:
                setattr(kind, name, value)


@each_stack
@each_input
@pytest.mark.usefixtures("_methods")
def test_tabulate_counts_each_parameter(name, inputs):
    module = module_of(name)
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
    for model, options in ((module, {}), (Outer(name, nnx.Rngs(0)), {}), (Outer(name, nnx.Rngs(0)), {"scale": 2})):
        table = nnx.tabulate(model, inputs, console_kwargs={"width": 200, "force_terminal": False}, **options)
        assert f"{count:,} (" in table
        if inputs is PACKED:
            assert f"data: float32[{PACKED.plan.size},{F}]" in table


@each_stack
@each_input
def test_to_linen_computes_the_same_on_the_variables_of_our_linen(name, inputs):
    bridged = nnx.bridge.to_linen(STACKS[name], F, H, bidirectional=True)
    linen = getattr(jaxpack.linen, name)(H, bidirectional=True)
    variables = jax.eval_shape(bridged.init, KEYS, inputs)
    assert shapes(variables) == shapes(jax.eval_shape(linen.init, KEYS, inputs))
    if inputs is PACKED:
        variables = linen.init(KEYS, inputs)
        actual, expected = (jax.jit(module.apply)(variables, inputs) for module in (bridged, linen))
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert bridged.tabulate(KEYS, inputs)


@each_module
@each_input
def test_to_linen_applies_any_module(name, inputs):
    bridged = nnx.bridge.ToLinen(MAKERS[name])
    outputs, variables = jax.eval_shape(bridged.init_with_output, KEYS, inputs)
    assert shapes(outputs) == outputs_of(name, inputs)
    applied = jax.eval_shape(lambda v, x: bridged.apply(v, x, rngs=KEYS), variables, inputs)
    assert shapes(applied) == shapes(outputs)


@each_stack
def test_the_state_is_the_tree_of_the_core_and_of_linen(name):
    module = module_of(name)
    assert jax.tree.map(np.shape, nnx.to_pure_dict(nnx.state(module, nnx.Param))) == module.layer.shapes
    assert module.params["l0"]["weight_ih"] is module.l0["weight_ih"]


@each_module
def test_outputs_are_captured(name):
    _, captured = nnx.capture(module_of(name), nnx.Intermediate)(PACKED)
    assert captured is not None


TRANSFORMS = {
    "jit": lambda module, x: nnx.jit(lambda module, x: module(x))(module, x),
    "remat": lambda module, x: nnx.remat(lambda module, x: module(x))(module, x),
    "clone": lambda module, x: nnx.clone(module)(x),
    "split and merge": lambda module, x: nnx.merge(*nnx.split(module))(x),
    "cond": lambda module, x: nnx.cond(True, *[lambda module, x: module(x)] * 2, module, x),
    "pytree": lambda module, x: jax.tree.map(lambda leaf: leaf, module)(x),
}


@each_module
@each_input
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_leave_outputs_as_they_are(name, inputs, transform):
    assert outputs_of(name, inputs, TRANSFORMS[transform]) == outputs_of(name, inputs)


@each_module
def test_vmap_and_scan_go_over_stacked_modules(name):
    def run(x):
        several = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: Outer(name, rngs)))(nnx.Rngs(0))
        run = nnx.scan(lambda x, module: (module(x), None), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        return run(x, several)[0]

    assert shapes(jax.eval_shape(run, PACKED)) == shapes(PACKED)


@each_module
def test_copies_and_pictures(name):
    module = module_of(name)
    twins = [copy.deepcopy(module), nnx.clone(module)]
    if name in STACKS:  # Flax's cells hold functions that pickle does not find
        twins.append(pickle.loads(pickle.dumps(module)))
    for twin in twins:
        jax.tree.map(np.testing.assert_array_equal, *(nnx.state(each, nnx.Param) for each in (twin, module)))
    assert nnx.graphdef(module_of(name)) == nnx.graphdef(module)
    assert list(nnx.iter_graph(module))
    assert list(nnx.iter_modules(module))
    assert type(module).__name__ in repr(module)
    treescope.render_to_html(module)
