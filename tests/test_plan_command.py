"""`jaxpack plan`: what it counts and estimates, what it chooses, what it reads, what it refuses."""

import re

import numpy as np
import pytest
from typer.testing import CliRunner

import jaxpack
from jaxpack.cli.app import app

LENGTHS = [4, 6, 8, 5, 4, 3, 7, 8]
LIST = ",".join(map(str, LENGTHS))
PLANS = {
    (): jaxpack.plan_buckets(LENGTHS),
    ("--num-buckets", 3): jaxpack.plan_buckets(LENGTHS, 3),
    ("--num-buckets", 2, "--row-multiple", 4): jaxpack.plan_buckets(LENGTHS, 2, row_multiple=4),
}


def invoke(*arguments):
    environment = {"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}
    return CliRunner().invoke(app, [str(a) for a in ("plan", *arguments)], env=environment)


def message(result):
    """An error without its box and line breaks."""
    assert result.exit_code == 2, result.output
    return " ".join(re.sub(r"\x1b\[[\d;]*m|[│╭╮╰╯─]", " ", result.output).split())


def counts(result, heading):
    """A row of the table, in numbers."""
    (line,) = [line for line in result.output.splitlines() if line.startswith(f"{heading}  ")]
    return [float(n.replace(",", "")) for n in line.removeprefix(heading).split()]


def columns(buckets, lengths=LENGTHS):
    """The plans that the table shows."""
    padded = jaxpack.plan_padded(len(lengths), max(lengths))
    return [padded, jaxpack.plan_exact(lengths), buckets, jaxpack.plan_rows(lengths)]


def longest_first(lengths):
    return np.sort(np.asarray(lengths))[::-1]


def pictures(result):
    """The lines of each picture, by its heading."""
    _, *parts = re.split(r"^(buckets.*|rows(?: and.*|, .*)?)\n", result.output, flags=re.MULTILINE)
    drawn = [re.findall(r"^  ([█▓░].*)$", part, re.MULTILINE) for part in parts[1::2]]
    return dict(zip(parts[::2], drawn, strict=True))


@pytest.mark.parametrize(("options", "buckets"), PLANS.items())
def test_counts_are_those_of_the_planners(options, buckets):
    result = invoke(LIST, *options)
    assert result.exit_code == 0, result.output
    plans, real, padded = columns(buckets), sum(LENGTHS), max(LENGTHS) * len(LENGTHS)
    cells = [sum(plan.batch_sizes) for plan in plans]
    assert counts(result, "loops, one a bucket") == [len(plan.rows) for plan in plans]
    assert counts(result, "cells") == cells
    assert counts(result, "cells / padded") == [round(count / padded, 2) for count in cells]
    assert counts(result, "slack") == [count - real for count in cells]
    assert counts(result, "saved: cells") == [padded - count for count in cells]
    assert re.search(r"^rows x steps +8 x 8  8 x 8 +8 x 8  6 x 8$", result.output, re.MULTILINE)


def test_times_are_the_cost_models_and_labelled_as_its_estimates():
    lengths = [length * 20 for length in LENGTHS]
    result = invoke(",".join(map(str, lengths)))
    plans, model = columns(jaxpack.plan_buckets(lengths), lengths), jaxpack.CostModel()
    runs, compiles = [1e3 * model.run_time(plan) for plan in plans], [model.compile_time(plan) for plan in plans]
    assert counts(result, "ms a step*") == pytest.approx(runs, abs=0.051)
    assert counts(result, "s to compile*") == pytest.approx(compiles, abs=0.051)
    assert counts(result, "saved: ms a step*") == pytest.approx([runs[0] - time for time in runs], abs=0.051)
    assert counts(result, "saved: s to compile*") == pytest.approx([compiles[0] - time for time in compiles], abs=0.051)
    note = " ".join(result.output.split())
    assert "* A training step, and its compilation, as jaxpack.CostModel() estimates them for its reference" in note


@pytest.mark.parametrize("lengths", [LENGTHS, [5, 5, 5], list(range(1, 200))])
def test_chosen_plan_is_plan_bests_and_its_code_makes_it(lengths):
    output = invoke(",".join(map(str, lengths))).output
    (code,) = re.findall(r"^  plan = (.*)$", output, re.MULTILINE)
    assert eval(code) == jaxpack.plan_best(lengths)
    name = "rows" if "rows" in code else "buckets"
    assert f"jaxpack.plan_best(lengths) picks {name}, the cheaper of the two" in " ".join(output.split())


def test_code_of_a_staircase_has_the_options():
    output = invoke("5,5,5", "--num-buckets", 2, "--row-multiple", 4).output
    assert "\n  plan = jaxpack.plan_buckets(lengths, 2, row_multiple=4)\n" in output


def test_a_choice_that_only_options_explain_is_not_said_to_be_plan_bests():
    lengths = [70] * 50 + [100]
    assert jaxpack.plan_best(lengths) == jaxpack.plan_buckets(lengths, 2)
    output = invoke(",".join(map(str, lengths)), "--num-buckets", 1).output
    assert "With these options: rows, the cheaper of the two" in output


def test_both_plans_are_drawn_with_real_cells_and_slack():
    drawn = pictures(invoke(LIST, "--num-buckets", 1))
    assert list(drawn) == ["buckets", "rows"]
    assert drawn["buckets"] == ["██" * length + "░░" * (8 - length) for length in longest_first(LENGTHS)]
    assert drawn["rows"] == [
        "█" * 16,
        "█" * 16,
        "█" * 14 + "░░",
        "█" * 12 + "░░░░",
        "█" * 10 + "▓" * 6,
        "█" * 8 + "▓" * 8,
    ]


def test_plans_that_are_the_same_are_drawn_once():
    assert pictures(invoke("5,5")) == {"buckets and rows": ["█" * 10] * 2}


def test_marks_are_ascii_where_the_terminal_knows_no_others():
    result = CliRunner(charset="ascii").invoke(app, ["plan", LIST], env={"COLUMNS": "80", "PYTHONIOENCODING": "ascii"})
    assert result.exit_code == 0, result.output
    assert result.output.isascii()
    assert "  ##########======" in result.output


@pytest.mark.parametrize("text", ["4\n6\n8\n5\n4\n3\n7\n8\n", "4 6 8 5 4\t3 7 8", "4,6,8,5\n\n 4, 3, 7, 8,\n"])
def test_a_file_says_the_same_as_a_list(tmp_path, text):
    file = tmp_path / "lengths.txt"
    file.write_text(text)
    result = invoke(file)
    assert result.exit_code == 0, result.output
    assert result.output == invoke(LIST).output


def test_report_of_many_long_sequences_fits_80_columns():
    lengths = ",".join(str(length) for length in np.random.default_rng(0).integers(1, 3000, 300))
    output = invoke(lengths).output
    assert max(len(line.rstrip()) for line in output.splitlines()) <= 80
    assert "\nbuckets, 16 of 300 rows drawn\n" in output


def test_lengths_of_0_and_a_single_sequence_are_planned():
    assert counts(invoke("0,0"), "cells") == [2, 2, 2, 2]
    assert counts(invoke("5"), "loops, one a bucket") == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds no lengths"),
        (" \n , \n", "holds no lengths"),
        ("4\n5.5\n", "line 2: '5.5' is not a whole number"),
        ("4\nfive\n", "line 2: 'five' is not a whole number"),
        ("4\n6 -3\n", "line 2: -3 is negative"),
        (f"{10**12}", "is longer than int32 can count"),
    ],
)
def test_a_bad_file_is_refused_by_line(tmp_path, text, expected):
    file = tmp_path / "lengths.txt"
    file.write_text(text)
    found = message(invoke(file))
    assert "Invalid value for 'LENGTHS'" in found
    assert expected in found


