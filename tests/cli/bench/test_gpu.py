"""`jaxpack bench gpu`: its cases, counts, budget and refusals, on a CPU at tiny sizes. No test asserts a time."""

import functools
import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import bench, message
from jax.experimental import rnn
from rich.console import Console

from jaxpack.cli.bench.calls import PASSES, Calls, Missing
from jaxpack.cli.bench.cudnn_peer import flat_weights
from jaxpack.cli.bench.gpu import command as gpu_command
from jaxpack.cli.bench.gpu import memory as gpu_memory
from jaxpack.cli.bench.gpu import run as gpu_run
from jaxpack.cli.bench.gpu import worker as gpu_worker
from jaxpack.cli.bench.gpu.cases import GRAPHS, TINY, Case, all_cases
from jaxpack.cli.bench.gpu.report import markdown, print_gpu
from jaxpack.cli.bench.gpu.run import Options, measure_gpu
from jaxpack.cli.bench.gpu.worker import Request, measure_case
from jaxpack.cli.bench.peers import PEERS
from jaxpack.cli.bench.workloads import Workload

LENGTHS = np.array([3, 5, 2])
FIRST = "lognormal-lstm-float32-64x256"


def quiet(doing, done):
    assert doing
    assert 0 <= done <= 1


def gpu(*arguments):
    return bench("gpu", *arguments)


# Cases


def test_cases_are_all_layers_dtypes_and_sizes_of_the_issue():
    cases = all_cases()
    names = [case.name for case in cases]
    assert len({*names}) == len(names) == 3 * 3 * 2 * 2 * 3 + 3 * 2 + 2
    for lengths in ("lognormal", "equal", "bilstm2"):
        for cell in ("lstm", "gru", "rnn"):
            for dtype in ("float32", "bfloat16"):
                for batch_size in (64, 256):
                    for hidden_size in (256, 512, 1024):
                        assert f"{lengths}-{cell}-{dtype}-{batch_size}x{hidden_size}" in names
                assert f"long-{cell}-{dtype}-16x768" in names


def test_the_first_cases_differ_in_one_respect_from_the_first_of_all():
    first, *others = all_cases()
    assert first.name == FIRST

    def differs(case):
        fields = {"lengths"} if case.lengths == "long" else {"lengths", "batch_size", "hidden_size"}
        return sum(getattr(case, field) != getattr(first, field) for field in fields | {"cell", "dtype", "graphs"})

    counts = [differs(case) for case in others]
    assert counts == sorted(counts)
    assert counts.count(1) == 11


