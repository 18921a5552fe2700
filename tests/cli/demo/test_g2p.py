"""`jaxpack demo g2p`: it learns, its report is true, and an interrupted run resumes exactly."""

import inspect
import os
import re
import signal
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from jaxpack.cli.app import app
from jaxpack.cli.demo.g2p import checkpoint as g2p_checkpoint
from jaxpack.cli.demo.g2p import command as g2p_file
from jaxpack.cli.demo.g2p import report as g2p_report
from jaxpack.cli.demo.g2p import train as g2p_train
from jaxpack.cli.demo.g2p import words as g2p_words
from jaxpack.datasets import Pronunciations, cmudict

WORDS = 130, 24, 24  # to train, validate and test on
BATCH_SIZE, EPOCHS = 32, 2
STEPS = 10  # 5 batches per epoch
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(autouse=True, scope="module")
def _interrupts():
    """Raises KeyboardInterrupt on SIGINT, which a process in the background of a shell script ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module", autouse=True)
def _small():
    """Uses a few words, checkpoints every three steps, and one compilation for all runs."""
    splits = tuple(
        Pronunciations(split.words[-count:], split.pronunciations[-count:])
        for split, count in zip(cmudict(), WORDS, strict=True)
    )
    jits: dict[str, Any] = {}

    def counted_jit(function):
        return jits.setdefault(function.__name__, CountedJit(function))

    CountedJit = g2p_file.CountedJit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(g2p_file, "cmudict", lambda: splits)
        patch.setattr(g2p_file, "CountedJit", counted_jit)
        patch.setattr(g2p_train, "SAVE_EVERY", 3)
        yield


class Run:
    """A run of the command: its exit code, its output, and the report object behind the output."""

    def __init__(self, *options):
        self.found: Any = None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(g2p_file, "print_report", self._print)
            command = "demo", "g2p", "--epochs", EPOCHS, "--batch-size", BATCH_SIZE, "--hidden-size", 8, *options
            self.result = invoke(*command)
        self.exit_code, self.report, self.progress = self.result.exit_code, self.result.stdout, self.result.stderr

    def _print(self, report, console):
        self.found = report
        g2p_report.print_report(report, console)


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"})


def plain(text):
    """Removes the frames and escape sequences that a terminal may get."""
    return " ".join(re.sub(r"\x1b\[[\d;]*m|[│╭╮╰╯─]", "", text).split())


def disturbed(patch, name, at, disturb):
    """Makes a function of the loop disturb the run as its call number `at` ends."""
    function, calls = getattr(g2p_train, name), []

    def disturbing(*args):
        result = function(*args)
        calls.append(1)
        if len(calls) == at:
            disturb()
        return result

    patch.setattr(g2p_train, name, disturbing)


@pytest.fixture(scope="module")
def whole():
    """An undisturbed run."""
    run = Run()
    assert run.exit_code == 0, run.result.output
    return run


def test_loss_falls(whole):
    losses = np.array(whole.found.losses)
    assert losses.shape == (STEPS,)
    assert losses[-3:].mean() < losses[:3].mean()


def test_all_steps_are_one_program_and_all_decoding_another(whole):
    assert (whole.found.train_programs, whole.found.decode_programs) == (1, 1)
    assert f"1 for {STEPS} training steps, 1 for decoding" in plain(whole.report)


def test_report_counts_letters_and_cells(whole):
    train, _, test = g2p_file.cmudict()
    words = [word for word, ways in zip(*train.without_stress(), strict=True) for _ in ways]
    letters = sum(map(len, words))
    assert (whole.found.tokens, whole.found.longest) == (letters, max(map(len, words)))
    assert whole.found.num_examples == len(words)
    assert whole.found.left_out == 0
    padded = BATCH_SIZE * max(map(len, words))
    share = letters / (STEPS / EPOCHS * whole.found.plan.size)
    assert f"Cells that are letters {share:.1%}" in plain(whole.report)
    assert f"{whole.found.plan.size / padded:.2f}, {whole.found.plan.size} of {padded} in a batch" in whole.report
    assert whole.found.test.words == len(test.words)


def test_report_is_80_columns_wide_and_alone_on_stdout(whole):
    assert max(map(len, whole.report.splitlines())) <= 80
    assert "validation PER" in whole.progress
    assert re.search(r"epoch 2/2 .* loss [\d.]+ [\d,]+ letters/s", whole.progress)


@pytest.mark.parametrize(
    ("number", "name", "at", "steps"),
    [
        (signal.SIGINT, "_take_step", 4, 4),
        (signal.SIGTERM, "_take_step", 5, 5),  # the end of an epoch, before validation
        (signal.SIGINT, "_show", 1, 0),  # before the first step
    ],
)
def test_a_signal_ends_the_step_and_the_run_resumes_exactly(whole, tmp_path, monkeypatch, number, name, at, steps):
    with monkeypatch.context() as patch:
        disturbed(patch, name, at, lambda: os.kill(os.getpid(), number))
        stopped = Run("--checkpoint", tmp_path)
    assert stopped.exit_code == EXIT_CODES[number]
    assert f"Stopped by {number.name}. Run the same command to resume" in plain(stopped.progress)
    resumed = Run("--checkpoint", tmp_path)
    assert resumed.found.resumed == steps
    same_run(resumed, whole)


def test_a_signal_while_validating_loses_no_step(whole, tmp_path, monkeypatch):
    def score_and_stop(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return transcribe(*args)

    transcribe = g2p_train.transcribe
    with monkeypatch.context() as patch:
        patch.setattr(g2p_train, "transcribe", score_and_stop)
        assert Run("--checkpoint", tmp_path).exit_code == 143
    resumed = Run("--checkpoint", tmp_path)
    assert resumed.found.resumed == STEPS // EPOCHS
    same_run(resumed, whole)


def test_a_killed_run_resumes_exactly_from_the_last_checkpoint(whole, tmp_path, monkeypatch):
    def kill():
        raise SystemError("killed")

    with monkeypatch.context() as patch:
        disturbed(patch, "_take_step", 8, kill)
        assert isinstance(Run("--checkpoint", tmp_path).result.exception, SystemError)
    resumed = Run("--checkpoint", tmp_path)
    assert resumed.found.resumed == 6
    same_run(resumed, whole)


def test_a_finished_run_prints_its_report_again(whole, tmp_path):
    Run("--checkpoint", tmp_path)
    again = Run("--checkpoint", tmp_path)
    assert again.found.resumed == STEPS
    assert again.found.compile_seconds is None
    same_run(again, whole)


def same_run(run, whole):
    """Asserts that a run has the results of the whole one, bit for bit."""
    assert run.exit_code == 0, run.result.output
    for name in ("losses", "validation", "test", "samples"):
        assert getattr(run.found, name) == getattr(whole.found, name)


def test_the_run_of_another_configuration_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        disturbed(patch, "_take_step", 1, lambda: os.kill(os.getpid(), signal.SIGINT))
        Run("--checkpoint", tmp_path)
    refused = Run("--checkpoint", tmp_path, "--seed", 5)
    assert refused.exit_code == 2
    assert "holds a run with seed=0; this one has seed=5. Resume with the same" in plain(refused.progress)


def test_a_run_of_an_older_version_with_another_layer_is_refused(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    older = g2p_checkpoint.Checkpoints(tmp_path, {"seed": 0, "dropout": 0.2})
    state = g2p_checkpoint.TrainState({"embedding": jnp.ones(2)}, (), jnp.int32(1))
    older.save(state, g2p_checkpoint.History(losses=[1.0]))
    refused = Run("--checkpoint", tmp_path)
    assert refused.exit_code == 2
    found, ours = plain(refused.progress).split("; this one has ")
    assert "holds a run with" in found
    assert "layer=None" in found
    assert "layer=LayerNormLSTM" in ours


def test_checkpoints_of_something_else_are_refused(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    manager = ocp.CheckpointManager(tmp_path)
    manager.save(1, args=ocp.args.Composite(weights=ocp.args.StandardSave({"w": np.ones(2)})))
    manager.close()
    refused = Run("--checkpoint", tmp_path)
    assert refused.exit_code == 2
    assert "holds checkpoints of something else" in plain(refused.progress)


def test_a_signal_without_checkpoints_says_how_to_keep_a_run(monkeypatch):
    disturbed(monkeypatch, "_take_step", 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    stopped = Run()
    assert (stopped.exit_code, stopped.found) == (130, None)
    assert "--checkpoint DIR" in stopped.progress


def test_the_second_signal_acts_at_once():
    with g2p_checkpoint.Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(g2p_checkpoint.Interrupted):
            interrupt.check()


def test_signals_are_as_before_after_a_run(whole):
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("missing", ["orbax", "rapidfuzz"])
def test_a_missing_package_is_named_before_anything_is_trained(missing, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    run = Run("--checkpoint", tmp_path)
    assert run.exit_code == 1
    assert f"{missing}" in plain(run.progress)
    assert "pip install 'jaxpack[" in plain(run.progress)


@pytest.mark.parametrize(
    ("word", "pronunciation", "kept"),
    [
        ("of", "AH V", True),
        ("ab", "EY B IY Z", True),  # four frames for four phonemes
        ("ab", "EY B IY Z S", False),
        ("ee", "B B IY", True),  # and one for the blank between equal ones
        ("ee", "B B IY Z", False),
    ],
)
def test_training_leaves_out_and_counts_what_two_frames_a_letter_cannot_emit(word, pronunciation, kept):
    spoken = tuple(pronunciation.split())
    split = Pronunciations([word, "cat"], [[spoken, ("V",)], [("K", "AE", "T")]])
    alphabets = g2p_words.Alphabets.of([split])
    examples, left_out = g2p_words.training_examples(split, alphabets)
    assert left_out == 1 - kept
    written = [alphabets.name(example["phonemes"][: example["num_phonemes"]]) for example in examples]
    assert written == [spoken] * kept + [("V",), ("K", "AE", "T")]
    assert ["".join(alphabets.letters[n] for n in example["letters"]) for example in examples][-2:] == [word, "cat"]


def test_words_are_scored_against_their_closest_pronunciation():
    split = Pronunciations(["tomato", "cat"], [[tuple("TAMEYTO"), tuple("TAMATO")], [tuple("KAT")]])
    assert g2p_train.score([tuple("TAMATO"), tuple("KA")], split) == (1, 9, 1, 2)
    scores = g2p_train.score([tuple("TAMATTO"), ()], split)
    assert scores == (4, 9, 2, 2)
    assert (scores.per, scores.wer) == (4 / 9, 1.0)


def test_help_names_every_option():
    text = plain(invoke("demo", "g2p", "--help").output)
    for name in inspect.signature(g2p_file.g2p).parameters:
        assert f"--{name.replace('_', '-')} " in text


def test_options_of_the_other_demo_are_not_taken_for_ours():
    result = invoke("demo", "--seed", 3, "g2p")
    assert result.exit_code == 2
    assert "Invalid value for '--seed'" in plain(result.output)
