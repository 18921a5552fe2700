"""Queue: the front of a server for many threads, whose single requests it gathers into batches."""

from __future__ import annotations

import atexit
import collections
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from queue import Full
from types import TracebackType
from typing import NamedTuple

import jax
import numpy as np

from jaxpack._checks import at_least_one
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._types import PyTree
from jaxpack.serving._answer import Answer
from jaxpack.serving._schema import Request
from jaxpack.serving._server import Server

_EXIT = 1.0  # seconds that the interpreter waits at its exit for a batch that runs


class Tally(NamedTuple):
    """What has run under a plan: how many batches, and the sequences and steps in them.

    Examples:
      >>> plans = [jaxpack.plan_padded(2, 3)]
      >>> server = Server(lambda params, packed: jaxpack.segment_sum(packed), (), plans, example=np.zeros(1, int))
      >>> with Queue(server) as queue:
      ...     future = queue.submit([1, 2, 3])
      >>> [queue.tallies[plan] for plan in plans]
      [Tally(runs=1, sequences=1, steps=3)]
    """

    runs: int = 0
    sequences: int = 0
    steps: int = 0


class _Waiting(NamedTuple):
    request: Request
    future: Answer
    since: float


class Queue:
    """Gathers the requests of many threads into batches, and answers each through its own future.

    One thread runs the batches, first come, first served: it starts when the oldest request has waited for max_wait
    seconds, when the server's largest batch is full, or when the queue is shut down; while it runs, requests gather. A
    request that is refused fails alone; an exception in the model fails the batch that it ran in, not those beside it.

    Callbacks of futures run in that thread too, and should be short. One that raises or exits is logged; one that would
    wait for the queue (`result()`, `submit` to a full queue, `shutdown()`) gets an error, for nobody could answer it.
    If the thread itself should end, whatever waits gets a RuntimeError, as whatever comes later does. A forked child
    has no such thread: there `submit` and `result()` raise RuntimeError. At the interpreter's exit requests that still
    wait are cancelled: shut the queue down first if they must be answered.

    Examples:
      >>> plans = [jaxpack.plan_padded(2, 3)]
      >>> server = Server(lambda params, packed: jaxpack.segment_sum(packed), (), plans, example=np.zeros(1, int))
      >>> with Queue(server, max_wait=0.005) as queue:
      ...     future = queue.submit([1, 2, 3])  # from any thread
      ...     result = future.result()  # or, under asyncio, await asyncio.wrap_future(future)
      >>> int(result)
      6

    Args:
      server: a Server.
      max_wait: seconds that a request waits for others, at most, while the server is idle.
      max_size: how many requests may wait; `submit` blocks where there are more.

    Raises:
      TypeError: if server is no Server or max_size no int.
      ValueError: if max_wait is negative, or max_size below 1.
    """

    def __init__(self, server: Server, *, max_wait: float = 0.005, max_size: int = 1024) -> None:
        if not isinstance(server, Server):
            raise TypeError(f"server must be a jaxpack.serving.Server, got {type(server).__name__}.")
        if not max_wait >= 0:
            raise ValueError(f"max_wait must be 0 or more seconds, got {max_wait}.")
        at_least_one("max_size", max_size)
        self._server, self._max_wait, self._max_size = server, max_wait, max_size
        self._waiting: collections.deque[_Waiting] = collections.deque()
        self._taken: list[_Waiting] = []  # what the thread works on
        self._changed = threading.Condition()  # guards the deque and what is set below
        self._closed = ""  # why no more requests are taken
        self._cancelled = False
        self._tallies = dict.fromkeys(server.plans, Tally())
        self._thread = threading.Thread(target=self._work, name="jaxpack.serving.Queue", daemon=True)
        atexit.register(self._leave)  # after jax's, so it is called before jax takes its clients down
        self._thread.start()

    def submit(self, sequence: PyTree, *, timeout: float | None = None) -> Future[PyTree]:
        """Puts a sequence into the queue. Its arrays are copied: they may be written over at once.

        Args:
          sequence: as a server takes it.
          timeout: seconds to wait for a place if the queue is full; 0 not to wait. Default: as long as it takes.

        Returns:
          A future of its result, NumPy arrays as a server returns them; or of its error, ValueError or TypeError, if
          it is not like the server's example or longer than every plan. It may be cancelled while it waits.

        Raises:
          queue.Full: if there was no place for it in time; in a callback, if there is none.
          RuntimeError: if the queue has been shut down, or its thread has ended; in a forked child.
        """
        future = Answer(self._thread)
        try:
            request = self._server.check(sequence)
        except (TypeError, ValueError) as error:
            future.set_exception(error)
            return future
        request = request._replace(arrays=jax.tree.map(np.array, request.arrays))
        if threading.current_thread() is self._thread:
            timeout = 0
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or len(self._waiting) < self._max_size, timeout):
                raise Full(f"{self._max_size} requests are waiting, and none was taken within {timeout} seconds.")
            if self._closed:
                raise RuntimeError(f"{self._closed}: it takes no more requests. Make a new Queue.")
            self._waiting.append(_Waiting(request, future, time.monotonic()))
            self._changed.notify_all()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Takes no more requests, and answers those that wait; as concurrent.futures.Executor.shutdown.

        Args:
          wait: whether to return only when all have been answered.
          cancel_futures: whether to cancel those that wait instead.

        Raises:
          RuntimeError: if a callback of a future waits: the thread that it would wait for is its own. The queue is shut
            down all the same.
        """
        if not self._thread.is_alive():  # in a forked child too, where nobody will ever release the lock
            return
        with self._changed:
            self._closed = self._closed or "the queue has been shut down"
            self._cancelled |= cancel_futures
            dropped = [waiting.future for waiting in self._waiting] if cancel_futures else []
            self._changed.notify_all()
        for future in dropped:
            future.cancel()
        if not wait:
            return
        if threading.current_thread() is self._thread:
            raise RuntimeError("a callback cannot wait for the queue that runs it. Pass shutdown(wait=False).")
        self._thread.join()

    @property
    def tallies(self) -> dict[BucketPlan, Tally]:
        """What has run under each plan so far, the cheapest plan first."""
        return dict(self._tallies)

    def __enter__(self) -> Queue:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def _work(self) -> None:
        """Takes and runs batches until there is nothing left and nothing to come."""
        try:
            while self._take():
                self._answer([waiting for waiting in self._taken if waiting.future.begin()])
        except BaseException as error:  # whatever it is, someone waits
            self._end(error)
        finally:
            atexit.unregister(self._leave)

    def _take(self) -> bool:
        """Waits until it is time for the next requests, and takes them; False if there are none after the shutdown."""
        most = self._server.batch_size
        with self._changed:
            self._taken = []
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._waiting:
                left = self._waiting[0].since + self._max_wait - time.monotonic()
                self._changed.wait_for(
                    lambda: len(self._waiting) >= most or self._closed, min(max(left, 0), threading.TIMEOUT_MAX)
                )
            self._taken = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
            self._changed.notify_all()
        if self._cancelled:
            for waiting in self._taken:
                waiting.future.cancel()
        return bool(self._taken)

    def _answer(self, batch: Sequence[_Waiting]) -> None:
        """Runs requests under the plans that they fit together."""
        try:
            for plan, rows in self._server.route([waiting.request.length for waiting in batch]):
                self._run(plan, [batch[row] for row in rows])
        except BaseException as error:
            _fail(batch, error)

    def _run(self, plan: BucketPlan, batch: Sequence[_Waiting]) -> None:
        """Runs requests that fit a plan together."""
        try:
            results = self._server.run(plan, [waiting.request for waiting in batch])
        except BaseException as error:
            _fail(batch, error)
            return
        runs, sequences, steps = self._tallies[plan]
        steps += sum(waiting.request.length for waiting in batch)
        self._tallies[plan] = Tally(runs + 1, sequences + len(batch), steps)
        for waiting, result in zip(batch, results, strict=True):
            waiting.future.settle(result)

    def _leave(self) -> None:
        """Lets the interpreter exit: cancels what waits, and gives the batch that runs a second to end."""
        self.shutdown(wait=False, cancel_futures=True)
        self._thread.join(_EXIT)

    def _end(self, error: BaseException) -> None:
        """Fails whatever waits, once the thread ends before its time."""
        with self._changed:
            self._closed = f"the queue's thread has ended with {error!r}"
            left = [*self._taken, *self._waiting]
            self._waiting.clear()
            self._changed.notify_all()
        _fail(left, RuntimeError(f"{self._closed}, before this request was answered. Make a new Queue."))


def _fail(batch: Sequence[_Waiting], error: BaseException) -> None:
    """Answers with an error. What ends a thread would end the one that asks for the result, so it is wrapped."""
    if not isinstance(error, Exception) or isinstance(error, StopIteration):  # which asyncio's futures refuse
        cause, error = error, RuntimeError(f"the batch of this request ended with {error!r}.")
        error.__cause__ = cause
    for waiting in batch:
        waiting.future.settle(error=error)
