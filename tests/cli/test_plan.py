"""`jaxpack plan`: its counts and estimates, its choice, the files that it reads, and the input that it refuses."""

import codecs
import re

import numpy as np
import pytest
from typer.testing import CliRunner

import jaxpack
from jaxpack.cli.app import app
from jaxpack.data import coverage, plan_cover

LENGTHS = [4, 6, 8, 5, 4, 3, 7, 8]
LIST = ",".join(map(str, LENGTHS))
PLANS = {
    (): jaxpack.plan_buckets(LENGTHS),
    ("--num-buckets", 3): jaxpack.plan_buckets(LENGTHS, 3),
    ("--num-buckets", 2, "--row-multiple", 4): jaxpack.plan_buckets(LENGTHS, 2, row_multiple=4),
}


def invoke(*arguments, standard_input=None):
    environment = {"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}
    return CliRunner().invoke(app, [str(a) for a in ("plan", *arguments)], env=environment, input=standard_input)


def message(result):
    """Returns an error without its box and line breaks."""
    assert result.exit_code == 2, result.output
    return " ".join(re.sub(r"\x1b\[[\d;]*m|[│╭╮╰╯─]", " ", result.output).split())


def counts(result, heading):
    """Returns a row of the table as numbers."""
    (line,) = [line for line in result.output.splitlines() if line.startswith(f"{heading}  ")]
    return [float(n.replace(",", "")) for n in line.removeprefix(heading).split()]


def columns(buckets, lengths=LENGTHS):
    """Returns the plans that the table shows."""
    padded = jaxpack.plan_padded(len(lengths), max(lengths))
    return [padded, jaxpack.plan_exact(lengths), buckets, jaxpack.plan_rows(lengths)]


def longest_first(lengths):
    return np.sort(np.asarray(lengths))[::-1]


def pictures(result):
    """Returns the lines of each picture by its heading."""
    _, *parts = re.split(r"^(buckets.*|rows(?: and.*|, .*)?)\n", result.output, flags=re.MULTILINE)
    drawn = [re.findall(r"^  ([█▓░].*)$", part, re.MULTILINE) for part in parts[1::2]]
    return dict(zip(parts[::2], drawn, strict=True))


@pytest.mark.parametrize(("options", "buckets"), PLANS.items())
def test_counts_are_those_of_the_planners(options, buckets):
    result = invoke(LIST, *options)
    assert result.exit_code == 0, result.output
    plans, real, padded = columns(buckets), sum(LENGTHS), max(LENGTHS) * len(LENGTHS)
    cells = [sum(plan.batch_sizes) for plan in plans]
    assert counts(result, "loops, one per bucket") == [len(plan.rows) for plan in plans]
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
    assert "* A training step, and its compilation, as jaxpack.CostModel.for_platform('cpu') estimates them for" in note


def test_plans_and_times_are_those_of_the_platform():
    lengths = [length * 20 for length in LENGTHS]
    result = invoke(",".join(map(str, lengths)), "--platform", "cuda", "--batch-size", 4)
    model = jaxpack.CostModel.for_platform("gpu")
    buckets, rows = (planner(lengths, platform="gpu") for planner in (jaxpack.plan_buckets, jaxpack.plan_rows))
    plans = [jaxpack.plan_padded(8, 160), jaxpack.plan_exact(lengths), buckets, rows]
    saved = [1e3 * (model.run_time(plans[0]) - model.run_time(plan)) for plan in plans]
    assert counts(result, "saved: ms a step*") == pytest.approx(saved, abs=0.051)
    code = dict(re.findall(r"^  (plan|corpus_plan) = (.*)$", result.output, re.MULTILINE))
    assert eval(code["plan"]) == jaxpack.plan_best(lengths, platform="gpu")
    assert eval(code["corpus_plan"]) == plan_cover(lengths, 4, platform="gpu")
    note = " ".join(result.output.split())
    assert "jaxpack.plan_best(lengths, platform='gpu') picks" in note
    assert "jaxpack.CostModel.for_platform('gpu') estimates them for its reference layer" in note


def test_an_unknown_platform_is_refused():
    assert "'--platform': platform must be one of cpu, gpu, cuda, rocm, tpu" in message(invoke(LIST, "--platform", "h"))


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
    assert counts(invoke("5"), "loops, one per bucket") == [1, 1, 1, 1]


SAME = {
    "a byte order mark": codecs.BOM_UTF8 + b"4\n6\n12\n",
    "CRLF": b"4\r\n6\r\n12\r\n",
    "CR": b"4\r6\r12",
    "form feeds": b"4\f6\n\f12\n",
    "tabs and blanks": b"\t4 \v 6\n  \n12",
    "comments": b"# lengths of a corpus, 1 a line\n4\n6 # short\n12\n",
    "floats": b"4.0\n6.\n1.2e+01\n",
    "numpy.savetxt": b"4.000000000000000000e+00\n6.000000000000000000e+00\n1.200000000000000000e+01\n",
    "leading zeros and signs": b"0000000000004\n+6\n012\n",
    "a header": b"Length\n4\n6\n12\n",
    "a table": b"id,length\n100,4\n101,6\n102,12\n",
    "a table of pandas": b",lengths,label\n0,4,a\n1,6,b\n2,12,c\n",
    "a quoted table": b'"name";"LENGTH"\n"a;b";"4"\n"c";6\n"d";12\n',
    "a table of tabs": b"length\tid\n4\t0\n6\t1\n12\t2\n",
    "a table of blanks": b"id length\n0 4\n1 6\n2 12\n",
    "a wrapped list": b"4, 6,\n12,\n",
}


@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize("source", ["file", "standard input"])
def test_lengths_are_read_however_they_are_written(tmp_path, kind, source):
    (tmp_path / "lengths").write_bytes(SAME[kind])
    result = invoke(tmp_path / "lengths") if source == "file" else invoke("-", standard_input=SAME[kind])
    assert result.exit_code == 0, result.output
    assert result.output == invoke("4,6,12").output


@pytest.mark.parametrize("text", ["1 2 3\n4 5\n", "1 4 5\n2 6 7\n9 8 3\n", "7\n8\n9\n"])
def test_lists_of_several_lines_are_no_tables(tmp_path, text):
    (tmp_path / "lengths").write_text(text)
    assert invoke(tmp_path / "lengths").output == invoke(",".join(text.split())).output


REFUSED = {
    "": "holds no lengths",
    " \n , \n": "holds no lengths",
    "# nothing\n": "holds no lengths",
    "length\n": "holds no lengths",
    "4\n5.5\n": "line 2: '5.5' is not a whole number",
    "4\nfive\n": "line 2: 'five' is not a whole number.",
    "4\n\n6 -3\n": "line 3: -3 is negative",
    "4\n-2.0\n": "line 2: -2.0 is negative",
    "4\nnan\n": "line 2: 'nan' is not a whole number",
    "4\ninf\n": "line 2: 'inf' is not a whole number",
    "4\n1_000\n": "line 2: '1_000' is not a whole number in the digits 0 to 9",
    "4\n٤\n": "line 2: '٤' is not a whole number in the digits 0 to 9",
    "4\n\uff11\uff12\n": "line 2: '\uff11\uff12' is not a whole number in the digits 0 to 9",
    "4\n²\n": "line 2: '²' is not a whole number in the digits 0 to 9",
    "4\f\f\n\fx\n": "line 2: 'x' is not a whole number",
    "4\r\n6\r\nx": "line 3: 'x' is not a whole number",
    "4\n0x10\n": "line 2: '0x10' is not a whole number",
    "4\n[red]5\n": "line 2: '[red]5' is not a whole number",
    f"{10**12}": "is longer than int32 can count",
    "4\n1e300\n": "line 2: 1e300 is longer than int32 can count",
    "4\n1e999\n": "line 2: 1e999 is longer than int32 can count",
    "4\n2147483648\n": "line 2: 2147483648 is longer than int32 can count",
    "4\n" + "9" * 5000: "line 2: 9999999999999999999999999999999999999999... is longer than int32",
    "4,,6\n": "line 1: a number is missing beside a comma",
    ",0\n0,4\n1,6\n": "line 1: a number is missing beside a comma",
    "0,4\n1,6\n2,5\n": "has 2 numbers on every line, like a table with an index or other columns that are not lengths",
    "17 4\n3 6\n": "has 2 numbers on every line",
    "4,17,1\n6,3,2\n5,9,3\n": "has 3 numbers on every line",
    "id,frames\n0,4\n": "line 1: 'id' is not a whole number. A first line that names columns must name one of",
    "utt1 400\nutt2 300\n": "line 1: 'utt1' is not a whole number. A first line that names columns",
    "length,lengths\n1,2\n": "the first line names 2 columns length. Leave one of them",
    "id,length\n0,4\n1\n": "line 3: 1 columns, but the first line names 2",
    "id,length\n0,\n": "line 2: '' is not a whole number",
}


@pytest.mark.parametrize(("text", "expected"), REFUSED.items(), ids=lambda text: ascii(text)[:20])
def test_a_bad_file_is_refused_by_line(tmp_path, text, expected):
    file = tmp_path / "lengths.txt"
    file.write_bytes(text.encode())
    found = message(invoke(file))
    assert "Invalid value for 'LENGTHS'" in found
    assert expected in found


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\xff\xfe\x00", "is not a text file in UTF-8, but in UTF-16. Save it as UTF-8"),
        ("4\n6\n".encode("utf-16"), "but in UTF-16"),
        (codecs.BOM_UTF16_BE + "4".encode("utf-16-be"), "but in UTF-16"),
        ("4\n6\n".encode("utf-32"), "but in UTF-32"),
        ("4\n6\n".encode("utf-16-le"), "is not a text file"),
        (
            b"\x93NUMPY\x01",
            "is not a text file in UTF-8. It must hold whole numbers, such as one per line: numpy.savetxt",
        ),
        (b"4\xe9", "is not a text file"),
    ],
)
def test_a_file_that_is_no_text_is_refused_by_its_encoding(tmp_path, data, expected):
    file = tmp_path / "lengths.bin"
    file.write_bytes(data)
    assert expected in message(invoke(file))
    assert f"standard input {expected[:6]}" in message(invoke("-", standard_input=data)) or expected[:3] == "but"


