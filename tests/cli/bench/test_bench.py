"""`jaxpack bench`: its counts, comparisons, missing libraries and refusals. No test asserts a time."""

import functools
import json
import os
import platform
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import bench as invoke
from commands import message
from flax import nnx
from stepped_oracles import stepped_step

import jaxpack
from jaxpack import plan_buckets
from jaxpack._recurrence.derivative import unplanned_cells
from jaxpack.cli.bench import command as bench_file
from jaxpack.cli.bench import measure as bench_measure
from jaxpack.cli.bench import peers as bench_peers
from jaxpack.cli.bench import turns as bench_turns
from jaxpack.cli.bench.calls import PASSES, Missing, jax_calls, num_threads
from jaxpack.cli.bench.further_cells import FURTHER_CELLS, FURTHER_LAYERS
from jaxpack.cli.bench.measure import measure
from jaxpack.cli.bench.peers import PEERS
from jaxpack.cli.bench.products import count_flops, product_runs, product_shapes, useful_flops
from jaxpack.cli.bench.stepped_cells import STEPPED_LAYERS, SteppedCell, side_by_side
from jaxpack.cli.bench.turns import take_turns
from jaxpack.cli.bench.workloads import (
    CELLS,
    LAYERS,
    LINEAR_LAYERS,
    Workload,
    named_workload,
    with_cell,
    workload_names,
)

LENGTHS = np.array([3, 8, 2])  # few, since a run without a plan has a loop for each of up to eight
FEATURES, HIDDEN, REPEATS = 3, 4, 2
CACHE = "jax_enable_compilation_cache"
NAMES = (
    "lognormal",
    "uniform",
    "equal",
    "vowels",
    "longtail",
    "bilstm2",
    "gru",
    "rnn",
    "words",
    "words-gru",
    "lru",
    "mingru",
    "rglru",
    "mamba2",
    "mlstm",
    "delta",
    "delta-long",
    "small",
    "wide",
    "long",
    "epoch",
)
OURS = ("jaxpack", "jaxpack-padded", "jaxpack-in-out", "jaxpack-no-plan")


def tiny(**options):
    return Workload(**{"name": "tiny", "lengths": LENGTHS, "features": FEATURES, "hidden_size": HIDDEN, **options})


def quiet(doing, done):
    assert doing
    assert 0 <= done <= 1


def toy(output=lambda x: x):
    """A library that compiles fast: its outputs are a function of the first input feature."""

    def build(workload):
        def apply(params, inputs, rest):
            return output(inputs[..., :1]) * params

        params = jnp.ones(workload.layer.output_size)
        return jax_calls(
            apply, params, workload.inputs, None, workload.cotangent, workload.padded_plan.size, same_weights=True
        )

    return build


@pytest.fixture
def toys(monkeypatch):
    """Only libraries that compile fast: one in the place of jaxpack, and another."""
    monkeypatch.setattr(bench_peers, "PEERS", {"jaxpack": toy(), "other": toy()})
    for module in (bench_file, bench_measure):
        monkeypatch.setattr(module, "PEERS", bench_peers.PEERS)
    return bench_peers.PEERS


