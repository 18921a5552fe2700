"""The contract: what everything recurrent promises, each promise a test of every subject.

All of them run in float64, and most on one program for each subject and plan.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from contract_subjects import ALIKE, CALLS, STEPS, B, Call, F, Subject, T, calls_of, one_call, subject_of

from jaxpack import pack_padded_sequence, pad_packed_sequence

ALWAYS_MISFITS = ((3, T + 1, 2), (2, -1, 3))
ROOM = (5, 3, 3)  # lengths that fit every plan: the i-th longest has at most that many steps
LENGTHS = ((2, 5, 2), (3, 3, 3), (1, 5, 1))  # the first of two different ones: each is a program of an oracle


class Operands(NamedTuple):
    """What a program of a subject is given: inputs, cotangents of its outputs and final state, and resets or None."""

    params: Any
    x: Any
    lengths: Any
    state: Any
    doutputs: Any
    dfinal: Any
    poison: Any
    resets: Any = None


class States(NamedTuple):
    """The states with which sequences and episodes begin, in place of the initial state, where a subject takes both."""

    initial: Any
    fresh: Any


class Results(NamedTuple):
    """Outputs [B, T, ...] and final state of a subject; gradients of its parameters, inputs and initial state."""

    outputs: Any
    final: Any
    params: Any
    x: Any
    state: Any


def operands(name: str, lengths: Any, seed: int = 0, poison: float = 0.0) -> Operands:
    """Returns random operands, NumPy arrays, with `poison` past each length."""
    subject = subject_of(name)
    rng = np.random.default_rng(seed)
    real = np.arange(T) < np.reshape(lengths, (-1, 1))

    def numbers(zeros, lead):
        return rng.standard_normal((*lead, *np.shape(zeros)))

    def past_poisoned(array):
        return np.where(real.reshape(real.shape + (1,) * (array.ndim - 2)), array, poison)

    batch_size = len(lengths)
    x = past_poisoned(numbers(np.zeros(F), (batch_size, T)))
    state, dfinal = (jax.tree.map(lambda zeros: numbers(zeros, (batch_size,)), subject.state) for _ in range(2))
    doutputs = jax.tree.map(lambda zeros: past_poisoned(numbers(zeros, (batch_size, T))), subject.output)
    params = jax.device_get(subject.params)
    return Operands(params, x, np.array(lengths, np.int32), state, doutputs, dfinal, np.float64(poison))


def forward(name: str, call: Call, **options: Any) -> Callable[..., Any]:
    """Returns forward(operands, params, x, state) -> (outputs [B, T, ...], outputs in slack, final state).

    Slack of packed inputs holds the poison.
    """
    run = subject_of(name).run

    def entering(state):
        return (state.initial, {"fresh_state": state.fresh}) if isinstance(state, States) else (state, {})

    def padded(given, params, x, state):
        state, more = entering(state)
        if given.resets is not None:
            more["resets"] = given.resets
        outputs, final = run(params, x, state, lengths=given.lengths, plan=call.plan, **options, **more)
        return outputs, (), final

    def packed(given, params, x, state):
        inputs = pack_padded_sequence(x, given.lengths, batch_first=True, plan=call.plan)
        inputs = inputs.replace(data=jnp.where(inputs.mask[:, None], inputs.data, given.poison))
        state, more = entering(state)
        if given.resets is not None:
            more["resets"] = pack_padded_sequence(given.resets, given.lengths, batch_first=True, plan=call.plan)
        outputs, final = run(params, inputs, state, **options, **more)
        slack = jax.tree.map(lambda leaf: jnp.where(expanded(inputs.mask, leaf), 0, leaf), outputs.data)
        return pad_packed_sequence(outputs, batch_first=True, total_length=T)[0], slack, final

    through_packed = call.packed or name in STEPS
    return packed if through_packed else padded


def expanded(mask, like):
    """A mask [S] shaped to select in an array [S, ...]."""
    return mask.reshape(mask.shape + (1,) * (like.ndim - 1))


def pulled_back(
    name: str, call: Call, wrap: Callable[[Any], Any] = lambda function: function
) -> Callable[..., Results]:
    """Returns a function from `Operands` to `Results`.

    Args:
      wrap: a transform around the forward pass.
    """
    run = forward(name, call)

    def derivatives(given: Operands) -> Results:
        apply = wrap(functools.partial(run, given))
        (outputs, slack, final), vjp = jax.vjp(apply, given.params, given.x, given.state)
        dslack = jax.tree.map(lambda leaf: jnp.zeros_like(leaf) + given.poison, slack)
        return Results(outputs, final, *vjp((given.doutputs, dslack, given.dfinal)))

    return derivatives


class Shared:
    """A jitted function that counts its programs and returns NumPy arrays, on which no operation is a program."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._run: Any = jax.jit(function)

    def __call__(self, *operands: Any) -> Any:
        """Returns what the function does."""
        return jax.device_get(self._run(*operands))

    def programs(self) -> int:
        """Returns how many programs there are of it."""
        return self._run._cache_size()

    def effects(self, *operands: Any) -> Any:
        """Returns the effects of the program for such operands."""
        return self._run.trace(*operands).jaxpr.effects


