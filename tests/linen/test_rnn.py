"""What is linen's own in the drop-in: variables, keys, lifted transforms, any cell."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import linen as nn
from flax_apis import OwnLinenCell

import jaxpack
from jaxpack import pack_padded_sequence, plan_buckets, plan_rows
from jaxpack.linen import RNN, Bidirectional


def run(module, variables, *args, **options):
    """module.apply in one program, since op by op it is hundreds."""
    return jax.jit(lambda variables, args: module.apply(variables, *args, **options))(variables, args)


def start(module, key, *args, **options):
    """module.init in one program."""
    return jax.jit(lambda key, args: module.init(key, *args, **options))(key, args)


F, H = 3, 4
LENGTHS = np.array([3, 6, 2, 4])
B, T = 4, 6
REAL = np.arange(T) < LENGTHS[:, None]
ROWS, BUCKETS = plan_rows(LENGTHS), plan_buckets(LENGTHS, 3)


def batch(nan=True):
    x = oracles.random_batch(LENGTHS, F, dtype=np.float32)
    return x if nan else np.nan_to_num(x)


class Noisy(nn.RNNCellBase):
    """A cell as users write them: a carry of their own, batch statistics, dropout inside, and a sown value."""

    train: bool = True

    @nn.compact
    def __call__(self, carry, x):
        h = nn.Dense(H)(x) + nn.Dense(H, use_bias=False)(carry["h"])
        h = nn.BatchNorm(use_running_average=not self.train, momentum=0.5)(h)
        h = nn.Dropout(0.5, deterministic=not self.train)(jnp.tanh(h))
        self.sow("intermediates", "h", h)
        return {"h": h, "steps": carry["steps"] + 1}, (h, carry["steps"])

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return {"h": jnp.zeros((*input_shape[:-1], H)), "steps": jnp.zeros(input_shape[:-1], jnp.int32)}

    @property
    def num_feature_axes(self):
        return 1


NOISY = {"variable_carry": "batch_stats", "split_rngs": {"params": False, "dropout": True}, "return_carry": True}


def assert_close(actual, expected, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance), actual, expected)


def test_a_users_cell_without_a_plan_draws_and_counts_as_in_flax():
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    cell = Noisy()
    variables = start(RNN(cell, **NOISY), keys, batch(nan=False))
    with pytest.raises(TypeError, match="same pytree structure"):
        start(nn.RNN(cell, **NOISY), keys, batch(nan=False))  # Flax cannot make the statistics that the scan carries
    for options in ({}, {"reverse": True, "time_major": True}):
        call = {"rngs": {"dropout": jax.random.key(2)}, "mutable": ["batch_stats"], **options}
        expected = run(nn.RNN(cell, **NOISY), variables, batch(nan=False), **call)
        assert_close(run(RNN(cell, **NOISY), variables, batch(nan=False), **call), expected)
    # All lengths at T: masks, statistics and keys are those of Flax though every step is masked.
    call = {"rngs": {"dropout": jax.random.key(2)}, "mutable": ["batch_stats"]}
    expected = run(nn.RNN(cell, **NOISY), variables, batch(nan=False), **call)
    actual = run(RNN(cell, **NOISY), variables, batch(nan=False), seq_lengths=np.full(B, T), **call)
    assert_close(actual, expected)
    # Sequences that are longest see the same, whatever the lengths of others, as long as statistics are fixed.
    still = RNN(Noisy(train=False), **NOISY)
    (carry, (h, steps)), _ = run(still, variables, batch(), seq_lengths=LENGTHS, mutable=["batch_stats"])
    flax = nn.RNN(Noisy(train=False), **NOISY)
    (_, (flax_h, _)), _ = run(flax, variables, batch(nan=False), mutable=["batch_stats"])
    with pytest.raises(TypeError, match="same pytree structure"):
        run(flax, variables, batch(nan=False))  # nor carry them where they may not change
    assert_close(run(still, variables, batch(nan=False))[1][0], flax_h)
    assert_close(h, np.where(REAL[..., None], flax_h, 0))
    np.testing.assert_array_equal(carry["steps"], LENGTHS)
    np.testing.assert_array_equal(steps, np.where(REAL, np.arange(T), 0))


@pytest.mark.parametrize("plan", [ROWS, BUCKETS], ids=["rows", "buckets"])
def test_a_users_cell_under_a_plan(plan):
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    rnn = RNN(Noisy(), plan=plan, **NOISY)
    variables = start(rnn, keys, batch(nan=False))
    call = {"rngs": {"dropout": jax.random.key(2)}, "mutable": ["batch_stats"]}
    (carry, (h, _)), updated = run(rnn, variables, batch(), seq_lengths=LENGTHS, **call)
    np.testing.assert_array_equal(carry["steps"], LENGTHS)
    assert (h[~REAL] == 0).all()
    dropped = h[REAL] == 0
    assert 0.2 < dropped.mean() < 0.8
    before, after = (v["batch_stats"]["cell"]["BatchNorm_0"]["mean"] for v in (variables, updated))
    assert (before != after).all()
    still = RNN(Noisy(train=False), plan=plan, **NOISY)
    no_plan = RNN(Noisy(train=False), **NOISY)
    assert_close(
        run(still, variables, batch(), seq_lengths=LENGTHS), run(no_plan, variables, batch(), seq_lengths=LENGTHS)
    )

    def loss(params, rnn):
        _, (h, _) = run(rnn, {**variables, "params": params}, batch(), seq_lengths=LENGTHS)
        return jnp.sum(h**2)

    assert_close(*(jax.grad(loss)(variables["params"], rnn) for rnn in (still, no_plan)))


class Mask(nn.RNNCellBase):
    """Puts out a dropout mask."""

    @nn.compact
    def __call__(self, carry, x):
        return carry, nn.Dropout(0.5, deterministic=False)(jnp.ones((x.shape[0], 32)))

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return jnp.zeros(input_shape[:-1])

    @property
    def num_feature_axes(self):
        return 1


@pytest.mark.parametrize("plan", [None, ROWS, BUCKETS], ids=["none", "rows", "buckets"])
@pytest.mark.parametrize("split", [True, False])
def test_keys_are_split_over_steps_as_asked(plan, split):
    rnn = RNN(Mask(), split_rngs={"dropout": split}, plan=plan)
    masks = run(rnn, {}, batch(), seq_lengths=LENGTHS, rngs={"dropout": jax.random.key(0)})
    distinct = len(np.unique(masks[1], axis=0))  # of the longest sequence, which passes through every bucket
    assert distinct == (T if split else 1)


def test_each_step_has_its_own_key_under_a_plan():
    rnn = RNN(Mask(), split_rngs={"dropout": True}, plan=BUCKETS)
    masks = run(rnn, {}, batch(), seq_lengths=LENGTHS, rngs={"dropout": jax.random.key(0)})
    assert len(np.unique(masks[REAL], axis=0)) == LENGTHS.sum()


def test_variables_with_a_time_axis_run_padded():
    options = {"variable_axes": {"params": 0}, "variable_broadcast": False, "split_rngs": {"params": True}}
    flax, ours = (module(nn.GRUCell(H), **options) for module in (nn.RNN, RNN))
    variables = start(flax, jax.random.key(0), batch(nan=False))
    jax.tree.map(np.testing.assert_array_equal, start(ours, jax.random.key(0), batch(nan=False)), variables)
    assert variables["params"]["cell"]["hn"]["kernel"].shape == (T, H, H)
    expected = np.where(REAL[..., None], run(flax, variables, batch(nan=False), seq_lengths=LENGTHS), 0)
    assert_close(run(ours, variables, batch(), seq_lengths=LENGTHS), expected)
    assert_close(run(ours, variables, batch(), seq_lengths=LENGTHS, plan=BUCKETS), expected)
    with pytest.raises(ValueError, match="packed inputs do not have: pass a padded batch"):
        run(ours, variables, pack_padded_sequence(batch(), LENGTHS, batch_first=True))


def test_what_is_sown_over_time_stays_in_the_callers_order():
    options = NOISY | {"variable_axes": {"intermediates": 0}}
    variables = start(RNN(Noisy(train=False), **options), jax.random.key(0), batch(nan=False))
    (_, (h, _)), sown = run(
        RNN(Noisy(train=False), **options), variables, batch(), seq_lengths=LENGTHS, mutable=["intermediates"]
    )
    (stacked,) = sown["intermediates"]["cell"]["h"]
    assert_close(np.where(REAL[..., None], np.swapaxes(stacked, 0, 1), 0), h)


@pytest.mark.parametrize("plan", [None, BUCKETS, ROWS], ids=["none", "buckets", "rows"])
def test_convolutional_cells(plan):
    x = np.random.default_rng(0).standard_normal((B, T, 5, 4, 2)).astype(np.float32)
    cell = nn.ConvLSTMCell(3, (2, 2))
    variables = start(nn.RNN(cell), jax.random.key(0), x)
    expected_carry, expected = run(nn.RNN(cell, return_carry=True), variables, x, seq_lengths=LENGTHS)
    carry, outputs = run(RNN(cell, return_carry=True, plan=plan), variables, x, seq_lengths=LENGTHS)
    real = REAL[..., None, None, None]
    assert_close(outputs, np.where(real, expected, 0))
    assert_close(carry, expected_carry)

    def gradient(rnn):
        def loss(variables):
            return jnp.sum(jnp.where(real, rnn.apply(variables, x, seq_lengths=LENGTHS), 0) ** 2)

        return jax.jit(jax.grad(loss))(variables)

    assert_close(gradient(RNN(cell, plan=plan)), gradient(nn.RNN(cell)), 1e-4)


class Model(nn.Module):
    """A user's model, whose RNNs come from one module or another."""

    rnn: type
    bidirectional: type

    @nn.compact
    def __call__(self, x, lengths):
        x = self.rnn(nn.LSTMCell(H))(x, seq_lengths=lengths)
        x = self.bidirectional(self.rnn(nn.GRUCell(H)), self.rnn(nn.GRUCell(H)))(x, seq_lengths=lengths)
        return nn.Dense(2)(x)


