"""`jaxpack plan`: what it counts, what it reads, what it refuses."""

import re

import numpy as np
import pytest
from typer.testing import CliRunner

import jaxpack
from jaxpack.cli.app import app

LENGTHS = [4, 6, 8, 5, 4, 3, 7, 8]
LIST = ",".join(map(str, LENGTHS))


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
    return [float(n.replace(",", "").rstrip("%")) for n in line.removeprefix(heading).split()]


def longest_first(lengths):
    return np.sort(np.asarray(lengths))[::-1]


def cells_of(boundaries, rows):
    return int(np.dot(np.diff(boundaries, prepend=0), rows))


@pytest.mark.parametrize("options", [(), ("--num-buckets", 3), ("--num-buckets", 2, "--row-multiple", 4)])
def test_counts_are_those_of_the_printed_plan(options):
    result = invoke(LIST, *options)
    assert result.exit_code == 0, result.output
    boundaries, rows = (
        [int(n) for n in group.split(",") if n.strip()]
        for group in re.search(r"boundaries=\((.*?)\), rows=\((.*?)\)", result.output.replace("\n", "")).groups()
    )
    chosen, real, padded = cells_of(boundaries, rows), sum(LENGTHS), max(LENGTHS) * len(LENGTHS)
    cells = [chosen, real, padded]
    assert counts(result, "cells") == cells
    assert counts(result, "slack") == [count - real for count in cells]
    assert counts(result, "cells that are real") == [round(100 * real / count) for count in cells]
    assert counts(result, "cells / padded") == [round(count / padded, 2) for count in cells]
    assert counts(result, "buckets") == [len(rows), len(set(LENGTHS)), 1]
    alive = np.repeat(rows, np.diff(boundaries, prepend=0))
    assert (alive >= [np.sum(np.array(LENGTHS) > step) for step in range(max(LENGTHS))]).all()


def test_options_reach_the_planner():
    assert repr(jaxpack.plan_buckets(LENGTHS, 3)) in invoke(LIST, "--num-buckets", 3).output
    rounded = jaxpack.plan_buckets(LENGTHS, row_multiple=4)
    assert rounded != jaxpack.plan_buckets(LENGTHS)
    assert repr(rounded) in invoke(LIST, "--row-multiple", 4).output


def test_picture_shows_real_cells_and_slack():
    output = invoke(LIST, "--num-buckets", 1).output
    drawn = [line.strip() for line in output.splitlines() if line.startswith("  █")]
    assert drawn == ["██" * length + "░░" * (8 - length) for length in longest_first(LENGTHS)]


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
    assert "16 of 300 rows are drawn" in " ".join(output.split())


def test_lengths_of_0_and_a_single_sequence_are_planned():
    assert counts(invoke("0,0"), "cells") == [2, 2, 2]
    assert counts(invoke("5"), "buckets") == [1, 1, 1]


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
    assert "time [steps]" in file.read_text()


def test_a_plot_that_cannot_be_written_is_refused(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, which the extra `plot` brings, is not installed")
    assert "png" in message(invoke(LIST, "--plot", tmp_path / "plan.xyz"))
    assert "does not exist" in message(invoke(LIST, "--plot", tmp_path / "nowhere" / "plan.png"))
    assert "it is a folder" in message(invoke(LIST, "--plot", tmp_path))
