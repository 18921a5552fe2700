"""The queue: each future its own answer or error, waiting, limits, shutdown; and what the load test finds."""

import asyncio
import concurrent.futures
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future

import jax
import numpy as np
import pytest

import jaxpack
from jaxpack import plan_padded
from jaxpack.serving import LoadReport, Queue, Server, Tally, measure_load

WIDE, LONG = plan_padded(4, 3), plan_padded(1, 9)
FOREVER = 3600  # seconds that no test waits for
SOON = 20  # seconds in which whatever comes, comes, on a busy machine too
EXITS = [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()]


@pytest.fixture(scope="module")
def served():
    def function(factor, packed):
        return {"steps": packed.map(lambda x: factor * x), "sum": jaxpack.segment_sum(packed)}

    return Server(function, 2.0, [WIDE, LONG], np.zeros(1, np.float32))


@pytest.fixture
def server(served, monkeypatch):
    """The server with a `run` that tests may replace."""
    monkeypatch.setattr(served, "run", served.run)
    return served


class Gate(threading.Event):
    """Holds every run up until it is set; `entered` is set when a run has come."""

    def __init__(self):
        super().__init__()
        self.entered = threading.Event()


@pytest.fixture
def gate(server):
    gate, run = Gate(), server.run

    def held(*args):
        gate.entered.set()
        assert gate.wait(60)
        return run(*args)

    server.run = held
    yield gate
    gate.set()


def check(sequence, result):
    np.testing.assert_array_equal(result["steps"], 2 * np.asarray(sequence, np.float32))
    assert result["sum"] == sum(sequence)


def sequences_of(count):
    """Sequences of 0 to 9 steps, each with numbers of its own."""
    return [list(range(i, i + i % 10)) for i in range(count)]


def test_many_threads_get_each_its_own_results(server):
    sequences = sequences_of(200)
    with Queue(server) as requests, concurrent.futures.ThreadPoolExecutor(8) as pool:
        for sequence, future in zip(sequences, pool.map(requests.submit, sequences), strict=True):
            check(sequence, future.result())


def test_a_bad_request_fails_alone(server):
    with Queue(server) as requests:
        futures = [requests.submit(sequence) for sequence in ([1, 2], [[1]], [1] * 10, [1j], [3])]
        assert [type(future.exception()) for future in futures[1:4]] == [ValueError, ValueError, TypeError]
        assert "sequence has 10 steps, but the longest plan has room for 9" in str(futures[2].exception())
        check([1, 2], futures[0].result())
        check([3], futures[4].result())


def test_an_exception_in_the_model_fails_its_batch_and_no_other(server):
    run = server.run

    def fail(plan, requests):
        if plan == WIDE:
            raise RuntimeError("out of memory")
        return run(plan, requests)

    server.run = fail
    with Queue(server, max_wait=FOREVER) as requests:
        futures = [requests.submit(sequence) for sequence in ([1], [5] * 8, [2], [3])]  # a full batch, in two runs
        assert [str(futures[i].exception()) for i in (0, 2, 3)] == ["out of memory"] * 3
        check([5] * 8, futures[1].result())
        server.run = run
        futures = [requests.submit([i]) for i in range(4)]
        for i, future in enumerate(futures):
            check([i], future.result())


def test_an_exception_in_routing_fails_the_batch(server, monkeypatch):
    def fail(lengths):
        raise MemoryError("no room")

    with Queue(server, max_wait=0) as requests:
        monkeypatch.setattr(server, "route", fail)
        assert isinstance(requests.submit([1]).exception(), MemoryError)
        monkeypatch.undo()
        check([1], requests.submit([1]).result())


@pytest.mark.parametrize("error", [*EXITS, StopIteration()], ids=repr)
@pytest.mark.parametrize("where", ["run", "route"])
def test_an_exit_in_the_model_fails_its_batch_by_name_and_no_other(server, monkeypatch, where, error):
    def leave(*_):
        raise error

    with Queue(server, max_wait=0) as requests:
        with monkeypatch.context() as patch:
            patch.setattr(server, where, leave)
            found = requests.submit([1]).exception(SOON)
        assert isinstance(found, RuntimeError)
        assert str(found) == f"the batch of this request ended with {error!r}."
        check([1], requests.submit([1]).result(SOON))


