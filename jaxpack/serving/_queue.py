"""Queue: gathers the single requests of many threads into batches for a server."""

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

_EXIT = 1.0  # seconds that the exiting interpreter waits for a running batch


class Tally(NamedTuple):
    """The number of batches that ran under a plan, with their sequences and steps.

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
    """A request in the queue, its future, and the time of its submission."""

    request: Request
    future: Answer
    since: float


class Queue:
    """Gathers the requests of many threads into batches, and answers each through its own future.

    One thread runs the batches, first come, first served. It starts a batch when the oldest request has waited for
    max_wait seconds, when the server's largest batch is full, or when the queue is shut down. Requests gather while a
    batch runs. A refused request fails alone. An exception in the model fails the batch in which it occurs, and no
    other.

    Callbacks of futures run in the same thread, and should be short. A callback that raises or exits is logged. A
    callback that would wait for the queue (`result()`, `submit` to a full queue, `shutdown()`) gets an error, since
    the wait would be endless. If the thread ends unexpectedly, waiting and later requests get a RuntimeError. A forked
    child has no such thread: there `submit` and `result()` raise RuntimeError. When the interpreter exits, waiting
    requests are cancelled: shut the queue down first if they must be answered.

    Examples:
      >>> plans = [jaxpack.plan_padded(2, 3)]
      >>> server = Server(lambda params, packed: jaxpack.segment_sum(packed), (), plans, example=np.zeros(1, int))
      >>> with Queue(server, max_wait=0.005) as queue:
      ...     future = queue.submit([1, 2, 3])  # from any thread
      ...     result = future.result()  # or, under asyncio, await asyncio.wrap_future(future)
      >>> int(result)
      6

    Args:
      server: a Server, or a SessionServer, whose requests are pairs (session, sequence).
      max_wait: the most seconds that a request waits for others while the server is idle.
      max_size: how many requests may wait; then `submit` blocks.

    Raises:
      TypeError: if server is not a Server, or max_size is not an int.
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
        self._taken: list[_Waiting] = []  # the requests that the thread works on
        self._changed = threading.Condition()  # guards the deque and the attributes below
        self._closed = ""  # the reason why no more requests are taken
        self._cancelled = False
        self._tallies = dict.fromkeys(server.plans, Tally())
        self._thread = threading.Thread(target=self._work, name="jaxpack.serving.Queue", daemon=True)
        atexit.register(self._leave)  # registered after jax's, so it runs before jax closes its clients
        self._thread.start()

    def submit(self, sequence: PyTree, *, timeout: float | None = None) -> Future[PyTree]:
        """Puts a sequence into the queue. Its arrays are copied, so the caller may overwrite them at once.

        Args:
          sequence: a sequence as the server takes it.
          timeout: the seconds to wait for a place if the queue is full; 0 does not wait. Default: no limit.

        Returns:
          A future of its result, NumPy arrays as the server returns them; or of its error, a ValueError or TypeError,
          if the sequence is not like the server's example or is longer than every plan. The future may be cancelled
          while the request waits.

        Raises:
          queue.Full: if there is no place within the timeout; in a callback, if there is none at once.
          RuntimeError: if the queue has been shut down, its thread has ended, or this is a forked child.
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
        """Takes no more requests, and answers the waiting ones, as concurrent.futures.Executor.shutdown does.

        Args:
          wait: whether to return only when all have been answered.
          cancel_futures: whether to cancel the waiting requests instead.

        Raises:
          RuntimeError: if a callback waits, since it runs in the thread for which it would wait. The queue is shut down
            even so.
        """
        if not self._thread.is_alive():  # also in a forked child, where the lock is never released
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
        """The tally of each plan so far, cheapest plan first."""
        return dict(self._tallies)

    def __enter__(self) -> Queue:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def _work(self) -> None:
        """Takes and runs batches until the queue is shut down and empty."""
        try:
            while self._take():
                self._answer([waiting for waiting in self._taken if waiting.future.begin()])
        except BaseException as error:  # every waiting request needs an answer
            self._end(error)
        finally:
            atexit.unregister(self._leave)

    def _take(self) -> bool:
        """Waits for the next batch of requests and takes it; returns False if there is none after the shutdown."""
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
        """Runs requests in the batches of their route."""
        try:
            for places in self._server._waves([waiting.request for waiting in batch]):
                wave = [batch[place] for place in places]
                for plan, rows in self._server.route([waiting.request.length for waiting in wave]):
                    self._run(plan, [wave[row] for row in rows])
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
        """Lets the interpreter exit: cancels waiting requests, and gives a running batch a second to end."""
        self.shutdown(wait=False, cancel_futures=True)
        self._thread.join(_EXIT)

    def _end(self, error: BaseException) -> None:
        """Fails all waiting requests when the thread ends unexpectedly."""
        with self._changed:
            self._closed = f"the queue's thread has ended with {error!r}"
            left = [*self._taken, *self._waiting]
            self._waiting.clear()
            self._changed.notify_all()
        _fail(left, RuntimeError(f"{self._closed}, before this request was answered. Make a new Queue."))


def _fail(batch: Sequence[_Waiting], error: BaseException) -> None:
    """Answers with an error. An error that ends threads is wrapped, since it would end the caller's thread too."""
    if not isinstance(error, Exception) or isinstance(error, StopIteration):  # asyncio's futures refuse StopIteration
        cause, error = error, RuntimeError(f"the batch of this request ended with {error!r}.")
        error.__cause__ = cause
    for waiting in batch:
        waiting.future.settle(error=error)
