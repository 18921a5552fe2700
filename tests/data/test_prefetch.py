"""prefetch_to_device: the same items, ahead of time, with the state after the last item taken."""

import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings

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

    def lay_out(i):
        laid_out.append(i)
        return np.float32(i)

    iterator = prefetch_to_device(map(lay_out, range(10)), 2)
    assert next(iterator) == 0
    for _ in range(100):
        if len(laid_out) >= 4:  # the one taken, two ready ones, and one that waits for room
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


SECONDS = 5.0  # a waiting thread must end within this time; it takes one on an idle machine


class Own(BaseException):
    """An exception that ends a program."""


def in_threads(call, count=1):
    """Starts threads that run a function; returns them with a queue of their results or errors."""
    results = []

    def run():
        try:
            results.append(call())
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, results


def join(threads):
    end = time.monotonic() + SECONDS
    for thread in threads:
        thread.join(max(0, end - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads)


def raising(error, after=1):
    for i in range(after):
        yield np.float32(i)
    raise error


class Waiting:
    """An iterator that gives an item, and the next one when `go` is set."""

    def __init__(self):
        self.go, self.asked = threading.Event(), threading.Event()
        self.count = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.count += 1
        if self.count > 1:
            self.asked.set()
            self.go.wait()
        return np.float32(self.count)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, Own, OSError, MemoryError])
def test_whatever_the_source_raises_is_raised_in_its_place(error):
    iterator = prefetch_to_device(raising(error("reason")), 2)
    threads, results = in_threads(lambda: [next(iterator)])
    join(threads)
    assert results == [[0]]
    threads, results = in_threads(lambda: next(iterator))
    join(threads)
    assert type(results[0]) is error
    assert results[0].args == ("reason",)
    threads, results = in_threads(lambda: list(iterator))  # a generator that raised has ended
    join(threads)
    assert results == [[]]


def test_an_error_on_the_way_to_the_device_is_raised_too(monkeypatch):
    def fail(*_):
        raise SystemExit("device")

    monkeypatch.setattr(jax, "device_put", fail)
    threads, results = in_threads(lambda: next(prefetch_to_device([1.0])))
    join(threads)
    assert type(results[0]) is SystemExit


@pytest.mark.parametrize("consumers", [1, 3])
def test_close_ends_who_waits(consumers):
    source = Waiting()
    iterator = prefetch_to_device(source, 1)
    next(iterator)
    threads, results = in_threads(lambda: list(iterator), consumers)
    assert source.asked.wait(SECONDS)
    iterator.close()
    join(threads)
    assert results == [[]] * consumers
    source.go.set()
    with pytest.raises(StopIteration):
        next(iterator)


def test_several_consumers_share_the_items_and_all_end():
    iterator = prefetch_to_device([np.float32(i) for i in range(200)], 2)
    threads, results = in_threads(lambda: [float(item) for item in iterator], 4)
    join(threads)
    assert sorted(item for items in results for item in items) == list(range(200))
    with pytest.raises(StopIteration):
        next(iterator)


def test_one_of_several_consumers_gets_the_error_and_the_others_end():
    iterator = prefetch_to_device(raising(Own(), 3), 1)
    threads, results = in_threads(lambda: [float(item) for item in iterator], 3)
    join(threads)
    assert sum(type(result) is Own for result in results) == 1
    assert sum(type(result) is list for result in results) == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_without_a_word_is_named_and_another_is_started():
    source = Waiting()
    iterator = prefetch_to_device(source, 1)
    before = set(threading.enumerate())
    next(iterator)
    (worker,) = set(threading.enumerate()) - before
    assert worker.ident is not None
    assert source.asked.wait(SECONDS)
    source.go.set()
    while not iterator._shared.ready:  # then it waits for room
        time.sleep(0.01)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident), ctypes.py_object(SystemExit))
    assert next(iterator) == 2
    threads, results = in_threads(lambda: next(iterator))
    join(threads)
    assert type(results[0]) is RuntimeError
    assert "ended without an item or an error" in str(results[0])
    threads, results = in_threads(lambda: next(iterator))
    join(threads)
    assert float(results[0]) >= 3
    iterator.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("started", [False, True])
def test_a_forked_child_gets_an_error(started):
    iterator = prefetch_to_device(batcher(), 1)
    if started:
        next(iterator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX and Python warn of forks of processes with threads
        child = os.fork()
    if not child:
        try:
            next(iterator)
        except RuntimeError as error:
            iterator.close()
            os._exit(7 if "another process" in str(error) else 8)
        os._exit(9)
    end, status = time.monotonic() + SECONDS, (0, 0)
    while time.monotonic() < end and not status[0]:
        status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    if not status[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status[1]) == 7
    assert len(list(iterator)) == 10 - started


def test_a_source_may_give_every_item_in_the_same_memory():
    def read():
        buffer = {"x": np.zeros((64, 1024), np.float32)}  # aligned so that a device may share it
        for i in range(6):
            buffer["x"][:] = i
            yield buffer

    assert [set(np.unique(item["x"])) for item in prefetch_to_device(read(), 4)] == [{i} for i in range(6)]


def test_what_is_on_the_device_does_not_follow_the_host():
    host = [np.zeros(1 << 16, np.float32) for _ in range(3)]
    iterator = prefetch_to_device(host, 3)
    items = list(iterator)
    for array in host:
        array[:] = 1
    assert not any(np.any(item) for item in items)


def test_the_thread_computes_in_64_bits_where_its_maker_does(x64):
    (item,) = prefetch_to_device([np.array([2**40, 1])])
    assert item.tolist() == [2**40, 1]
    stream = SlotFilling(iter([[2**40]]), plan_padded(1, 1))
    assert next(prefetch_to_device(stream)).inputs.data.tolist() == [2**40]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="size must be at least 1"):
        prefetch_to_device([1.0], 0)
    with pytest.raises(AttributeError, match="no get_state"):
        prefetch_to_device([1.0]).get_state()


def test_a_process_may_end_while_items_are_left():
    code = """
import itertools
import numpy as np
from jaxpack.data import prefetch_to_device
iterator = prefetch_to_device(np.ones(1 << 20) for _ in itertools.count())
print(next(iterator).shape)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS * 6)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "(1048576,)\n", "")
