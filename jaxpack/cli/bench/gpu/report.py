"""The reports of `jaxpack bench gpu`: on the terminal, in 80 columns, and as Markdown tables for a guide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxpack.cli._text import print_parts
from jaxpack.cli.bench.calls import PASSES
from jaxpack.cli.bench.gpu.cases import PEERS
from jaxpack.cli.bench.report import digits, machine_line, start_table

Result = Mapping[str, Any]
_MIB = 2**20
_SHOWN = 4  # of the cases in a sentence; --json has all
_MEMORY = (
    "the peak of device memory beyond weights and batch, or, where the device does not count its memory, the "
    "temporaries that XLA planned, in parentheses"
)


def print_gpu(result: Result, console: Console) -> None:
    """Prints the report."""
    parts: list[Text | Table] = [Text(_title(result), style="bold")]
    if result["machine"]:
        parts.append(Text(machine_line(result["machine"])))
    for case in result["cases"]:
        parts += [Text(_describe(case), style="bold"), _table(case)]
    if result["cases"]:
        parts.append(Text(_legend(result)))
    parts += [Text(line) for line in (_missing(result), _left_out(result)) if line]
    failed = [f"{name} ({case['name']})" for case in result["cases"] for name in case["failed"]]
    if failed:
        parts.append(Text(f"jaxpack failed: {', '.join(failed)}.", style="bold red"))
    print_parts(parts, console)


def markdown(result: Result) -> str:
    """Returns two tables with a line for each case, of times and of memory, and what is to be known about them."""
    lines = [f"{machine_line(result['machine'])}"] if result["machine"] else []
    for heading, write in (
        ("Microseconds per step of the longest sequence, forward / training:", _times_of),
        (f"MiB of a training step: {_MEMORY}:", _memory_of),
    ):
        rows = [_markdown_row(["", *PEERS]), "|---" * (len(PEERS) + 1) + "|"]
        for case in result["cases"]:
            peers = {peer["name"]: peer for peer in case["peers"]}
            rows.append(_markdown_row([f"`{case['name']}`", *(write(peers.get(name)) for name in PEERS)]))
        lines.append(f"{heading}\n\n" + "\n".join(rows))
    lines += [line for line in (_missing(result), _left_out(result)) if line]
    return "\n\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _times_of(peer: Result | None) -> str:
    return " / ".join(digits(peer[key]["us_per_step"]) for key in PASSES) if peer else ""


def _memory_of(peer: Result | None) -> str:
    """Formats the memory of a training step: its peak, or in parentheses the temporaries that XLA planned."""
    if peer and peer["peak_bytes"] is not None:
        return digits(peer["peak_bytes"] / _MIB)
    if peer and peer["temp_bytes"]:
        return f"({digits(peer['temp_bytes']['training'] / _MIB)})"
    return ""


def _title(result: Result) -> str:
    count, total = len(result["cases"]), len(result["cases"]) + len(result["left_out"])
    return f"{count} of {total} cases in {result['seconds']:.0f} s, of a budget of {result['budget']:.0f} s"


def _describe(case: Result) -> str:
    """Returns the line above the table of a case."""
    workload = case["workload"]
    steps = f"{min(workload['lengths']):,} to {workload['longest']:,} steps, {workload['tokens']:,} in all"
    return f"{case['name']}: {workload['batch_size']:,} sequences of {steps}"


def _table(case: Result) -> Table:
    """Returns the table of a case."""
    table = start_table("us per step", "forward", "x", "training", "x", "x limit", "MiB", "compile s", width=15)

    def times(found: Result) -> list[str]:
        ratio = found["times_jaxpack"]
        return [digits(found["us_per_step"]), f"{ratio['median']:.2f}" if ratio else "-"]

    for peer in case["peers"]:
        compiled = peer["compile_seconds"]
        table.add_row(
            peer["name"],
            *(entry for key in PASSES for entry in times(peer[key])),
            digits(peer["training"]["times_limit"]["median"]),
            _memory_of(peer) or "-",
            f"{sum(compiled.values()):.1f}" if compiled else "-",
            style="bold" if peer["name"] == "jaxpack" else "",
        )
    limit = [entry for key in PASSES for entry in times(case["limit"][key])]
    table.add_row("product limit", *limit, "1.00", "", "", style="italic")
    return table


def _legend(result: Result) -> str:
    return (
        f"A step: of the longest sequence. Median of {result['cases'][0]['repeats']} turns, all libraries of a case in "
        f"one process; x: times jaxpack under the plan that plan_best chooses, turn by turn; x limit: training, times "
        f"the matrix products of real steps. MiB, of a training step: {_MEMORY}. Compilation: of both passes. Every "
        f"library computes in its default precision, which for float32 is TF32 on recent GPUs."
    )


def _missing(result: Result) -> str:
    """Says which libraries were not measured in which cases, and why."""
    cases: dict[tuple[str, str], list[str]] = {}
    for case in result["cases"]:
        for peer in case["missing"]:
            cases.setdefault((peer["name"], peer["reason"]), []).append(case["name"])
    lines = [f"{name}: {reason}{_where(names, result)}" for (name, reason), names in cases.items()]
    return "\n".join(["Not measured:", *(f"- {line}" for line in lines)]) if lines else ""


def _where(names: Sequence[str], result: Result) -> str:
    return "" if len(names) == len(result["cases"]) else f" ({_some(names)})"


def _left_out(result: Result) -> str:
    """Says how many cases were left out, and why."""
    reasons: dict[str, list[str]] = {}
    for case in result["left_out"]:
        reasons.setdefault(case["reason"], []).append(case["name"])
    lines = [f"{len(names)}, since {reason}: {_some(names)}" for reason, names in reasons.items()]
    if not lines:
        return ""
    way_out = "--only NAME measures those with this text in their names, --budget SECONDS more of them."
    return "\n".join(["Cases left out:", *(f"- {line}" for line in lines), way_out])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