def test_a_folder_is_no_file_of_lengths(tmp_path):
    assert "cannot be read: Is a directory" in message(invoke(tmp_path))


@pytest.mark.parametrize("argument", ["no-such-file", "4,x", ",", "1_000,4", "٤,5"])
def test_what_is_neither_file_nor_list_is_refused(argument):
    assert f"{argument!r} is neither a file that exists nor a list" in message(invoke(argument))


def test_a_negative_length_in_a_list_is_refused():
    assert "-3 is negative" in message(invoke("4,-3"))


def corpus_of(size, longest=200):
    return np.clip(np.random.default_rng(0).lognormal(np.log(50), 0.7, size), 1, longest).astype(int)


def test_more_lengths_than_a_batch_are_planned_as_a_corpus_too(tmp_path):
    lengths = corpus_of(30_000)
    np.savetxt(tmp_path / "lengths", lengths)
    result = invoke(tmp_path / "lengths")
    assert result.exit_code == 0, result.output
    batch, corpus = result.output.split("As a corpus: one plan for all batches of 64 (--batch-size)")
    assert "As one batch" in batch
    assert re.search(rf"^rows x steps +30,000 x {lengths.max()} ", batch, re.MULTILINE)
    plan, padded = plan_cover(lengths, 64), 64 * lengths.max()
    expected = coverage(lengths, plan)
    (cells,) = re.findall(r"^cells {2,}([\d,]+) +([\d,]+)$", corpus, re.MULTILINE)
    assert [int(count.replace(",", "")) for count in cells] == [padded, plan.size]
    (shares,) = re.findall(r"^cells that are real +([\d.]+)% +([\d.]+)%$", corpus, re.MULTILINE)
    assert float(shares[1]) == round(100 * expected.efficiency, 1)
    assert float(shares[0]) == pytest.approx(100 * lengths.sum() / (469 * padded), abs=0.051)
    (code,) = re.findall(r"^  corpus_plan = (.*)$", corpus, re.MULTILINE)
    assert eval(code, {"jaxpack": jaxpack, "lengths": lengths}) == plan
    assert f"{expected.miss:.1%} of batches drawn at random would not fit" in " ".join(corpus.split())
    assert max(len(line.rstrip()) for line in result.output.splitlines()) <= 80


