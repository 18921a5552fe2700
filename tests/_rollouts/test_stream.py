"""Streams: users that come and go, each row at its own time, equal to each user's own sequence in one piece."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import jaxpack
from jaxpack.rollouts import Stream

F, H, B, C = 2, 3, 3, 4
LAYERS: dict[str, Any] = {
    "lstm": jaxpack.LSTM(F, H, num_layers=2, dropout=0.5, proj_size=2),
    "gru": jaxpack.GRU(F, H),
    "min_gru": jaxpack.MinGRU(F, 4),
}


@pytest.fixture(autouse=True)
def _x64(x64):
    """Runs in float64."""


@functools.cache
def subject(name):
    """A layer's parameters, and its stream's chunk as a program."""
    layer = LAYERS[name]
    params = layer.init(jax.random.key(0), jnp.float64)
    return layer, params, jax.jit(Stream(layer).chunk)


def whole(layer, params, users):
    """The outputs of each user's sequence in one piece."""
    options = {"deterministic": True} if getattr(layer, "has_dropout", False) else {}
    output, _ = jax.jit(functools.partial(layer.apply, **options))(params, jaxpack.pack_sequence(users))
    return jaxpack.unpack_sequence(output)


class Seats:
    """Users in rows: each reads its sequence in pieces of any length, leaves, and gives its row to the next."""

    def __init__(self, users, rng):
        self.left, self.rng = [list(user) for user in users], rng
        self.waiting = list(range(B, len(users)))
        self.users: list[int | None] = list(range(B))
        self.begins = np.ones(B, bool)
        self.outputs: list[list[Any]] = [[] for _ in users]

    def pieces(self):
        """Takes the next steps of each row."""
        taken = []
        for user in self.users:
            left = [] if user is None else self.left[user]
            n = int(self.rng.integers(0, min(C, len(left)) + 1))
            taken.append(np.reshape(left[:n], (n, F)))
            del left[:n]
        return taken

    def hand_out(self, outputs):
        """Gives each row its outputs, and rows whose users have read everything to others."""
        self.begins = np.zeros(B, bool)
        for row, user in enumerate(self.users):
            if user is not None:
                self.outputs[user] += list(np.asarray(outputs[row]))
                if not self.left[user]:
                    self.users[row] = self.waiting.pop() if self.waiting else None
                    self.begins[row] = True


@pytest.mark.parametrize(
    ("name", "packed"), [*((name, False) for name in LAYERS), ("gru", True)], ids=[*LAYERS, "gru, packed"]
)
def test_each_user_gets_what_its_sequence_in_one_piece_gives(name, packed):
    layer, params, chunk = subject(name)
    rng = np.random.default_rng(0)
    users = [rng.standard_normal((length, F)) for length in (9, 7, 5, 3, 6)]
    state = jax.tree.map(lambda leaf: leaf + 7.0, Stream(layer).init(params, B))  # of users before
    plan, seats = jaxpack.plan_rows([C] * B, 2), Seats(users, rng)
    while any(user is not None for user in seats.users):
        pieces = seats.pieces()
        if packed:
            output, state = chunk(params, jaxpack.pack_sequence(pieces, plan=plan), state, begins=seats.begins)
            seats.hand_out(jaxpack.unpack_sequence(output))
        else:
            inputs = np.stack([np.pad(x, ((0, C - len(x)), (0, 0)), constant_values=9) for x in pieces])
            lengths = np.array([len(piece) for piece in pieces])
            output, state = chunk(params, inputs, state, lengths=lengths, begins=seats.begins)
            seats.hand_out([row[:n] for row, n in zip(output, lengths, strict=True)])
    for outputs, expected in zip(seats.outputs, whole(layer, params, users), strict=True):
        np.testing.assert_allclose(outputs, expected, atol=1e-10)


@pytest.mark.parametrize(
    "layer", [jaxpack.LRU(F, 4), jaxpack.Mamba2(F, 4, head_size=2, state_size=3)], ids=["lru", "mamba"]
)
def test_rows_are_in_front_of_every_state(layer):
    stream, params = Stream(layer), layer.init(jax.random.key(0))
    shapes = [leaf.shape for leaf in jax.tree.leaves(stream.init(params))]
    assert [leaf.shape for leaf in jax.tree.leaves(stream.init(params, 5))] == [(5, *shape) for shape in shapes]


