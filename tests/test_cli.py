"""The command line: what it accepts, and that the demo's report tells the truth."""

import collections
import inspect
import io
import logging
import re
import runpy
import sys

import jax
import numpy as np
import optax
import pytest
from rich.console import Console
from typer.testing import CliRunner

import jaxpack
from jaxpack import cli
from jaxpack.cli import demo as demo_file
from jaxpack.cli.app import app
from jaxpack.cli.measure import CountedJit
from jaxpack.cli.report import Column, Report, print_report
from jaxpack.datasets import japanese_vowels

BATCH_SIZE = 100  # does not divide 270: the last batch of an epoch has empty rows
EPOCHS = 2


def invoke(*arguments):
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"})


def plain(text):
    """Text without the escape sequences that colour it on some CI machines."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)


class Run:
    """A run of the demo: its report, and how often XLA compiled each function, read from JAX's own log."""

    def __init__(self, *options):
        self.compiled = collections.Counter()
        handler = logging.Handler()
        handler.emit = self._count
        logging.getLogger("jax").addHandler(handler)
        try:
            with jax.log_compiles():
                result = invoke(
                    *("demo", "--epochs", EPOCHS, "--hidden-size", 8, "--batch-size", BATCH_SIZE, "--seed", 3, *options)
                )
        finally:
            logging.getLogger("jax").removeHandler(handler)
        assert result.exit_code == 0, result.output
        self.report, self.progress = result.stdout, result.stderr

    def _count(self, record):
        found = re.match(r"Finished XLA compilation of jit\((\w+)\)", record.getMessage())
        if found:
            self.compiled[found[1]] += 1

    def row(self, heading):
        """The numbers in a row of the report's table."""
        (line,) = [line for line in self.report.splitlines() if line.startswith(heading)]
        return [float(n.replace(",", "").rstrip("%")) for n in line.removeprefix(heading).split()]


@pytest.fixture(scope="module")
def packed():
    return Run()


@pytest.fixture(scope="module")
def padded():
    with pytest.MonkeyPatch.context() as patch:
        # A packed plan that no batch fits, and that compiles fast: training under it would make everything NaN.
        patch.setattr(demo_file, "plan_run", lambda lengths, rows: jaxpack.plan_padded(rows.shape[-1], 1))
        return Run("--padded")


@pytest.fixture(scope="module")
def lengths():
    return np.array([len(s) for s in japanese_vowels()[0].sequences])


def test_report_counts_tokens_and_padded_cells(packed, lengths):
    batches = int(np.ceil(len(lengths) / BATCH_SIZE))
    padded_cells = batches * BATCH_SIZE * lengths.max()
    assert packed.row("real tokens in an epoch") == [lengths.sum()] * 2
    cells, counted, ratio = packed.row("cells computed in an epoch")
    assert counted == padded_cells
    assert lengths.sum() < cells < padded_cells
    assert ratio == pytest.approx(cells / padded_cells, abs=0.005)
    assert packed.row("cells that are real")[1] == round(100 * lengths.sum() / padded_cells)


def test_report_counts_packed_cells_of_a_plan_that_every_batch_fits(packed, lengths):
    rows = demo_file.shuffle(3, EPOCHS, len(lengths), BATCH_SIZE)
    plan = demo_file.plan_run(np.append(lengths, 0), rows)
    assert packed.row("cells computed in an epoch")[0] == sum(plan.batch_sizes) * rows.shape[1]


def test_speed_ratio_is_that_of_the_speeds_shown(packed):
    fast, slow, ratio = packed.row("tokens per second in training")
    assert ratio == pytest.approx(fast / slow, abs=0.006)


@pytest.mark.parametrize("trained", ["packed", "padded"])
def test_every_training_step_of_a_plan_runs_one_program(trained, request):
    run = request.getfixturevalue(trained)
    assert run.compiled["train_step"] == 2  # one packed, one padded: the report compares them
    assert run.compiled["count_correct"] == 1
    steps = EPOCHS * int(np.ceil(270 / BATCH_SIZE))
    assert f"1 for {steps} training steps, 1 for the test" in run.report


def test_padded_training_learns_the_same(packed, padded):
    accuracy = re.compile(r"Test accuracy +([\d.]+)%, (\d+) of 370")
    (share, correct), (_, correct_padded) = (accuracy.search(run.report).groups() for run in (packed, padded))
    assert float(share) == pytest.approx(100 * int(correct) / 370, abs=0.05)
    assert abs(int(correct) - int(correct_padded)) <= 2  # rounding may turn an utterance on the edge
    assert int(correct) > 2 * 370 / 9  # it has learnt something


def test_report_shows_the_plan_that_was_trained(packed, padded):
    assert "(1 bucket; 14 of its 100 rows)" in padded.report
    assert "rows of " in packed.report
    drawn, drawn_padded = (re.findall(r"^ +([█▓░]+)$", run.report, re.MULTILINE) for run in (packed, padded))
    assert len(drawn) == len(drawn_padded) == 14
    assert {len(line) for line in drawn_padded} == {2 * 26}
    assert any("▓" in line for line in drawn)
    assert not any("▓" in line for line in drawn_padded)


def test_report_is_80_columns_wide_and_alone_on_stdout(packed):
    assert max(map(len, packed.report.splitlines())) <= 80
    assert "loss" not in packed.report
    assert re.search(r"epoch 2/2 .* loss [\d.]+ [\d,]+ tokens/s", packed.progress)


