"""The contract of resets: with them a batch gives what its episodes give as sequences of their own.

Where a subject takes a fresh state beside the initial one, episodes begin with that; elsewhere with the initial one.
Each subject runs under one of its plans, in turn, in one program for all tests.
"""

import functools

import jax
import jax.export
import numpy as np
import oracles
import pytest
from contract import (
    CALLS,
    Operands,
    Results,
    Shared,
    States,
    assert_close,
    dot,
    forward,
    operands,
    oracle,
    program,
    pulled_back,
    random_lengths,
    stacked,
    tangent_like,
)
from contract_subjects import ALIKE, DEEP, FLAX, LAYERS, LINEAR, STEPPED, STEPS, B, T, one_call, subject_of

# Of a few lengths: where PyTorch does not have the layer, the oracle compiles a program for all episodes.
LENGTHS = (3, 5, 0)
RESETS = np.array([[0, 1, 0, 1, 0, 1], [1, 0, 1, 0, 0, 1], [1, 0, 1, 1, 0, 1]], bool)
# All episodes have two steps, so that the oracle of a layer that compiles slowly is one program.
EVEN_LENGTHS = (4, 2, 0)
EVEN_RESETS = np.array([[0, 0, 1, 0, 0, 1], [1, 0, 1, 0, 1, 0], [1, 0, 1, 1, 0, 1]], bool)
# What differs by its cell alone has its resets in tests/_recurrence/test_derivative.py.
STEPWISE = {name: subject for name, subject in (LAYERS | FLAX | STEPS).items() if name not in ALIKE}
each_subject = pytest.mark.parametrize("subject", STEPWISE | LINEAR | DEEP)


@pytest.fixture(autouse=True)
def _strictly():
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        yield


@functools.cache
def program_with_resets(name):
    return Shared(pulled_back(name, CALLS[one_call(name, 0)]))


def operands_with_resets(name, lengths, seed=0, poison=0.0, resets=RESETS):
    """Random operands with resets, and with a fresh state where the subject takes one."""
    given = operands(name, lengths, seed, poison)
    if subject_of(name).takes_fresh:
        fresh = operands(name, lengths, seed + 100).state
        given = given._replace(state=States(given.state, fresh))
    return given._replace(resets=resets)


def episodes_of(given):
    """The row, the first step and the step after the last of each episode."""
    episodes: list[tuple[int, int, int]] = []
    for row, length in enumerate(given.lengths):
        begins = [0, *(t for t in range(1, length) if given.resets[row, t])]
        episodes += zip([row] * len(begins), begins, [*begins[1:], length], strict=True) if length else []
    return episodes