def test_the_batch_size_of_a_corpus_can_be_chosen():
    output = invoke(LIST, "--batch-size", 4).output
    assert "As a corpus: one plan for all batches of 4" in output
    assert re.search(r"^batches an epoch +2 +2$", output, re.MULTILINE)
    assert "  corpus_plan = jaxpack.data.plan_cover(lengths, batch_size=4)\n" in output
    assert "corpus" not in invoke(LIST).output


def test_a_corpus_that_is_no_single_batch_is_planned_as_a_corpus(tmp_path):
    (tmp_path / "lengths").write_text("30000000\n" * 100)
    output = invoke(tmp_path / "lengths", "--batch-size", 10).output
    assert "One batch would have more cells than int32 can index." in output
    assert re.search(r"^cells that are real +100.0% +100.0%$", output, re.MULTILINE)
    assert "reference layer" in output  # the note of *


def test_a_report_of_large_numbers_fits_80_columns(tmp_path):
    (tmp_path / "lengths").write_text("499\n" + "1\n" * 999_999)
    lines = invoke(tmp_path / "lengths").output.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert any(line.startswith("saved: s to compile*  ") for line in lines)


def test_more_cells_than_can_be_indexed_are_refused():
    assert "more than int32 can index" in message(invoke(",".join(["2000000000"] * 2)))


@pytest.mark.parametrize(
    ("option", "value"), [("--num-buckets", 0), ("--row-multiple", 0), ("--num-buckets", "x"), ("--batch-size", 0)]
)
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
