"""The command line: its options and errors, and the truth of the demo's report."""

import collections
import contextlib
import errno
import inspect
import io
import logging
import os
import pathlib
import re
import runpy
import sys

import jax
import numpy as np
import optax
import pytest
import typer
from commands import message
from rich.console import Console
from typer.testing import CliRunner

import jaxpack
from jaxpack import cli
from jaxpack.cli import plan as plan_file
from jaxpack.cli import serve_bench as serve_bench_file
from jaxpack.cli._measure import CountedJit
from jaxpack.cli.app import app
from jaxpack.cli.bench import command as bench_file
from jaxpack.cli.bench.gpu import command as gpu_file
from jaxpack.cli.bench.rollout import command as rollout_file
from jaxpack.cli.demo import command as demo_file
from jaxpack.cli.demo.g2p import checkpoint as g2p_checkpoint
from jaxpack.cli.demo.g2p import command as g2p_file
from jaxpack.cli.demo.report import Column, Report, print_report
from jaxpack.datasets import japanese_vowels

BATCH_SIZE = 100  # does not divide 270: the last batch of an epoch has empty rows
EPOCHS = 2


def invoke(*arguments):
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"})


def plain(text):
    """Removes the escape sequences that colour text on some CI machines."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)


class Run:
    """A run of the demo: its report, and how often XLA compiled each function, from JAX's log."""

    def __init__(self, *options):
        self.compiled: collections.Counter[str] = collections.Counter()
        handler = logging.Handler()
        handler.addFilter(self._count)
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
        return False

    def row(self, heading):
        """Returns the numbers in a row of the report's table."""
        (line,) = [line for line in self.report.splitlines() if line.startswith(heading)]
        return [float(n.replace(",", "").rstrip("%")) for n in line.removeprefix(heading).split()]


@pytest.fixture(scope="module")
def packed():
    return Run()


@pytest.fixture(scope="module")
def padded():
    with pytest.MonkeyPatch.context() as patch:
        # A packed plan that compiles fast and no batch fits: training under it would make everything NaN.
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
    (share, correct), (_, correct_padded) = (accuracy.findall(run.report)[0] for run in (packed, padded))
    assert float(share) == pytest.approx(100 * int(correct) / 370, abs=0.05)
    assert abs(int(correct) - int(correct_padded)) <= 2  # rounding may change an answer near a boundary
    assert int(correct) > 2 * 370 / 9  # better than twice chance


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
    with pytest.raises(AssertionError):  # the label of a real row matters
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


OUTPUTS = {
    "plan --plot": ("plan", "4,5", "--plot", "x.svg"),
    "bench --json": ("bench", "--json", "x.json"),
    "bench --plot": ("bench", "--plot", "x.svg"),
    "bench epoch --json": ("bench", "epoch", "--json", "x.json"),
    "bench gpu --json": ("bench", "gpu", "--cpu", "--json", "x.json"),
    "bench rollout --json": ("bench", "rollout", "--json", "x.json"),
    "bench gpu --markdown": ("bench", "gpu", "--cpu", "--markdown", "x.md"),
    "serve-bench --json": ("serve-bench", "--json", "x.json"),
    "demo g2p --checkpoint": ("demo", "g2p", "--checkpoint", "x"),
}


@pytest.fixture
def no_work(monkeypatch):
    """Makes commands fail if they begin to work."""

    def work(*args, **kwargs):
        raise AssertionError("the work began")

    for module, name in WORK:
        monkeypatch.setattr(module, name, work)


WORK = [
    (plan_file, "_plan_batch"),
    (bench_file, "measure"),
    (bench_file, "measure_epoch"),
    (gpu_file, "measure_gpu"),
    (rollout_file, "measure_rollout"),
    (serve_bench_file, "measure"),
    (g2p_file, "_run"),
]


def refused(output, path):
    """Returns the error of a command whose output goes to a path that cannot be written."""
    if "--plot" in output:
        pytest.importorskip("matplotlib", reason="matplotlib, which the extra `plot` brings, is not installed")
    *command, option, _ = OUTPUTS[output]
    result = invoke(*command, option, str(path))
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", plain(result.output)).split())
    assert result.exit_code == 2, text
    assert f"Invalid value for '{option}'" in text
    return text.replace(" ", "")  # paths are broken between lines


