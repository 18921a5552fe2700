"""`jaxpack serve-bench`: its report tells what happened, and its exit status whether all went well."""

import json
import re

import pytest
import typer
from typer.testing import CliRunner

from jaxpack.cli import serve_bench as command

app = typer.Typer()
app.command()(command.serve_bench)
SMALL = ("--requests", 60, "--threads", 3, "--burst", 4, "--batch-size", 4, "--features", 2, "--hidden-size", 3)


def invoke(*arguments):
    environment = {"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the command, and what it wrote."""
    path = tmp_path_factory.mktemp("serve") / "result.json"
    result = invoke(*SMALL, "--json", path)
    assert result.exit_code == 0, result.output
    return result.stdout, json.loads(path.read_text())


def test_every_request_is_answered_rightly_and_counted(run):
    report, found = run
    assert found["passed"]
    assert "0 lost, 0 reordered, 0 another's, 0 wrong" in report
    assert sum(plan["sequences"] for plan in found["plans"]) == 60
    assert sum(plan["steps"] for plan in found["plans"]) == found["lengths"]["steps"]
    assert f"60 requests of {found['lengths']['shortest']} to {found['lengths']['longest']} steps" in report
    assert found["warm_up"]["compiled"] >= len(found["plans"])
    assert re.search(rf"Programs compiled +{found['warm_up']['compiled']} in a warm-up of [\d.]+ s, 0 after", report)


def test_the_report_fits_80_columns_and_adds_up(run):
    report, found = run
    assert max(map(len, report.splitlines())) <= 80
    latencies = [1e3 * seconds for seconds in found["latency"].values()]
    assert latencies == sorted(latencies)
    (shown,) = re.findall(r"Latency, ms +p50 ([\d.]+), p90 ([\d.]+), p99 ([\d.]+), at most ([\d.]+)", report)
    assert [float(number) for number in shown] == pytest.approx(latencies, abs=0.051)
    runs, cells = (sum(plan["runs"] * factor(plan) for plan in found["plans"]) for factor in FACTORS)
    real = found["lengths"]["steps"] / cells
    assert re.search(rf"^all +{runs} +60 +{real:.0%}$", report, re.MULTILINE)


FACTORS = (lambda plan: 1, lambda plan: plan["cells"])


def test_the_exit_status_says_that_a_request_was_lost(run, monkeypatch):
    monkeypatch.setattr(command, "measure", lambda load: {**run[1], "lost": 1, "passed": False})
    result = invoke()
    assert result.exit_code == 1
    assert "1 lost, 0 reordered" in result.stdout
    assert "The test failed" in result.stdout
