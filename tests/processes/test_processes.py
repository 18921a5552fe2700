"""Programs of two processes over loopback: what they compare, the loss of one, and the resume of the guide's script."""

import importlib.util
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
PROGRAM = pathlib.Path(__file__).with_name("program.py")
STEPS = 14  # an epoch has 12: 96 sequences in batches of two times four
PATIENCE = 400  # seconds, of which hardly any are needed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")


def start(command, **environment):
    """Starts a process that finds this package, with one CPU device unless the environment says otherwise."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "JAX_NUM_CPU_DEVICES": "1", **environment}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def start_two(command):
    """Starts two processes of one program, without `jaxpack launch`."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listening.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [start(command, JAX_PROCESS_ID=str(i), **shared) for i in range(2)]


def wait(process, read=""):
    """Waits for the end of a process; returns its exit status, all its output, and its errors."""
    try:
        output, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return process.returncode, read + output, errors


def read_until(process, step):
    """Returns the output of a process until it has made a step."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(f"step {step} "):
            return "".join(lines)
    raise AssertionError(f"it ended before step {step}: {process.stderr.read()}")


def losses(output):
    """Returns the loss of each step."""
    return {int(step): float(loss) for step, loss in re.findall(r"^step (\d+) loss (\S+)$", output, re.MULTILINE)}


def child(process, number):
    """Returns the process of a program that `jaxpack launch` has started."""
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parent = folder.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            environment = folder.joinpath("environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or is another user's
            continue
        if int(parent) == process.pid and f"JAX_PROCESS_ID={number}".encode() in environment:
            return int(folder.name)
    raise AssertionError(f"process {number} does not run")


@pytest.fixture(scope="module")
def told():
    """What each of two hosts was told about values that differ."""
    found = [wait(process) for process in start_two([PROGRAM])]
    assert [status for status, _, _ in found] == [0, 0], found
    return [json.loads(output.splitlines()[-1]) for _, output, _ in found]


def test_hosts_that_agree_go_on(told):
    for host in told:
        assert host["same"] == host["nothing"] == "they agree"


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("seed", r"disagree on seed: 0 on host 0; 1 on host 1\. Start all hosts with the same"),
        (
            "plan",
            r"disagree on plan: BucketPlan\(boundaries=\(5,\).* on host 0; BucketPlan\(boundaries=\(6,\).* on host 1",
        ),
        (
            "lengths",
            r"disagree on lengths: int64 \[4000\] with the hash (\w{8}) on host 0; int64 .* hash (?!\1)\w{8} on",
        ),
        ("dtype", r"disagree on lengths: int32 \[9\] .* on host 0; int64 \[9\] .* on host 1"),
        ("names", r"disagree on the names of the values: seed on host 0; seeds on host 1"),
    ],
)
def test_all_hosts_are_told_what_they_disagree_on_and_who_has_what(told, case, said):
    assert re.search(said, told[0][case]), told[0][case]
    assert told[1][case] == told[0][case]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The guide's script: undisturbed in one process; and in two, of which one is killed, then resumed twice.

    Both processes of a resume are killed in turn, and the last resume is by one process.
    """
    if importlib.util.find_spec("orbax") is None:
        pytest.skip("orbax-checkpoint, which the extra `demo` brings, is not installed")
    folder = tmp_path_factory.mktemp("cluster")
    (code,) = re.findall(r"^```py\n(.*?)^```", (ROOT / ".docs/guide/clusters.md").read_text(), re.MULTILINE | re.DOTALL)
    script = folder / "train.py"
    script.write_text(code)

    def command(checkpoints, steps=STEPS):
        return script, "--checkpoints", folder / checkpoints, "--steps", steps

    found = {}
    undisturbed = start(command("whole"), JAX_NUM_CPU_DEVICES="2")

    first, second = start_two(command("broken"))
    read = read_until(first, 6)
    second.send_signal(signal.SIGKILL)
    found["survivor"] = wait(first, read)
    wait(second)

    launched = start(["-m", "jaxpack", "launch", "--processes", 2, *command("broken")])
    read = read_until(launched, 9)
    os.kill(child(launched, 0), signal.SIGKILL)
    found["launched"] = wait(launched, read)

    found["one process"] = wait(start(command("broken"), JAX_NUM_CPU_DEVICES="2"))
    found["undisturbed"] = wait(undisturbed)
    return found


def test_two_processes_have_the_losses_of_one(runs):
    status, output, errors = runs["undisturbed"]
    assert status == 0, errors
    assert list(losses(output)) == list(range(1, STEPS + 1))
    found = losses(runs["survivor"][1])
    assert found == {step: loss for step, loss in losses(output).items() if step in found}


def test_a_host_that_is_left_alone_ends_with_a_named_error(runs):
    status, output, errors = runs["survivor"]
    assert status != 0
    assert max(losses(output)) < STEPS
    assert re.search(r"^jaxpack\.sharding\.HostLostError: another host was lost \(.*\)\.$", errors, re.MULTILINE), (
        errors
    )
    assert "Start all hosts again, from the last checkpoint." in errors


def test_the_loss_of_the_coordinator_has_the_same_name_under_launch(runs):
    status, _, errors = runs["launched"]
    assert status == 1
    assert "jaxpack launch: process 0 was ended by SIGKILL." in errors
    assert "HostLostError" in errors


def test_a_resume_has_the_very_losses_of_a_run_that_was_not_broken_off(runs):
    whole = losses(runs["undisturbed"][1])
    for name, first in {"launched": 5, "one process": 9}.items():
        found = losses(runs[name][1])
        assert min(found) == first, runs[name][2]  # after the checkpoint
        assert found == {step: whole[step] for step in found}
    assert max(losses(runs["one process"][1])) == STEPS
    assert runs["one process"][0] == 0
