"""Several processes: how they start, a check that they agree, and an error that says that one was lost.

A host is one process of the program, jax.process_index() of jax.process_count().
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import queue
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxpack._checks import at_least_one
from jaxpack._types import PyTree

# jax.distributed.initialize reads the first one; `jaxpack launch` sets all three.
COORDINATOR, NUM_PROCESSES, PROCESS_ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_SHUTDOWN_SECONDS = 5  # for which a host that ends waits for the others to end
_DESCRIBED = 120  # bytes of a value that hosts tell each other, for the error
# Texts of the errors in which XLA's collectives, JAX's coordination service and gRPC report a host that is gone.
_LOST = ("Gloo", "NCCL", "coordination service", "Barrier timed out", "UNAVAILABLE:", "DEADLINE_EXCEEDED:")


class HostLostError(RuntimeError):
    """The error that another host of the program has ended or does not answer.

    The arrays of the running step are lost with it. Start all hosts again, from the last checkpoint.

    Examples:
      >>> try:
      ...     with watch_hosts():
      ...         raise jax.errors.JaxRuntimeError("UNAVAILABLE: Failed to send RPC to coordination service.")
      ... except HostLostError as error:
      ...     print(type(error.__cause__).__name__)
      JaxRuntimeError
    """


def start_hosts(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout: int = 30,
) -> None:
    """Connects this process with the others of the program, before JAX is used: jax.distributed.initialize.

    What is not given is taken from the environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, which `jaxpack launch` sets, or else from the cluster that JAX detects: SLURM, Open MPI, Kubernetes,
    or TPU VMs. Where there is none of these, the program is of one process, and nothing is done.

    JAX ends all processes of which another one has not answered for `heartbeat_timeout` seconds, and those whose
    coordinator, process 0, has ended. A process that ends waits for the others for 5 seconds.

    Examples:
      >>> start_hosts("10.0.0.1:1234", num_processes=8)
      Traceback (most recent call last):
      ...
      ValueError: hosts start with a coordinator (10.0.0.1:1234), num_processes (8) and process_id (None).
      Pass all three, or none where JAX detects the cluster.

    Args:
      coordinator: the address host:port of process 0, with a free port.
      num_processes: the number of processes.
      process_id: the number of this one, from 0.
      heartbeat_timeout: seconds; JAX's own default is 100.

    Raises:
      ValueError: if only some of the three are known, or process_id is not below num_processes.
      RuntimeError: if JAX has computed something already, or the coordinator does not answer.
    Source: jax.distributed.initialize.
    """
    at_least_one("heartbeat_timeout", heartbeat_timeout)
    num_processes = _number(NUM_PROCESSES) if num_processes is None else num_processes
    process_id = _number(PROCESS_ID) if process_id is None else process_id
    if coordinator is None and (num_processes, process_id) != (None, None):
        coordinator = os.environ.get(COORDINATOR)  # alone it tells JAX the address in a cluster that it detects
    known = [value is not None for value in (coordinator, num_processes, process_id)]
    if any(known) and not all(known):
        raise ValueError(
            f"hosts start with a coordinator ({coordinator}), num_processes ({num_processes}) and process_id "
            f"({process_id}).\nPass all three, or none where JAX detects the cluster."
        )
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        if any(known) or "coordinator_address" not in str(error):  # otherwise JAX detects no cluster
            raise


def check_hosts_agree(timeout: float = 300.0, /, **values: PyTree) -> None:
    """Raises an error on every host if a value is not the same on all of them.

    Hosts whose plans, seeds or corpora differ would wait for each other without end, or train on other batches than one
    host does. Call it on every host, after `start_hosts` and before the first step.

    Hosts compare hashes of the values, so a value may be large.

    Examples:
      >>> check_hosts_agree(seed=0, plan=jaxpack.plan_padded(8, 20), lengths=np.arange(20))

    Args:
      timeout: seconds for which a host waits for the others to call this too.
      values: by name, numbers, strings, plans and other frozen dataclasses of them, arrays, and pytrees of these. Of
        arrays the values, the shape and the dtype count.

    Raises:
      ValueError: if hosts differ, in a value or in the names. It says in which, and which hosts have what.
      TypeError: if a value is of another type.
      HostLostError: if another host has not called this after `timeout` seconds.
    """
    names = sorted(values)
    hashes = [_hash(name, values[name]) for name in names]
    if jax.process_count() == 1:
        return
    called = [hashlib.sha256(repr(names).encode()).digest(), ", ".join(names).encode()]
    found = _within(timeout, lambda: _gather(called))
    _raise_if_differing("the names of the values", found[:, 0], [_text(row) for row in found[:, 1]])
    if not names:
        return
    all_hashes = _gather(hashes)
    described = _gather([_describe(values[name]).encode() for name in names])
    for i, name in enumerate(names):
        _raise_if_differing(name, all_hashes[:, i], [_text(row) for row in described[:, i]])


@contextlib.contextmanager
def watch_hosts() -> Iterator[None]:
    """A context in which an error of JAX that reports the loss of another host is raised as a HostLostError.

    A host that is gone breaks the collectives of the others: of which, and how, depends on the backend. This gives the
    errors one name. Any other error passes through.

    Where process 0 is lost, or a host no longer answers, JAX ends the process itself, with SIGABRT: `jaxpack launch`
    reports that under the same name.

    Examples:
      >>> with watch_hosts():
      ...     raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: closed by peer")
      Traceback (most recent call last):
      ...
      jaxpack.sharding.HostLostError: another host was lost (UNKNOWN: Gloo all-reduce failed: closed by peer).
      Start all hosts again, from the last checkpoint.

    Raises:
      HostLostError: in place of the error, which it has as its cause.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:  # XLA's status errors are either, by their code
        if isinstance(error, HostLostError) or not any(text in str(error) for text in _LOST):
            raise
        said = str(error).splitlines()[0]
        raise HostLostError(
            f"another host was lost ({said}).\nStart all hosts again, from the last checkpoint."
        ) from error


