"""The load test: many threads send requests of mixed lengths in bursts, and every answer is checked and timed."""

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

_COMPILED = "/jax/core/compile/backend_compile_duration"  # the event that jax.monitoring reports once a program


@dataclasses.dataclass(frozen=True, eq=False)
class LoadReport:
    """What a load test found.

    Examples:
      >>> found = {"lost": 0, "reordered": 0, "misdelivered": 0, "wrong": 0, "compiled": 0}
      >>> report = LoadReport(latencies=np.array([1.0, 2.0, 6.0]), seconds=9.0, **found)
      >>> report.passed, report.percentile(50)
      (True, 2.0)

    Attributes:
      latencies: float [N], seconds from the submission of each request to its answer; NaN where there was none.
      seconds: from the first submission to the last answer.
      lost: requests that were refused, failed, or were not answered in time.
      reordered: requests that got the answer of another one in the same burst.
      misdelivered: requests that got the answer of one outside their burst.
      wrong: requests whose answer is no request's.
      compiled: programs that JAX compiled meanwhile, in any thread.
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
        """The latency in seconds that this share of the answered requests did not exceed; NaN if there were none."""
        answered = self.latencies[np.isfinite(self.latencies)]
        return float(np.percentile(answered, percent)) if answered.size else float("nan")


@dataclasses.dataclass(frozen=True, eq=False)
class _Sent:
    """A request of a client, and what became of it."""

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
    """Sends each request once and compares what comes back with what was expected.

    Threads share the requests out. Each sends a burst of them, waits until all are answered, pauses, and goes on.

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
      submit: takes a request and returns the future of its answer, as `Queue.submit`.
      requests: N sequences.
      expected: the answer that each should get, a pytree of arrays; no two alike, or an answer that went to the wrong
        one would pass unnoticed: give each request a number in its data, and return it.
      threads: how many clients there are.
      burst: requests in a burst in the mean, geometrically distributed.
      pause: seconds between bursts in the mean, exponentially distributed.
      timeout: seconds after which an answer counts as lost.
      seed: of bursts and pauses.
      rtol: how far an answer may be from what was expected, as a share of it; batch-mates change its rounding.
      atol: how far besides.

    Raises:
      ValueError: if requests and expected differ in number, or an option is out of range.
      TypeError: if threads is no int.
    """
    if len(requests) != len(expected):
        raise ValueError(f"there must be one expected answer a request, got {len(expected)} for {len(requests)}.")
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
    """A list that gets an entry, its seconds, for each program that JAX compiles in any thread until the context ends.

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
    """Sends some requests at once and waits for their answers."""
    done: queue.SimpleQueue[tuple[int, float, Future[PyTree]]] = queue.SimpleQueue()
    sent = {index: _Sent(index, indices) for index in indices}
    taken = 0
    for index in indices:
        start = time.perf_counter()

        def arrive(future: Future[PyTree], index: int = index, start: float = start) -> None:
            done.put((index, time.perf_counter() - start, future))

        with contextlib.suppress(BaseException):  # one that is not taken is lost, whatever ended the call
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
    """Counts what became of the requests."""
    latencies = np.full(len(expected), np.nan)
    counts = dict.fromkeys(("lost", "reordered", "misdelivered", "wrong"), 0)
    for one in sent:
        latencies[one.index] = one.latency
        fault = _fault(one, expected, tolerances)
        if fault is not None:
            counts[fault] += 1
    return LoadReport(latencies, seconds, compiled=compiled, **counts)


def _fault(sent: _Sent, expected: Sequence[PyTree], tolerances: tuple[float, float]) -> str | None:
    """What is wrong with an answer, if anything is: a count of LoadReport."""
    if np.isnan(sent.latency):
        return "lost"
    if _same(sent.answer, expected[sent.index], tolerances):
        return None
    owners = [index for index, answer in enumerate(expected) if _same(sent.answer, answer, tolerances)]
    if set(owners) & set(sent.burst):
        return "reordered"
    return "misdelivered" if owners else "wrong"


def _same(answer: PyTree, expected: PyTree, tolerances: tuple[float, float]) -> bool:
    """Whether two results agree in structure, shapes and, about, in values."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (answer, expected)]
    return structures[0] == structures[1] and all(
        np.shape(a) == np.shape(b) and np.allclose(a, b, *tolerances, equal_nan=True)
        for a, b in zip(jax.tree.leaves(answer), jax.tree.leaves(expected), strict=True)
    )
