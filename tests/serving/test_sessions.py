"""Sessions: pieces of a sequence continue where the one before ended; the table, its limit, and its file."""

import concurrent.futures
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpack
from jaxpack import plan_padded
from jaxpack.rollouts import Stream
from jaxpack.serving import Queue, Server, SessionServer, UnknownSessionError, counted_compilations

PLANS = [plan_padded(4, 3), plan_padded(1, 9)]
EXAMPLE = np.zeros(1, np.float32)
SOON = 20  # seconds within which answers come even on a busy machine


def accumulate(decay, packed, state):
    """h_t = decay h_{t-1} + x_t, and the number of steps."""
    steps, final = jaxpack.linear_scan(decay, packed, state["h"])
    return {"steps": steps, "last": final}, {"h": final, "count": state["count"] + packed.lengths}


BEGIN = {"h": np.float32(1), "count": np.int32(0)}


def make(**options):
    return SessionServer(accumulate, np.float32(0.5), PLANS, EXAMPLE, state=BEGIN, **options)


@pytest.fixture(scope="module")
def shared():
    return make()


@pytest.fixture
def server(shared):
    """The server, without sessions."""
    for session in shared.sessions:
        shared.close(session)
    return shared


def whole(x, h=1.0):
    """The states after each step of a sequence in one piece."""
    return list(itertools.accumulate(x, lambda h, x: 0.5 * h + x, initial=h))[1:]


def pieces_of(x, rng):
    """A sequence in pieces of 0 to 9 steps."""
    while len(x):
        n = int(rng.integers(0, 10))
        yield x[:n]
        x = x[n:]


def joined(results):
    return np.concatenate([result["steps"] for result in results])


def test_pieces_in_any_mixture_give_what_the_whole_gives(server):
    rng = np.random.default_rng(0)
    users = {name: rng.standard_normal(30).astype(np.float32) for name in "abcdefg"}
    pieces = [[(name, piece) for piece in pieces_of(x, rng)] for name, x in users.items()]
    calls = [piece for turn in itertools.zip_longest(*pieces) for piece in turn if piece is not None]
    found: dict[str, list[Any]] = {name: [] for name in users}
    for name in users:
        server.open(name)
    with counted_compilations() as compiled:
        while calls:
            n = int(rng.integers(1, 12))  # with several pieces of some sessions
            for (name, _), result in zip(calls[:n], server(calls[:n]), strict=True):
                found[name].append(result)
            calls = calls[n:]
    assert not compiled
    for name, x in users.items():
        np.testing.assert_allclose(joined(found[name]), whole(x), atol=1e-5)
        assert server.state(name)["count"] == 30
        np.testing.assert_allclose(server.state(name)["h"], whole(x)[-1], atol=1e-5)


def test_many_threads_have_their_sessions_through_a_queue(server):
    users = {f"user {i}": np.random.default_rng(i).standard_normal(40).astype(np.float32) for i in range(12)}

    def client(name):
        server.open(name)
        rng, futures = np.random.default_rng(len(name)), []
        for piece in pieces_of(users[name], rng):
            futures.append(queue.submit((name, piece)))  # without waiting: their order is kept
        return joined([future.result(SOON) for future in futures])

    with Queue(server) as queue, concurrent.futures.ThreadPoolExecutor(6) as pool:
        for x, steps in zip(users.values(), pool.map(client, users), strict=True):
            np.testing.assert_allclose(steps, whole(x), atol=1e-5)
    assert sum(tally.steps for tally in queue.tallies.values()) == 12 * 40


def test_a_recurrent_layer_serves_sessions():
    layer = jaxpack.GRU(2, 3, num_layers=2)
    params, stream = layer.init(jax.random.key(0)), Stream(layer)
    server = SessionServer(stream.chunk, params, [plan_padded(2, 4)], np.zeros((1, 2)), state=stream.init(params))
    x = np.random.default_rng(0).standard_normal((2, 7, 2)).astype(np.float32)
    for name in "ab":
        server.open(name)
    cuts = {"a": (0, 1, 1, 5, 7), "b": (0, 4, 4, 5, 7)}
    steps = [[x["ab".index(name), a:b] for a, b in itertools.pairwise(at)] for name, at in cuts.items()]
    results = [server([("a", one), ("b", other)]) for one, other in zip(*steps, strict=True)]
    expected, _ = layer.apply(params, x)
    for row in range(2):
        np.testing.assert_allclose(np.concatenate([result[row] for result in results]), expected[row], atol=1e-5)


def test_the_session_without_a_request_for_longest_makes_room(server, monkeypatch):
    monkeypatch.setattr(server, "_max_sessions", 3)
    for name in "abc":
        server.open(name)
    server([("a", [1.0])])
    server.open("d")
    assert server.sessions == ("c", "a", "d")
    with pytest.raises(UnknownSessionError, match=r"session 'b' is not open: .*\(at most 3 are open\)"):
        server([("a", [1.0]), ("b", [1.0])])
    assert server.state("a")["count"] == 1  # nothing of a refused call has run


