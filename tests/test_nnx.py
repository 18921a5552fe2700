import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from flax import nnx

import jaxpack
import jaxpack.nnx
from jaxpack import BucketPlan, pack_padded_sequence

F, H = 3, 4
LENGTHS = [3, 6, 2, 4]
PLAN = BucketPlan((3, 6), (4, 2))
MODULES = {
    "SimpleRNN": (jaxpack.nnx.SimpleRNN, jaxpack.RNN, {"nonlinearity": "relu"}),
    "LSTM": (jaxpack.nnx.LSTM, jaxpack.LSTM, {"proj_size": 2}),
    "GRU": (jaxpack.nnx.GRU, jaxpack.GRU, {"bias": False}),
}


def batch():
    return oracles.random_batch(LENGTHS, F, dtype=np.float32)


def plain(module):
    """A module's parameters as the core takes them."""
    return jax.tree.map(lambda leaf: leaf, nnx.to_pure_dict(nnx.state(module, nnx.Param)))["params"]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_its_layer(name):
    module_class, layer_class, options = MODULES[name]
    options = {"num_layers": 2, "bidirectional": True, **options}
    module = module_class(F, H, **options, rngs=nnx.Rngs(0))
    layer = layer_class(F, H, **options)
    assert jax.tree.map(jnp.shape, plain(module)) == layer.shapes
    packed = pack_padded_sequence(batch(), LENGTHS, batch_first=True, plan=PLAN)
    expected = layer.apply(plain(module), packed)
    jax.tree.map(np.testing.assert_array_equal, module(packed), expected)
    output, state = module(batch(), seq_lengths=LENGTHS, plan=PLAN)
    assert output.shape == (4, 6, layer.output_size)
    jax.tree.map(np.testing.assert_array_equal, state, expected[1])
    initial = jax.tree.map(jnp.ones_like, state)
    jax.tree.map(np.testing.assert_array_equal, module(packed, initial), layer.apply(plain(module), packed, initial))


class Classifier(nnx.Module):
    """What a user builds: a packed stack, pooled, with a head."""

    def __init__(self, rngs, **options):
        self.rnn = jaxpack.nnx.LSTM(F, 8, bidirectional=True, **options, rngs=rngs)
        self.head = nnx.Linear(16, 2, rngs=rngs)

    def __call__(self, packed):
        output, _ = self.rnn(packed)
        return self.head(jaxpack.segment_mean(output))


def test_trains_inside_a_module_with_one_program():
    model = Classifier(nnx.Rngs(0), num_layers=2, dropout=0.1)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    labels = jnp.array([0, 1, 1, 0])
    traces = []

    @nnx.jit
    def train_step(model, optimizer, x, lengths):
        traces.append(lengths)

        def loss(model):
            packed = pack_padded_sequence(x, lengths, batch_first=True, plan=PLAN)
            return optax.softmax_cross_entropy_with_integer_labels(model(packed), labels).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    losses = [train_step(model, optimizer, batch(), jnp.array([3, 6 - i % 2, 2, 4])) for i in range(60)]
    assert len(traces) == 1
    assert losses[-1] < 0.1 < losses[0]
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def test_eval_and_train_switch_dropout():
    model = Classifier(nnx.Rngs(0), num_layers=2, dropout=0.5)
    packed = pack_padded_sequence(batch(), LENGTHS, batch_first=True, plan=PLAN)
    first, second = model(packed), model(packed)
    assert (first != second).any()  # the dropout stream moves on
    model.eval()
    np.testing.assert_array_equal(model(packed), model(packed))
    model.train()
    assert (model(packed) != model(packed)).any()
    rnn = model.rnn
    np.testing.assert_array_equal(
        rnn(packed, rngs=nnx.Rngs(dropout=7))[0].data, rnn(packed, rngs=nnx.Rngs(dropout=7))[0].data
    )
    np.testing.assert_array_equal(
        rnn(packed, deterministic=True)[0].data,
        jaxpack.LSTM(F, 8, 2, True, 0.0, True).apply(plain(rnn), packed)[0].data,
    )


def test_seeds_and_dtypes():
    a, b, c = (jaxpack.nnx.GRU(F, H, rngs=nnx.Rngs(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, plain(a), plain(b))
    assert (plain(a)["l0"]["weight_ih"] != plain(c)["l0"]["weight_ih"]).any()
    half = jaxpack.nnx.GRU(F, H, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(plain(half))} == {jnp.dtype("bfloat16")}


def test_errors_are_the_layers_own():
    with pytest.raises(ValueError, match="proj_size"):
        jaxpack.nnx.LSTM(F, H, proj_size=9, rngs=nnx.Rngs(0))
    module = jaxpack.nnx.GRU(F, H, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="2 lengths for a batch of 4"):
        module(batch(), seq_lengths=[1, 2])
