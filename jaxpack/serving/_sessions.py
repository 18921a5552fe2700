"""SessionServer: a server whose sequences arrive in pieces, and continue where the piece before ended."""

from __future__ import annotations

import collections
import os
import pathlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxpack._checks import at_least_one
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._plans.cost import CostModel
from jaxpack._traced_checks import unchecked
from jaxpack._types import PyTree
from jaxpack.serving._results import results_of
from jaxpack.serving._schema import Schema
from jaxpack.serving._server import Server, as_weight, checked_plans

_FORMAT = 1


class UnknownSessionError(LookupError, ValueError):
    """The error for a session that is not open.

    Examples:
      >>> issubclass(UnknownSessionError, LookupError)
      True
    """


class _Session:
    """An open session. A request holds it, so that it is answered even if the session is closed meanwhile."""

    def __init__(self, name: str, state: PyTree) -> None:
        self.name, self.state = name, state


class _Piece(NamedTuple):
    """A checked piece of a session's sequence, as a `Request`."""

    arrays: PyTree
    length: int
    session: _Session | None = None


class SessionServer(Server):
    """A server that keeps a state for each session between its requests.

    A request is a pair (session, sequence), where a session is a name: `server([("alice", x), ("bob", y)])`, and
    `queue.submit(("alice", x))` to a `Queue`. Each request continues from the state that the one before it in its
    session left. Requests of one session run in the order in which they came, in batches one after the other; those of
    different sessions share batches. A request that fails leaves the state as it was.

    States are on the host, in NumPy arrays. At most `max_sessions` are open: opening one more closes the session that
    has been without a request for longest. Its next request is an UnknownSessionError.

    Examples:
      >>> from jaxpack.rollouts import Stream
      >>> lstm = jaxpack.LSTM(2, 4)
      >>> params, stream = lstm.init(jax.random.key(0)), Stream(lstm)
      >>> plans, example = [jaxpack.plan_padded(4, 3)], np.zeros((1, 2), np.float32)
      >>> server = SessionServer(stream.chunk, params, plans, example, state=stream.init(params))
      >>> server.open("alice")
      >>> server.open("bob")
      >>> x = np.ones((5, 2), np.float32)
      >>> for start in range(0, 5, 2):  # alice's sequence in three pieces
      ...     piece, other = server([("alice", x[start : start + 2]), ("bob", x[:1])])
      >>> output, _ = lstm.apply(params, x)
      >>> bool(np.allclose(piece, output[4:], atol=1e-6))
      True
      >>> server.sessions
      ('alice', 'bob')
      >>> server([("carol", x[:1])])
      Traceback (most recent call last):
      jaxpack.serving.UnknownSessionError: session 'carol' is not open...

    Args:
      function: a jittable function(params, packed, state) -> (results, state), such as `Stream(layer).chunk`. Results
        are those of a `Server`; the state is a pytree of arrays [B, ...], with a row for each sequence, and comes back
        in the same shapes and dtypes. A sequence of no steps must keep its state.
      params: the function's first argument, any pytree of arrays.
      plans, example, cost_model: as for a `Server`.
      state: the state in which a session begins: the same pytree without the batch axis.
      max_sessions: the most sessions that are open at once.

    Raises:
      ValueError: as `Server`, and if the function returns a state of other shapes or dtypes than it takes, or
        max_sessions is below 1.
      TypeError: as `Server`, and if the function does not return a pair.
    """

    def __init__(
        self,
        function: Callable[[Any, PackedSequence, Any], tuple[PyTree, PyTree]],
        params: PyTree,
        plans: Sequence[BucketPlan],
        example: PyTree,
        *,
        state: PyTree,
        max_sessions: int = 10_000,
        cost_model: CostModel | None = None,
    ) -> None:
        weights, structure = jax.tree.flatten(jax.tree_util.tree_map_with_path(as_weight, params))
        states = [jnp.asarray(leaf) for leaf in jax.tree.leaves(state)]
        count = len(weights)

        @unchecked
        def program(weights: list[jax.Array], packed: PackedSequence, state: PyTree) -> PyTree:
            return function(jax.tree.unflatten(structure, weights[:count]), packed, state)

        self._hold(jax.tree.map(np.asarray, jax.tree.unflatten(jax.tree.structure(state), states)), max_sessions)
        # The first state is one of the weights, so that a saved server has it.
        programs = dict.fromkeys(checked_plans(plans), program)
        cost_model = cost_model or CostModel.for_platform(training=False)
        self._start(programs, weights + states, Schema.of(example), cost_model)

    def _hold(self, initial: PyTree, max_sessions: int = 10_000) -> None:
        """Makes the empty table of sessions, which begin in a state."""
        self._initial, self._max_sessions = initial, at_least_one("max_sessions", max_sessions)
        self._open: collections.OrderedDict[str, _Session] = collections.OrderedDict()  # the longest unused one first
        self._table, self._running = threading.Lock(), threading.Lock()

    @property
    def sessions(self) -> tuple[str, ...]:
        """The open sessions, that without a request for longest first."""
        with self._table:
            return tuple(self._open)

    def open(self, session: str, state: PyTree = None) -> None:
        """Opens a session. If max_sessions are open, the one without a request for longest is closed.

        Args:
          session: its name.
          state: the state in which it begins, as `close` and `state` return it. Default: that of the server.

        Raises:
          TypeError: if session is not a str.
          ValueError: if it is open already, or state has other shapes or dtypes than those of the server.
        """
        if not isinstance(session, str):
            raise TypeError(f"a session is a str, got {session!r}.")
        began = self._initial if state is None else self._checked_state(state, f"the state of session {session!r}")
        with self._table:
            if session in self._open:
                raise ValueError(f"session {session!r} is open already. Close it first, or send it requests.")
            while len(self._open) >= self._max_sessions:
                self._open.popitem(last=False)
            self._open[session] = _Session(session, began)

    def close(self, session: str) -> PyTree:
        """Closes a session and returns its state. Its requests that wait in a queue are still answered.

        Wait for their answers first if the state must include them.

        Raises:
          UnknownSessionError: if it is not open.
        """
        with self._table:
            found = self._found(session)
            del self._open[session]
        return jax.tree.map(np.copy, found.state)

    def state(self, session: str) -> PyTree:
        """Returns a copy of the state of a session, NumPy arrays without a batch axis.

        Raises:
          UnknownSessionError: if it is not open.
        """
        with self._table:
            return jax.tree.map(np.copy, self._found(session).state)

    def check(self, sequence: PyTree, name: str = "sequence") -> Any:
        """Returns a checked request, a pair (session, sequence), for `run`. Raises as a call does.

        Raises:
          TypeError: if it is not such a pair; and as `Server`.
          UnknownSessionError: if the session is not open.
        """
        if not isinstance(sequence, tuple) or len(sequence) != 2 or not isinstance(sequence[0], str):
            raise TypeError(
                f"{name} must be a pair (session, sequence) with the session's name, a str, got "
                f"{type(sequence).__name__}."
            )
        session, steps = sequence
        arrays, length = super().check(steps, name)
        with self._table:
            found = self._found(session)
            self._open.move_to_end(session)
        return _Piece(arrays, length, found)

    def run(self, plan: BucketPlan, requests: Sequence[Any]) -> list[PyTree]:
        """Runs requests of different sessions that fit a plan together; returns their results, and keeps the states."""
        sessions = [getattr(request, "session", None) for request in requests]
        with self._running:
            states = [self._initial if session is None else session.state for session in sessions]
            states += [self._initial] * (plan.num_sequences - len(states))
            stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *states)
            output, after = self._output(plan, requests, stacked)
            results = results_of(output, len(requests))
            for row, session in enumerate(sessions):
                if session is not None:
                    session.state = jax.tree.map(lambda leaf, row=row: leaf[row].copy(), after)
        return results

    @classmethod
    def load(
        cls, directory: str | os.PathLike[str], *, max_sessions: int = 10_000, cost_model: CostModel | None = None
    ) -> Self:
        """Makes a server from a folder that `save` wrote, without sessions. `load_sessions` brings back saved ones.

        Args and errors: as `Server.load` and the constructor.
        """
        server = super().load(directory, cost_model=cost_model)
        server._max_sessions = at_least_one("max_sessions", max_sessions)
        return server

    def save_sessions(self, path: str | os.PathLike[str]) -> None:
        """Writes the states of all open sessions to a file, which `load_sessions` reads. Nothing is pickled."""
        from flax import serialization

        with self._running, self._table:
            names = list(self._open)
            leaves = [jax.tree.leaves(session.state) for session in self._open.values()]
        columns = {str(i): np.stack(column) for i, column in enumerate(zip(*leaves, strict=True))}
        content = {"format": _FORMAT, "sessions": {str(i): name for i, name in enumerate(names)}, "states": columns}
        target = pathlib.Path(path)
        unfinished = target.with_name(f"{target.name}.unfinished")
        unfinished.write_bytes(serialization.msgpack_serialize(content))
        unfinished.replace(target)

    def load_sessions(self, path: str | os.PathLike[str]) -> None:
        """Opens the sessions of a file that `save_sessions` wrote, in their states and in their order of use.

        Raises:
          FileNotFoundError: if there is no file.
          ValueError: if it is damaged, is from a server with another state, or one of its sessions is open already. No
            session is opened then.
        """
        from flax import serialization

        data = pathlib.Path(path).read_bytes()
        try:
            content = serialization.msgpack_restore(data)
            if content["format"] != _FORMAT:
                raise ValueError(f"it has format {content['format']}, not {_FORMAT}")
            names = [content["sessions"][str(i)] for i in range(len(content["sessions"]))]
            columns = [content["states"][str(i)] for i in range(len(content["states"]))]
            structure = jax.tree.structure(self._initial)
            states = [jax.tree.unflatten(structure, [column[i] for column in columns]) for i in range(len(names))]
            states = [self._checked_state(state, name) for name, state in zip(names, states, strict=True)]
        except Exception as error:
            raise ValueError(f"{path} is damaged, or holds the sessions of another server ({error!r}).") from error
        both = set(names) & set(self.sessions)
        if both:
            raise ValueError(f"session {min(both)!r} of {path} is open already. Close it first.")
        for name, state in zip(names, states, strict=True):
            self.open(name, state)

    def _found(self, session: str) -> _Session:
        """Returns an open session, for a thread that has the table."""
        if session not in self._open:
            raise UnknownSessionError(
                f"session {session!r} is not open: it was never opened, or closed, also to make room for others (at "
                f"most {self._max_sessions} are open). Open it with server.open({session!r}), from a saved state with "
                f"state=."
            )
        return self._open[session]

    def _checked_state(self, state: PyTree, name: str) -> PyTree:
        """Returns a state of one session as NumPy arrays; raises ValueError if it is not like the first one."""
        state = jax.tree.map(np.array, state)
        if _forms(state) != _forms(self._initial):
            raise ValueError(f"{name} must have the shapes and dtypes {_forms(self._initial)}, got {_forms(state)}.")
        return state

    def _argument_shapes(self, plan: BucketPlan) -> tuple[PyTree, ...]:
        def rows(leaf: np.ndarray) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((plan.num_sequences, *leaf.shape), leaf.dtype)

        return self._schema.packed(plan), jax.tree.map(rows, self._initial)

    def _results(self, output: PyTree, plan: BucketPlan) -> PyTree:
        if not isinstance(output, tuple) or len(output) != 2:
            raise TypeError(f"the function must return a pair (results, state), got {type(output).__name__}.")
        results, state = output
        expected = _forms(self._argument_shapes(plan)[1])
        if _forms(state) != expected:
            raise ValueError(
                f"the function must return the state in the shapes and dtypes in which it takes it, {expected}, got "
                f"{_forms(state)}."
            )
        return results

    def _waves(self, requests: Sequence[Any]) -> list[list[int]]:
        waves: list[list[int]] = []
        before: collections.Counter[int] = collections.Counter()
        for place, request in enumerate(requests):
            key = id(request.session)
            if before[key] == len(waves):
                waves.append([])
            waves[before[key]].append(place)
            before[key] += 1
        return waves

    def _restore(self, weights: Sequence[np.ndarray], others: Sequence[PyTree]) -> None:
        if not others:
            raise ValueError("it holds no sessions: load it with Server.load")
        count = len(jax.tree.leaves(others[0]))
        leaves = list(weights[len(weights) - count :])
        self._hold(jax.tree.unflatten(jax.tree.structure(others[0]), leaves))


def _forms(state: PyTree) -> PyTree:
    """Returns the shape and dtype of each array of a state, as text."""
    return jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", state)