@pytest.mark.parametrize(("name", "flag"), GRAPHS.items())
def test_graphs_are_a_flag_of_every_process_and_do_not_replace_others(monkeypatch, name, flag):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_hlo_as_text=false")
    cases = all_cases(name)
    assert len(cases) == 114
    assert {case.graphs for case in cases} == {name}
    for case in (cases[0], cases[-1]):
        assert case.environment()["XLA_FLAGS"] == f"--xla_dump_hlo_as_text=false {flag}".strip()
        assert case.environment()["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
        assert case.environment()["PATH"] == os.environ["PATH"]


def test_only_libraries_that_read_the_flags_are_measured_with_other_graphs():
    by_graphs = {case.graphs: {name for group in case.groups for name in group} for case in all_cases()}
    assert by_graphs["off"] == by_graphs["loops"] == {"jaxpack", "jaxpack-padded", "flax.nnx"}
    assert by_graphs["default"] >= {"jaxpack-rows", "jaxpack-buckets", "jax-cudnn", "torch-packed", "torch-padded"}
    assert by_graphs["default"] <= {*PEERS}


def test_workloads_have_the_lengths_that_their_names_say():
    sizes: dict[str, list[tuple[int, int]]] = {}
    for case in all_cases():
        workload = case.workload(0)
        assert (workload.cell, workload.dtype, workload.batch_size) == (case.cell, case.dtype, case.batch_size)
        assert (workload.num_layers, workload.bidirectional) == ((2, True) if case.lengths == "bilstm2" else (1, False))
        sizes.setdefault(case.lengths, []).append((workload.lengths.min(), workload.longest))
    assert {*sizes["long"]} == {(1024, 1024)}
    assert {*sizes["equal"]} == {(100, 100)}
    assert max(shortest for shortest, _ in sizes["lognormal"]) < 50 < 150 < min(t for _, t in sizes["bilstm2"])


def test_a_try_out_divides_all_sizes():
    for case, tiny in zip(all_cases(), all_cases(divisor=TINY), strict=True):
        full, small = case.workload(0), tiny.workload(0)
        assert (small.batch_size, small.hidden_size, small.features) == (
            full.batch_size // 16,
            full.hidden_size // 16,
            8,
        )
        assert small.longest <= 64
        assert tiny.environment()["JAX_PLATFORMS"] == "cpu"


# Libraries


@pytest.mark.parametrize("stack", [{}, {"num_layers": 2, "bidirectional": True}])
def test_weights_and_lengths_of_cudnn_mean_what_its_reference_computes(stack):
    workload = Workload("tiny", LENGTHS, features=3, hidden_size=4, **stack)
    sizes = 3, 4, workload.num_layers
    weights = flat_weights(workload)
    assert weights.shape == (rnn.get_num_params_in_lstm(*sizes, workload.bidirectional),)
    unpacked = rnn.unpack_lstm_weights(jnp.asarray(weights), *sizes, workload.bidirectional)
    zeros = jnp.zeros((workload.num_layers * workload.layer.num_directions, 3, 4))
    arrays = workload.inputs, zeros, zeros, *unpacked, jnp.asarray(workload.int32_lengths)
    expected, _, _ = rnn.lstm_ref(*arrays, *sizes, 0.0, workload.bidirectional)
    found, _ = workload.layer.apply(workload.params, workload.inputs, lengths=LENGTHS, plan=workload.padded_plan)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_cudnn_is_called_with_the_batch_and_its_lengths(monkeypatch):
    # The call itself needs a device: it is replaced by the reference.
    def lstm(x, h_0, c_0, weights, lengths, features, hidden_size, num_layers, dropout, bidirectional):
        sizes = features, hidden_size, num_layers
        unpacked = rnn.unpack_lstm_weights(weights, *sizes, bidirectional)
        return rnn.lstm_ref(x, h_0, c_0, *unpacked, lengths, *sizes, dropout, bidirectional)

    workload = Workload("tiny", LENGTHS, features=3, hidden_size=4, bidirectional=True)
    expected, _ = PEERS["jaxpack-padded"](workload).training()
    monkeypatch.setattr(rnn, "lstm", lstm)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    calls = PEERS["jax-cudnn"](workload)
    loss, (weights, inputs) = calls.training()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert calls.same_weights
    assert np.any(np.asarray(weights))
    np.testing.assert_array_equal(np.any(np.asarray(inputs), axis=-1), workload.mask)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"cell": "gru"}, "LSTM in float32"), ({"dtype": "bfloat16"}, "LSTM in float32"), ({}, "needs a CUDA device")],
)
def test_cudnn_says_what_it_lacks(options, reason):
    with pytest.raises(Missing, match=reason):
        PEERS["jax-cudnn"](Workload("tiny", LENGTHS, features=3, hidden_size=4, **options))


@pytest.mark.parametrize("name", ["jaxpack-padded", "flax.nnx", "torch-packed", "torch-padded"])
def test_libraries_compute_in_bfloat16(name):
    if name.startswith("torch"):
        pytest.importorskip("torch", reason="torch is not installed on this Python")
    workload = Workload("tiny", LENGTHS, features=3, hidden_size=4, dtype="bfloat16")
    calls = PEERS[name](workload)
    loss, gradients = calls.training()
    assert "float32" in str(loss.dtype)
    assert {str(leaf.dtype).removeprefix("torch.") for leaf in jax.tree.leaves(gradients)} == {"bfloat16"}
    assert str(calls.forward().dtype).endswith("bfloat16")
    if calls.same_weights:
        exact = Workload("tiny", LENGTHS, features=3, hidden_size=4)
        output, _ = exact.layer.apply(exact.params, exact.inputs, lengths=LENGTHS, plan=exact.padded_plan)
        assert loss.item() == pytest.approx(float(np.sum(output * exact.cotangent)), abs=0.05)


# Memory


class Device:
    """A device that counts its memory."""

    def __init__(self):
        self.in_use = self.peak = 0

    def memory_stats(self):
        return {"bytes_in_use": self.in_use, "peak_bytes_in_use": self.peak}

    def take(self, size):
        self.in_use += size
        self.peak = max(self.peak, self.in_use)

    def zeros(self, size, dtype):
        self.take(size)
        return SimpleNamespace(delete=lambda: self.take(-size))