class Run:
    """A run of the command on a tiny file of lengths: its report and its JSON."""

    def __init__(self, folder, *options):
        file = folder / "lengths.txt"
        file.write_text("\n".join(map(str, LENGTHS)))
        sizes = "--features", FEATURES, "--hidden-size", HIDDEN, "--repeats", REPEATS
        result = invoke("--lengths", file, *sizes, "--json", folder / "result.json", *options)
        assert result.exit_code == 0, result.output
        self.report = result.stdout
        self.result = json.loads((folder / "result.json").read_text())
        self.peers = {peer["name"]: peer for peer in self.result["peers"]}
        self.missing = {peer["name"]: peer["reason"] for peer in self.result["missing"]}
        self.calls: dict[str, Any] = {}  # the compiled calls of each library

    def row(self, table, name):
        """Returns the entries of a library in one of the report's tables."""
        lines = iter(self.report.splitlines())
        assert any(line.startswith(f"{table}  ") for line in lines)
        return next(line for line in lines if line.startswith(f"{name}  ")).removeprefix(name).split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All libraries, with their calls."""
    calls = {}

    def keeping(name, build):
        def keep(workload):
            calls[name] = build(workload)
            return calls[name]

        return keep

    with pytest.MonkeyPatch.context() as patch:
        for name, build in PEERS.items():
            patch.setitem(PEERS, name, keeping(name, build))
        found = Run(tmp_path_factory.mktemp("bench"))
    found.calls = calls
    return found


def test_every_library_is_measured_or_listed_as_missing(run):
    assert sorted([*run.peers, *run.missing]) == sorted(PEERS)
    assert set(run.peers) >= {*OURS, "flax.nnx", "flax.linen"}
    assert all(reason for reason in run.missing.values())
    assert run.missing["jaxpack-buckets"] == "is the same plan as jaxpack-padded"  # since the batch is small
    assert run.missing["jaxpack-rows"] == "is the same plan as jaxpack"
    for name, module in {"torch-packed": "torch", "torch-padded": "torch", "haiku": "haiku", "keras": "keras"}.items():
        if name in run.missing:
            assert run.missing[name] == f"not installed ({module})"


def test_cells_are_counted(run):
    plan = run.result["plan"]
    packed = int(np.dot(np.diff(plan["boundaries"], prepend=0), plan["rows"]))
    padded = len(LENGTHS) * LENGTHS.max()
    expected = {"jaxpack": packed, "jaxpack-in-out": packed, "torch-packed": LENGTHS.sum()}
    expected["jaxpack-buckets"] = plan_buckets(LENGTHS).size
    expected |= dict.fromkeys(["jaxpack.nnx-plan", "own-cell-plan"], packed)
    expected |= dict.fromkeys(["jaxpack-no-plan", "jaxpack.nnx"], unplanned_cells(LENGTHS, LENGTHS.max()))
    for name, peer in run.peers.items():
        cells = expected.get(name, padded)
        assert peer["cells"] == cells
        assert run.row("Cost", name)[:2] == [f"{cells}", f"{LENGTHS.sum() / cells:.0%}"]


def test_json_says_what_was_run_and_where(run):
    result = run.result
    assert list(result) == ["workload", "plan", "machine", "repeats", "limit", "peers", "missing", "huge_pages"]
    assert result["workload"] == {
        "name": "lengths.txt",
        "cell": "lstm",
        "num_layers": 1,
        "bidirectional": False,
        "features": FEATURES,
        "hidden_size": HIDDEN,
        "dtype": "float32",
        "seed": 0,
        "lengths": LENGTHS.tolist(),
        "batch_size": len(LENGTHS),
        "longest": LENGTHS.max(),
        "tokens": LENGTHS.sum(),
    }
    assert result["repeats"] == REPEATS
    assert result["huge_pages"] is None
    machine = result["machine"]
    assert machine["cpu"]
    assert (machine["python"], machine["backend"]) == (platform.python_version(), jax.default_backend())
    assert machine["threads"] == num_threads() <= machine["cores"] == os.cpu_count()
    assert machine["versions"]["jax"] == jax.__version__
    assert machine["versions"]["jaxpack"] == jaxpack.__version__


def test_json_says_what_was_found_for_each_library(run):
    for name, peer in run.peers.items():
        assert list(peer) == ["name", "cells", "loss", "compile_seconds", "temp_bytes", *PASSES]
        assert np.isfinite(peer["loss"])
        if name.startswith("torch"):
            assert peer["compile_seconds"] is peer["temp_bytes"] is None
        else:
            assert min(peer["compile_seconds"][key] for key in PASSES) > 0
            assert peer["temp_bytes"]["training"] > 0


def test_medians_spreads_and_ratios_are_those_of_the_samples(run):
    result = run.result
    for peer in result["peers"]:
        for key in PASSES:
            found, ours = peer[key], run.peers["jaxpack"][key]["seconds"]
            assert len(found["seconds"]) == REPEATS
            quantiles = np.quantile(found["seconds"], (0.25, 0.5, 0.75))
            np.testing.assert_allclose([found["low"], found["median"], found["high"]], quantiles)
            np.testing.assert_allclose(
                found["times_jaxpack"]["median"], np.median(np.divide(found["seconds"], ours)), rtol=1e-12
            )


def test_times_limit_is_the_time_over_that_of_the_products_in_the_same_turn(run):
    limit = run.result["limit"]
    flops = 2 * LENGTHS.sum() * 4 * HIDDEN * (FEATURES + HIDDEN)
    assert limit["useful_flops"] == {"forward": flops, "training": 3 * flops}
    for key in PASSES:
        seconds = np.array(limit[key]["seconds"])
        assert seconds.shape == (REPEATS,)
        for peer in run.result["peers"]:
            found, expected = peer[key]["times_limit"], np.quantile(peer[key]["seconds"] / seconds, (0.25, 0.5, 0.75))
            np.testing.assert_allclose([found["low"], found["median"], found["high"]], expected)
        ours = limit[key]["times_jaxpack"]["median"]
        assert ours == pytest.approx(np.median(seconds / run.peers["jaxpack"][key]["seconds"]))
    rates = flops / np.array(limit["forward"]["seconds"])
    assert limit["flops_per_second"]["median"] == pytest.approx(np.median(rates))


def test_report_fits_80_columns_and_has_all_tables(run):
    lines = run.report.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    for name, peer in run.peers.items():
        forward, training = run.row("Forward", name), run.row("Forward and backward", name)
        assert len(forward) == len(training) == 4
        assert float(training[-1].replace(",", "")) == pytest.approx(
            peer["training"]["times_jaxpack"]["median"], abs=0.006
        )
    for table in ("Forward", "Forward and backward"):
        assert run.row(table, "product limit")[-2] == "1.00"
    text = " ".join(run.report.split())
    assert f"{num_threads()} threads for every library" in text or "1 thread for every library" in text
    assert f"jax {jax.__version__}" in text
    for name in run.missing:
        assert f"missing {name}" in text


@pytest.mark.parametrize("load", [0.1, 100.0])
def test_a_busy_machine_is_told(toys, monkeypatch, tmp_path, load):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    found = Run(tmp_path)
    assert found.result["machine"]["load_before"] == load
    assert ("The machine was busy" in found.report) == (load > num_threads() / 2)


def test_only_the_named_libraries_are_measured(toys, tmp_path):
    found = Run(tmp_path, "--peer", "other", "--cell", "gru")
    assert list(found.peers) == ["other"]
    assert found.missing == {}
    assert found.result["workload"]["cell"] == "gru"
    assert found.peers["other"]["forward"]["times_jaxpack"] is None
    assert found.row("Forward", "other")[-1] == "-"


@pytest.mark.parametrize("name", ["MinGRU", "RGLRU", "GatedDeltaNet"])
def test_linear_layers_are_measured_on_lengths_of_ones_own(toys, tmp_path, name):
    found = Run(tmp_path, "--cell", name, "--hidden-size", FEATURES)
    assert found.result["workload"]["cell"] == name.lower()
    assert f"lengths.txt: {name}, {FEATURES} features, hidden size {FEATURES}" in " ".join(found.report.split())


def test_sizes_that_a_layer_refuses_are_an_error_of_its_option(tmp_path):
    (tmp_path / "lengths.txt").write_text("3 8 2")
    result = invoke("--lengths", tmp_path / "lengths.txt", "--cell", "RGLRU", "--features", 3, "--hidden-size", 4)
    assert result.exit_code == 2
    assert "Invalid value for '--cell': hidden_size must be input_size" in message(result)


@pytest.mark.parametrize(
    ("cell", "title"),
    [
        ("ConvGRU", "small: ConvGRU on images of 8 x 8, 4 features, hidden size 8, float32"),
        ("RGLRU", "small: RGLRU, 32 features, hidden size 32, float32"),
    ],
)
def test_a_workload_runs_any_cell_in_sizes_that_it_can_have(toys, tmp_path, cell, title):
    result = invoke("small", "--cell", cell, "--repeats", 1, "--json", tmp_path / "result.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["workload"]["name"], found["workload"]["cell"]) == ("small", cell.lower())
    assert found["workload"]["lengths"] == named_workload("small").lengths.tolist()
    assert [peer["name"] for peer in found["peers"]] == ["jaxpack", "other"]
    assert max(len(line.rstrip()) for line in result.stdout.splitlines()) <= 80
    assert title in " ".join(result.stdout.split())


def test_the_command_that_repeats_a_run_has_its_cell():
    workload = with_cell(named_workload("wide"), "rglru")
    assert (workload.features, workload.hidden_size) == (512, 512)
    assert bench_file._arguments(workload, None, ["jaxpack"], 2)[-3:] == ["--cell", "rglru", "wide"]


def test_an_unknown_cell_is_refused_with_the_list():
    result = invoke("small", "--cell", "transformer")
    assert result.exit_code == 2
    assert f"'transformer' is no cell. Choose one of {', '.join(CELLS)}." in message(result)
    assert [*LAYERS, *LINEAR_LAYERS, *STEPPED_LAYERS] == list(CELLS)


def expected_loss(workload):
    output, _ = workload.layer.apply(workload.params, workload.inputs, lengths=workload.lengths)
    return np.sum(np.asarray(output, np.float64) * workload.cotangent)


def test_libraries_with_the_same_weights_compute_the_same_loss(run):
    same = [name for name, calls in run.calls.items() if calls.same_weights]
    assert {*OURS} <= {*same} <= {*OURS, "torch-packed", "torch-padded"}
    expected = expected_loss(tiny())
    for name in same:
        assert run.peers[name]["loss"] == pytest.approx(expected, abs=1e-5)


def test_a_drop_in_computes_what_flax_computes(run):
    pairs = {"jaxpack.nnx": "flax.nnx", "jaxpack.nnx-plan": "flax.nnx", "own-cell-plan": "own-cell-flax"}
    for ours, flax in pairs.items():
        assert run.peers[ours]["loss"] == pytest.approx(run.peers[flax]["loss"], abs=1e-5)
    assert run.peers["own-cell-flax"]["loss"] != pytest.approx(run.peers["flax.nnx"]["loss"], abs=1e-3)


def test_a_cell_of_ones_own_is_measured_as_an_lstm_only():
    with pytest.raises(Missing, match="LSTM"):
        PEERS["own-cell-plan"](tiny(cell="gru"))


@pytest.mark.parametrize("cell", FURTHER_LAYERS)
def test_flax_runs_the_equations_of_the_further_cells(cell):
    workload = tiny(cell=cell)
    flax = FURTHER_CELLS[cell](FEATURES, HIDDEN, rngs=nnx.Rngs(0))
    params = {name: param[...] for name, param in flax.weights.items()}
    params.setdefault("bias_hh", jnp.zeros_like(params["bias_ih"]))
    outputs = nnx.jit(lambda cell, x: nnx.RNN(cell)(x, seq_lengths=LENGTHS))(flax, workload.inputs)
    expected, _ = workload.layer.apply({"l0": params}, workload.inputs, lengths=LENGTHS, plan=workload.padded_plan)
    np.testing.assert_allclose(np.where(workload.mask[..., None], outputs, 0), expected, atol=1e-5)
    flops = useful_flops(workload)["forward"]
    products = workload.layer.shapes["l0"]["weight_ih"][1] * (FEATURES + (0 if cell == "indrnn" else HIDDEN))
    assert flops == 2 * LENGTHS.sum() * products


@pytest.mark.parametrize("cell", STEPPED_LAYERS)
def test_flax_runs_the_equations_of_the_cells_that_run_step_by_step(cell):
    workload = tiny(cell=cell)
    rnn = nnx.RNN(SteppedCell(cell, workload.layer, workload.params))
    inputs = side_by_side(workload.inputs, workload.beside)
    outputs = jax.device_get(nnx.jit(lambda rnn, x: rnn(x, seq_lengths=LENGTHS))(rnn, inputs))
    kind = {"convlstm": "conv_lstm", "convgru": "conv_gru", "grud": "gru_d", "timedecay": "decay"}.get(cell, cell)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), workload.layer.state_like("float32"))
    for row, length in enumerate(LENGTHS):
        state = zeros
        for t in range(length):
            x = workload.joined(workload.inputs[row, t], [array[row, t] for array in workload.beside])
            with np.errstate(divide="ignore"):  # sLSTM's oracle takes the logarithm of a gate
                state, expected = stepped_step(kind, workload.layer, workload.params, state, x)
            np.testing.assert_allclose(outputs[row, t], expected, atol=1e-5)


def test_the_products_of_convolutions_are_those_of_all_places_with_the_kernel():
    workload = tiny(cell="convgru")
    products = 64 * 9 * (FEATURES + HIDDEN) * 3 * HIDDEN
    assert useful_flops(workload)["forward"] == 2 * LENGTHS.sum() * products


def test_a_layer_that_runs_step_by_step_has_peers_that_compute_its_loss():
    assert [array.shape[2:] for array in tiny(cell="grud").beside] == [(FEATURES,), ()]
    workload = tiny(cell="cfc")
    output, _ = workload.layer.apply(
        workload.params, workload.joined(workload.inputs, workload.beside), lengths=LENGTHS
    )
    expected = np.sum(np.asarray(output, np.float64) * workload.cotangent)
    for name in ("jaxpack", "flax.nnx", "masked_scan"):
        calls = PEERS[name](workload)
        assert calls.same_weights
        loss, (_, gradient) = calls.training()
        assert loss.item() == pytest.approx(expected, abs=1e-5), name
        assert gradient.shape[-1] == FEATURES
    for name in ("flax.linen", "own-cell-flax", "keras", "torch-packed", "associative_scan"):
        with pytest.raises((Missing, ModuleNotFoundError)):
            PEERS[name](workload)


@pytest.mark.parametrize("cell", ["gru", "rnn"])
def test_torch_runs_the_other_cells_too(cell):
    pytest.importorskip("torch", reason="torch is not installed on this Python")
    expected = expected_loss(tiny(cell=cell))
    for name in ("torch-packed", "torch-padded"):
        loss = PEERS[name](tiny(cell=cell)).training()[0].item()
        assert loss == pytest.approx(expected, abs=1e-5)


def test_a_layer_of_matrix_states_has_a_peer_that_steps_over_the_padded_batch():
    workload = tiny(cell="mamba2", hidden_size=64)
    for name in ("jaxpack", "masked_scan"):
        loss, (_, gradient) = PEERS[name](workload).training()
        assert loss.item() == pytest.approx(expected_loss(workload), abs=1e-5), name
        assert np.isfinite(gradient).all()
    assert workload.cells_under(None) == len(LENGTHS) * LENGTHS.max()
    with pytest.raises(Missing, match="would keep a matrix of each head for every step"):
        PEERS["associative_scan"](workload)


@pytest.mark.parametrize("cell", ["lru", "rglru"])
def test_a_linear_layer_has_peers_that_scan_the_padded_batch(cell):
    workload = tiny(cell=cell, hidden_size=FEATURES)
    expected = expected_loss(workload)
    for name in ("jaxpack", "associative_scan", "masked_scan"):
        loss, (_, gradient) = PEERS[name](workload).training()
        assert loss.item() == pytest.approx(expected, abs=1e-5), name
        assert np.isfinite(gradient).all()
    for name in ("flax.nnx", "flax.linen", "jaxpack.nnx"):
        with pytest.raises(Missing, match=f"it has no {cell}"):
            PEERS[name](workload)
    with pytest.raises(Missing, match="which LSTM is not"):
        PEERS["masked_scan"](tiny())


def test_training_gives_the_gradients_of_weights_and_of_every_real_input(run):
    for name, calls in run.calls.items():
        loss, gradients = calls.training()
        *weights, inputs = jax.tree.leaves(gradients)
        assert np.isfinite(loss.item()), name
        assert all(np.any(np.asarray(leaf)) for leaf in weights), name
        assert np.any(np.asarray(inputs), axis=-1).sum() == LENGTHS.sum(), name
        assert inputs.shape[-1] == FEATURES, name


@pytest.mark.parametrize("name", ["flax.nnx", "flax.linen", "jaxpack.nnx", "haiku", "keras"])
def test_two_layers_of_two_directions_never_see_the_padding(name):
    workload = tiny(lengths=np.array([2, 3]), num_layers=2, bidirectional=True)
    try:
        calls = PEERS[name](workload)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    _, (_, gradient) = calls.training()
    np.testing.assert_array_equal(np.any(gradient, axis=-1), workload.mask)
    assert calls.forward().shape == (*workload.mask.shape, 2 * HIDDEN)


def test_torch_gives_the_same_gradients():
    pytest.importorskip("torch", reason="torch is not installed on this Python")
    workload = tiny(num_layers=2, bidirectional=True)
    _, (weights, _) = PEERS["jaxpack-padded"](workload).training()
    _, (*torch_weights, torch_inputs) = PEERS["torch-packed"](workload).training()
    assert torch_inputs.shape == (LENGTHS.sum(), FEATURES)
    expected = workload.layer.to_torch(weights)
    assert len(expected) == len(torch_weights)
    for name, found in zip(_torch_names(workload), torch_weights, strict=True):
        np.testing.assert_allclose(found.numpy(), expected[name], atol=1e-6, err_msg=name)


def _torch_names(workload):
    """Returns the names of a torch module's parameters, in its order."""
    import torch

    module = torch.nn.LSTM(FEATURES, HIDDEN, workload.num_layers, bidirectional=workload.bidirectional)
    return [name for name, _ in module.named_parameters()]


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (lambda x: x / 0, "its loss is nan"),
        (lambda x: 3 + x, r"its loss is [\d.-]+, but that of jaxpack, with the"),
    ],
)
def test_a_library_that_computes_something_else_is_listed_and_not_timed(toys, output, reason):
    toys["other"] = toy(output)
    found = measure(tiny(), ["jaxpack", "other"], 1, quiet)
    assert [peer["name"] for peer in found["peers"]] == ["jaxpack"]
    assert re.match(reason, found["missing"][0]["reason"])


