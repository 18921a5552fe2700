"""Hosts in one process: what can be compared, which errors are renamed, and what starts. tests/processes has two."""

import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

import jaxpack
from jaxpack.sharding import HostLostError, _hosts, check_hosts_agree, start_hosts, watch_hosts


@pytest.mark.parametrize(
    "value",
    [0, 1.5, "corpus", b"bytes", None, np.float32(2), np.arange(3), [1, {"a": "b"}], jaxpack.plan_exact([3, 2])],
    ids=repr,
)
def test_a_hash_is_that_of_an_equal_value_and_of_no_other(value):
    check_hosts_agree(value=value)
    found = _hosts._hash("value", value)
    assert found == _hosts._hash("value", jax.tree.map(lambda leaf: leaf, value))
    others = [1, "0", 1.0, "Corpus", b"", [], np.float64(2), np.arange(4), np.arange(3, dtype=np.int8), [1, {"a": "c"}]]
    others += [np.arange(3)[:, None], jaxpack.plan_exact([3, 3]), jaxpack.plan_padded(2, 3)]
    assert found not in [_hosts._hash("value", other) for other in others]


def test_an_array_on_a_device_is_the_same_value():
    assert _hosts._hash("x", jnp.arange(3)) == _hosts._hash("x", np.arange(3, dtype=np.int32))


def test_plans_of_many_slots_differ_though_they_are_written_alike():
    one, other = (jaxpack.plan_rows([9, 9, *[3, 2] * 20, length]) for length in (1, 2))
    assert _hosts._hash("plan", one) != _hosts._hash("plan", other)


@pytest.mark.parametrize("value", [object(), len, np.array([object()])], ids=["object", "function", "array"])
def test_what_cannot_be_compared_is_refused_by_name(value):
    with pytest.raises(TypeError, match=r"^corpus holds a \w+, which hosts cannot compare"):
        check_hosts_agree(corpus=[0, value])


@pytest.mark.parametrize("late", [True, False])
def test_a_host_that_does_not_call_is_an_error_after_the_timeout(monkeypatch, late):
    called = threading.Event()

    def gather(array):
        called.wait(600 if late else 0)
        return np.stack([array, array])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    if late:
        with pytest.raises(HostLostError, match=r"some of the 2 hosts have not called check_hosts_agree for 0\.01 sec"):
            check_hosts_agree(0.01, seed=0, timeout="also a value's name")
    else:
        check_hosts_agree(600, seed=0, timeout="also a value's name")
    called.set()


def test_an_error_of_the_comparison_passes_through(monkeypatch):
    def fail(array):
        raise OSError("no network")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", fail)
    with pytest.raises(OSError, match="no network"):
        check_hosts_agree(seed=0)


def test_many_hosts_are_named_in_groups():
    hashes = np.zeros((12, 2), np.uint8)
    hashes[[3, 7]] = 1
    with pytest.raises(
        ValueError, match=r"seed: 0 on hosts 0, 1, 2, 4, 5, 6, 8, 9 and 2 more; 1 on hosts 3, 7\. Start"
    ):
        _hosts._raise_if_differing("seed", hashes, [str(row[0]) for row in hashes])


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("UNAVAILABLE: Failed to send RPC to coordination service."),
        ValueError("UNKNOWN: Gloo all-reduce failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:1\nmore"),
        jax.errors.JaxRuntimeError("INTERNAL: NCCL operation ncclAllReduce failed: remote process exited"),
    ],
)
def test_the_loss_of_a_host_has_one_name_and_its_cause(error):
    with pytest.raises(HostLostError) as raised, watch_hosts():
        raise error
    assert raised.value.__cause__ is error
    assert str(error).splitlines()[0] in str(raised.value)


@pytest.mark.parametrize("error", [ValueError("shapes differ"), KeyError("Gloo"), HostLostError("Gloo")])
def test_other_errors_pass_through(error):
    with pytest.raises(type(error)) as raised, watch_hosts():
        raise error
    assert raised.value is error


def test_hosts_that_are_half_described_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"num_processes \(None\) and process_id \(1\)\.\nPass all three"):
        start_hosts("127.0.0.1:1", process_id=1)
    monkeypatch.setenv(_hosts.PROCESS_ID, "first")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID must be a whole number, got 'first'"):
        start_hosts()
    with pytest.raises(ValueError, match="heartbeat_timeout must be at least 1"):
        start_hosts(heartbeat_timeout=0)


def test_an_address_alone_is_left_to_jax_which_may_detect_the_rest(monkeypatch):
    given = []

    def initialize(*args, **options):
        given.append((args, options))
        raise ValueError("Number of processes must be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setenv(_hosts.COORDINATOR, "h0:1")
    with pytest.raises(ValueError, match="Number of processes"):
        start_hosts(heartbeat_timeout=20)
    assert given == [((None, None, None), {"heartbeat_timeout_seconds": 20, "shutdown_timeout_seconds": 5})]


def test_a_program_of_one_process_starts_without_a_cluster():
    code = "import jax; from jaxpack.sharding import start_hosts; start_hosts(); print(jax.process_count())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"
