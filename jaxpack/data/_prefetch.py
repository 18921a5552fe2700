"""prefetch_to_device: batches are laid out and sent by a thread of their own while the device computes."""

from __future__ import annotations

import collections
import os
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpack._checks import at_least_one
from jaxpack.data._batcher import BatchIterator

_POLL = 0.1  # seconds after which who waits for the thread looks whether it is alive


def prefetch_to_device(iterator: Iterable[Any], size: int = 2, *, device: Any = None) -> PrefetchIterator:
    """Takes items ahead of their use, in a thread, and puts them on a device.

    Examples:
      >>> from jaxpack.data import SlotFilling
      >>> batches = SlotFilling([[1, 2, 3], [4], [5, 6], [7]], batch_size=2)
      >>> [isinstance(batch.weights, jax.Array) for batch in prefetch_to_device(batches)]
      [True, True]

    Args:
      iterator: of pytrees of arrays, such as a batcher or its iterator. It may give the next in the same memory.
      size: how many items are kept ready.
      device: where jax.device_put puts them: a device or a sharding. Default: JAX's default device.

    Returns:
      An iterator, from which several threads may take items: each goes to one of them. Its `get_state()` is the batch
      iterator's after the item that it gave last, so a program that stops there goes on with the next. An exception of
      the iterator, of whatever kind, is raised where its item would have come.

    Raises:
      TypeError: if size is no int.
      ValueError: if it is below 1.
    Source: mirrors flax.jax_utils.prefetch_to_device.
    """
    at_least_one("size", size)
    return PrefetchIterator(iter(iterator), size, device)


class _Entry(NamedTuple):
    """What the thread has ready: an item, or why there is none. And the iterator's state after it."""

    item: Any
    error: BaseException | None
    state: Any


class PrefetchIterator:
    """Made by `prefetch_to_device`. Nobody waits for a thread that has ended: there is an item, or an error.

    Examples:
      >>> from jaxpack.data import SlotFilling, prefetch_to_device
      >>> epoch = prefetch_to_device(SlotFilling([[1, 2, 3], [4], [5, 6], [7]], batch_size=2))
      >>> batch = next(epoch)
      >>> epoch.get_state()["batch"]  # the item given last, whatever was taken ahead
      1
      >>> epoch.close()
    """

    def __init__(self, iterator: Iterator[Any], size: int, device: Any) -> None:
        self._shared = _Shared(iterator, size, device)
        self._state = _state(iterator)
        self._process = os.getpid()
        self._thread: threading.Thread | None = None

    def __iter__(self) -> PrefetchIterator:
        return self

    def __next__(self) -> Any:
        """The next item, on the device.

        Raises:
          RuntimeError: in a process that was forked from the one that made this, which has no such thread; or if the
            thread has ended without a word.
        """
        if os.getpid() != self._process:  # before any lock, which the thread may have held
            raise RuntimeError(
                "this prefetch_to_device was made in another process, whose thread a fork does not have. Make one in "
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
        """The iterator's state after the item given last; raises AttributeError if it keeps none."""
        if self._state is None:
            raise AttributeError(f"{type(self._shared.iterator).__name__} has no get_state().")
        return self._state

    def close(self) -> None:
        """Ends the thread; there are no more items then, for whoever waits for one either."""
        if os.getpid() == self._process:
            self._shared.stop()

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self.close()

    def _wait(self) -> _Entry:
        """Waits for an entry and takes it. Starts the thread at first, and after an error, which may be got over."""
        shared = self._shared
        while not (shared.ready or shared.ended):
            if self._thread is None or shared.left:
                shared.left = False
                self._thread = None  # should there be no more threads
                thread = threading.Thread(target=_fill, args=(shared,), daemon=True)
                thread.start()
                self._thread = thread
            elif not self._thread.is_alive():
                self._thread = None
                raise RuntimeError(
                    "the thread of prefetch_to_device has ended without an item or an error. Asking again starts one."
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
    """What the thread knows: not the PrefetchIterator, so that one which is forgotten can go.

    Attributes:
      changed: guards the others, and is notified whenever they change.
      ready: entries not taken yet.
      ended: there is nothing more to come, since the iterator was exhausted or the prefetch closed.
      left: the thread has said why, and gone.
    """

    def __init__(self, iterator: Iterator[Any], size: int, device: Any) -> None:
        self.iterator, self.size, self.device = iterator, size, device
        self.x64 = jax.config.read("jax_enable_x64")  # of this thread
        self.changed = threading.Condition()
        self.ready: collections.deque[_Entry] = collections.deque()
        self.ended = self.left = False

    def stop(self) -> None:
        """Ends it, for who waits and for the thread."""
        with self.changed:
            self.ended = True
            self.ready.clear()
            self.changed.notify_all()

    def put(self, entry: _Entry) -> bool:
        """Hands an entry over; whether another is wanted, once there is room for it."""
        with self.changed:
            if not self.ended:
                self.ready.append(entry)
            self.left = entry.error is not None
            self.changed.notify_all()
            while len(self.ready) >= self.size and not (self.ended or self.left):
                self.changed.wait()
            return not (self.ended or self.left)


def _fill(shared: _Shared) -> None:
    """The thread."""
    wanted = True
    while wanted:
        try:
            with jax.enable_x64(shared.x64):
                item = jax.device_put(_own(shared.iterator, next(shared.iterator)), shared.device)
            entry = _Entry(item, None, _state(shared.iterator))
        except BaseException as error:  # whoever asks for the item is told
            entry = _Entry(None, error, _state(shared.iterator) if isinstance(error, StopIteration) else None)
        wanted = shared.put(entry)


def _own(iterator: Iterator[Any], item: Any) -> Any:
    """The item in memory that nobody else writes to: a device may share that of the host, or copy it later."""
    if isinstance(iterator, BatchIterator):
        return item
    return jax.tree.map(lambda leaf: np.array(leaf) if isinstance(leaf, np.ndarray) else leaf, item)


def _state(iterator: Any) -> Any:
    return iterator.get_state() if hasattr(iterator, "get_state") else None