def test_a_library_that_cannot_be_imported_or_raises_is_listed_with_the_reason(monkeypatch):
    def raises(error):
        def build(workload):
            raise error

        return build

    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(PEERS, "old", raises(AttributeError("no such thing\nsecond line")))
    found = measure(tiny(), ["torch-packed", "torch-padded", "old"], 1, quiet)
    assert found["peers"] == []
    assert found["missing"] == [
        {"name": "torch-packed", "reason": "not installed (torch)"},
        {"name": "torch-padded", "reason": "not installed (torch)"},
        {"name": "old", "reason": "AttributeError: no such thing"},
    ]


def test_an_error_of_jaxpack_is_not_hidden(monkeypatch):
    def build(workload):
        raise RuntimeError("a bug")

    monkeypatch.setitem(PEERS, "jaxpack", build)
    with pytest.raises(RuntimeError, match="a bug"):
        measure(tiny(), ["jaxpack"], 1, quiet)


def test_lengths_of_0_are_measured_but_not_by_torch_packed():
    workload = Workload("zeros", np.array([4, 0, 2]), features=FEATURES, hidden_size=HIDDEN)
    found = measure(workload, ["jaxpack-padded", "torch-packed"], 1, quiet)
    assert [peer["name"] for peer in found["peers"]] == ["jaxpack-padded"]
    assert "refuses lengths of 0" in found["missing"][0]["reason"]