@pytest.mark.parametrize("error", [*EXITS, ValueError()], ids=repr)
def test_a_callback_that_exits_holds_up_neither_the_other_callbacks_nor_the_queue(server, error):
    def leave(future):
        raise error

    called: queue.SimpleQueue = queue.SimpleQueue()
    with Queue(server, max_wait=FOREVER) as requests:
        futures = [requests.submit([i]) for i in range(3)]
        for future in futures:
            future.add_done_callback(leave)
            future.add_done_callback(called.put)
        futures.append(requests.submit([3]))
        assert {called.get(timeout=SOON) for _ in range(3)} == set(futures[:3])
        futures += [requests.submit([i]) for i in range(4, 8)]
        for i, future in enumerate(futures):
            check([i], future.result(SOON))


def test_an_exit_in_a_callback_that_the_caller_runs_is_the_callers(server):
    def leave(future):
        raise SystemExit

    with Queue(server, max_wait=FOREVER) as requests:
        dropped = requests.submit([1])
        dropped.add_done_callback(leave)
        with pytest.raises(SystemExit):
            dropped.cancel()


OWNERS = {
    "result": lambda future: future.set_result("mine"),
    "exception": lambda future: future.set_exception(KeyError("mine")),
    "cancelled": lambda future: future.cancel(),
    "cancelled and told": lambda future: future.cancel() and future.set_running_or_notify_cancel(),
}


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("how", OWNERS)
def test_a_future_that_its_owner_settles_first_keeps_that_and_disturbs_nobody(server, gate, how, running):
    with Queue(server, max_wait=0 if running else FOREVER) as requests:
        futures = [requests.submit([0])]
        if running:
            assert gate.entered.wait(SOON)
        futures += [requests.submit([i]) for i in (1, 2)]
        settled = futures[0]
        OWNERS[how](settled)
        cancelled = settled.cancelled()
        gate.set()
        futures.append(requests.submit([3]))
        for i, future in enumerate(futures[1:], 1):
            check([i], future.result(SOON))
        if cancelled:
            assert concurrent.futures.wait([settled], SOON).done == {settled}
        elif how == "result":
            assert settled.result(0) == "mine"
        elif how == "exception":
            assert isinstance(settled.exception(0), KeyError)


def test_a_future_is_awaited_under_asyncio_whatever_it_brings(server):
    async def ask(requests):
        return await asyncio.wait_for(asyncio.wrap_future(requests.submit([1])), SOON)

    def leave(*_):
        raise StopIteration

    with Queue(server, max_wait=0) as requests:
        check([1], asyncio.run(ask(requests)))
        server.run = leave
        with pytest.raises(RuntimeError, match=re.escape("ended with StopIteration()")):
            asyncio.run(ask(requests))


def test_a_future_that_its_owner_has_begun_is_answered(server):
    with Queue(server, max_wait=FOREVER) as requests:
        future = requests.submit([1])
        assert future.set_running_or_notify_cancel()
        requests.shutdown()
        check([1], future.result(0))


@pytest.mark.parametrize("blocked", [False, True], ids=["", "a submit waits"])
def test_when_the_thread_dies_all_that_wait_and_come_get_an_error_that_names_it(server, monkeypatch, gate, blocked):
    requests = Queue(server, max_wait=0, max_size=2)
    futures = [requests.submit([0])]
    assert gate.entered.wait(SOON)
    futures += [requests.submit([i]) for i in (1, 2)]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        late = pool.submit(requests.submit, [3]) if blocked else None
        monkeypatch.setattr(requests, "_answer", lambda batch: sys.exit("gone"))  # where nothing is expected to fail
        gate.set()
        check([0], futures[0].result(SOON))
        found = [future.exception(SOON) for future in futures[1:]]
        assert [type(error) for error in found] == [RuntimeError] * 2
        assert str(found[0]).startswith("the queue's thread has ended with SystemExit('gone'), before this request")
        if late is not None:
            with pytest.raises(RuntimeError, match=re.escape("has ended with SystemExit('gone')")):
                late.result(SOON).result(SOON)
    with pytest.raises(RuntimeError, match=re.escape("has ended with SystemExit('gone'): it takes no more requests")):
        requests.submit([1])
    requests.shutdown()
    requests.shutdown(wait=False, cancel_futures=True)


