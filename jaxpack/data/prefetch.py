"""prefetch_to_device: batches are laid out and sent by a thread of their own while the device computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from jaxpack.arguments import at_least_one

_Ready = queue.Queue[tuple[str, Any, Any]]  # "item", "end" or "error"; the item or exception; the state after it

_POLL = 0.1  # seconds after which a waiting thread looks whether it is still wanted


def prefetch_to_device(iterator: Iterable[Any], size: int = 2, *, device: Any = None) -> PrefetchIterator:
    """Takes items ahead of their use, in a thread, and puts them on a device.

    Examples:
      >>> from jaxpack.data import SlotFilling
      >>> batches = SlotFilling([[1, 2, 3], [4], [5, 6], [7]], batch_size=2)
      >>> [isinstance(batch.weights, jax.Array) for batch in prefetch_to_device(batches)]
      [True, True]

    Args:
      iterator: of pytrees of arrays, such as a batcher or its iterator.
      size: how many items are kept ready.
      device: where jax.device_put puts them: a device or a sharding. Default: JAX's default device.

    Returns:
      An iterator. Its `get_state()` is the batch iterator's after the item that it gave last, so a program that stops
      there goes on with the next. An exception of the iterator is raised where its item would have come.

    Raises:
      TypeError: if size is no int.
      ValueError: if it is below 1.
    Source: mirrors flax.jax_utils.prefetch_to_device.
    """
    at_least_one("size", size)
    return PrefetchIterator(iter(iterator), size, device)


class PrefetchIterator:
    """Made by `prefetch_to_device`.

    Examples:
      >>> from jaxpack.data import SlotFilling, prefetch_to_device
      >>> epoch = prefetch_to_device(SlotFilling([[1, 2, 3], [4], [5, 6], [7]], batch_size=2))
      >>> batch = next(epoch)
      >>> epoch.get_state()["batch"]  # the item given last, whatever was taken ahead
      1
      >>> epoch.close()
    """

    def __init__(self, iterator: Iterator[Any], size: int, device: Any) -> None:
        self._iterator, self._device = iterator, device
        self._state = _state(iterator)
        self._ready: _Ready = queue.Queue(size)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __iter__(self) -> PrefetchIterator:
        return self

    def __next__(self) -> Any:
        """The next item, on the device."""
        if self._stop.is_set():
            raise StopIteration
        if self._thread is None:  # at the start, and after an exception, which another try may get over
            arguments = (self._iterator, self._ready, self._stop, self._device)
            self._thread = threading.Thread(target=_fill, args=arguments, daemon=True)
            self._thread.start()
        kind, item, state = self._ready.get()
        if kind == "item":
            self._state = state
            return item
        self._thread.join()
        self._thread = None
        if kind == "end":
            self.close()
            self._state = state
            raise StopIteration
        raise item

    def get_state(self) -> Any:
        """The iterator's state after the item given last; raises AttributeError if it keeps none."""
        if self._state is None:
            raise AttributeError(f"{type(self._iterator).__name__} has no get_state().")
        return self._state

    def close(self) -> None:
        """Ends the thread; there are no more items then."""
        self._stop.set()

    def __del__(self) -> None:
        self._stop.set()


def _fill(iterator: Iterator[Any], ready: _Ready, stop: threading.Event, device: Any) -> None:
    """The thread. It knows nothing of the PrefetchIterator, so that one which is forgotten can go."""
    kind = "item"
    while kind == "item" and not stop.is_set():
        try:
            item = jax.device_put(next(iterator), device)
        except StopIteration:
            kind, item = "end", None
        except Exception as error:
            kind, item = "error", error
        _put(ready, (kind, item, _state(iterator)), stop)


def _put(ready: _Ready, entry: tuple[str, Any, Any], stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            ready.put(entry, timeout=_POLL)
        except queue.Full:
            continue
        return


def _state(iterator: Any) -> Any:
    return iterator.get_state() if hasattr(iterator, "get_state") else None