@pytest.fixture
def at_once(monkeypatch):
    """Settles every run in a single call."""
    monkeypatch.setattr(bench_turns, "SETTLE", 0)


def test_every_timed_run_follows_one_of_its_own_in_an_order_drawn_anew(at_once):
    order: list[str] = []
    runs = {(name, "forward"): functools.partial(order.append, name) for name in "abcdef"}
    samples = take_turns(runs, 8, quiet)
    assert order[::2] == order[1::2]
    turns = [tuple(order[i : i + 12 : 2]) for i in range(0, len(order), 12)]
    assert len(turns) == 8
    assert all(sorted(turn) == list("abcdef") for turn in turns)
    assert len(set(turns)) > 4
    assert samples["b", "forward"].seconds.shape == samples["b", "forward"].page_faults.shape == (8,)


def test_samples_are_those_of_their_run_whatever_the_order(monkeypatch, at_once):
    monkeypatch.setattr(bench_turns, "seconds", lambda run: run())
    runs = {(name, "forward"): functools.partial(float, i) for i, name in enumerate("abc")}
    samples = take_turns(runs, 5, quiet)
    for i, name in enumerate("abc"):
        np.testing.assert_array_equal(samples[name, "forward"].seconds, np.full(5, i))


def test_a_run_settles_until_the_threads_of_another_library_sleep(monkeypatch):
    now, runs = [0.0], []

    def run():
        runs.append(now[0])
        now[0] += 0.6 * bench_turns.SETTLE

    monkeypatch.setattr(bench_turns.time, "perf_counter", lambda: now[0])
    bench_turns._settle(run)
    assert len(runs) == 2


