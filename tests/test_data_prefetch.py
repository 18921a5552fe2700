"""prefetch_to_device: the same items, ahead of time, with the state of what was given."""

import gc
import threading
import time

import jax
import numpy as np
import pytest

from jaxpack import plan_padded
from jaxpack.data import SlotFilling, prefetch_to_device


def batcher():
    return SlotFilling([np.full(2, i) for i in range(20)], plan_padded(2, 2))


def test_items_are_those_of_the_iterator_on_the_device():
    expected, given = list(batcher()), list(prefetch_to_device(batcher(), 3))
    for batch, wanted in zip(given, expected, strict=True):
        assert isinstance(batch.weights, jax.Array)
        jax.tree.map(np.testing.assert_array_equal, batch, wanted)


def test_the_state_is_that_of_the_batch_given_last():
    iterator = prefetch_to_device(iter(batcher()), 4)
    assert iterator.get_state()["batch"] == 0
    for count in range(1, 6):
        next(iterator)
        assert iterator.get_state()["batch"] == count
    resumed = batcher()
    resumed.set_state(iterator.get_state())
    assert [batch.indices.tolist() for batch in resumed] == [batch.indices.tolist() for batch in iterator]


def test_packing_runs_ahead_while_nobody_asks():
    laid_out = []
    iterator = prefetch_to_device((laid_out.append(i) or np.float32(i) for i in range(10)), 2)
    assert next(iterator) == 0
    for _ in range(100):
        if len(laid_out) >= 4:  # the one given, two that are ready, one that waits to be put
            break
        time.sleep(0.02)
    assert 3 <= len(laid_out) <= 4


def test_an_exception_comes_in_its_items_place_and_may_be_got_over():
    class Once:
        def __init__(self):
            self.left = [0.0, OSError("disk"), 1.0]

        def __iter__(self):
            return self

        def __next__(self):
            if not self.left:
                raise StopIteration
            item = self.left.pop(0)
            if isinstance(item, Exception):
                raise item
            return item

    iterator = prefetch_to_device(Once(), 1)
    assert next(iterator) == 0
    with pytest.raises(OSError, match="disk"):
        next(iterator)
    assert next(iterator) == 1
    assert list(iterator) == []


def test_the_thread_ends_with_its_iterator():
    before = set(threading.enumerate())
    iterator = prefetch_to_device(iter(np.arange(100.0)), 1)
    next(iterator)
    (thread,) = set(threading.enumerate()) - before
    del iterator
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="size must be at least 1"):
        prefetch_to_device([1.0], 0)
    with pytest.raises(AttributeError, match="no get_state"):
        prefetch_to_device([1.0]).get_state()