def test_a_model_of_flax_is_initialised_and_loads_unchanged():
    flax, ours = Model(nn.RNN, nn.Bidirectional), Model(RNN, Bidirectional)
    variables = start(flax, jax.random.key(0), batch(nan=False), LENGTHS)
    jax.tree.map(np.testing.assert_array_equal, start(ours, jax.random.key(0), batch(nan=False), LENGTHS), variables)
    expected = run(flax, variables, batch(nan=False), LENGTHS)
    assert_close(run(ours, variables, batch(), LENGTHS)[REAL], expected[REAL])


def test_a_module_with_a_plan_is_initialised_with_any_batch():
    for cell in (nn.LSTMCell(H), OwnLinenCell(H)):
        rnn = RNN(cell, plan=ROWS)
        outputs, variables = rnn.init_with_output(jax.random.key(0), jnp.zeros((1, 2, F)))
        assert outputs.shape == (1, 2, H)
        packed = pack_padded_sequence(batch(), LENGTHS, batch_first=True)
        jax.tree.map(np.testing.assert_array_equal, start(rnn, jax.random.key(0), packed), variables)


def test_init_key_draws_the_initial_carry_as_in_flax():
    cell = nn.SimpleCell(H, carry_init=nn.initializers.normal(1.0))
    layer = nn.Bidirectional(nn.RNN(cell), nn.RNN(cell.clone()))
    ours = Bidirectional(RNN(cell), RNN(cell.clone()))
    variables = start(layer, jax.random.key(0), batch(nan=False))
    for key in (None, jax.random.key(5)):
        expected = run(layer, variables, batch(nan=False), init_key=key)
        assert_close(run(ours, variables, batch(nan=False), init_key=key), expected)