def test_compile_seconds_do_not_come_from_a_cache(monkeypatch):
    before = getattr(jax.config, CACHE)
    seen = []

    def build(workload):
        seen.append(getattr(jax.config, CACHE))
        raise Missing("enough")

    monkeypatch.setitem(PEERS, "other", build)
    measure(tiny(), ["other"], 1, quiet)
    assert seen == [False]
    assert getattr(jax.config, CACHE) == before


def test_workloads_are_those_of_the_list():
    assert workload_names() == NAMES
    sizes = {
        name: (w.batch_size, w.longest, w.features, w.hidden_size, w.cell, w.num_layers, w.bidirectional)
        for name, w in ((name, named_workload(name)) for name in NAMES)
    }
    assert sizes["equal"] == (64, 100, 128, 256, "lstm", 1, False)
    assert sizes["vowels"][0] == 27
    assert sizes["longtail"][:2] == (128, 500)
    assert sizes["bilstm2"][4:] == ("lstm", 2, True)
    assert (sizes["gru"][4], sizes["rnn"][4]) == ("gru", "rnn")
    assert [(w[0], *w[2:5]) for w in (sizes["words"], sizes["words-gru"])] == [
        (128, 64, 192, cell) for cell in ("lstm", "gru")
    ]
    assert 8 < named_workload("words").lengths.mean() < 10
    assert (sizes["small"][0], sizes["small"][2:4]) == (8, (32, 32))
    assert (sizes["wide"][0], sizes["wide"][3]) == (256, 512)
    assert sizes["long"][:4] == (16, 10_000, 128, 256)
    assert sizes["delta-long"][:5] == (1, 1024, 512, 512, "gateddeltanet")
    assert named_workload("delta-long").layer.heads == (8, 1, 64, 64)
    assert sizes["epoch"][:4] == (4096, 200, 128, 256)