def test_report_is_plain_on_an_ascii_terminal():
    plan = jaxpack.plan_exact([4, 2, 1])
    column = Column(plan, compile_seconds=1.0, epoch_seconds=0.1)
    report = Report(
        *("title", 1, 2, 3, 1, 1, 7, 1),
        columns={"packed": column, "padded": column._replace(plan=jaxpack.plan_padded(3, 4))},
        trained="packed",
        repeats=1,
        lengths=np.array([4, 2, 1]),
    )
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    print_report(report, Console(file=file, width=80))
    assert "\n  ########\n  ####\n  ##\n" in file.buffer.getvalue().decode("ascii")


def test_shuffle_shows_every_example_once_an_epoch_and_fills_up_with_empty_rows():
    rows = demo_file.shuffle(0, 3, num_examples=10, batch_size=4)
    assert rows.shape == (3, 3, 4)
    for epoch in rows:
        assert sorted(epoch.ravel()) == [-1, -1, *range(10)]
    assert not np.array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows, demo_file.shuffle(0, 3, 10, 4))
    assert not np.array_equal(rows, demo_file.shuffle(1, 3, 10, 4))


def test_run_plan_gives_each_slot_the_room_of_its_longest_sequence():
    lengths = np.array([5, 2, 3, 4, 0])
    assert demo_file.plan_run(lengths, np.array([[[0, 1], [2, 3]]])) == jaxpack.plan_buckets([5, 3])
    assert demo_file.plan_run(lengths, np.array([[[1, 2]], [[3, -1]]])) == jaxpack.plan_buckets([4, 2])


def test_empty_rows_change_neither_loss_nor_training():
    examples, _ = demo_file.load()
    batch = demo_file.take(examples, np.array([0, 50, -1]))
    model, optimizer, plan = demo_file.Classifier(12, 4, 9), optax.adam(1e-2), jaxpack.plan_padded(3, 26)
    params = model.init(jax.random.key(0))
    state = demo_file.TrainState(params, optimizer.init(params))
    step = jax.jit(demo_file.make_train_step(model, optimizer, plan))
    (trained, loss), (trained_too, _), (trained_otherwise, _) = (
        step(state, batch._replace(labels=np.array(labels, np.int32))) for labels in ([0, 1, 0], [0, 1, 8], [0, 2, 0])
    )
    logits = np.asarray(jax.jit(demo_file.make_logits(model, plan))(params, batch), np.float64)
    likelihoods = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(loss, -np.log(likelihoods[[0, 1], [0, 1]]).mean(), rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, trained, trained_too)
    with pytest.raises(AssertionError):  # a label of a real row does make a difference
        jax.tree.map(np.testing.assert_array_equal, trained, trained_otherwise)


def test_correct_answers_are_counted_by_weight():
    _, tests = demo_file.load()
    batch = demo_file.Batch(*(field[:5] for field in tests))
    model, plan = demo_file.Classifier(12, 4, 9), jaxpack.plan_padded(5, 29)
    params = model.init(jax.random.key(0))
    answers = np.asarray(jax.jit(demo_file.make_logits(model, plan))(params, batch)).argmax(-1)
    count = jax.jit(demo_file.make_count_correct(model, plan))
    labels = (answers + np.array([0, 0, 0, 1, 1])) % 9  # three right, two wrong
    assert count(params, batch._replace(labels=labels)) == 3
    assert count(params, batch._replace(labels=labels, weights=np.array([0, 1, 1, 1, 1]))) == 2


def test_counted_jit_counts_a_program_for_each_shape():
    double = CountedJit(lambda x: 2 * x)
    for size in (3, 3, 4, 3):
        assert double(np.ones(size)).shape == (size,)
    assert double.programs == 2


def test_demo_help_names_every_option_and_its_default():
    text = plain(invoke("demo", "--help").output)
    _, *parameters = inspect.signature(demo_file.demo).parameters.items()  # without typer's context
    for name, parameter in parameters:
        assert f"--{name.replace('_', '-')} " in text
        assert parameter.default is False or f"[default: {parameter.default}]" in text


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--epochs", "0"),
        ("--batch-size", "0"),
        ("--batch-size", "271"),
        ("--hidden-size", "-4"),
        ("--seed", "-1"),
        ("--seed", "tuesday"),
    ],
)
def test_bad_options_are_refused_by_name(option, value):
    result = invoke("demo", option, value)
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in plain(result.output)


def test_version_is_printed():
    result = invoke("--version")
    assert (result.exit_code, result.output) == (0, f"jaxpack {jaxpack.__version__}\n")


def test_python_m_jaxpack_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jaxpack", "--version"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("jaxpack", run_name="__main__")
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"jaxpack {jaxpack.__version__}\n"


def without(monkeypatch, missing):
    """Makes a module fail to import, as if it were not installed."""
    for name in [name for name in sys.modules if name.startswith(("jaxpack.cli.", f"{missing}."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_missing_extra_is_named_with_the_way_out(missing, monkeypatch, capsys):
    without(monkeypatch, missing)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    assert missing in message
    assert "pip install 'jaxpack[demo]'" in message


def test_another_missing_module_is_not_blamed_on_the_extra(monkeypatch):
    without(monkeypatch, "optax")
    with pytest.raises(ModuleNotFoundError, match="optax"):
        cli.main()