def test_the_memory_of_a_run_is_seen_below_the_peak_of_an_earlier_one(monkeypatch):
    device = Device()
    device.take(10)  # arguments

    def run(temporaries, results):
        device.take(temporaries + results)
        device.take(-temporaries - results)

    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(jax, "device_put", lambda array, device: array)
    monkeypatch.setattr(gpu_memory.jnp, "zeros", device.zeros)
    monkeypatch.setitem(sys.modules, "torch", None)
    runs = [functools.partial(run, size, 5) for size in (100, 7, 300)]
    assert [gpu_memory.peak_bytes(each) for each in runs] == [105, 12, 305]
    assert device.in_use == 10


def test_the_memory_of_torch_is_its_own_allocators(monkeypatch):
    device = Device()
    torch = SimpleNamespace(
        is_initialized=lambda: True,
        reset_peak_memory_stats=lambda: None,
        memory_allocated=lambda: 20,
        max_memory_allocated=lambda: 90,
    )
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(jax, "device_put", lambda array, device: array)
    monkeypatch.setattr(gpu_memory.jnp, "zeros", device.zeros)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=torch))
    assert gpu_memory.peak_bytes(lambda: None) == 70


def test_a_device_that_is_full_has_no_peak_and_no_error(monkeypatch):
    def full(size, dtype):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    monkeypatch.setattr(gpu_memory.jnp, "zeros", full)
    assert gpu_memory.peak_bytes(lambda: None) is None


def test_a_device_that_does_not_count_has_no_peak():
    assert gpu_memory.peak_bytes(lambda: pytest.fail("ran in vain")) is None


# One case


def toy():
    """Calls that compile nothing."""
    call = np.zeros(3)
    return lambda workload: Calls(lambda: call, lambda: (np.float32(0.5), call), 15)


@pytest.fixture
def toys(monkeypatch):
    for name in [*PEERS]:
        monkeypatch.setitem(PEERS, name, toy())
    return PEERS


def case_of(*groups):
    return Case(divisor=TINY, groups=groups)


def results_of(case, seconds=100.0):
    kept = []
    measure_case(Request(case, 2, seconds, 0), lambda result: kept.append(json.loads(json.dumps(result))))
    return kept


def test_results_are_kept_after_each_group_with_those_before(toys):
    first, second = results_of(case_of(("jaxpack", "flax.nnx"), ("jaxpack-buckets",)))
    assert [peer["name"] for peer in first["peers"]] == ["jaxpack", "flax.nnx"]
    assert [peer["name"] for peer in second["peers"]] == ["jaxpack", "flax.nnx", "jaxpack-buckets"]
    assert second["name"] == "lognormal-lstm-float32-4x16"
    assert second["failed"] == []
    longest = second["workload"]["longest"]
    for peer in (*second["peers"], second["limit"]):
        for key in PASSES:
            assert peer[key]["us_per_step"] == pytest.approx(1e6 * np.median(peer[key]["seconds"]) / longest)
    assert {peer["peak_bytes"] for peer in second["peers"]} == {None}  # a CPU does not count


def test_what_the_time_does_not_suffice_for_is_named(toys):
    (found,) = results_of(case_of(("jaxpack", "flax.nnx")), seconds=0)
    assert found["peers"] == []
    assert found["missing"] == [
        {"name": name, "reason": "the time of the case was over"} for name in ("jaxpack", "flax.nnx")
    ]


def test_a_failure_of_jaxpack_is_told_and_loses_no_other_result(toys):
    def fails(workload):
        raise RuntimeError("out of memory\nmore")

    toys["jaxpack-rows"] = fails
    (found,) = results_of(case_of(("jaxpack", "jaxpack-rows", "flax.nnx")))
    assert [peer["name"] for peer in found["peers"]] == ["jaxpack", "flax.nnx"]
    assert found["missing"] == [{"name": "jaxpack-rows", "reason": "failed: RuntimeError: out of memory"}]
    assert found["failed"] == ["jaxpack-rows"]


def test_a_request_reaches_its_process_unchanged():
    for case in (*all_cases(), *all_cases("off", TINY)):
        request = Request(case, 3, 1.5, 7)
        assert Request.from_json(request.to_json()) == request


def test_a_result_is_replaced_as_a_whole(tmp_path):
    for value in (1, 2):
        gpu_worker._write(tmp_path / "result.json", {"value": value})
        assert json.loads((tmp_path / "result.json").read_text()) == {"value": value}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


# The run


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
    case = case_of(("jaxpack", "flax.nnx"), ("jaxpack-buckets",))
    (found,) = measure_gpu([Case(groups=case.groups)], Options(450, 1, 0), quiet)["cases"]
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


# The command


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
