"""One case of `jaxpack bench gpu`: its libraries, memory and failures."""

import functools
import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxpack.cli.bench.calls import PASSES, Calls
from jaxpack.cli.bench.gpu import memory as gpu_memory
from jaxpack.cli.bench.gpu import worker as gpu_worker
from jaxpack.cli.bench.gpu.cases import TINY, Case, all_cases
from jaxpack.cli.bench.gpu.worker import Request, measure_case
from jaxpack.cli.bench.peers import PEERS


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
