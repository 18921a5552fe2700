"""The run of `jaxpack bench gpu`: its budget, and processes that hang or crash."""

import json
import subprocess
import sys

from jaxpack.cli.bench.gpu import run as gpu_run
from jaxpack.cli.bench.gpu.cases import Case, all_cases
from jaxpack.cli.bench.gpu.run import Options, measure_gpu
from jaxpack.cli.bench.gpu.worker import Request

FIRST = "lognormal-lstm-float32-64x256"


def quiet(doing, done):
    assert doing
    assert 0 <= done <= 1


class Processes:
    """Stands for the processes of cases: each takes some seconds, and does what it is told."""

    def __init__(self, monkeypatch, seconds=30.0):
        self.now, self.seconds, self.requests, self.does = 0.0, seconds, [], {}
        monkeypatch.setattr(gpu_run.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(gpu_run.subprocess, "run", self.run)

    def run(self, command, env, capture_output, text, timeout):
        request = Request.from_json(command[-2])
        self.requests.append(request)
        assert command[:3] == [sys.executable, "-m", "jaxpack.cli.bench.gpu.worker"]
        assert env["XLA_FLAGS"] == request.case.environment()["XLA_FLAGS"]
        self.now += min(self.seconds, timeout)
        does = self.does.get(request.case.name, "works")
        if does != "crashes":
            names = [request.case.groups[0][0]]
            result = {"name": request.case.name, "peers": [{"name": name} for name in names], "missing": []}
            with open(command[-1], "w") as file:
                json.dump({**result, "machine": {"cpu": "a processor"}, "failed": []}, file)
        if does == "hangs":
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 0, "", "a warning\nSegmentation fault\n")


def test_cases_are_measured_in_order_until_the_budget_is_spent(monkeypatch):
    processes = Processes(monkeypatch)
    cases = all_cases()
    found = measure_gpu(cases, Options(100, 4, 5), quiet)
    assert [case["name"] for case in found["cases"]] == [case.name for case in cases[:3]]
    assert [case["name"] for case in found["left_out"]] == [case.name for case in cases[3:]]
    assert {case["reason"] for case in found["left_out"]} == {"no time was left"}
    assert found["machine"] == {"cpu": "a processor"}
    assert (found["seconds"], found["budget"]) == (90, 100)
    assert [(request.repeats, request.seed) for request in processes.requests] == [(4, 5)] * 3
    assert [request.seconds for request in processes.requests] == [40, 35, 20]


def test_a_run_ends_within_its_budget_even_if_processes_hang(monkeypatch):
    processes = Processes(monkeypatch, seconds=1e6)
    processes.does = {case.name: "hangs" for case in all_cases()}
    found = measure_gpu(all_cases(), Options(450, 1, 0), quiet)
    assert found["seconds"] <= 450
    assert len(found["cases"]) == 6


def test_what_a_process_measured_before_it_was_ended_is_kept(monkeypatch):
    processes = Processes(monkeypatch)
    processes.does = {FIRST: "hangs"}
    case = Case(groups=(("jaxpack", "flax.nnx"), ("jaxpack-buckets",)))
    (found,) = measure_gpu([case], Options(450, 1, 0), quiet)["cases"]
    assert [peer["name"] for peer in found["peers"]] == ["jaxpack"]
    assert found["missing"] == [
        {"name": name, "reason": "it was ended after 80 s"} for name in ("flax.nnx", "jaxpack-buckets")
    ]


def test_a_process_that_crashes_costs_its_case_only(monkeypatch):
    processes = Processes(monkeypatch)
    processes.does = {FIRST: "crashes"}
    cases = all_cases()[:2]
    found = measure_gpu(cases, Options(450, 1, 0), quiet)
    assert found["left_out"] == [{"name": FIRST, "reason": "Segmentation fault"}]
    assert [case["name"] for case in found["cases"]] == [cases[1].name]
