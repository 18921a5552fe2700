"""prefetch_to_device: a thread that lays batches out and sends them while the device computes."""

from __future__ import annotations

import atexit
import collections
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpack._checks import at_least_one
from jaxpack.data._batcher import BatchIterator

_POLL = 0.1  # seconds between checks that the thread is alive, while a caller waits
_LAST_ITEM = 5.0  # seconds that a process which ends waits for a thread to put its last item on a device


def prefetch_to_device(iterator: Iterable[Any], size: int = 2, *, device: Any = None) -> PrefetchIterator:
    """Takes items from an iterator ahead of their use, in a thread, and puts them on a device.

    Examples:
      >>> from jaxpack.data import SlotFilling
      >>> batches = SlotFilling([[1, 2, 3], [4], [5, 6], [7]], batch_size=2)
      >>> [isinstance(batch.weights, jax.Array) for batch in prefetch_to_device(batches)]
      [True, True]

    Args:
      iterator: an iterable of pytrees of arrays, such as a batcher or its iterator. It may reuse the memory of an item
        for the next.
      size: how many items are kept ready.
      device: the device or sharding for jax.device_put. Default: JAX's default device.

    Returns:
      An iterator, from which several threads may take items: each item goes to one of them. Its `get_state()` is the
      batch iterator's state after the last item taken, so a program that stops there can continue with the next item.
      An exception of the iterator, of any kind, is raised in place of its item.

    Raises:
      TypeError: if size is not an int.
      ValueError: if size is below 1.
    Source: mirrors flax.jax_utils.prefetch_to_device.
    """
    at_least_one("size", size)
    return PrefetchIterator(iter(iterator), size, lambda item: jax.device_put(item, device))


class _Entry(NamedTuple):
    """An item, or the exception in its place, with the iterator's state after it."""

    item: Any
    error: BaseException | None
    state: Any


class PrefetchIterator:
    """The iterator that `prefetch_to_device` returns. Every call returns or raises, even if the thread has died.

    Examples:
      >>> from jaxpack.data import SlotFilling, prefetch_to_device
      >>> epoch = prefetch_to_device(SlotFilling([[1, 2, 3], [4], [5, 6], [7]], batch_size=2))
      >>> batch = next(epoch)
      >>> epoch.get_state()["batch"]  # after the item taken last, not those ready
      1
      >>> epoch.close()
    """

    def __init__(self, iterator: Iterator[Any], size: int, send: Callable[[Any], Any]) -> None:
        self._shared = _Shared(iterator, size, send)
        self._state = _state(iterator)
        self._process = os.getpid()
        self._thread: threading.Thread | None = None
        _open.add(self)
        weakref.finalize(self, _stop, self._shared, self._process).atexit = False

    def __iter__(self) -> PrefetchIterator:
        return self

    def __next__(self) -> Any:
        """Returns the next item, on the device.

        Raises:
          RuntimeError: in a forked process, which has no such thread; or if the thread has died.
        """
        if os.getpid() != self._process:  # before any lock, which the thread may have held
            raise RuntimeError(
                "this prefetch_to_device was made in another process, and a fork does not have its thread. Call it in "
                "the process that takes its items."
            )
        with self._shared.changed:
            entry = self._wait()
            if entry.error is None or isinstance(entry.error, StopIteration):
                self._state = entry.state
        if isinstance(entry.error, StopIteration):
            raise StopIteration
        if entry.error is not None:
            raise entry.error
        return entry.item

    def get_state(self) -> Any:
        """Returns the iterator's state after the item taken last; raises AttributeError if it has none."""
        if self._state is None:
            raise AttributeError(f"{type(self._shared.iterator).__name__} has no get_state().")
        return self._state

    def close(self) -> None:
        """Ends the thread and the iteration, also for callers that wait for an item."""
        _stop(self._shared, self._process)

    def _wait(self) -> _Entry:
        """Waits for an entry and takes it. Starts the thread first, and again after an error."""
        shared = self._shared
        while not (shared.ready or shared.ended):
            if self._thread is None or shared.left:
                shared.left = False
                self._thread = None  # in case no thread can be started
                thread = threading.Thread(target=_fill, args=(shared,), daemon=True)
                thread.start()
                self._thread = thread
            elif not self._thread.is_alive():
                self._thread = None
                raise RuntimeError(
                    "the thread of prefetch_to_device has ended without an item or an error. The next call starts one."
                )
            shared.changed.wait(_POLL)
        if not shared.ready:
            return _Entry(None, StopIteration(), self._state)
        entry = shared.ready.popleft()
        if isinstance(entry.error, StopIteration):
            shared.ended = True
        shared.changed.notify_all()
        return entry


class _Shared:
    """The state that the thread shares with the PrefetchIterator, to which it holds no reference.

    So an iterator that is no longer used can be collected.

    Attributes:
      send: puts an item on its devices.
      changed: guards the others, and is notified whenever they change.
      ready: entries not taken yet.
      ended: whether there are no more items, since the iterator was exhausted or the prefetch closed.
      left: whether the thread has handed over an error and ended.
    """

    def __init__(self, iterator: Iterator[Any], size: int, send: Callable[[Any], Any]) -> None:
        self.iterator, self.size, self.send = iterator, size, send
        self.x64 = jax.config.read("jax_enable_x64")  # this thread's value
        self.changed = threading.Condition()
        self.ready: collections.deque[_Entry] = collections.deque()
        self.ended = self.left = False

    def stop(self) -> None:
        """Ends the iteration, for waiting callers and for the thread."""
        with self.changed:
            self.ended = True
            self.ready.clear()
            self.changed.notify_all()

    def put(self, entry: _Entry) -> bool:
        """Hands an entry over, and waits for room; returns whether another is wanted."""
        with self.changed:
            if not self.ended:
                self.ready.append(entry)
            self.left = entry.error is not None
            self.changed.notify_all()
            while len(self.ready) >= self.size and not (self.ended or self.left):
                self.changed.wait()
            return not (self.ended or self.left)


_open = weakref.WeakSet[PrefetchIterator]()


@atexit.register
def _join_all() -> None:
    """Ends all threads before the interpreter does, which would abort the process within a device transfer."""
    for iterator in list(_open):
        iterator.close()
        if iterator._thread is not None and os.getpid() == iterator._process:
            iterator._thread.join(_LAST_ITEM)


def _stop(shared: _Shared, process: int) -> None:
    """Ends a thread and its iteration, in the process that has it: a fork may have inherited its locks."""
    if os.getpid() == process:
        shared.stop()


def _fill(shared: _Shared) -> None:
    """Takes items until no more are wanted, in the thread."""
    wanted = True
    while wanted:
        try:
            with jax.enable_x64(shared.x64):
                item = shared.send(_own(shared.iterator, next(shared.iterator)))
            entry = _Entry(item, None, _state(shared.iterator))
        except BaseException as error:  # raised where the item is taken
            entry = _Entry(None, error, _state(shared.iterator) if isinstance(error, StopIteration) else None)
        wanted = shared.put(entry)


def _own(iterator: Iterator[Any], item: Any) -> Any:
    """Copies an item whose memory may be reused, since a device may share it with the host or copy it later."""
    if isinstance(iterator, BatchIterator):
        return item
    return jax.tree.map(lambda leaf: np.array(leaf) if isinstance(leaf, np.ndarray) else leaf, item)


def _state(iterator: Any) -> Any:
    return iterator.get_state() if hasattr(iterator, "get_state") else None
