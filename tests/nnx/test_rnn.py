"""What is nnx's own in the drop-in: state, keys, nnx transforms, any cell."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import orbax.checkpoint
import pytest
from flax import nnx

from jaxpack import pack_padded_sequence, plan_buckets, plan_rows
from jaxpack.nnx import RNN, Bidirectional

F, H = 3, 4
LENGTHS = np.array([3, 6, 2, 4])
B, T = 4, 6
REAL = np.arange(T) < LENGTHS[:, None]
ROWS, BUCKETS = plan_rows(LENGTHS), plan_buckets(LENGTHS, 3)


def batch(nan=True):
    x = oracles.random_batch(LENGTHS, F, dtype=np.float32)
    return x if nan else np.nan_to_num(x)


def run(module, *args, **options):
    """module(...) in one program, since op by op it is hundreds; its state moves on."""
    return nnx.jit(lambda module, args: module(*args, **options))(module, args)


def assert_close(actual, expected, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance), actual, expected)


def plain(module):
    """All state of a module, keys as numbers."""
    return jax.tree.map(
        lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf,
        nnx.to_pure_dict(nnx.state(module)),
    )


def assert_same_state(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, plain(actual), plain(expected))


class Noisy(nnx.RNNCellBase):
    """A cell as users write them: a carry of their own, batch statistics and dropout inside."""

    def __init__(self, rngs):
        self.from_x = nnx.Linear(F, H, rngs=rngs)
        self.from_h = nnx.Linear(H, H, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(H, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, carry, x):
        h = self.dropout(jnp.tanh(self.norm(self.from_x(x) + self.from_h(carry["h"]))))
        return {"h": h, "steps": carry["steps"] + 1}, (h, carry["steps"])

    def initialize_carry(self, input_shape, rngs=None, carry_init=None):
        return {"h": jnp.zeros((*input_shape[:-1], H)), "steps": jnp.zeros(input_shape[:-1], jnp.int32)}

    @property
    def num_feature_axes(self):
        return 1


def test_a_users_cell_without_a_plan_draws_and_counts_as_in_flax():
    for call in ({}, {"reverse": True}):
        flax, ours = (module(Noisy(nnx.Rngs(0)), return_carry=True) for module in (nnx.RNN, RNN))
        assert_close(run(ours, batch(nan=False), **call), run(flax, batch(nan=False), **call))
        assert_same_state(ours, flax)
    # All lengths at T: masks, statistics and keys are those of Flax though every step is masked.
    assert_close(run(ours, batch(nan=False), seq_lengths=np.full(B, T)), run(flax, batch(nan=False)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), plain(ours.cell), plain(flax.cell))


@pytest.mark.parametrize("plan", [ROWS, BUCKETS], ids=["rows", "buckets"])
def test_a_users_cell_under_a_plan(plan):
    rnn = RNN(Noisy(nnx.Rngs(0)), plan=plan, return_carry=True)
    mean = rnn.cell.norm.mean[...]
    carry, (h, steps) = run(rnn, batch(), seq_lengths=LENGTHS)
    np.testing.assert_array_equal(carry["steps"], LENGTHS)
    np.testing.assert_array_equal(steps, np.where(REAL, np.arange(T), 0))
    assert (h[~REAL] == 0).all()
    assert 0.2 < (h[REAL] == 0).mean() < 0.8
    assert (rnn.cell.norm.mean[...] != mean).all()
    rnn.eval()
    (carry, (h, _)), (flax_carry, (flax_h, _)) = (
        run(rnn, batch(), seq_lengths=LENGTHS),
        run(nnx.RNN(rnn.cell, return_carry=True), batch(nan=False), seq_lengths=LENGTHS),
    )
    assert_close((carry, h), (flax_carry, np.where(REAL[..., None], flax_h, 0)))

    def loss(rnn, x):
        return jnp.sum(jnp.where(REAL[..., None], rnn(x, seq_lengths=LENGTHS)[1][0], 0) ** 2)

    gradient = nnx.jit(nnx.grad(loss))
    expected = gradient(nnx.RNN(rnn.cell, return_carry=True), batch(nan=False))
    assert_close(*(nnx.to_pure_dict(found) for found in (gradient(rnn, batch()), expected)))


class Mask(nnx.RNNCellBase):
    """Puts out a dropout mask."""

    def __init__(self, rngs):
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, carry, x):
        return carry, self.dropout(jnp.ones((x.shape[0], 32)))

    def initialize_carry(self, input_shape, rngs=None, carry_init=None):
        return jnp.zeros(input_shape[:-1])

    @property
    def num_feature_axes(self):
        return 1


@pytest.mark.parametrize("plan", [None, ROWS, BUCKETS], ids=["none", "rows", "buckets"])
def test_steps_share_keys_that_are_broadcast(plan):
    apart = RNN(Mask(nnx.Rngs(0)), plan=plan)
    assert len(np.unique(run(apart, batch(), seq_lengths=LENGTHS)[REAL], axis=0)) == LENGTHS.sum()
    shared = RNN(Mask(nnx.Rngs(dropout=0)), plan=plan, broadcast_rngs="dropout")
    first, second = (run(shared, batch(), seq_lengths=LENGTHS)[1] for _ in range(2))  # of the longest sequence
    assert len(np.unique(first, axis=0)) == len(np.unique(second, axis=0)) == 1
    assert (first[0] != second[0]).any()  # but each call has its own
    flax = nnx.RNN(Mask(nnx.Rngs(dropout=0)), broadcast_rngs="dropout")
    for _ in range(2):
        run(flax, batch(nan=False))
    assert_same_state(shared.cell, flax.cell)


class PerStep(nnx.RNNCellBase):
    """Adds a number of each step's own."""

    def __init__(self):
        self.shift = nnx.Param(jnp.arange(float(T)))

    def __call__(self, carry, x):
        carry = carry + self.shift[...]
        return carry, carry

    def initialize_carry(self, input_shape, rngs=None, carry_init=None):
        return jnp.zeros(input_shape[:-1])

    @property
    def num_feature_axes(self):
        return 1


