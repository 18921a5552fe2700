"""The report of `jaxpack bench`, in 80 columns, from a result as `jaxpack.cli.bench_measure` describes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxpack.cli.text import print_parts
from jaxpack.plan import BucketPlan

Result = Mapping[str, Any]
_MIB = 2**20


def print_bench(result: Result, console: Console) -> None:
    """Prints the report."""
    parts: list[Text | Table] = [
        Text(_title(result["workload"]), style="bold"),
        Text(f"{_batch(result)}\n{_machine(result)}\n{_limit(result)}"),
        _times(result, "forward", "Forward"),
        _times(result, "training", "Forward and backward"),
        _costs(result),
        Text(_legend(result)),
    ]
    if _busy(result["machine"]):
        load = result["machine"]["load_before"]
        parts.append(
            Text(
                f"The machine was busy before this run (load {load:.1f} on {result['machine']['threads']} CPUs): times "
                f"are not to be trusted, least of all torch's, whose threads wait for each other.",
                style="bold red",
            )
        )
    if result["missing"]:
        parts.append(_missing(result))
    print_parts(parts, console)


def _title(workload: Result) -> str:
    directions = "bidirectional " if workload["bidirectional"] else ""
    layers = f"{workload['num_layers']} layers of " if workload["num_layers"] > 1 else ""
    sizes = f"{workload['features']} features, hidden size {workload['hidden_size']}"
    return f"{workload['name']}: {layers}{directions}{workload['cell'].upper()}, {sizes}, {workload['dtype']}"


def _batch(result: Result) -> str:
    workload, plan = result["workload"], BucketPlan(**result["plan"])
    sequences = "1 sequence" if workload["batch_size"] == 1 else f"{workload['batch_size']:,} sequences"
    steps = f"{min(workload['lengths']):,} to {workload['longest']:,} steps, {workload['tokens']:,} tokens in all"
    return f"{sequences} of {steps}; the plan has {plan.summary}."


def _machine(result: Result) -> str:
    machine = result["machine"]
    versions = [f"{name} {version}" for name, version in machine["versions"].items() if version and name != "jaxlib"]
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    on = f"JAX on {machine['backend']}"
    if machine["backend"] != "cpu":
        on += f" ({machine['device']})"
    tunables = f" GLIBC_TUNABLES={machine['glibc_tunables']}." if machine["glibc_tunables"] else ""
    return (
        f"{machine['cpu']}, {threads} for every library; {on}. "
        f"Python {machine['python']}, {', '.join(versions)}.{tunables}"
    )


def _limit(result: Result) -> str:
    limit, rate = result["limit"], result["limit"]["flops_per_second"]
    forward, training = (_flops(limit["useful_flops"][key]) for key in ("forward", "training"))
    return (
        f"Limit: the products that real tokens need, {forward} forward and {training} with backward, "
        f"at the rate of one matmul of side {limit['matmul_side']}: {_digits(rate['median'] / 1e9)} GFLOP/s "
        f"({_range(rate, 1e9)})."
    )


def _times(result: Result, key: str, title: str) -> Table:
    """One pass: times and ratios."""
    huge = _huge_pages(result)
    table = _table(title, "ms", "25-75 %", "x limit", "x jaxpack", *(["ms, huge pages"] if huge else []))
    for peer in result["peers"]:
        found = peer[key]
        cells = [
            _digits(found["median"] * 1e3),
            _range(found, 1e-3),
            _digits(found["times_limit"]["median"]),
            _optional(found["times_jaxpack"], lambda ratio: f"{ratio['median']:.2f}"),
        ]
        if huge:
            cells.append(_optional(huge.get(peer["name"]), lambda other: _digits(other[key]["median"] * 1e3)))
        _row(table, peer, cells)
    return table


def _costs(result: Result) -> Table:
    """What is counted, compiled and allocated."""
    tokens, huge = result["workload"]["tokens"], _huge_pages(result)
    headings = ["cells", "real", "compile s", "temp MiB", "page faults", *(["huge pages"] if huge else [])]
    table = _table("Cost", *headings)
    for peer in result["peers"]:
        cells = [
            f"{peer['cells']:,}",
            f"{tokens / peer['cells']:.0%}",
            _optional(peer["compile_seconds"], lambda found: f"{found['training']:.2f}"),
            _optional(peer["temp_bytes"], lambda found: _digits(found["training"] / _MIB)),
            f"{peer['training']['page_faults']:,.0f}",
        ]
        if huge:
            cells.append(_optional(huge.get(peer["name"]), lambda other: f"{other['training']['page_faults']:,.0f}"))
        _row(table, peer, cells)
    return table


def _legend(result: Result) -> str:
    turns = "1 turn" if result["repeats"] == 1 else f"{result['repeats']} turns"
    return (
        f"Median of {turns} in one process, all libraries in each; ratios are taken turn by turn. Backward: with "
        f"respect to weights and inputs. Cells are steps of rows, in each direction of a layer. Compile, temporary "
        f"memory and page faults are of forward and backward."
    )


def _busy(machine: Result) -> bool:
    """Whether other processes had more than half of the processors."""
    return machine["load_before"] is not None and machine["load_before"] > machine["threads"] / 2


def _missing(result: Result) -> Table:
    table = Table.grid(padding=(0, 2))
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for peer in result["missing"]:
        table.add_row("missing", peer["name"], peer["reason"])
    return table


def _huge_pages(result: Result) -> dict[str, Result]:
    """By library, what the process with huge pages found."""
    other = result["huge_pages"]
    return {} if other is None else {peer["name"]: peer for peer in other["peers"]}


def _table(title: str, *headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(title, no_wrap=True, min_width=20)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _row(table: Table, peer: Result, cells: list[str]) -> None:
    table.add_row(peer["name"], *cells, style="bold" if peer["name"] == "jaxpack" else "")


def _optional(value: Any, write: Callable[[Any], str]) -> str:
    return "-" if value is None else write(value)


def _digits(value: float) -> str:
    """Three digits, or all before the point."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _flops(count: int) -> str:
    """A number of operations with a unit of its size."""
    unit, name = (1e9, "GFLOP") if count >= 1e8 else (1e6, "MFLOP")
    return f"{count / unit:.2g} {name}" if count < unit else f"{_digits(count / unit)} {name}"


def _range(spread: Result, unit: float) -> str:
    return f"{_digits(spread['low'] / unit)}-{_digits(spread['high'] / unit)}"
