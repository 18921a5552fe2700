"""`jaxpack launch`: the processes that it starts, and what it says of their ends. tests/processes trains with it."""

import json

import pytest
from commands import message
from typer.testing import CliRunner

from jaxpack.cli import launch as launch_file
from jaxpack.cli.app import app


@pytest.fixture
def launch(tmp_path):
    """Launches a script of which each process writes its variables and arguments to a file."""
    script = tmp_path / "script.py"

    def run(code, *options, arguments=()):
        script.write_text(
            "import json, os, pathlib, signal, sys, time\n"
            "found = {name: value for name, value in os.environ.items() if name.startswith('JAX_')}\n"
            "me = os.environ.get('JAX_PROCESS_ID', 'alone')\n"
            f"file = pathlib.Path({str(tmp_path)!r}, me + '.json')\n"
            "file.write_text(json.dumps([found, sys.argv[1:]]))\n" + code
        )
        result = CliRunner().invoke(app, ["launch", *options, str(script), *arguments], env={"NO_COLOR": "1"})
        return result, {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}

    return run


def test_all_processes_get_one_address_their_number_and_the_arguments(launch):
    result, found = launch("", "--processes", "2", arguments=["--processes", "x"])
    assert result.exit_code == 0, result.output
    assert sorted(found) == ["0", "1"]
    addresses = {environment["JAX_COORDINATOR_ADDRESS"] for environment, _ in found.values()}
    assert len(addresses) == 1
    assert addresses.pop().startswith("127.0.0.1:")
    for number, (environment, arguments) in found.items():
        assert (environment["JAX_NUM_PROCESSES"], environment["JAX_PROCESS_ID"]) == ("2", number)
        assert arguments == ["--processes", "x"]


def test_one_process_of_a_program_on_several_machines_is_started(launch):
    result, found = launch("", "--processes", "8", "--process-id", "3", "--coordinator", "h0:12")
    assert result.exit_code == 0, result.output
    (environment, _) = found["3"]
    assert list(found) == ["3"]
    assert (environment["JAX_COORDINATOR_ADDRESS"], environment["JAX_NUM_PROCESSES"]) == ("h0:12", "8")


def test_without_options_the_cluster_is_left_to_jax(launch):
    result, found = launch("")
    assert result.exit_code == 0, result.output
    assert not {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"} & found["alone"][0].keys()


def test_a_process_that_fails_is_named(launch):
    result, _ = launch("sys.exit(7 if me == '1' else 0)", "--processes", "2")
    assert result.exit_code == 1
    assert result.stderr == "jaxpack launch: process 1 ended with exit status 7.\n"


def test_an_abort_is_a_lost_host_and_comes_after_the_cause(launch):
    code = (
        "if me == '1':\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "while not file.with_name('1.json').exists():\n    time.sleep(0.05)\n"
        "time.sleep(1)\nos.abort()\n"
    )
    result, _ = launch(code, "--processes", "2")
    first, second = result.stderr.splitlines()
    assert first == "jaxpack launch: process 1 was ended by SIGKILL."
    assert second.startswith("jaxpack.sharding.HostLostError: process 0 was ended by JAX (SIGABRT)")


def test_a_process_that_goes_on_alone_is_ended(launch, monkeypatch):
    monkeypatch.setattr(launch_file, "_GRACE", 0)
    result, _ = launch("time.sleep(1000) if me == '0' else sys.exit(7)", "--processes", "2")
    assert result.exit_code == 1
    assert "process 1 ended with exit status 7.\njaxpack launch: process 0 was ended by SIGKILL." in result.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--process-id", "1"), "Invalid value for '--processes': --process-id and --coordinator need it."),
        (("--processes", "2", "--coordinator", "h:1"), "Invalid value for '--process-id': with --coordinator, say"),
        (
            ("--processes", "2", "--process-id", "0"),
            "Invalid value for '--coordinator': the processes need the address",
        ),
        (("--processes", "2", "--process-id", "2", "--coordinator", "h:1"), "must be below --processes 2."),
    ],
)
def test_options_that_do_not_go_together_are_refused(launch, options, said):
    result, found = launch("", *options)
    assert result.exit_code == 2
    assert said in message(result)
    assert not found
