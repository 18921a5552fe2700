"""`jaxpack bench epoch`: its batches, counts and refusals. No test asserts a time."""

import json
import re

import jax
import numpy as np
import pytest
from commands import bench as invoke
from commands import message

from jaxpack.cli.bench import command as bench_file
from jaxpack.cli.bench import epoch as bench_epoch
from jaxpack.cli.bench.epoch import BATCH_SIZE, BATCHERS, ON_DEVICES, Epoch, Training, measure_epoch
from jaxpack.cli.bench.workloads import Workload, named_workload

LENGTHS = np.random.default_rng(0).choice([2, 9], 200, p=[0.8, 0.2])
BATCHES, REPEATS = 4, 2
NAMES = ("padded", "padded-batch", "bucketed", "sorted", "slot-filled")


def batcher(name, lengths):
    """Returns a batcher over sequences with one feature, whose steps all hold the sequence's number."""
    source = [np.full((length, 1), i, np.float32) for i, length in enumerate(lengths)]
    return BATCHERS[name](Workload("tiny", lengths, features=1, hidden_size=1), source)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The report and the JSON of a tiny corpus."""
    folder = tmp_path_factory.mktemp("epoch")
    (folder / "lengths.txt").write_text(" ".join(map(str, LENGTHS)))
    sizes = "--features", 3, "--hidden-size", 4, "--repeats", REPEATS, "--json", folder / "result.json"
    found = invoke("epoch", "--lengths", folder / "lengths.txt", *sizes)
    assert found.exit_code == 0, found.output
    return found.stdout, json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def peers(run):
    return {peer["name"]: peer for peer in run[1]["peers"]}


def rows(report, table):
    """Returns the entries of a table by name."""
    lines = iter(report.splitlines())
    assert any(line.startswith(f"{table}  ") for line in lines)
    return {line.split()[0]: line.split()[1:] for line, _ in zip(lines, NAMES, strict=False)}


def test_report_has_a_row_for_every_way_to_batch_in_80_columns(run, peers):
    report, _ = run
    assert max(len(line.rstrip()) for line in report.splitlines()) <= 80
    times, costs = rows(report, "Epoch"), rows(report, "Cost")
    assert tuple(times) == tuple(costs) == tuple(peers) == NAMES
    assert {*BATCHERS} - {*NAMES} == {ON_DEVICES}  # which needs --cpu-devices
    for name, peer in peers.items():
        assert float(times[name][2]) == pytest.approx(peer["times_padded"]["median"], abs=0.006)
        counts = f"{peer['batches']:.0f}", f"{peer['cells']:,.0f}", f"{peer['efficiency']:.1%}", f"{peer['programs']}"
        assert tuple(costs[name][:4]) == counts
    text = " ".join(report.split())
    assert f"200 sequences of 2 to 9 steps, {LENGTHS.sum()} tokens in all, in batches of {BATCH_SIZE}" in text


def test_json_says_what_was_run(run):
    _, result = run
    assert list(result) == ["workload", "plan", "machine", "repeats", "peers"]
    workload = result["workload"]
    assert (workload["name"], workload["lengths"]) == ("lengths.txt", LENGTHS.tolist())
    assert [workload[key] for key in ("batch_size", "sequences", "tokens", "longest")] == [64, 200, LENGTHS.sum(), 9]
    assert result["repeats"] == REPEATS
    assert result["machine"]["versions"]["jax"] == jax.__version__


def test_every_epoch_trains_on_all_tokens(peers):
    for peer in peers.values():
        assert len(peer["epochs"]) == REPEATS
        assert [(epoch["rows"], epoch["tokens"]) for epoch in peer["epochs"]] == [(200, LENGTHS.sum())] * REPEATS


@pytest.mark.parametrize("name", NAMES)
def test_a_batcher_uses_every_sequence_once_with_its_own_inputs(name):
    for _ in range(2):
        seen = []
        for batch in batcher(name, LENGTHS):
            real = batch.indices >= 0
            seen += batch.indices[real].tolist()
            np.testing.assert_array_equal(batch.inputs.lengths[real], LENGTHS[batch.indices[real]])
        assert sorted(seen) == list(range(200))


def test_padded_and_slot_filled_have_one_program_and_the_others_one_for_each_length_they_pad_to(peers):
    programs = {name: peer["programs"] for name, peer in peers.items()}
    assert programs["padded"] == programs["slot-filled"] == 1
    assert programs["bucketed"] == 2
    assert 1 <= programs["padded-batch"] <= 8
    assert 1 <= programs["sorted"] <= 2


def test_cells_are_those_of_the_batches(peers):
    cells = {name: peer["cells"] for name, peer in peers.items()}
    assert cells["padded"] == BATCHES * BATCH_SIZE * 9
    batches = {length: -(-np.sum(length == LENGTHS) // BATCH_SIZE) for length in (2, 9)}
    assert cells["bucketed"] == sum(count * BATCH_SIZE * length for length, count in batches.items())
    assert min(cells, key=cells.__getitem__) == "slot-filled"
    for peer in peers.values():
        assert peer["efficiency"] == pytest.approx(LENGTHS.sum() / peer["cells"])


def test_an_epoch_trains_on_inputs_of_several_arrays_too():
    workload = Workload("tiny", np.array([2, 3] * BATCH_SIZE), cell="cfc", features=3, hidden_size=4)
    (peer,) = measure_epoch(workload, ["slot-filled"], 1, lambda doing, done: None)["peers"]
    assert peer["epochs"][0]["tokens"] == 5 * BATCH_SIZE


def test_ratios_are_taken_turn_by_turn_and_shares_of_each_epoch(peers):
    padded = np.array([epoch["seconds"] for epoch in peers["padded"]["epochs"]])
    for peer in peers.values():
        seconds, packing = np.array([[epoch["seconds"], epoch["packing_seconds"]] for epoch in peer["epochs"]]).T
        assert np.all((packing > 0) & (packing < seconds))
        assert peer["packing_share"] == pytest.approx(np.median(packing / seconds))
        assert peer["seconds"]["median"] == pytest.approx(np.median(seconds))
        assert peer["tokens_per_second"] == pytest.approx(np.median(LENGTHS.sum() / seconds))
        found = [peer["times_padded"][key] for key in ("low", "median", "high")]
        np.testing.assert_allclose(found, np.quantile(seconds / padded, (0.25, 0.5, 0.75)))
        assert 0 < peer["compile_seconds"] < np.inf


def test_all_learn_the_same_from_the_same_start(peers):
    first = [peer["epochs"][0]["loss"] for peer in peers.values()]
    np.testing.assert_allclose(first, first[0], rtol=0.02)
    for peer in peers.values():
        assert peer["epochs"][1]["loss"] < peer["epochs"][0]["loss"]


def test_length_says_nothing_about_when_a_sequence_comes_where_slots_are_filled():
    lengths = named_workload("epoch").lengths
    found = {name: batcher(name, lengths).statistics().rank_correlation for name in NAMES}
    assert abs(found["slot-filled"]) < 1e-3
    assert abs(found["padded"]) == abs(found["padded-batch"]) < 0.1


def test_padding_wastes_most_buckets_less_and_slots_next_to_nothing():
    lengths = named_workload("epoch").lengths
    found = {name: batcher(name, lengths).statistics().efficiency for name in NAMES}
    assert found["padded"] < found["padded-batch"] < 0.4 < 0.7 < found["bucketed"] < found["sorted"] < 0.9
    assert found["slot-filled"] > 0.97


def test_all_start_from_one_state_and_go_on_from_their_own_in_turns(monkeypatch):
    order = []

    def prepare(make, step, state, repeats, mesh):
        batches = make()

        def program(state, batch):
            order.append((type(batches).__name__, state))
            return len(order), 0.5

        return Training(batches, dict.fromkeys(batches.plans, program), 1.0, mesh)

    monkeypatch.setattr(bench_epoch, "_prepare", prepare)
    workload = Workload("tiny", LENGTHS[:BATCH_SIZE], features=1, hidden_size=1)
    found = measure_epoch(workload, ["padded-batch", "slot-filled"], 6, lambda doing, done: None)
    assert [(peer["name"], peer["times_padded"]) for peer in found["peers"]] == [
        ("padded-batch", None),
        ("slot-filled", None),
    ]
    turns = [tuple(kind for kind, _ in order[i : i + 2]) for i in range(0, 12, 2)]
    assert {*turns} == {("SortedChunks", "SlotFilling"), ("SlotFilling", "SortedChunks")}  # the order is drawn
    for kind in turns[0]:
        calls = [i for i, (name, _) in enumerate(order) if name == kind]
        assert order[calls[0]][1] is order[0][1]
        assert [order[i][1] for i in calls[1:]] == [i + 1 for i in calls[:-1]]  # the state of its last epoch


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--peer", "slot-filled"), (["slot-filled"], 3)),
        (("--repeats", 7), (list(BATCHERS), 7)),
    ],
)
def test_options_choose_ways_and_turns(monkeypatch, options, expected):
    asked = []
    monkeypatch.setattr(bench_file, "measure_epoch", lambda workload, *rest: asked.append((workload.name, *rest[:2])))
    monkeypatch.setattr(bench_file, "print_epoch", lambda result, console: None)
    result = invoke("epoch", *options)
    assert result.exit_code == 0, result.output
    assert asked == [("epoch", *expected)]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"tokens": 16}, "an epoch of sorted has 3 sequences and 16 tokens, but the corpus has 3 and 15."),
        ({"rows": 2}, "an epoch of sorted has 2 sequences and 15 tokens, but the corpus has 3 and 15."),
        ({"loss": np.nan}, "an epoch of sorted has a loss of nan."),
    ],
)
def test_an_epoch_that_leaves_something_out_is_no_result(change, expected):
    epoch = Epoch(1.0, 0.5, 0.1, tokens=15, rows=3, batches=1, cells=20, rank_correlation=0.0)
    workload = Workload("tiny", np.array([4, 5, 6]))
    bench_epoch._check("sorted", [epoch], workload)
    with pytest.raises(RuntimeError, match=re.escape(expected)):
        bench_epoch._check("sorted", [epoch, epoch._replace(**change)], workload)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("epoch", "--huge-pages"), "Set GLIBC_TUNABLES=glibc.malloc.hugetlb=1 for another run"),
        (("epoch", "--hidden-size", 3), "Invalid value for '--hidden-size': the workload epoch has a fixed one"),
        (("epoch", "--peer", "jaxpack"), f"'jaxpack' is unknown. Choose from {', '.join(BATCHERS)}."),
        (("gru", "--peer", "padded"), "'padded' is unknown. Choose from jaxpack,"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(options, expected):
    result = invoke(*options)
    assert result.exit_code == 2
    assert expected in message(result)


def test_a_plot_is_refused(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, which the extra `plot` brings, is not installed")
    result = invoke("epoch", "--plot", tmp_path / "epoch.png")
    assert result.exit_code == 2
    assert "Invalid value for '--plot': the workload epoch has no plot" in message(result)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([100_000_000], "makes one padded batch of 64 x 100,000,000 steps"),
        ([60_000] * 200, "has 12,000,000 steps in all, 11 GiB. Pass those of a part of the corpus."),
    ],
)
def test_a_corpus_that_does_not_fit_in_memory_is_refused(tmp_path, lengths, expected):
    file = tmp_path / "lengths.txt"
    file.write_text(" ".join(map(str, lengths)))
    result = invoke("epoch", "--lengths", file)
    assert result.exit_code == 2
    assert expected in message(result)


def test_help_names_every_way():
    text = message(invoke("--help"))
    for name in NAMES:
        assert name in text