def test_a_file_that_is_no_text_or_no_file_is_refused(tmp_path):
    file = tmp_path / "lengths.bin"
    file.write_bytes(b"\xff\xfe\x00")
    assert "is no text file" in message(invoke(file))
    assert "cannot be read" in message(invoke(tmp_path))


@pytest.mark.parametrize("argument", ["no-such-file", "4,x", ","])
def test_what_is_neither_file_nor_list_is_refused(argument):
    assert f"{argument!r} is neither a file that exists nor a list" in message(invoke(argument))


def test_a_negative_length_in_a_list_is_refused():
    assert "-3 is negative" in message(invoke("4,-3"))


def test_more_cells_than_can_be_indexed_are_refused():
    assert "more than int32 can index" in message(invoke(",".join(["2000000000"] * 2)))


@pytest.mark.parametrize(("option", "value"), [("--num-buckets", 0), ("--row-multiple", 0), ("--num-buckets", "x")])
def test_bad_options_are_refused_by_name(option, value):
    assert f"Invalid value for '{option}'" in message(invoke(LIST, option, value))


def test_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, which the extra `plot` brings, is not installed")
    file = tmp_path / "plan.svg"
    assert invoke(LIST, "--plot", file).exit_code == 0
    assert "6 rows of 8 steps, 48 cells" in file.read_text()


def test_a_plot_that_cannot_be_written_is_refused(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, which the extra `plot` brings, is not installed")
    assert "png" in message(invoke(LIST, "--plot", tmp_path / "plan.xyz"))
    assert "does not exist" in message(invoke(LIST, "--plot", tmp_path / "nowhere" / "plan.png"))
    assert "it is a folder" in message(invoke(LIST, "--plot", tmp_path))
