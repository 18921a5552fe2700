"""`jaxpack bench rollout` at tiny sizes: equal results of all rows, counts and refusals. No test asserts a time."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from commands import bench as invoke
from commands import message

from jaxpack.cli.bench.calls import PASSES, Missing, jax_calls
from jaxpack.cli.bench.rollout import command as rollout_command
from jaxpack.cli.bench.rollout import measure as rollout_measure
from jaxpack.cli.bench.rollout.cases import CELLS, Rollout, Sizes, rollouts
from jaxpack.cli.bench.rollout.measure import measure_rollout
from jaxpack.cli.bench.rollout.peers import PEERS

ROWS, STEPS, FEATURES, HIDDEN, REPEATS = 5, 8, 3, 4, 2
EQUAL = [name for name in PEERS if name != "jaxpack-no-resets"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The report and the JSON of the command, and by cell the case and its compiled calls."""
    file = tmp_path_factory.mktemp("rollout") / "result.json"
    made: dict[str, Any] = {}

    def keeping(name, build):
        def keep(case):
            calls = build(case)
            made.setdefault(case.cell, (case, {}))[1][name] = calls
            return calls

        return keep

    sizes = "--environments", ROWS, "--steps", STEPS, "--features", FEATURES, "--hidden-size", HIDDEN
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout_measure, "PEERS", {name: keeping(name, build) for name, build in PEERS.items()})
        found = invoke("rollout", *sizes, "--probability", 0.3, "--repeats", REPEATS, "--json", file)
    assert found.exit_code == 0, found.output
    return found.stdout, json.loads(file.read_text()), made


@pytest.fixture(params=CELLS)
def rows(run, request):
    """A case in which episodes of several lengths begin, and the calls of each row."""
    case, calls = run[2][request.param]
    assert 0 < case.resets[:, 1:].sum() < ROWS * (STEPS - 1)
    assert {"jaxpack", "flax-scan", "jaxpack-fragments"} <= calls.keys()
    return case, calls


def loop(case):
    """Computes the outputs step by step in float64, an episode at a time: [N, T, H]."""
    params = {name: np.asarray(value, np.float64) for name, value in case.params["l0"].items()}
    outputs = np.zeros((ROWS, STEPS, HIDDEN))
    for row in range(ROWS):
        h = c = np.zeros(HIDDEN)
        for step in range(STEPS):
            if case.resets[row, step]:
                h = c = np.zeros(HIDDEN)
            h, c = STEP[case.cell](params, case.inputs[row, step].astype(np.float64), h, c)
            outputs[row, step] = h
    return outputs


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gates(params, x, h):
    """Returns what inputs and state add to each gate."""
    from_x = x @ params["weight_ih"] + params["bias_ih"]
    from_h = h @ params["weight_hh"] + params["bias_hh"]
    return (np.split(each, len(each) // HIDDEN) for each in (from_x, from_h))


def gru_step(params, x, h, c):
    """Cho et al. 2014, with the reset after the product."""
    (r_x, z_x, n_x), (r_h, z_h, n_h) = gates(params, x, h)
    z = sigmoid(z_x + z_h)
    return (1 - z) * np.tanh(n_x + sigmoid(r_x + r_h) * n_h) + z * h, c


def lstm_step(params, x, h, c):
    """Gers et al. 2000."""
    i, f, g, o = (a + b for a, b in zip(*gates(params, x, h), strict=True))
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


STEP = {"gru": gru_step, "lstm": lstm_step}


def test_all_rows_have_the_outputs_of_a_loop_over_episodes(rows):
    case, calls = rows
    expected = loop(case)
    for name, each in calls.items():
        if name in EQUAL:
            np.testing.assert_allclose(each.in_place(each.forward()), expected, atol=1e-5, err_msg=name)
    plain = calls["jaxpack"].in_place(calls["jaxpack-no-resets"].forward())
    assert np.abs(plain - expected).max() > 0.01


def test_all_rows_have_the_same_loss_and_gradients_of_inputs(rows):
    case, calls = rows
    expected_loss = np.sum(loop(case) * case.cotangent)
    _, (_, expected) = calls["jaxpack"].training()
    expected = calls["jaxpack"].in_place(expected)
    for name in EQUAL:
        if name in calls:
            loss, gradients = calls[name].training()
            assert loss.item() == pytest.approx(expected_loss, abs=1e-5), name
            np.testing.assert_allclose(calls[name].in_place(gradients[-1]), expected, atol=1e-5, err_msg=name)


def test_steps_and_cells_are_those_of_the_layout(rows):
    case, calls = rows
    plan, longest = case.fragments.plan, case.fragment_lengths.max()
    assert case.fragment_lengths.sum() == ROWS * STEPS
    for name in ("jaxpack", "jaxpack-no-resets", "jaxpack-carried", "flax-scan"):
        assert (calls[name].steps, calls[name].cells) == (STEPS, ROWS * STEPS)
    for name in ("jaxpack-fragments", "jaxpack-in-out"):
        assert (calls[name].steps, calls[name].cells) == (plan.num_steps, plan.size)
    for name in {"torch-fragments", "torch-in-out"} & calls.keys():
        assert (calls[name].steps, calls[name].cells) == (longest, ROWS * STEPS)


def test_resets_are_drawn_from_the_seed_with_the_probability():
    never, half, always = rollouts(["gru"], [0, 0.5, 1], Sizes(64, 64), seed=1)
    assert not never.resets.any()
    assert always.resets.all()
    assert half.resets.mean() == pytest.approx(0.5, abs=0.03)
    (again,) = rollouts(["lstm"], [0.5], Sizes(64, 64), seed=1)
    np.testing.assert_array_equal(again.resets, half.resets)
    assert [len(case.fragment_lengths) for case in (never, always)] == [64, 64 * 64]


def test_json_says_what_was_run_and_what_was_found(run):
    _, result, _ = run
    assert list(result) == ["machine", "repeats", "cases"]
    assert [case["workload"]["cell"] for case in result["cases"]] == list(CELLS)
    for case in result["cases"]:
        assert list(case) == ["workload", "plan", "cut_seconds", "limit", "peers", "missing"]
        workload = case["workload"]
        assert [workload[key] for key in ("environments", "steps", "reset_probability")] == [ROWS, STEPS, 0.3]
        assert [workload[key] for key in ("features", "hidden_size")] == [FEATURES, HIDDEN]
        assert workload["mean_fragment"] * workload["fragments"] == pytest.approx(ROWS * STEPS)
        assert 0 < case["cut_seconds"]["median"] < np.inf
        assert [peer["name"] for peer in (*case["peers"], *case["missing"])] == list(PEERS)
        for peer in case["peers"]:
            assert [len(peer[key]["seconds"]) for key in PASSES] == [REPEATS] * 2
            assert (peer["difference"] is None) == (peer["name"] not in EQUAL)
            assert peer["difference"] is None or peer["difference"] < 1e-5


def test_the_report_has_a_line_for_each_row_in_80_columns(run):
    report, result, _ = run
    lines = report.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    for name in PEERS:
        peers = [peer for case in result["cases"] for peer in case["peers"] if peer["name"] == name]
        found = [line.split()[1:] for line in lines if line.startswith(f"{name}  ")]
        for entries, peer in zip(found, peers, strict=True):
            ratios = [f"{peer[key]['times_jaxpack']['median']:.2f}" for key in PASSES]
            assert [entries[1], entries[3]] == ratios
            assert entries[4:6] == ["-" if peer["steps"] is None else str(peer["steps"]), str(peer["cells"])]
    text = " ".join(report.split())
    assert "GRU, 3 features, hidden size 4, float32; reset probability 0.3" in text
    assert f"{result['cases'][0]['workload']['fragments']} fragments, the longest of" in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), [(cell, probability) for cell in CELLS for probability in (0, 0.01, 0.1)]),
        (("--cell", "LSTM", "--probability", 0.2, "--probability", 1), [("lstm", 0.2), ("lstm", 1)]),
    ],
)
def test_options_choose_cells_and_probabilities(monkeypatch, options, expected):
    asked = []
    monkeypatch.setattr(rollout_command, "measure_rollout", lambda cases, *rest: asked.append((cases, *rest[:2])))
    monkeypatch.setattr(rollout_command, "print_rollout", lambda result, console: None)
    result = invoke("rollout", *options, "--peer", "flax-scan", "--repeats", 3)
    assert result.exit_code == 0, result.output
    ((cases, *rest),) = asked
    assert rest == [["flax-scan"], 3]
    assert [(case.cell, case.probability) for case in cases] == expected
    assert {(case.batch_size, case.longest, case.features, case.hidden_size) for case in cases} == {(128, 128, 64, 128)}


