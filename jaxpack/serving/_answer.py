"""Answer: the future of a request, for which nobody waits in vain."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any

from jaxpack._types import PyTree


class Answer(Future[PyTree]):
    """A future that one thread settles, which no callback ends, and whose owner may settle or cancel it before.

    Args:
      thread: the thread that will settle it.
    """

    def __init__(self, thread: threading.Thread) -> None:
        super().__init__()
        self._thread = thread

    def result(self, timeout: float | None = None) -> PyTree:
        """As Future's; raises RuntimeError where no thread will ever settle it."""
        self._check_wait()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As Future's; raises RuntimeError where no thread will ever settle it."""
        self._check_wait()
        return super().exception(timeout)

    def add_done_callback(self, fn: Callable[[Future[PyTree]], Any]) -> None:
        """As Future's, which logs what a callback raises: in the thread that settles it, exits too."""

        def contained(future: Future[PyTree]) -> None:
            try:
                fn(future)
            except BaseException as error:
                if isinstance(error, Exception) or threading.current_thread() is not self._thread:
                    raise
                raise RuntimeError(f"the callback {fn!r} of a request ended with {error!r}.") from error

        super().add_done_callback(contained)

    def begin(self) -> bool:
        """Whether it is still to be settled; tells those that wait for it if it has been cancelled."""
        if self.done() and not self.cancelled():
            return False
        try:
            return self.set_running_or_notify_cancel()
        except RuntimeError:  # the owner has begun it
            return not self.done()

    def settle(self, result: PyTree = None, *, error: BaseException | None = None) -> None:
        """Sets the result or the error, unless its owner was first."""
        with contextlib.suppress(InvalidStateError):
            if error is None:
                self.set_result(result)
            else:
                self.set_exception(error)

    def _check_wait(self) -> None:
        """Raises RuntimeError if a wait would have no end."""
        if threading.current_thread() is self._thread:
            if not self.done():
                raise RuntimeError(
                    "a callback waits for an answer of the queue that runs it, so it would wait for ever. Add a "
                    "callback to that answer, or wait in another thread."
                )
        elif not self._thread.is_alive() and not self.done():  # a thread that ends in its own process settles all
            raise RuntimeError(
                "the answer comes in the process that made the queue, of which this is a fork. Wait for it there, or "
                "make a server and a queue in this process."
            )
