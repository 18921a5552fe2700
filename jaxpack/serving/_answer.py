"""Answer: the future of a request, on which no wait is endless."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any

from jaxpack._types import PyTree


class Answer(Future[PyTree]):
    """A future that one thread settles, and that its owner may settle or cancel first. No callback ends that thread.

    Args:
      thread: the thread that settles it.
    """

    def __init__(self, thread: threading.Thread) -> None:
        super().__init__()
        self._thread = thread

    def result(self, timeout: float | None = None) -> PyTree:
        """Returns the result, as Future.result; raises RuntimeError if no thread can settle it."""
        self._check_wait()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Returns the exception, as Future.exception; raises RuntimeError if no thread can settle it."""
        self._check_wait()
        return super().exception(timeout)

    def add_done_callback(self, fn: Callable[[Future[PyTree]], Any]) -> None:
        """Adds a callback, as Future.add_done_callback; an exit in the settling thread is logged like other errors."""

        def contained(future: Future[PyTree]) -> None:
            try:
                fn(future)
            except BaseException as error:
                if isinstance(error, Exception) or threading.current_thread() is not self._thread:
                    raise
                raise RuntimeError(f"the callback {fn!r} of a request ended with {error!r}.") from error

        super().add_done_callback(contained)

    def begin(self) -> bool:
        """Marks it as running; returns False if it has been settled or cancelled, and wakes those that wait for it."""
        if self.done() and not self.cancelled():
            return False
        try:
            return self.set_running_or_notify_cancel()
        except RuntimeError:  # its owner marked it
            return not self.done()

    def settle(self, result: PyTree = None, *, error: BaseException | None = None) -> None:
        """Sets the result or the error, unless its owner has done so."""
        with contextlib.suppress(InvalidStateError):
            if error is None:
                self.set_result(result)
            else:
                self.set_exception(error)

    def _check_wait(self) -> None:
        """Raises RuntimeError if a wait would be endless."""
        if threading.current_thread() is self._thread:
            if not self.done():
                raise RuntimeError(
                    "a callback waits for an answer of the queue that runs it, so it would wait forever. Add a "
                    "callback to that answer, or wait in another thread."
                )
        elif not self._thread.is_alive() and not self.done():  # in its own process the thread settles all first
            raise RuntimeError(
                "the answer comes in the process that made the queue, and this is a fork of it. Wait for it there, or "
                "make a server and a queue in this process."
            )