def toys(**outputs):
    """Rows that compile fast: their outputs are a factor times the inputs."""

    def build(factor):
        def make(case):
            if factor is None:
                raise Missing("it is not here")
            arrays = jnp.float32(factor), case.inputs, None, case.inputs
            calls = jax_calls(lambda params, inputs, rest: params * inputs, *arrays, case.tokens)
            return calls._replace(in_place=np.asarray)

        return make

    return {name.replace("_", "-"): build(factor) for name, factor in outputs.items()}


@pytest.mark.parametrize("factor", [1.5, None])
def test_a_library_with_other_outputs_is_missing_with_the_reason(monkeypatch, factor):
    monkeypatch.setattr(rollout_measure, "PEERS", toys(jaxpack=1.0, other=factor))
    case = Rollout("toy", np.array([2, 2]), "gru", features=HIDDEN, hidden_size=HIDDEN)
    (found,) = measure_rollout([case], ["jaxpack", "other"], 1, lambda doing, done: None)["cases"]
    assert [peer["name"] for peer in found["peers"]] == ["jaxpack"]
    (missing,) = found["missing"]
    assert missing["reason"].startswith(
        "it is not here" if factor is None else "its outputs differ from the others' by"
    )


def test_outputs_of_jaxpack_that_differ_are_an_error(monkeypatch):
    monkeypatch.setattr(rollout_measure, "PEERS", toys(jaxpack=1.0, jaxpack_fragments=1.5))
    case = Rollout("toy", np.array([2, 2]), "gru", features=HIDDEN, hidden_size=HIDDEN)
    with pytest.raises(RuntimeError, match="jaxpack-fragments: its outputs differ from the others' by"):
        measure_rollout([case], ["jaxpack", "jaxpack-fragments"], 1, lambda doing, done: None)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--cell", "rnn"), "'rnn' is not one of 'gru', 'lstm'"),
        (("--probability", 1.5), "Invalid value for '--probability'"),
        (("--peer", "keras"), "'keras' is unknown. Choose from jaxpack, jaxpack-no-resets"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(options, expected):
    result = invoke("rollout", *options)
    assert result.exit_code == 2
    assert expected in message(result)


def test_help_names_every_row():
    text = message(invoke("rollout", "--help"))
    assert all(name in text for name in PEERS)
    assert "bench rollout" in message(invoke("--help"))