def by_episodes(name, given):
    """What the oracle makes of each episode, put together in the layout of the sequences."""
    subject, episodes = subject_of(name), episodes_of(given)
    rows = np.array([row for row, _, _ in episodes])
    starts, stops = np.array([start for _, start, _ in episodes]), np.array([stop for _, _, stop in episodes])
    is_first, is_last = starts == 0, stops == given.lengths[rows]
    initial, fresh = given.state if isinstance(given.state, States) else (given.state, given.state)
    backward = jax.tree.map(lambda _: np.bool_(False), subject.state) if subject.backward is None else subject.backward

    def cut(leaf):
        return np.stack([np.pad(leaf[r, i:j], [(0, T - (j - i))] + [(0, 0)] * (leaf.ndim - 2)) for r, i, j in episodes])

    def wide(flags, leaf):
        return flags.reshape(flags.shape + (1,) * (leaf.ndim - 1))

    def of_ends(leaf, backward):
        """The cotangents of final states: of the last episode, for a backward direction of the first."""
        return np.where(wide(is_first, leaf) & backward | wide(is_last, leaf) & ~backward, leaf[rows], 0)

    def goes_on(leaf, backward):
        """Which episodes begin with the initial state: the first without a reset, for a backward direction the last."""
        return np.where(backward, wide(is_last, leaf), wide(is_first & ~given.resets[rows, 0], leaf))

    alone = oracle(
        name,
        Operands(
            given.params,
            cut(given.x),
            stops - starts,
            jax.tree.map(
                lambda old, new, backward: np.where(goes_on(old, backward), old[rows], new[rows]),
                initial,
                fresh,
                backward,
            ),
            jax.tree.map(cut, given.doutputs),
            jax.tree.map(of_ends, given.dfinal, backward),
            given.poison,
        ),
    )

    def joined(leaf):
        whole = np.zeros((B, T, *np.shape(leaf)[2:]))
        for episode, (row, start, stop) in enumerate(episodes):
            whole[row, start:stop] = leaf[episode, : stop - start]
        return whole

    def final(leaf, backward, initial):
        firsts, lasts = np.array(initial), np.array(initial)
        firsts[rows[is_first]], lasts[rows[is_last]] = np.asarray(leaf)[is_first], np.asarray(leaf)[is_last]
        return np.where(backward, firsts, lasts)

    def summed(leaf, dfinal, mine):
        total = np.where(wide(given.lengths == 0, dfinal), dfinal, 0)
        np.add.at(total, rows, np.where(mine, leaf, 0))
        return total

    on = jax.tree.map(goes_on, initial, backward)
    if isinstance(given.state, States):
        nothing = jax.tree.map(np.zeros_like, given.dfinal)
        dstate = States(
            jax.tree.map(summed, alone.state, given.dfinal, on),
            jax.tree.map(lambda leaf, zeros, on: summed(leaf, zeros, ~on), alone.state, nothing, on),
        )
    else:
        dstate = jax.tree.map(lambda leaf, dfinal: summed(leaf, dfinal, True), alone.state, given.dfinal)

    return Results(
        jax.tree.map(joined, alone.outputs),
        jax.tree.map(final, alone.final, backward, initial),
        alone.params,
        joined(alone.x),
        dstate,
    )


def episodes_for(subject):
    """Lengths and resets for a subject."""
    return (EVEN_LENGTHS, EVEN_RESETS) if subject in STEPPED else (LENGTHS, RESETS)


@pytest.mark.parametrize("subject", STEPWISE | LINEAR | STEPPED)
def test_values_and_gradients_are_those_of_the_episodes_alone(subject):
    by_torch = subject_of(subject).layer is not None and oracles.torch is not None
    for seed in range(4 if by_torch else 1):
        lengths, resets = episodes_for(subject) if seed == 0 else (random_lengths(seed), random_resets(seed))
        given = operands_with_resets(subject, lengths, seed, np.nan, resets)
        expected = by_episodes(subject, jax.tree.map(np.nan_to_num, given))
        found = program_with_resets(subject)(given)
        assert_close(found._replace(params=subject_of(subject).plain(found.params)), expected)


def random_resets(seed):
    return np.random.default_rng(seed).random((B, T)) < 0.4


@pytest.mark.parametrize("subject", STEPWISE | STEPPED)
def test_nothing_of_an_episode_reaches_another_bit_for_bit(subject):
    lengths, resets = episodes_for(subject)
    given = operands_with_resets(subject, lengths, resets=resets)
    expected = program_with_resets(subject)(given)
    for row, start, stop in episodes_of(given):
        inside = np.zeros((B, T), bool)
        inside[row, start:stop] = True

        def perturbed(leaf, inside=inside):
            return np.where(inside.reshape(B, T, *[1] * (leaf.ndim - 2)), 3 * leaf + 1, leaf)

        moved = given._replace(x=perturbed(given.x), doutputs=jax.tree.map(perturbed, given.doutputs))
        found = program_with_resets(subject)(moved)
        pairs = (jax.tree.leaves((each.outputs, each.x)) for each in (found, expected))
        for ours, theirs in zip(*pairs, strict=True):
            np.testing.assert_array_equal(ours[~inside], theirs[~inside])
            assert (ours[inside] != theirs[inside]).any()


