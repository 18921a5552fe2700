"""The queue: each future its own answer or error, waiting, limits, shutdown; and what the load test finds."""

import concurrent.futures
import queue
import re
import threading
import time
from concurrent.futures import Future

import jax
import numpy as np
import pytest

import jaxpack
from jaxpack import plan_padded
from jaxpack.serving import LoadReport, Queue, Server, Tally, load_test

WIDE, LONG = plan_padded(4, 3), plan_padded(1, 9)
FOREVER = 3600  # seconds that no test waits for


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


@pytest.fixture
def gate(server):
    """Holds up every run until it is set; `gate.entered` is set when one has come."""
    event, run = threading.Event(), server.run
    event.entered = threading.Event()

    def held(*args):
        event.entered.set()
        assert event.wait(60)
        return run(*args)

    server.run = held
    yield event
    event.set()


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


def test_a_load_test_of_a_queue_finds_nothing_wrong(server):
    sequences = sequences_of(150)
    expected = [server([sequence])[0] for sequence in sequences]
    with Queue(server, max_wait=0.001) as requests:
        report = load_test(requests.submit, sequences, expected, threads=5, burst=4, pause=0.001)
        tallies = requests.tallies.values()
    assert report.passed
    assert (report.lost, report.reordered, report.misdelivered, report.wrong, report.compiled) == (0,) * 5
    assert sum(tally.sequences for tally in tallies) == 150
    assert sum(tally.steps for tally in tallies) == sum(map(len, sequences))
    assert report.latencies.shape == (150,)
    assert 0 < report.latencies.min() <= report.percentile(50) <= report.percentile(100) < report.seconds


def answered(value):
    future = Future()
    future.set_result(value)
    return future


def failed(_):
    future = Future()
    future.set_exception(RuntimeError)
    return future


def cancelled(_):
    future = Future()
    future.cancel()
    return future


def refused(_):
    raise queue.Full


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
    "lost, no answer": lambda request: Future(),
    "compiled": compiling,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_load_test_counts_each_fault(fault):
    requests = [0, 2, 1, 3]  # the first client sends 0 and 1, in one burst; the second 2 and 3
    report = load_test(
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
        load_test(answered, [1], **{"expected": [1], **options})