WAITS = {
    "result": lambda requests: requests.submit([1]).result(),
    "exception": lambda requests: requests.submit([1]).exception(),
    "a full queue": lambda requests: [requests.submit([i]) for i in range(3)],
    "shutdown": lambda requests: requests.shutdown(),
    "the context's end": lambda requests: requests.__exit__(None, None, None),
}


@pytest.mark.parametrize("wait", WAITS)
def test_a_callback_that_would_wait_for_its_own_queue_is_told(server, wait, monkeypatch):
    told: queue.SimpleQueue = queue.SimpleQueue()
    submitted = []
    requests = Queue(server, max_wait=0.05, max_size=2)

    def callback(future):
        try:
            WAITS[wait](requests)
        except BaseException as error:
            told.put(error)

    submit = requests.submit

    def recorded(sequence):
        submitted.append(submit(sequence))
        return submitted[-1]

    monkeypatch.setattr(requests, "submit", recorded)
    requests.submit([5]).add_done_callback(callback)
    error = told.get(timeout=SOON)
    if wait == "a full queue":
        assert isinstance(error, queue.Full)
    else:
        assert isinstance(error, RuntimeError)
        assert str(error).startswith("a callback ")
    requests.shutdown()
    assert all(future.exception(0) is None for future in submitted)
    with pytest.raises(RuntimeError, match="has been shut down"):
        submit([1])