def _number(variable: str) -> int | None:
    """Returns the whole number in an environment variable, or None if it is not set."""
    text = os.environ.get(variable)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"the environment variable {variable} must be a whole number, got {text!r}.") from error


def _hash(name: str, value: PyTree) -> bytes:
    """Returns a hash of a value: of its structure and its leaves."""
    found = hashlib.sha256()
    leaves, structure = jax.tree.flatten(value)
    found.update(str(structure).encode())
    for leaf in leaves:
        found.update(_bytes_of(name, leaf))
    return found.digest()


def _bytes_of(name: str, leaf: Any) -> bytes:
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        return f"{type(leaf).__name__}{dataclasses.astuple(leaf)}".encode()
    if isinstance(leaf, (str, bytes, bool, int, float, complex)):
        return repr(leaf).encode()
    if isinstance(leaf, (np.ndarray, np.generic, jax.Array)):
        array = np.asarray(leaf)
        if array.dtype != object:
            return f"{array.dtype}{array.shape}".encode() + array.tobytes()
    raise TypeError(
        f"{name} holds a {type(leaf).__name__}, which hosts cannot compare. Pass arrays, numbers, strings, plans, or "
        f"pytrees of them."
    )


def _describe(value: PyTree) -> str:
    """Returns a value in words, for the error: itself if it is short."""
    if isinstance(value, (np.ndarray, jax.Array)):
        return f"{value.dtype.name} {list(value.shape)} with the hash {_hash('', value).hex()[:8]}"
    text = repr(value)
    if len(text.encode()) <= _DESCRIBED:
        return text
    return f"a {type(value).__name__} with the hash {_hash('', value).hex()[:8]}"


def _within(timeout: float, gather: Callable[[], np.ndarray]) -> np.ndarray:
    """Returns what hosts gather; raises HostLostError if that takes longer. A collective itself waits without end."""
    found: queue.SimpleQueue[np.ndarray | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            found.put(gather())
        except Exception as error:
            found.put(error)

    threading.Thread(target=run, name="check_hosts_agree", daemon=True).start()
    try:
        result = found.get(timeout=timeout)
    except queue.Empty:
        raise HostLostError(
            f"some of the {jax.process_count()} hosts have not called check_hosts_agree for {timeout:g} seconds. Look "
            f"at their outputs, and start all hosts again."
        ) from None
    if isinstance(result, Exception):
        raise result
    return result


def _gather(rows: Sequence[bytes]) -> np.ndarray:
    """Collects the rows of all hosts: [hosts, rows, bytes], each cut or filled up to one length."""
    array = np.zeros((len(rows), _DESCRIBED), np.uint8)
    for line, row in zip(array, rows, strict=True):
        line[: len(row)] = np.frombuffer(row[:_DESCRIBED], np.uint8)
    return np.asarray(multihost_utils.process_allgather(array))


def _text(row: np.ndarray) -> str:
    return row.tobytes().rstrip(b"\0").decode(errors="replace")


def _raise_if_differing(what: str, hashes: np.ndarray, described: Sequence[str]) -> None:
    """Raises ValueError unless the rows of hashes, one for each host, are equal."""
    hosts: dict[Hashable, list[int]] = {}
    for host, row in enumerate(hashes):
        hosts.setdefault(row.tobytes(), []).append(host)
    if len(hosts) == 1:
        return
    found = "; ".join(f"{described[same[0]]} on {_hosts(same)}" for same in hosts.values())
    raise ValueError(f"hosts disagree on {what}: {found}. Start all hosts with the same code, data and options.")


def _hosts(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"host{'s' if len(numbers) > 1 else ''} {shown}{more}"