def test_state_with_a_time_axis_runs_padded():
    ours = RNN(PerStep(), state_axes=nnx.StateAxes({nnx.Param: 0, ...: nnx.Carry}), return_carry=True, plan=BUCKETS)
    expected = np.where(REAL, np.cumsum(np.arange(T)), 0)
    carry, outputs = run(ours, batch(), seq_lengths=LENGTHS)
    np.testing.assert_array_equal(outputs, expected)
    np.testing.assert_array_equal(carry, expected.max(axis=1))
    with pytest.raises(ValueError, match="packed inputs do not have: pass a padded batch"):
        ours(pack_padded_sequence(batch(), LENGTHS, batch_first=True))


class Tagger(nnx.Module):
    """A user's model, whose RNNs come from one module or another."""

    def __init__(self, rnn, bidirectional, rngs):
        self.lstm = rnn(nnx.LSTMCell(F, H, rngs=rngs), rngs=rngs)
        self.both = bidirectional(*(rnn(nnx.GRUCell(H, H, rngs=rngs)) for _ in range(2)), rngs=rngs)
        self.head = nnx.Linear(2 * H, 2, rngs=rngs)

    def __call__(self, x, lengths, **options):
        return self.head(self.both(self.lstm(x, seq_lengths=lengths, **options), seq_lengths=lengths, **options))


def tagger(ours, seed=0):
    rnn, bidirectional = (RNN, Bidirectional) if ours else (nnx.RNN, nnx.Bidirectional)
    return Tagger(rnn, bidirectional, nnx.Rngs(seed, carry=1))


def test_a_checkpoint_of_a_model_of_flax_loads_unchanged(tmp_path):
    flax = tagger(ours=False)
    expected = run(flax, batch(nan=False), jnp.asarray(LENGTHS))  # moves key counters on
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "flax", plain(flax))
    ours = tagger(ours=True, seed=5)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "flax", plain(ours))
    nnx.update(ours, jax.tree.map(lambda new, old: new, nnx.state(flax), nnx.state(ours)))
    jax.tree.map(np.testing.assert_array_equal, restored, plain(ours))
    assert_close(run(ours, batch(), jnp.asarray(LENGTHS))[REAL], expected[REAL])


def test_key_counters_move_as_in_flax():
    flax, ours = tagger(ours=False), tagger(ours=True)
    for _ in range(2):
        run(flax, batch(nan=False), jnp.asarray(LENGTHS))
        run(ours, batch(), jnp.asarray(LENGTHS))
        ours_state, flax_state = plain(ours), plain(flax)
        jax.tree.map(np.testing.assert_array_equal, ours_state, flax_state)