def test_steps_equal_numpy():
    layer, stream = LAYERS["gru"], Stream(LAYERS["gru"])
    params = oracles.random_params(layer)
    rng = np.random.default_rng(0)
    step: Any = jax.jit(stream.step)
    state, h = stream.init(params, B), np.zeros((B, H))
    for _ in range(6):
        x, active, begins = rng.standard_normal((B, F)), rng.random(B) < 0.6, rng.random(B) < 0.3
        y, state = step(params, x, state, active=active, begins=begins)
        h = np.where(begins[:, None], 0, h)
        for row in np.flatnonzero(active):
            (h[row],) = oracles.cell_step("gru", params["l0"], (h[row],), x[row])
        np.testing.assert_allclose(y, np.where(active[:, None], h, 0), atol=1e-12)
        np.testing.assert_allclose(state[:, 0], h, atol=1e-12)
    assert step._cache_size() == 1


def test_a_row_that_waits_keeps_its_state_bit_for_bit():
    layer, params, chunk = subject("lstm")
    state = jax.tree.map(lambda leaf: leaf + np.pi, Stream(layer).init(params, B))
    _, after = chunk(params, np.full((B, C, F), np.nan), state, lengths=np.array([0, C, 0]), begins=np.zeros(B, bool))
    for ours, before in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(np.asarray(ours)[[0, 2]], np.asarray(before)[[0, 2]])
        assert np.isnan(ours[1]).any()


def test_users_may_begin_from_another_state_than_zeros():
    layer, params, _ = subject("gru")
    stream = Stream(layer)
    fresh = np.full((1, 1, H), 0.5)
    _, begun = stream.chunk(
        params, np.zeros((2, 0, F)), stream.init(params, 2), begins=np.array([True, False]), fresh=fresh
    )
    np.testing.assert_array_equal(begun[:, 0, 0], [0.5, 0])


def test_users_begin_from_a_learned_initial_state():
    layer = jaxpack.LSTM(F, H, learned_initial_state=True)
    params, stream = layer.init(jax.random.key(0), float), Stream(layer)
    params["l0"] |= {"h_0": jnp.arange(H, dtype=float), "c_0": jnp.ones(H)}
    h, c = stream.init(params, 2)
    np.testing.assert_array_equal(h[:, 0], [np.arange(H)] * 2)
    _, (h, c) = stream.chunk(params, np.zeros((2, 0, F)), (5 * h, 5 * c), begins=np.array([True, False]))
    np.testing.assert_array_equal(c[:, 0], [[1] * H, [5] * H])


GRU_PARAMS = functools.cache(lambda: subject("gru")[1])
ZEROS = functools.cache(lambda: Stream(LAYERS["gru"]).init(GRU_PARAMS(), B))
WRONG: dict[str, Any] = {
    "no layer": (lambda s: Stream("lstm"), TypeError, "layer must be a layer of jaxpack, such as"),
    "a class": (lambda s: Stream(jaxpack.LSTM), TypeError, "layer must be a layer of jaxpack, such as"),
    "both directions": (lambda s: Stream(jaxpack.GRU(F, H, bidirectional=True)), ValueError, "is bidirectional"),
    "ints": (
        lambda s: s.chunk(GRU_PARAMS(), np.zeros((B, C, F)), ZEROS(), begins=[1, 0, 0]),
        TypeError,
        "begins must be bool, got dtype int",
    ),
    "rows": (
        lambda s: s.step(GRU_PARAMS(), np.zeros((B, F)), ZEROS(), active=[True]),
        ValueError,
        "active must be one bool for each of the 3 rows, got shape [1]",
    ),
    "another batch": (
        lambda s: s.chunk(GRU_PARAMS(), np.zeros((B + 1, C, F)), ZEROS()),
        ValueError,
        "initial_state must be h_0 [1, 4, 3]",
    ),
    "another state": (
        lambda s: s.chunk(GRU_PARAMS(), np.zeros((B, C, F)), (ZEROS(), ZEROS())),
        ValueError,
        "state must be what Stream.init(params, batch_size) returns",
    ),
    "one step": (lambda s: s.step(GRU_PARAMS(), np.zeros(F), ZEROS()), ValueError, "x must be one step a row"),
    "no time": (lambda s: s.chunk(GRU_PARAMS(), np.zeros((B, F)), ZEROS()), ValueError, "inputs must be [B, C, 2]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case):
    call, error, message = WRONG[case]
    with pytest.raises(error, match=re.escape(message)):
        call(Stream(LAYERS["gru"]))
