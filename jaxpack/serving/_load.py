"""measure_load: a load test whose threads send requests in bursts, and check and time every answer."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from jaxpack._checks import as_int
from jaxpack._types import PyTree

Submit = Callable[[PyTree], "Future[PyTree]"]

_COMPILED = "/jax/core/compile/backend_compile_duration"  # the event that jax.monitoring reports once per program


@dataclasses.dataclass(frozen=True, eq=False)
class LoadReport:
    """The results of a load test.

    Examples:
      >>> found = {"lost": 0, "reordered": 0, "misdelivered": 0, "wrong": 0, "compiled": 0}
      >>> report = LoadReport(latencies=np.array([1.0, 2.0, 6.0]), seconds=9.0, **found)
      >>> report.passed, report.percentile(50)
      (True, 2.0)

    Attributes:
      latencies: float [N], the seconds from the submission of each request to its answer; NaN without an answer.
      seconds: the time from the first submission to the last answer.
      lost: how many requests were refused, failed, or were not answered in time.
      reordered: how many requests got the answer to another one in the same burst.
      misdelivered: how many requests got the answer to one outside their burst.
      wrong: how many requests got an answer that belongs to no request.
      compiled: how many programs JAX compiled meanwhile, in any thread.
    """

    latencies: np.ndarray
    seconds: float
    lost: int
    reordered: int
    misdelivered: int
    wrong: int
    compiled: int

    @property
    def passed(self) -> bool:
        """Whether every request got its own answer, and nothing was compiled."""
        return not (self.lost or self.reordered or self.misdelivered or self.wrong or self.compiled)

    def percentile(self, percent: float) -> float:
        """Returns the latency in seconds that this share of answered requests did not exceed; NaN without answers."""
        answered = self.latencies[np.isfinite(self.latencies)]
        return float(np.percentile(answered, percent)) if answered.size else float("nan")


@dataclasses.dataclass(frozen=True, eq=False)
class _Sent:
    """A request of a client, with its answer."""

    index: int
    burst: Sequence[int]
    latency: float = float("nan")
    answer: PyTree = None


def measure_load(
    submit: Submit,
    requests: Sequence[PyTree],
    expected: Sequence[PyTree],
    *,
    threads: int = 16,
    burst: float = 8,
    pause: float = 0.01,
    timeout: float = 60,
    seed: int = 0,
    rtol: float = 1e-4,
    atol: float = 1e-5,
) -> LoadReport:
    """Sends each request once, and compares its answer with the expected one.

    The threads share the requests. Each sends a burst, waits until all of it is answered, pauses, and continues.

    Examples:
      >>> from jaxpack.serving import Queue, Server
      >>> plans = [jaxpack.plan_padded(2, 3)]
      >>> server = Server(lambda params, packed: jaxpack.segment_sum(packed), (), plans, example=np.zeros(1, int))
      >>> requests = [[1, 2, 3], [4], [5, 6]]
      >>> with Queue(server) as queue:
      ...     report = measure_load(queue.submit, requests, expected=server(requests), threads=2)
      >>> report.passed
      True

    Args:
      submit: takes a request and returns the future of its answer, as `Queue.submit` does.
      requests: N sequences.
      expected: the answer to each request, a pytree of arrays. No two may be equal, or an answer to the wrong request
        would go unnoticed: put a number into the data of each request, and return it.
      threads: the number of clients.
      burst: the mean number of requests in a burst, geometrically distributed.
      pause: the mean number of seconds between bursts, exponentially distributed.
      timeout: the seconds after which an answer counts as lost.
      seed: the seed of bursts and pauses.
      rtol: the relative tolerance of answers; the other sequences of a batch change the rounding of an answer.
      atol: the absolute tolerance of answers.

    Raises:
      ValueError: if requests and expected differ in number, or an option is out of range.
      TypeError: if threads is not an int.
    """
    if len(requests) != len(expected):
        raise ValueError(f"there must be one expected answer per request, got {len(expected)} for {len(requests)}.")
    if as_int("threads", threads) < 1 or burst < 1 or pause < 0:
        raise ValueError(f"threads and burst must be at least 1 and pause 0, got {threads}, {burst} and {pause}.")
    found: list[list[_Sent]] = [[] for _ in range(threads)]

    def client(number: int) -> None:
        generator = np.random.default_rng([seed, number])
        mine = range(number, len(requests), threads)
        while mine:
            size = int(generator.geometric(1 / burst))
            found[number] += _burst(submit, requests, mine[:size], timeout)
            mine = mine[size:]
            time.sleep(generator.exponential(pause))

    with counted_compilations() as compiled:
        start = time.perf_counter()
        clients = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(threads)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        seconds = time.perf_counter() - start
    return _report([sent for part in found for sent in part], expected, seconds, len(compiled), (rtol, atol))


@contextlib.contextmanager
def counted_compilations() -> Iterator[list[float]]:
    """Yields a list to which each compilation of JAX within the context, in any thread, appends its seconds.

    Examples:
      >>> double = jax.jit(lambda x: 2 * x)
      >>> with counted_compilations() as first:
      ...     two = double(1)
      >>> with counted_compilations() as again:
      ...     four = double(2)
      >>> len(first), len(again)
      (1, 0)
    """
    compiled: list[float] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILED:
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _burst(submit: Submit, requests: Sequence[PyTree], indices: Sequence[int], timeout: float) -> list[_Sent]:
    """Sends requests at once, and waits for their answers."""
    done: queue.SimpleQueue[tuple[int, float, Future[PyTree]]] = queue.SimpleQueue()
    sent = {index: _Sent(index, indices) for index in indices}
    taken = 0
    for index in indices:
        start = time.perf_counter()

        def arrive(future: Future[PyTree], index: int = index, start: float = start) -> None:
            done.put((index, time.perf_counter() - start, future))

        with contextlib.suppress(BaseException):  # a request whose call raises is lost
            submit(requests[index]).add_done_callback(arrive)
            taken += 1
    deadline = time.monotonic() + timeout
    with contextlib.suppress(queue.Empty):
        for _ in range(taken):
            index, latency, future = done.get(timeout=max(deadline - time.monotonic(), 0))
            if not future.cancelled() and future.exception() is None:
                sent[index] = _Sent(index, indices, latency, future.result())
    return list(sent.values())


def _report(
    sent: Sequence[_Sent], expected: Sequence[PyTree], seconds: float, compiled: int, tolerances: tuple[float, float]
) -> LoadReport:
    """Counts the faults of the answers."""
    latencies = np.full(len(expected), np.nan)
    counts = dict.fromkeys(("lost", "reordered", "misdelivered", "wrong"), 0)
    for one in sent:
        latencies[one.index] = one.latency
        fault = _fault(one, expected, tolerances)
        if fault is not None:
            counts[fault] += 1
    return LoadReport(latencies, seconds, compiled=compiled, **counts)


def _fault(sent: _Sent, expected: Sequence[PyTree], tolerances: tuple[float, float]) -> str | None:
    """Returns the fault of an answer, by the name of its count in LoadReport; None if it is right."""
    if np.isnan(sent.latency):
        return "lost"
    if _same(sent.answer, expected[sent.index], tolerances):
        return None
    owners = [index for index, answer in enumerate(expected) if _same(sent.answer, answer, tolerances)]
    if set(owners) & set(sent.burst):
        return "reordered"
    return "misdelivered" if owners else "wrong"


def _same(answer: PyTree, expected: PyTree, tolerances: tuple[float, float]) -> bool:
    """Whether two results agree in structure and shapes, and in values within tolerances."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (answer, expected)]
    return structures[0] == structures[1] and all(
        np.shape(a) == np.shape(b) and np.allclose(a, b, *tolerances, equal_nan=True)
        for a, b in zip(jax.tree.leaves(answer), jax.tree.leaves(expected), strict=True)
    )
