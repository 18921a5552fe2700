"""`jaxpack bench gpu` on a CPU at tiny sizes: its reports and refusals. No test asserts a time."""

import io
import json

import jax
import pytest
from commands import bench, message
from rich.console import Console

from jaxpack.cli.bench.calls import PASSES
from jaxpack.cli.bench.gpu import command as gpu_command
from jaxpack.cli.bench.gpu import run as gpu_run
from jaxpack.cli.bench.gpu.cases import GRAPHS
from jaxpack.cli.bench.gpu.report import markdown, print_gpu

FIRST = "lognormal-lstm-float32-64x256"


def gpu(*arguments):
    return bench("gpu", *arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A try-out of two cases in real processes: its report, JSON and Markdown."""
    folder = tmp_path_factory.mktemp("gpu")
    files = "--json", folder / "gpu.json", "--markdown", folder / "gpu.md"
    cases = "--only", "equal-lstm-float32-4x16", "--only", "graphs-loops"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_run, "_CASE_SECONDS", 1e4)  # so that no machine is too slow for the test
        found = gpu("--cpu", "--repeats", 2, "--budget", 100_000, *cases, *files)
    assert found.exit_code == 0, found.output
    return found.stdout, json.loads((folder / "gpu.json").read_text()), (folder / "gpu.md").read_text()


def test_a_try_out_measures_its_cases_and_names_what_it_does_not(run):
    _, result, _ = run
    assert [case["name"] for case in result["cases"]] == [
        "lognormal-lstm-float32-4x16-graphs-loops",
        "equal-lstm-float32-4x16",
    ]
    assert result["left_out"] == []
    loops, equal = result["cases"]
    assert "WHILE" in loops["xla_flags"]
    assert "command_buffer" not in equal["xla_flags"]
    assert result["machine"]["backend"] == "cpu"
    for case in result["cases"]:
        assert case["failed"] == []
        assert case["peers"][0]["name"] == "jaxpack"
    missing = {peer["name"]: peer["reason"] for peer in equal["missing"]}
    assert missing["jax-cudnn"] == "it needs a CUDA device"
    assert missing["jaxpack-padded" if "jaxpack-padded" in missing else "jaxpack-rows"].startswith("is the same plan")


def test_the_report_fits_80_columns_and_has_a_line_for_each_library(run):
    report, result, _ = run
    lines = report.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    for case in result["cases"]:
        start = next(i for i, line in enumerate(lines) if line.startswith(f"{case['name']}: 4 sequences"))
        table = {line.split()[0]: line.split()[1:] for line in lines[start + 3 : start + 4 + len(case["peers"])]}
        for peer in case["peers"]:
            forward, ratio = table[peer["name"]][:2]
            assert float(forward.replace(",", "")) == pytest.approx(peer["forward"]["us_per_step"], rel=0.01)
            assert float(ratio) == pytest.approx(peer["forward"]["times_jaxpack"]["median"], abs=0.006)
    assert "- jax-cudnn: it needs a CUDA device" in report


def test_the_markdown_has_a_line_for_each_case_and_a_column_for_each_library(run):
    _, result, text = run
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    headings = [cell.strip() for cell in rows[0]]
    assert {len(row) for row in rows} == {9}
    assert len(rows) == 2 * (2 + len(result["cases"]))
    times = {row[0].strip(" `"): row[1:] for row in rows[2:4]}
    for case in result["cases"]:
        for peer in case["peers"]:
            cell = times[case["name"]][headings.index(peer["name"]) - 1]
            forward, training = (float(number.replace(",", "")) for number in cell.split("/"))
            assert forward == pytest.approx(peer["forward"]["us_per_step"], rel=0.01)
            assert training == pytest.approx(peer["training"]["us_per_step"], rel=0.01)


def case_result(name, **options):
    """Returns the result of a case with one library."""
    times = {"us_per_step": 1234.5, "times_jaxpack": None, "times_limit": {"median": 2.5}}
    peer = {"name": "flax.nnx", "forward": times, "training": times, "peak_bytes": None, "temp_bytes": None}
    workload = {"lengths": [2, 7], "longest": 7, "tokens": 9, "batch_size": 2}
    case = {"name": name, "workload": workload, "repeats": 3, "limit": dict.fromkeys(PASSES, times), "failed": []}
    return {**case, "peers": [{**peer, "compile_seconds": None, **options}], "missing": []}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"peak_bytes": 3 * 2**20}, "3.00"),
        ({"peak_bytes": 0, "temp_bytes": {"training": 2**20}}, "0.00"),
        ({"temp_bytes": {"training": 2**22}}, "(4.00)"),
        ({}, "-"),
    ],
)
def test_memory_that_was_planned_and_not_measured_stands_in_parentheses(options, expected):
    file = io.StringIO()
    result = {"machine": None, "budget": 9, "seconds": 8.7, "cases": [case_result("a", **options)], "left_out": []}
    print_gpu(result, Console(file=file, width=80))
    (line,) = [line for line in file.getvalue().splitlines() if line.startswith("flax.nnx")]
    assert line.split()[1:] == ["1,234", "-", "1,234", "-", "2.50", expected, "-"]
    row = markdown(result).split("MiB of a training step")[1]
    assert ("| " + expected.replace("-", "") + " |") in row


def test_the_report_says_what_is_missing_and_left_out_and_why():
    missing = {"name": "torch-packed", "reason": "not installed (torch)"}
    cases = [{**case_result(name), "missing": [missing]} for name in "ab"]
    cases[1]["missing"] = [missing, {"name": "jaxpack-rows", "reason": "failed: OutOfMemory"}]
    cases[1]["failed"] = ["jaxpack-rows"]
    left_out = [{"name": str(i), "reason": "no time was left"} for i in range(6)]
    left_out.append({"name": "c", "reason": "Segmentation fault"})
    file = io.StringIO()
    print_gpu(
        {"machine": None, "budget": 450, "seconds": 441.2, "cases": cases, "left_out": left_out},
        Console(file=file, width=80),
    )
    text = file.getvalue()
    assert "2 of 9 cases in 441 s, of a budget of 450 s" in text
    assert "- torch-packed: not installed (torch)\n" in text
    assert "- jaxpack-rows: failed: OutOfMemory (b)\n" in text
    assert "- 6, since no time was left: 0, 1, 2, 3, ...\n" in text
    assert "- 1, since Segmentation fault: c\n" in text
    assert "jaxpack failed: jaxpack-rows (b)." in text


def test_without_a_cuda_device_the_way_out_is_named(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(gpu_command, "measure_gpu", lambda *args: pytest.fail("the work began"))
    found = gpu()
    assert found.exit_code == 2
    assert "it needs a CUDA device, and JAX runs on cpu here." in message(found)
    assert "--cpu to try the command out" in message(found)


def test_an_unknown_case_is_refused_with_examples():
    found = gpu("--only", "nope")
    assert found.exit_code == 2
    assert f"no case has 'nope' in its name. Names are such as {FIRST}" in message(found).replace("- ", "-")


@pytest.mark.parametrize("failed", [[], ["jaxpack-rows"]])
def test_the_exit_status_tells_failures_of_jaxpack(monkeypatch, failed):
    case = {"name": FIRST, "failed": failed}
    monkeypatch.setattr(gpu_command, "measure_gpu", lambda *args: {"cases": [case]})
    monkeypatch.setattr(gpu_command, "print_gpu", lambda result, console: None)
    assert gpu("--cpu").exit_code == bool(failed)


def test_bench_still_runs_workloads_and_help_names_every_graph():
    assert "'gpus' is not a workload" in message(bench("gpus"))
    text = message(gpu("--help"))
    for name in GRAPHS:
        assert name in text