def test_a_state_continues_where_it_was_taken(server):
    server.open("a")
    server([("a", [1.0, 2.0])])
    copy = server.state("a")
    server([("a", [3.0])])
    server.open("b", copy)
    np.testing.assert_array_equal(server([("b", [3.0])])[0]["last"], server.state("a")["h"])
    copy["h"][...] = 7  # of nobody
    assert server.close("b")["count"] == 3
    assert server.sessions == ("a",)


def test_requests_that_wait_are_answered_when_their_session_closes(server):
    server.open("a")
    with Queue(server, max_wait=3600) as queue:
        futures = [queue.submit(("a", [1.0])), queue.submit(("a", [1.0]))]
        server.close("a")
        refused = queue.submit(("a", [1.0]))
    assert [float(future.result(SOON)["last"]) for future in futures] == [1.5, 1.75]
    assert isinstance(refused.exception(SOON), UnknownSessionError)


def test_a_request_that_fails_leaves_the_state_as_it_was(server, monkeypatch):
    server.open("a")
    server([("a", [1.0])])
    before = server.state("a")
    with pytest.raises(ValueError, match="must have shape"):
        server([("a", [[1.0]])])
    with monkeypatch.context() as patch:
        patch.setattr(server, "_output", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            server([("a", [1.0])])
    np.testing.assert_equal(server.state("a"), before)


def test_sessions_are_saved_and_restored_by_another_server(server, tmp_path):
    for i, name in enumerate(["ä", "b", ""]):
        server.open(name)
        server([(name, [float(i)] * i)])
    server([("ä", [])])
    server.save(tmp_path / "server")
    server.save_sessions(tmp_path / "sessions")
    loaded = SessionServer.load(tmp_path / "server", max_sessions=5)
    loaded.load_sessions(tmp_path / "sessions")
    assert loaded.sessions == server.sessions == ("b", "", "ä")
    for name in loaded.sessions:
        np.testing.assert_equal(loaded.state(name), server.state(name))
    loaded.open("new")
    assert loaded([("new", [2.0])])[0]["last"] == 2.5
    with pytest.raises(ValueError, match=r"session '' of .* is open already"):
        server.load_sessions(tmp_path / "sessions")
    with pytest.raises(ValueError, match=r"load it with SessionServer\.load"):
        Server.load(tmp_path / "server")


def test_files_that_are_not_its_sessions_are_refused(server, tmp_path):
    def function(params, packed, state):
        return jaxpack.segment_sum(packed), state + 1

    other = SessionServer(function, (), PLANS[:1], EXAMPLE, state=jnp.zeros(2))
    other.open("a")
    other.save_sessions(tmp_path / "other")
    (tmp_path / "half").write_bytes((tmp_path / "other").read_bytes()[:-9])
    for name in ("other", "half"):
        with pytest.raises(ValueError, match=f"{name} is damaged, or holds the sessions of another server"):
            server.load_sessions(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        server.load_sessions(tmp_path / "none")
    assert server.sessions == ()
    plain = Server(lambda params, packed: jaxpack.segment_sum(packed), (), PLANS[:1], EXAMPLE)
    plain.save(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"it holds no sessions: load it with Server\.load"):
        SessionServer.load(tmp_path / "plain")


def widened(params, packed, state):
    return jaxpack.segment_sum(packed), state["h"][:, None]


WRONG: dict[str, Any] = {
    "never opened": (lambda s: s([("a", [1.0])]), UnknownSessionError, "Open it with server.open('a')"),
    "closed": (lambda s: s.close("a"), UnknownSessionError, "session 'a' is not open"),
    "no state": (lambda s: s.state("a"), UnknownSessionError, "session 'a' is not open"),
    "no session": (lambda s: s([[1.0]]), TypeError, "sequences[0] must be a pair (session, sequence)"),
    "numbers": (lambda s: s([(1, [1.0])]), TypeError, "sequences[0] must be a pair (session, sequence)"),
    "a number": (lambda s: s.open(1), TypeError, "a session is a str, got 1"),
    "twice": (lambda s: s.open("a") or s.open("a"), ValueError, "session 'a' is open already"),
    "another state": (
        lambda s: s.open("a", {"h": np.zeros(2, np.float32), "count": np.int32(0)}),
        ValueError,
        "the state of session 'a' must have the shapes and dtypes {'count': 'int32[]', 'h': 'float32[]'}, got",
    ),
    "no room": (lambda s: make(max_sessions=0), ValueError, "max_sessions must be at least 1"),
    "no pair": (
        lambda s: SessionServer(lambda p, x, state: state, 1, PLANS, EXAMPLE, state=BEGIN),
        TypeError,
        "must return a pair (results, state), got dict",
    ),
    "another state back": (
        lambda s: SessionServer(widened, 1, PLANS, EXAMPLE, state=BEGIN),
        ValueError,
        "the function must return the state in the shapes and dtypes in which it takes it",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(server, case):
    call, error, message = WRONG[case]
    with pytest.raises(error, match=re.escape(message)):
        call(server)