@functools.cache
def program(name: str, call: str) -> Shared:
    """Returns the one program in which a subject runs under a plan, forward and backward, for any lengths."""
    return Shared(pulled_back(name, CALLS[call]))


@functools.cache
def program_alone(name: str) -> Shared:
    """Returns the oracle of one sequence by itself: Flax's modules, or equations in a plain scan."""

    def derivatives(params, xs, state, cotangents):
        (outputs, final), vjp = jax.vjp(subject_of(name).one, params, xs, state)
        return Results(outputs, final, *vjp(cotangents))

    return Shared(derivatives)


def oracle_alone(name: str, given: Operands) -> Results:
    """Returns what the oracle makes of each sequence alone. Sequences of the same length share a program."""
    each = []
    for row, length in enumerate(given.lengths):
        state, dfinal, x, doutputs = jax.tree.map(
            lambda leaf, row=row: leaf[row], (given.state, given.dfinal, given.x, given.doutputs)
        )
        x, doutputs = jax.tree.map(lambda leaf, length=length: leaf[:length], (x, doutputs))
        found = program_alone(name)(given.params, x, state, (doutputs, dfinal))
        each.append(found._replace(outputs=jax.tree.map(_padded, found.outputs), x=_padded(found.x)))
    params = jax.tree.map(lambda *leaves: sum(leaves), *(found.params for found in each))
    return stacked([found._replace(params=()) for found in each])._replace(params=params)


def _padded(steps):
    return np.pad(steps, [(0, T - len(steps))] + [(0, 0)] * (steps.ndim - 1))


def stacked(trees):
    """Pytrees of NumPy arrays as one, with a leading axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def oracle(name: str, given: Operands) -> Results:
    """Returns what PyTorch makes of the operands, or else what Flax or the equations make of each sequence alone."""
    subject = subject_of(name)
    if subject.layer is None or oracles.torch is None:
        with jax.numpy_rank_promotion("allow"):
            return oracle_alone(name, given)

    def leaves(state):
        return [np.swapaxes(leaf, 0, 1) for leaf in jax.tree.leaves(state)]

    def tree(leaves):
        return jax.tree.unflatten(jax.tree.structure(subject.state), [np.swapaxes(leaf, 0, 1) for leaf in leaves])

    (outputs, *final), (params, x, *state) = oracles.torch_gradients(
        subject.layer,
        subject.plain(given.params),
        given.x,
        tuple(map(int, given.lengths)),
        leaves(given.state),
        [given.doutputs, *leaves(given.dfinal)],
    )
    return Results(outputs, tree(final), params, x, tree(state))


def assert_close(ours, theirs, tolerance=1e-10):
    """All leaves are the same but for rounding, NaN included."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