@pytest.mark.parametrize("cancel", [False, True])
def test_whichever_thread_shuts_down_nothing_is_unsettled_when_it_has_waited(server, cancel):
    unsettled: queue.SimpleQueue = queue.SimpleQueue()
    settled: queue.SimpleQueue = queue.SimpleQueue()
    requests = Queue(server, max_wait=0.001, max_size=8)
    futures, start = [], threading.Barrier(6)

    def client():
        start.wait(SOON)
        try:
            for i in range(1000):
                future = requests.submit([i])
                future.add_done_callback(settled.put)
                futures.append(future)
        except RuntimeError:
            pass

    def owner():
        start.wait(SOON)
        time.sleep(0.02)
        requests.shutdown(cancel_futures=cancel)
        for future in list(futures):
            if not future.done():
                unsettled.put(future)

    threads = [threading.Thread(target=target, daemon=True) for target in [client] * 3 + [owner] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()
    assert unsettled.empty()
    assert concurrent.futures.wait(futures, SOON).not_done == set()
    assert settled.qsize() == len(futures)
    if not cancel:
        assert all(future.exception(0) is None for future in futures)


def test_waiters_hear_of_what_a_shutdown_cancels(server):
    requests = Queue(server, max_wait=FOREVER)
    futures = [requests.submit([i]) for i in range(3)]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        heard = pool.submit(concurrent.futures.wait, futures, SOON)
        requests.shutdown(wait=False, cancel_futures=True)
        assert all(future.cancelled() for future in futures)
        assert not heard.result(2 * SOON).not_done


@pytest.mark.parametrize("max_wait", [float("inf"), 1e300])
def test_a_request_may_wait_for_others_for_ever(server, max_wait):
    with Queue(server, max_wait=max_wait) as requests:
        futures = [requests.submit([0])]
        assert not concurrent.futures.wait(futures, timeout=0.05).done
        futures += [requests.submit([i]) for i in range(1, server.batch_size)]
        for i, future in enumerate(futures):
            check([i], future.result(SOON))


IN_A_FORK = {
    "submit": (lambda requests, future, server: requests.submit([1]), "the server was made in another process"),
    "a queue made there": (lambda requests, future, server: Queue(server).submit([1]), "the server was made in anoth"),
    "a call": (lambda requests, future, server: server([[1]]), "the server was made in another process"),
    "save": (lambda requests, future, server: server.save("/dev/null/no"), "the server was made in another process"),
    "result": (lambda requests, future, server: future.result(), "the answer comes in the process that made the que"),
    "exception": (lambda requests, future, server: future.exception(), "the answer comes in the process that made t"),
    "shutdown": (lambda requests, future, server: requests.shutdown(), ""),
    "shutdown, cancelled": (lambda requests, future, server: requests.shutdown(cancel_futures=True), ""),
    "tallies": (lambda requests, future, server: requests.tallies, ""),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # Python's, JAX's: forks may hang
@pytest.mark.parametrize("use", IN_A_FORK)
def test_a_forked_child_gets_an_error_and_waits_for_nobody(server, use):
    function, message = IN_A_FORK[use]
    with Queue(server, max_wait=FOREVER) as requests:
        future = requests.submit([2])
        with requests._changed:  # as if another thread had held it
            process = os.fork()
            if not process:
                signal.alarm(SOON)
                found = ""
                try:
                    function(requests, future, server)
                except RuntimeError as error:
                    found = str(error)
                finally:
                    os._exit(not (found.startswith(message) if message else found == ""))
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
        requests.shutdown()
        check([2], future.result(0))


EXIT = """
import concurrent.futures, sys, threading, time
import numpy as np
import jaxpack
from jaxpack.serving import Queue, Server

server = Server(lambda _, packed: jaxpack.segment_sum(packed), None, [jaxpack.plan_padded(2, 3)], np.zeros(1, int))
if "a batch runs" in sys.argv:
    entered = threading.Event()
    server.run = lambda *_: entered.set() or time.sleep(3600)
requests = Queue(server, max_wait=0 if "a batch runs" in sys.argv else 3600)
future = requests.submit([1])
if "a batch runs" in sys.argv:
    entered.wait()
    waiting = requests.submit([2])
else:
    future.add_done_callback(lambda future: print("cancelled", future.cancelled()))
    threading.Thread(target=concurrent.futures.wait, args=[[future]], daemon=True).start()
print("end of main", flush=True)
"""


@pytest.mark.parametrize("case", ["requests wait", "a batch runs"])
def test_the_interpreter_exits_while_requests_are_pending(case):
    command = [sys.executable, "-c", EXIT, case]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == "end of main\n" + ("cancelled True\n" if case == "requests wait" else "")


def test_requests_wait_for_others_until_the_largest_batch_is_full(server):
    with Queue(server, max_wait=FOREVER) as requests:
        futures = [requests.submit([i]) for i in range(2 * server.batch_size)]
        for i, future in enumerate(futures):
            check([i], future.result())
        assert requests.tallies == {WIDE: Tally(runs=2, sequences=8, steps=8), LONG: Tally()}


def test_a_request_waits_no_longer_than_max_wait(server):
    with Queue(server, max_wait=0.1) as requests:
        start = time.monotonic()
        check([1], requests.submit([1]).result())
        assert time.monotonic() - start > 0.09


def test_requests_that_come_while_a_batch_runs_make_the_next_one(server, gate):
    with Queue(server, max_wait=0) as requests:
        futures = [requests.submit([0])]
        assert gate.entered.wait(60)
        futures += [requests.submit([i]) for i in (1, 2, 3)]
        gate.set()
        for i, future in enumerate(futures):
            check([i], future.result())
        assert requests.tallies[WIDE].runs + requests.tallies[LONG].runs == 2


def test_arrays_may_be_written_over_once_submitted(server):
    with Queue(server, max_wait=FOREVER) as requests:
        buffer = np.array([1, 2], np.float32)
        future = requests.submit(buffer)
        buffer[:] = np.nan
        requests.shutdown()
        check([1, 2], future.result())


def test_a_full_queue_refuses_in_time_or_waits(server, gate):
    with Queue(server, max_wait=0, max_size=2) as requests:
        futures = [requests.submit([0])]
        assert gate.entered.wait(60)
        futures += [requests.submit([i]) for i in (1, 2)]
        for timeout in (0, 0.01):
            with pytest.raises(queue.Full, match=f"2 requests are waiting, and none was taken within {timeout} sec"):
                requests.submit([9], timeout=timeout)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            late = pool.submit(requests.submit, [3])
            assert not concurrent.futures.wait([late], timeout=0.05).done
            gate.set()
            futures.append(late.result(60))
        for i, future in enumerate(futures):
            check([i], future.result())


def test_shutdown_answers_what_waits_and_takes_no_more(server):
    requests = Queue(server, max_wait=FOREVER)
    futures = [requests.submit([i]) for i in range(3)]
    requests.shutdown()
    for i, future in enumerate(futures):
        check([i], future.result(0))
    with pytest.raises(RuntimeError, match="has been shut down"):
        requests.submit([1])
    requests.shutdown()


def test_shutdown_may_cancel_what_waits(server, gate):
    requests = Queue(server, max_wait=0, max_size=2)
    running = requests.submit([0])
    assert gate.entered.wait(60)
    waiting = [requests.submit([i]) for i in (1, 2)]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        blocked = pool.submit(requests.submit, [3])
        requests.shutdown(wait=False, cancel_futures=True)
        assert isinstance(blocked.exception(60), RuntimeError)
    gate.set()
    requests.shutdown()
    check([0], running.result(0))
    assert all(future.cancelled() for future in waiting)


def test_a_cancelled_request_does_not_run(server):
    with Queue(server, max_wait=FOREVER) as requests:
        dropped, kept = requests.submit([1]), requests.submit([2])
        assert dropped.cancel()
        requests.shutdown()
        check([2], kept.result(0))
        assert sum(tally.sequences for tally in requests.tallies.values()) == 1
    with Queue(server, max_wait=FOREVER) as requests:
        assert requests.submit([1]).cancel()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_wait": -1}, ValueError, "max_wait must be 0 or more seconds, got -1."),
        ({"max_wait": float("nan")}, ValueError, "max_wait must be 0 or more seconds, got nan."),
        ({"max_size": 0}, ValueError, "max_size must be at least 1, got 0."),
        ({"max_size": 1.5}, TypeError, "max_size must be an int, got 1.5."),
        ({"server": print}, TypeError, "server must be a jaxpack.serving.Server, got builtin_function_or_method."),
    ],
)
def test_wrong_options_are_refused(served, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Queue(**{"server": served, **options})


def test_measuring_the_load_of_a_queue_finds_nothing_wrong(server):
    sequences = sequences_of(150)
    expected = [server([sequence])[0] for sequence in sequences]
    with Queue(server, max_wait=0.001) as requests:
        report = measure_load(requests.submit, sequences, expected, threads=5, burst=4, pause=0.001)
        tallies = requests.tallies.values()
    assert report.passed
    assert (report.lost, report.reordered, report.misdelivered, report.wrong, report.compiled) == (0,) * 5
    assert sum(tally.sequences for tally in tallies) == 150
    assert sum(tally.steps for tally in tallies) == sum(map(len, sequences))
    assert report.latencies.shape == (150,)
    assert 0 < report.latencies.min() <= report.percentile(50) <= report.percentile(100) < report.seconds


def answered(value):
    future: Future = Future()
    future.set_result(value)
    return future


def failed(_):
    future: Future = Future()
    future.set_exception(RuntimeError())
    return future


def cancelled(_):
    future: Future = Future()
    future.cancel()
    return future


def refused(_):
    raise queue.Full


def ended(_):
    raise SystemExit


def compiling(request):
    jax.jit(lambda x: x + request)(0.0)
    return answered(request)


FAULTS = {
    "reordered": lambda request: answered(request ^ 1),  # neighbours, in the same burst
    "misdelivered": lambda request: answered((request + 2) % 4),  # of the other client
    "wrong": lambda request: answered(request + 0.5),
    "lost": failed,
    "lost, cancelled": cancelled,
    "lost, refused": refused,
    "lost, the client ended": ended,
    "lost, no answer": lambda request: Future(),
    "compiled": compiling,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_load_test_counts_each_fault(fault):
    requests = [0, 2, 1, 3]  # the first client sends 0 and 1, in one burst; the second 2 and 3
    report = measure_load(
        FAULTS[fault], requests, requests, threads=2, burst=1e9, pause=0, timeout=0.05 if "no answer" in fault else 60
    )
    name = fault.partition(",")[0]
    assert getattr(report, name) == 4
    assert not report.passed
    assert report.lost + report.reordered + report.misdelivered + report.wrong + report.compiled == 4
    assert np.isnan(report.latencies).sum() == report.lost


def test_percentiles_are_of_the_answered():
    report = LoadReport(np.array([3.0, np.nan, 1.0, 2.0]), 1.0, 1, 0, 0, 0, 0)
    assert [report.percentile(p) for p in (0, 50, 100)] == [1, 2, 3]
    assert np.isnan(LoadReport(np.full(2, np.nan), 1.0, 2, 0, 0, 0, 0).percentile(50))


@pytest.mark.parametrize("options", [{"threads": 0}, {"burst": 0.5}, {"pause": -1}, {"expected": []}])
def test_a_load_test_refuses_wrong_options(options):
    with pytest.raises(ValueError, match="must be"):
        measure_load(answered, [1], **{"expected": [1], **options})