def test_lognormal_is_the_batch_of_the_study():
    workload = named_workload("lognormal")
    assert (workload.batch_size, workload.tokens, workload.longest) == (64, 4102, 197)
    for name in ("bilstm2", "gru", "rnn"):
        np.testing.assert_array_equal(named_workload(name).lengths, workload.lengths)


def test_lengths_are_in_the_range_of_each_workload():
    ranges = {"words": (1, 24), "lognormal": (1, 200), "uniform": (1, 100), "vowels": (7, 29), "epoch": (1, 200)}
    for seed in range(3):
        for name, (low, high) in ranges.items():
            lengths = named_workload(name, seed).lengths
            assert low <= lengths.min() <= lengths.max() <= high
        assert np.sum(named_workload("longtail", seed).lengths == 500) == 6
        assert np.sum(np.abs(named_workload("longtail", seed).lengths - 30) < 25) == 122


def test_a_seed_always_draws_the_same_and_another_draws_another():
    first, again, other = (named_workload("small", seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.lengths, again.lengths)
    np.testing.assert_array_equal(first.inputs, again.inputs)
    assert not np.array_equal(first.lengths, other.lengths)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inputs_and_cotangents_are_0_past_each_length(dtype):
    workload = tiny(dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(workload.params)} == {jnp.dtype(dtype)}
    for array in (workload.inputs, workload.cotangent):
        assert array.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(np.any(array, axis=-1), np.arange(8) < LENGTHS[:, None])


def test_useful_operations_count_every_matrix_of_every_layer_and_direction():
    workload = tiny(num_layers=2, bidirectional=True, cell="gru")
    weights = 2 * 3 * HIDDEN * (FEATURES + HIDDEN) + 2 * 3 * HIDDEN * (2 * HIDDEN + HIDDEN)
    forward = 2 * weights * LENGTHS.sum()
    assert useful_flops(workload) == {"forward": forward, "training": 3 * forward}
    shapes = [shape for group in workload.layer.shapes.values() for shape in group.values() if len(shape) == 2]
    assert weights == sum(map(np.prod, shapes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_product_limit_runs_exactly_the_useful_operations(dtype):
    workload = tiny(num_layers=2, bidirectional=True, dtype=dtype)
    for key, run in product_runs(workload).items():
        shapes = product_shapes(workload)[key]
        assert [product.shape for product in run()] == [(n, m) for n, _, m in shapes]
        assert {product.dtype for product in run()} == {jnp.dtype(dtype)}
        if dtype == "float32":  # on CPUs, bfloat16 is converted, which counts too
            program: Any = run.func
            assert program.cost_analysis()["flops"] == count_flops(shapes)


def test_an_unknown_workload_is_refused_with_the_list():
    result = invoke("nope")
    assert result.exit_code == 2
    assert f"'nope' is not a workload. Choose one of {', '.join(NAMES)}." in message(result)


def test_an_unknown_library_is_refused_with_the_list():
    result = invoke("--peer", "nope")
    assert result.exit_code == 2
    assert f"'nope' is unknown. Choose from {', '.join(PEERS)}." in message(result)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds no lengths"),
        ("4\nfive", "line 2: 'five' is not a whole number"),
        ("4\n2.5", "line 2: '2.5' is not a whole number"),
        ("4\n-6", "line 2: -6 is negative"),
        ("0 0", "there is nothing to compute"),
        ("100000000 1 1", "Pass the lengths of one batch"),
    ],
)
def test_a_bad_file_of_lengths_is_refused(tmp_path, text, expected):
    file = tmp_path / "lengths.txt"
    file.write_text(text)
    result = invoke("--lengths", file)
    assert result.exit_code == 2
    assert "Invalid value for '--lengths'" in message(result)
    assert expected in message(result)


def test_a_missing_file_of_lengths_is_refused(tmp_path):
    result = invoke("--lengths", tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "cannot be read: No such file" in message(result)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("gru", "--features", 3), "Invalid value for '--features': the workload gru has a fixed one"),
        (("--hidden-size", 3), "Invalid value for '--hidden-size': the workload lognormal has a fixed one"),
        (("bilstm2", "--cell", "grud"), "'--cell': GRUD is one layer in one direction, but bilstm2 has 2 layers in 2"),
        (("gru", "--lengths", "x"), "pass a workload (gru) or lengths, not both"),
        (("--repeats", 0), "Invalid value for '--repeats'"),
        (("--features", 0), "Invalid value for '--features'"),
        (("--json", "nowhere/x.json"), "Invalid value for '--json'"),
        (("--plot", "nowhere/x.png"), "Invalid value for '--plot'"),
    ],
)
def test_bad_options_are_refused_by_name(options, expected):
    result = invoke(*options)
    assert result.exit_code == 2
    assert expected in message(result)