def test_lifted_transforms_around_it():
    x = batch(nan=False)
    plain = RNN(nn.GRUCell(H))
    variables = start(plain, jax.random.key(0), x)
    expected = run(plain, variables, x, seq_lengths=LENGTHS)
    assert_close(run(nn.remat(RNN)(nn.GRUCell(H)), variables, x, seq_lengths=LENGTHS), expected)
    assert_close(run(nn.jit(RNN)(nn.GRUCell(H)), variables, x, seq_lengths=LENGTHS), expected)
    many = nn.vmap(RNN, in_axes=None, axis_size=2, variable_axes={"params": 0}, split_rngs={"params": True})
    several = many(nn.GRUCell(H))
    stacked = start(several, jax.random.key(1), x)
    outputs = run(several, stacked, x)
    for i in range(2):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
        assert_close(outputs[i], run(plain, one, x))


def test_partitioned_parameters():
    cell = nn.OptimizedLSTMCell(H, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model")))
    variables = start(RNN(cell), jax.random.key(0), batch(nan=False))
    specs = nn.get_partition_spec(variables)["params"]["cell"]["ii"]["kernel"]
    assert specs == jax.sharding.PartitionSpec(None, "model")
    expected = run(nn.RNN(cell), variables, batch(nan=False), seq_lengths=LENGTHS)
    actual = run(RNN(cell), variables, batch(), seq_lengths=LENGTHS)
    assert_close(actual, np.where(REAL[..., None], expected, 0))


def test_the_same_rnn_twice_is_said():
    rnn = RNN(nn.GRUCell(H))
    layer = Bidirectional(rnn, rnn)
    with pytest.warns(UserWarning, match="share their parameters"):
        variables = start(layer, jax.random.key(0), batch(nan=False))
    expected = start(nn.Bidirectional(*[nn.RNN(nn.GRUCell(H))] * 2), jax.random.key(0), batch(nan=False))
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, expected)


def test_version_of_the_core_is_the_same_layer():
    layer = jaxpack.GRU(F, H)
    from jaxpack._flax.known import from_cell

    rnn = RNN(nn.GRUCell(H), return_carry=True)
    variables = start(rnn, jax.random.key(0), batch(nan=False))
    params = {"l0": from_cell(layer.cell, variables["params"]["cell"])}
    carry, outputs = run(rnn, variables, batch(), seq_lengths=LENGTHS)
    expected, h_n = run(layer, params, batch(), lengths=LENGTHS)
    assert_close((outputs, carry), (expected, h_n[0]))