def test_initial_carries_are_drawn_as_in_flax():
    with pytest.warns(UserWarning, match="carry_init"):
        cell = nnx.SimpleCell(F, H, carry_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(0))
    modules = nnx.RNN(cell, rngs=nnx.Rngs(3)), RNN(cell, rngs=nnx.Rngs(3))
    assert_close(*(run(module, batch(nan=False)) for module in modules))
    assert_close(*(module(batch(nan=False), rngs=nnx.Rngs(carry=7)) for module in modules))
    pairs = [
        bidirectional(rnn(cell), rnn(nnx.clone(cell)), rngs=nnx.Rngs(1))
        for rnn, bidirectional in ((nnx.RNN, nnx.Bidirectional), (RNN, Bidirectional))
    ]
    assert_close(*(run(pair, batch(nan=False)) for pair in pairs))


def test_trains_under_nnx_transforms_with_one_program():
    model = tagger(ours=True)
    optimizer = nnx.Optimizer(model, optax.adam(3e-2), wrt=nnx.Param)
    labels = jnp.asarray(np.random.default_rng(0).integers(0, 2, (B, T)))
    traces = []

    @nnx.jit
    def train_step(model, optimizer, x, lengths):
        traces.append(lengths)

        def loss(model):
            losses = optax.softmax_cross_entropy_with_integer_labels(model(x, lengths), labels)
            return jnp.sum(jnp.where(jnp.arange(T) < lengths[:, None], losses, 0)) / jnp.sum(lengths)

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    losses = [train_step(model, optimizer, batch(), jnp.asarray(LENGTHS - i % 2)) for i in range(80)]
    assert len(traces) == 1
    assert losses[-1] < 0.3 * losses[0]


def test_nnx_transforms_around_it():
    x = batch(nan=False)
    rnn = RNN(nnx.GRUCell(F, H, rngs=nnx.Rngs(0)))
    expected = run(rnn, x, seq_lengths=LENGTHS)
    assert_close(nnx.jit(nnx.remat(lambda rnn, x: rnn(x, seq_lengths=LENGTHS)))(rnn, x), expected)
    many = nnx.vmap(lambda rngs: RNN(nnx.GRUCell(F, H, rngs=rngs), rngs=False))(nnx.Rngs(0).split(2))
    with pytest.raises(ValueError, match="RNGs must be provided"):  # as in Flax, rngs=False leaves it without keys
        many(x)
    several = nnx.vmap(lambda rnn, x, key: rnn(x, seq_lengths=LENGTHS, rngs=nnx.Rngs(key)), in_axes=(0, None, None))
    outputs = nnx.jit(several)(many, x, jax.random.key(0))
    graph, state = nnx.split(many)
    for i in range(2):
        one = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))
        assert_close(outputs[i], one(x, seq_lengths=LENGTHS, rngs=nnx.Rngs(0)))


def test_a_changed_layer_inside_a_known_cell_is_run_as_it_is():
    cell = nnx.OptimizedLSTMCell(F, H, rngs=nnx.Rngs(0))
    cell.dense_i = nnx.LoRALinear(F, 4 * H, lora_rank=2, use_bias=False, rngs=nnx.Rngs(1))
    cell.dense_i.lora.lora_b[...] = jnp.ones_like(cell.dense_i.lora.lora_b[...])
    expected = run(nnx.RNN(cell), batch(nan=False), seq_lengths=LENGTHS)
    assert_close(run(RNN(cell), batch(), seq_lengths=LENGTHS), np.where(REAL[..., None], expected, 0))


def test_cells_that_keep_their_keys_are_known():
    with pytest.warns(UserWarning, match="keep_rngs"):
        cell = nnx.GRUCell(F, H, rngs=nnx.Rngs(0), keep_rngs=True)
    rnn = RNN(cell, rngs=False)
    graph, state = nnx.split(rnn)
    jaxpr = jax.make_jaxpr(lambda state: nnx.merge(graph, state)(batch(), seq_lengths=LENGTHS))(state)
    assert "custom_vjp" in str(jaxpr)


def test_the_same_rnn_twice_is_said():
    rnn = RNN(nnx.GRUCell(F, H, rngs=nnx.Rngs(0)))
    with pytest.warns(UserWarning, match="share their parameters"):
        outputs = Bidirectional(rnn, rnn)(batch(), seq_lengths=LENGTHS)
    assert outputs.shape == (B, T, 2 * H)
