"""The command `jaxpack launch`: starts the processes of a program, and reports why they end."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Annotated

import typer

from jaxpack.sharding._hosts import COORDINATOR, NUM_PROCESSES, PROCESS_ID

_GRACE = 60  # seconds for the others to end by themselves once one has failed
_POLL = 0.1

Processes = Mapping[int, subprocess.Popen[bytes]]  # by process number


def launch(
    script: Annotated[pathlib.Path, typer.Argument(exists=True, dir_okay=False, help="A Python file.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[ARGUMENTS]...", help="Its arguments.")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes of the program.", show_default="the cluster's")
    ] = None,
    process_id: Annotated[
        int | None, typer.Option(min=0, metavar="I", help="Start only this one.", show_default="all N, here")
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Address of process 0.", show_default="a free port here"),
    ] = None,
) -> None:
    """Start a script's processes, and say why they end.

    The script calls jaxpack.sharding.start_hosts(). With --processes alone all
    of them run on this machine. On several machines, each starts its own with
    --coordinator, --processes and --process-id. Where JAX detects the cluster
    (SLURM, Open MPI, Kubernetes, TPU VMs) there are no options: srun jaxpack
    launch train.py.

    If one process fails, the others are ended after a minute, if they have not
    ended by themselves, and the exit status is 1.
    """
    environments = _environments(processes, process_id, coordinator)
    command = [sys.executable, str(script), *(arguments or ())]
    started = {i: subprocess.Popen(command, env={**os.environ, **more}) for i, more in environments.items()}
    with _signals_to(started):
        first = _wait(started)
    failed = {i: process.returncode for i, process in started.items() if process.returncode}
    for i in sorted(failed, key=lambda i: i != first):
        typer.echo(_reason(i, failed[i], named=processes is not None), err=True)
    if failed:
        raise typer.Exit(1)


def _environments(processes: int | None, process_id: int | None, coordinator: str | None) -> dict[int, dict[str, str]]:
    """Returns the environment variables of each process to start, by its number."""
    if processes is None:
        if process_id is not None or coordinator is not None:
            raise typer.BadParameter("--process-id and --coordinator need it.", param_hint="'--processes'")
        return {0: {}}
    if process_id is None:
        if coordinator is not None:
            raise typer.BadParameter("with --coordinator, say which process this is.", param_hint="'--process-id'")
        numbers, coordinator = range(processes), f"127.0.0.1:{_free_port()}"
    else:
        if process_id >= processes:
            raise typer.BadParameter(f"must be below --processes {processes}.", param_hint="'--process-id'")
        if coordinator is None:
            raise typer.BadParameter("the processes need the address of process 0.", param_hint="'--coordinator'")
        numbers = range(process_id, process_id + 1)
    shared = {COORDINATOR: coordinator, NUM_PROCESSES: str(processes)}
    return {i: {**shared, PROCESS_ID: str(i)} for i in numbers}


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@contextlib.contextmanager
def _signals_to(processes: Processes) -> Iterator[None]:
    """A context in which SIGINT and SIGTERM go to the processes."""

    def forward(number: int, frame: object) -> None:
        for process in processes.values():
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: Processes) -> int | None:
    """Waits for all processes; ends those that run on after one has failed. Returns the first to fail, if any."""
    first, deadline = None, float("inf")
    while None in [process.poll() for process in processes.values()]:
        if first is None:
            first = next((i for i, process in processes.items() if process.returncode), None)
            deadline = float("inf") if first is None else time.monotonic() + _GRACE
        if time.monotonic() > deadline:
            for process in processes.values():
                process.kill()
        time.sleep(_POLL)
    return first


def _reason(process: int, code: int, *, named: bool) -> str:
    """Says in a line why a process failed."""
    which = f"process {process}" if named else "the process"
    if code >= 0:
        return f"jaxpack launch: {which} ended with exit status {code}."
    name = signal.Signals(-code).name
    if -code == signal.SIGABRT:
        return (
            f"jaxpack.sharding.HostLostError: {which} was ended by JAX ({name}), which does so when another host was "
            f"lost. Start all hosts again, from the last checkpoint."
        )
    return f"jaxpack launch: {which} was ended by {name}."