@each_subject
def test_resets_at_first_steps_and_past_the_end_change_nothing(subject):
    given = operands(subject, LENGTHS)
    resets = np.arange(T)[None] >= np.reshape(LENGTHS, (B, 1))
    resets[:, 0] = True
    fresh = subject_of(subject).takes_fresh
    state = States(given.state, given.state) if fresh else given.state
    found = program_with_resets(subject)(given._replace(resets=resets, state=state))
    if fresh:
        found = found._replace(state=jax.tree.map(np.add, *found.state))
    assert_close(found, program(subject, one_call(subject, 0))(given))


@pytest.mark.parametrize("subject", ["LSTM bidirectional", "nnx.RNN(OwnCell)", "log_step"])
def test_vmap_changes_no_result(subject):
    each = [operands_with_resets(subject, random_lengths(i), i, resets=random_resets(i)) for i in range(2)]
    together = Shared(jax.vmap(pulled_back(subject, CALLS[one_call(subject, 0)])))(stacked(each))
    for i, given in enumerate(each):
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], together), program_with_resets(subject)(given))


@pytest.mark.parametrize("subject", ["LSTM projected", "nnx.RNN(OwnCell)"])
def test_resets_alone_may_vary_over_devices(subject):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    given, resets = operands_with_resets(subject, LENGTHS), [random_resets(seed) for seed in range(2)]
    call = CALLS[one_call(subject, 0)]

    def run(resets):
        return forward(subject, call)(given._replace(resets=resets), given.params, given.x, given.state)[0]

    sharded = jax.shard_map(run, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
    found = jax.device_get(jax.jit(sharded)(np.concatenate(resets)))
    for i in range(2):
        expected = program_with_resets(subject)(given._replace(resets=resets[i])).outputs
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i * B : (i + 1) * B], found), expected)


def test_an_export_for_every_platform_computes_the_same():
    subject = "GRU"
    given = operands_with_resets(subject, LENGTHS)
    leaves, structure = jax.tree.flatten(given)

    def flat(*leaves):
        return jax.tree.leaves(pulled_back(subject, CALLS["rows"])(jax.tree.unflatten(structure, leaves)))

    exported = jax.export.export(jax.jit(flat), platforms=oracles.PLATFORMS)(*leaves)
    assert_close(exported.call(*leaves), program_with_resets(subject)(given))


def test_the_derivative_has_a_derivative():
    subject = "GRU"
    given = operands_with_resets(subject, LENGTHS)
    tangent = tangent_like(given.params)
    gradient = pulled_back(subject, CALLS[one_call(subject, 0)])

    def moved(step):
        params = jax.tree.map(lambda leaf, change: leaf + step * change, given.params, tangent)
        return program_with_resets(subject)(given._replace(params=params)).params

    run = jax.jit(lambda params: jax.jvp(lambda p: gradient(given._replace(params=p)).params, (params,), (tangent,)))
    differences = jax.tree.map(lambda a, b: (a - b) / 2e-6, moved(1e-6), moved(-1e-6))
    assert_close(run(given.params)[1], differences, 1e-6)


@pytest.mark.parametrize("subject", [name for name in LAYERS if name in STEPWISE])
def test_forward_mode_equals_reverse_mode(subject):
    given = operands_with_resets(subject, LENGTHS)
    run = forward(subject, CALLS[one_call(subject, 0)], forward_mode=True)
    primals = given.params, given.x, given.state
    tangents = tangent_like(primals)

    @jax.jit
    def directional(given):
        (outputs, _, final), (doutputs, _, dfinal) = jax.jvp(functools.partial(run, given), primals, tangents)
        return (outputs, final), dot((doutputs, dfinal), (given.doutputs, given.dfinal))

    values, slope = directional(given)
    expected = program_with_resets(subject)(given)
    assert_close(values, expected[:2])
    np.testing.assert_allclose(slope, dot(expected[2:], tangents), rtol=1e-10)