@pytest.mark.parametrize("output", OUTPUTS)
def test_what_cannot_be_written_is_refused_before_the_work(output, tmp_path, no_work):
    name = OUTPUTS[output][-1]
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    assert "cannotbewritten" in refused(output, tmp_path / "file" / name)
    assert "cannotbewritten" in refused(output, tmp_path / ("long" * 100 + name))
    if "--checkpoint" in output:
        assert "isnotafolder" in refused(output, tmp_path / "file")
    else:
        assert "doesnotexist" in refused(output, tmp_path / "nowhere" / name)
        (tmp_path / f"link{name}").symlink_to(tmp_path / "nowhere" / name)
        assert "doesnotexist" in refused(output, tmp_path / f"link{name}")
        (tmp_path / f"link{name}").unlink()
        assert "itisafolder" in refused(output, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("output", [output for output in OUTPUTS if "--checkpoint" not in output])
def test_a_device_without_permission_is_refused_before_the_work(output, tmp_path, no_work, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    assert "cannotbewritten:Permissiondenied" in refused(output, tmp_path / OUTPUTS[output][-1])


def test_a_folder_of_checkpoints_without_permission_is_refused_before_the_work(tmp_path, no_work, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "doesnotpermitit" in refused("demo g2p --checkpoint", tmp_path / "new" / "x")


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_check_of_an_output_leaves_nothing_and_changes_nothing(output, tmp_path, no_work):
    if "--plot" in output:
        pytest.importorskip("matplotlib", reason="matplotlib, which the extra `plot` brings, is not installed")
    *command, option, name = OUTPUTS[output]
    there = tmp_path / f"there.{name}"
    there.mkdir() if "--checkpoint" in output else there.write_text("kept")
    for path in (tmp_path / name, there):
        assert isinstance(invoke(*command, option, str(path)).exception, AssertionError)  # the work began
    assert list(tmp_path.iterdir()) == [there]
    assert there.is_dir() or there.read_text() == "kept"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
@pytest.mark.parametrize("output", [output for output in OUTPUTS if "--checkpoint" not in output])
def test_a_device_that_is_full_at_the_end_is_one_line(output, tmp_path, monkeypatch):
    if "--plot" in output:
        pytest.importorskip("matplotlib", reason="matplotlib, which the extra `plot` brings, is not installed")
    for module, name in WORK[1:]:
        monkeypatch.setattr(module, name, lambda *args, **kwargs: {"passed": True, "cases": []})
    monkeypatch.setattr(gpu_file, "markdown", lambda result: "a table")
    for module in (bench_file, gpu_file, rollout_file, serve_bench_file):
        for name in {"print_bench", "print_epoch", "print_gpu", "print_rollout", "print_serve_bench"} & vars(
            module
        ).keys():
            monkeypatch.setattr(module, name, lambda *args: None)
    monkeypatch.setattr(jaxpack.plot, "plot_bench", lambda result: jaxpack.plot.plot_plan(jaxpack.plan_padded(1, 1)))
    *command, option, name = OUTPUTS[output]
    path = tmp_path / name
    path.symlink_to("/dev/full")
    result = invoke(*command, option, str(path))
    assert result.exit_code == 1
    assert result.stderr.lstrip() == f"{path} cannot be written: No space left on device.\n"  # after the progress bar


def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path, capsys):
    pytest.importorskip("orbax.checkpoint")
    checkpoints = g2p_checkpoint.Checkpoints(tmp_path / "run", {})

    def save(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints._manager.save = save
    with pytest.raises(typer.Exit) as stopped:
        checkpoints.save(g2p_checkpoint.TrainState({}, (), jax.numpy.int32(0)), g2p_checkpoint.History())
    assert stopped.value.exit_code == 1
    assert capsys.readouterr().err == f"{tmp_path / 'run'} cannot be written: No space left on device.\n"


@pytest.mark.parametrize(("device", "said"), [("full", "The report cannot be written: No space left"), ("pipe", "")])
@pytest.mark.parametrize("arguments", [["--version"], ["plan", "4,5"]])
def test_a_report_that_nobody_can_read_ends_without_a_traceback(device, said, arguments, monkeypatch, capfd):
    if device == "pipe":
        read, write = os.pipe()
        os.close(read)
    elif not os.path.exists("/dev/full"):
        pytest.skip("there is no device that is always full")
    else:
        write = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(sys, "argv", ["jaxpack", *arguments])
    stdout = os.fdopen(write, "w", encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    sys.stdout.flush()  # as Python does at its end
    with contextlib.suppress(BrokenPipeError):
        stdout.close()  # typer may have replaced it
    assert stopped.value.code == 1
    error = capfd.readouterr().err
    assert error.startswith(said)
    assert error.count("\n") == bool(said)


def test_lengths_on_standard_input_cannot_be_measured_twice():
    result = invoke("bench", "--lengths", "-", "--huge-pages")
    assert result.exit_code == 2
    assert "which standard input does not allow" in message(result)