def rows_of(results: Results, rows: Any) -> Any:
    """What belongs to some sequences: all but the gradient of parameters."""
    return jax.tree.map(lambda leaf: leaf[rows], results._replace(params=()))


def random_lengths(seed: int) -> np.ndarray:
    """Lengths that fit every plan, in any order, some of them 0."""
    rng = np.random.default_rng(seed)
    return rng.permutation([rng.integers(0, most, endpoint=True) for most in ROOM])


def tangent_like(tree: Any) -> Any:
    """A direction in the space of a pytree."""
    return jax.tree.map(lambda leaf: np.cos(np.arange(leaf.size)).reshape(leaf.shape), tree)


def dot(tree: Any, other: Any) -> Any:
    """The inner product of two pytrees."""
    return sum((a * b).sum() for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True))


class Contract:
    """The promises, each of them a test of every subject; a class of tests names its subjects."""

    subjects: dict[str, Callable[[], Subject]]

    def pytest_generate_tests(self, metafunc):
        """Runs a test for each subject, and for each of its calls where it takes one; or for one of each kind."""
        if "call" in metafunc.fixturenames:
            named = [(name, call) for name in self.subjects for call in calls_of(name)]
            metafunc.parametrize(("subject", "call"), named, ids=["-".join(each) for each in named])
        elif "subject" in metafunc.fixturenames:
            metafunc.parametrize("subject", self.subjects)
        elif "kind" in metafunc.fixturenames:
            metafunc.parametrize("kind", [name for name in self.subjects if name not in ALIKE])

    @pytest.fixture(autouse=True)
    def _strictly(self):
        """Runs in float64 and without promotion of ranks."""
        with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
            yield

    def test_values_and_gradients_are_the_oracles(self, subject, call):
        by_torch = subject_of(subject).layer is not None and oracles.torch is not None
        for seed, lengths in enumerate(LENGTHS if by_torch else LENGTHS[:1]):
            given = operands(subject, lengths, seed)
            ours, theirs = program(subject, call)(given), oracle(subject, given)
            assert_close(ours._replace(params=subject_of(subject).plain(ours.params)), theirs)
            assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {np.dtype("float64")}

    def test_every_plan_gives_the_same(self, subject):
        first, *others = calls_of(subject)
        for seed in range(5):
            given = operands(subject, random_lengths(seed), seed)
            expected = program(subject, first)(given)
            for call in others:
                assert_close(program(subject, call)(given), expected)

    def test_programs_have_no_effects(self, subject, call):
        """A jitted function with an effect is called through Python, which takes longer than a small layer."""
        assert not program(subject, call).effects(operands(subject, LENGTHS[0]))

    def test_batch_mates_do_not_matter(self, subject, call):
        together = program(subject, call)(operands(subject, (3, 5, 2)))
        for row, length in enumerate((3, 5, 2)):
            lengths = np.where(np.arange(B) == row, length, 0)
            alone = program(subject, call)(operands(subject, lengths))
            assert_close(rows_of(alone, row), rows_of(together, row))

    def test_permuting_the_batch_permutes_the_results(self, subject, call):
        given, order = operands(subject, (3, 0, 2)), np.array([2, 0, 1])
        fields = {name: getattr(given, name) for name in ("x", "lengths", "state", "doutputs", "dfinal")}
        permuted = given._replace(**jax.tree.map(lambda leaf: leaf[order], fields))
        results, expected = program(subject, call)(permuted), program(subject, call)(given)
        assert_close(rows_of(results, slice(None)), rows_of(expected, order))
        assert_close(results.params, expected.params)

    def test_slack_and_padding_are_inert_to_nan_and_inf(self, subject, call):
        lengths = (2, 3, 0)
        clean = program(subject, call)(operands(subject, lengths))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(clean))
        for poison in (np.nan, np.inf, -np.inf):
            dirty = program(subject, call)(operands(subject, lengths, poison=poison))
            jax.tree.map(np.testing.assert_array_equal, dirty, clean)
        padding = np.arange(T) >= np.reshape(lengths, (-1, 1))
        for leaf in jax.tree.leaves((clean.outputs, clean.x)):
            assert (leaf[padding] == 0).all()

    def test_misfits_alone_are_nan_and_so_are_the_gradients_of_parameters(self, subject, call):
        others = np.array([0, 2])
        for lengths in ALWAYS_MISFITS + CALLS[call].misfits:
            given = operands(subject, (T,) * B)
            found = program(subject, call)(given._replace(lengths=np.array(lengths, np.int32)))
            fitting = program(subject, call)(given._replace(lengths=np.array([lengths[0], 1, lengths[2]], np.int32)))
            assert_close(rows_of(found, others), rows_of(fitting, others))
            for leaf in jax.tree.leaves((found.outputs, found.final)):
                assert np.isnan(leaf[1]).all()
            assert np.isnan(found.x[1]).any()
            assert all(np.isnan(leaf).any() for leaf in jax.tree.leaves(found.params))
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(fitting))

    def test_a_sequence_of_length_0_keeps_its_initial_state_and_passes_its_cotangent_on(self, subject, call):
        given = operands(subject, (2, 0, 3))
        found = program(subject, call)(given)
        assert_close(rows_of(found, 1).final, jax.tree.map(lambda leaf: leaf[1], given.state), 0)
        assert_close(rows_of(found, 1).state, jax.tree.map(lambda leaf: leaf[1], given.dfinal), 0)
        for leaf in jax.tree.leaves((found.outputs, found.x)):
            assert (leaf[1] == 0).all()

    def test_a_sequence_of_length_0_may_have_any_initial_state(self, subject, call):
        given = operands(subject, (2, 0, 3))
        expected = program(subject, call)(given)

        def poisoned(leaf):
            return np.where(expanded(np.arange(B) == 1, leaf), np.nan, leaf)

        found = program(subject, call)(given._replace(state=jax.tree.map(poisoned, given.state)))
        assert_close(rows_of(found, np.array([0, 2])), rows_of(expected, np.array([0, 2])), 0)
        assert_close(found.params, expected.params, 0)

    def test_a_batch_of_empty_sequences_is_legal(self, subject, call):
        given = operands(subject, (0, 0, 0), poison=np.nan)
        found = program(subject, call)(given)
        assert_close((found.final, found.state), (given.state, given.dfinal), 0)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves((found.outputs, found.params, found.x)))

    def test_a_batch_of_no_sequences_has_gradients_of_zero(self, subject):
        given = operands(subject, ())

        def packed(given):
            return pulled_back(subject, Call(None, packed=True))(given._replace(lengths=np.zeros(0, np.int32)))

        runs = [packed] + [pulled_back(subject, CALLS[call]) for call in calls_of(subject) if call == "none"]
        for run in runs:
            found = jax.device_get(jax.jit(run)(given))
            assert all(leaf.shape[0] == 0 for leaf in jax.tree.leaves(found._replace(params=())))
            assert all((leaf == 0).all() for leaf in jax.tree.leaves(found.params))
            assert jax.tree.map(np.shape, found.params) == jax.tree.map(np.shape, given.params)

    def test_all_lengths_are_one_program(self, subject, call):
        for seed in range(3):
            program(subject, call)(operands(subject, random_lengths(seed), seed))
        assert program(subject, call).programs() == 1

    def test_ranks_need_no_promotion(self, subject, call):
        assert jax.numpy_rank_promotion.value == "raise"
        program(subject, call)(operands(subject, (3, 5, 2)))

    def test_forward_mode_is_there_on_request_and_equals_reverse_mode(self, subject):
        call = one_call(subject, 1)
        given = operands(subject, (3, 5, 2))
        options = {"forward_mode": True} if subject_of(subject).own_derivative else {}
        primals = given.params, given.x, given.state
        tangents = tangent_like(primals)

        def directional(given, call=call, **options):
            run = functools.partial(forward(subject, CALLS[call], **options), given)
            _, (doutputs, _, dfinal) = jax.jvp(run, primals, tangents)
            return doutputs, dfinal

        def loss(given):
            return dot(directional(given, **options), (given.doutputs, given.dfinal))

        expected = dot(program(subject, call)(given)[2:], tangents)
        np.testing.assert_allclose(jax.jit(loss)(given), expected, rtol=1e-10)
        if subject_of(subject).own_derivative:
            with pytest.raises(TypeError, match="forward_mode=True"):
                directional(given, "padded")

    def test_the_derivative_has_a_derivative(self, kind):
        call = one_call(kind, 2)
        given = operands(kind, (3, 5, 2))
        tangent = tangent_like(given.params)

        def gradient(params):
            return pulled_back(kind, CALLS[call])(given._replace(params=params)).params

        def moved(step):
            params = jax.tree.map(lambda leaf, change: leaf + step * change, given.params, tangent)
            return program(kind, call)(given._replace(params=params)).params

        found = jax.device_get(jax.jit(lambda params: jax.jvp(gradient, (params,), (tangent,))[1])(given.params))
        differences = jax.tree.map(lambda a, b: (a - b) / 2e-6, moved(1e-6), moved(-1e-6))
        assert_close(found, differences, 1e-6)

    def test_transformations_compose_on_every_platform(self, subject):
        """One program holds an export for all platforms of shard_map over vmap of remat of the derivative."""
        call = one_call(subject, 0)
        each = [[operands(subject, random_lengths(2 * v + d), 2 * v + d) for d in range(2)] for v in range(2)]
        params = [jax.tree.map(lambda leaf, scale=scale: scale * leaf, each[0][0].params) for scale in (1, 0.5)]
        each = [[given._replace(params=params[v]) for given in each[v]] for v in range(2)]
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        data, whole = jax.P(None, "data"), jax.P()
        run = jax.vmap(pulled_back(subject, CALLS[call], jax.checkpoint))
        specs = (Operands(whole, data, data, data, data, data, whole),)
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=Results(data, data, whole, data, data))
        leaves, structure = jax.tree.flatten(stacked([_side_by_side(halves) for halves in each]))
        flat = jax.jit(lambda *leaves: jax.tree.leaves(run(jax.tree.unflatten(structure, leaves))))
        assert "remat2" in str(flat.trace(*leaves).jaxpr)
        exported = jax.export.export(flat, platforms=oracles.PLATFORMS)(*leaves)
        assert exported.platforms == oracles.PLATFORMS
        found = exported.call(*jax.device_put(leaves, jax.NamedSharding(mesh, whole)))
        expected = [[program(subject, call)(given) for given in halves] for halves in each]
        together = jax.tree.unflatten(jax.tree.structure(expected[0][0]), jax.device_get(found))
        for v, halves in enumerate(expected):
            results = jax.tree.map(lambda leaf, v=v: leaf[v], together)
            for d, half in enumerate(halves):
                assert_close(rows_of(results, slice(d * B, (d + 1) * B)), rows_of(half, slice(None)))
            assert_close(results.params, jax.tree.map(np.add, *(half.params for half in halves)))

    def test_bfloat16_comes_out_where_bfloat16_goes_in(self, subject):
        def half(leaf):
            return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16 if leaf.dtype == np.float64 else leaf.dtype)

        run = pulled_back(subject, CALLS[one_call(subject, 1)])
        found = jax.eval_shape(run, jax.tree.map(half, operands(subject, (3, 5, 2))))
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}


def _side_by_side(parts):
    """Operands of the same parameters as those of one batch."""
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves) if np.ndim(leaves[0]) else leaves[0], *parts)
    return joined._replace(params=parts[0].params)