def test_help_names_the_page_faults_the_variable_and_every_workload_and_library():
    text = message(invoke("--help"))
    assert "page faults" in text
    assert "GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in text
    for name in (*NAMES, *CELLS, *PEERS):
        assert name in text


def test_huge_pages_run_the_same_command_in_a_process_that_starts_with_the_variable(toys, monkeypatch, tmp_path):
    started = []

    def start(command, env, stdout, check):
        assert (command[:3], check) == ([sys.executable, "-m", "jaxpack"], True)
        started.append(env["GLIBC_TUNABLES"])
        assert invoke(*command[4:]).exit_code == 0

    monkeypatch.setattr(bench_file.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(subprocess, "run", start)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    found = Run(tmp_path, "--peer", "other", "--huge-pages", "--seed", 7)
    assert started == ["glibc.malloc.check=0:glibc.malloc.hugetlb=1"]
    other = found.result["huge_pages"]
    assert other["workload"] == found.result["workload"]
    assert other["repeats"] == REPEATS
    assert [peer["name"] for peer in other["peers"]] == ["other"]
    assert other["peers"][0]["loss"] == found.peers["other"]["loss"]
    assert max(len(line.rstrip()) for line in found.report.splitlines()) <= 80
    for table, heading in {"Forward": "ms, huge pages", "Cost": "huge pages"}.items():
        assert any(
            line.startswith(f"{table}  ") and line.rstrip().endswith(heading) for line in found.report.splitlines()
        )
    assert len(found.row("Forward", "other")) == 5


@pytest.mark.parametrize(
    ("libc", "tunables", "expected"),
    [
        (("", ""), "", "it needs glibc 2.35 or newer; this system has another C library."),
        (("glibc", "2.31"), "", "it needs glibc 2.35 or newer; this system has glibc 2.31."),
        (("glibc", "2.36"), "glibc.malloc.hugetlb=1", "already has glibc.malloc.hugetlb=1"),
    ],
)
def test_huge_pages_are_refused_where_they_would_change_nothing(monkeypatch, libc, tunables, expected):
    monkeypatch.setattr(bench_file.platform, "libc_ver", lambda: libc)
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    result = invoke("--huge-pages")
    assert result.exit_code == 2
    assert expected in message(result)


def test_plot_is_written(toys, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, which the extra `plot` brings, is not installed")
    Run(tmp_path, "--plot", tmp_path / "bench.svg")
    assert "time / matmul limit" in (tmp_path / "bench.svg").read_text()
