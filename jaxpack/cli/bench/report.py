"""The report of `jaxpack bench`, in 80 columns, from a result of `jaxpack.cli.bench.measure`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack.cli._text import print_parts
from jaxpack.cli.bench.workloads import layer_name

Result = Mapping[str, Any]
_MIB = 2**20


def print_bench(result: Result, console: Console) -> None:
    """Prints the report."""
    parts: list[Text | Table] = [
        Text(title_of(result["workload"]), style="bold"),
        Text(f"{_batch(result)}\n{machine_line(result['machine'], ' for every library')}\n{_limit(result)}"),
        _times(result, "forward", "Forward"),
        _times(result, "training", "Forward and backward"),
        _costs(result),
        Text(_legend(result)),
    ]
    parts += busy_warning(result["machine"], ", least of all torch's, whose threads wait for each other")
    if result["missing"]:
        parts.append(_missing(result))
    print_parts(parts, console)


def title_of(workload: Result) -> str:
    """Returns the report's first line."""
    directions = "bidirectional " if workload["bidirectional"] else ""
    layers = f"{workload['num_layers']} layers of " if workload["num_layers"] > 1 else ""
    sizes = f"{workload['features']} features, hidden size {workload['hidden_size']}"
    return f"{workload['name']}: {layers}{directions}{layer_name(workload['cell'])}, {sizes}, {workload['dtype']}"


def _batch(result: Result) -> str:
    workload, plan = result["workload"], BucketPlan(**result["plan"])
    sequences = "1 sequence" if workload["batch_size"] == 1 else f"{workload['batch_size']:,} sequences"
    steps = f"{min(workload['lengths']):,} to {workload['longest']:,} steps, {workload['tokens']:,} tokens in all"
    return f"{sequences} of {steps}; the plan has {plan.summary}."


def machine_line(machine: Result, whose: str = "") -> str:
    """Describes the machine in a line; `whose` follows the number of threads."""
    versions = [f"{name} {version}" for name, version in machine["versions"].items() if version and name != "jaxlib"]
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    on = f"JAX on {machine['backend']}"
    if machine["backend"] != "cpu":
        on += f" ({machine['device']})"
    elif machine.get("devices", 1) > 1:
        on += f" as {machine['devices']} devices"
    tunables = f" GLIBC_TUNABLES={machine['glibc_tunables']}." if machine["glibc_tunables"] else ""
    return f"{machine['cpu']}, {threads}{whose}; {on}. Python {machine['python']}, {', '.join(versions)}.{tunables}"


def _limit(result: Result) -> str:
    limit = result["limit"]
    forward, training = (_flops(limit["useful_flops"][key]) for key in ("forward", "training"))
    return (
        f"Product limit: the matrix products that real steps need, all steps in one product: {forward} forward, at "
        f"{digits(limit['flops_per_second']['median'] / 1e9)} GFLOP/s, and {training} with backward."
    )


def _times(result: Result, key: str, title: str) -> Table:
    """Returns the table of the times and ratios of one pass."""
    huge = _huge_pages(result)
    table = start_table(title, "ms", "25-75 %", "x limit", "x jaxpack", *(["ms, huge pages"] if huge else []))

    def times(found: Result, times_limit: float) -> list[str]:
        ratio = _optional(found["times_jaxpack"], lambda ratio: f"{ratio['median']:.2f}")
        return [digits(found["median"] * 1e3), quartiles(found, 1e-3), digits(times_limit), ratio]

    for peer in result["peers"]:
        cells = times(peer[key], peer[key]["times_limit"]["median"])
        if huge:
            cells.append(_optional(huge.get(peer["name"]), lambda other: digits(other[key]["median"] * 1e3)))
        _row(table, peer, cells)
    limit = times(result["limit"][key], 1.0)
    if huge:
        limit.append(digits(result["huge_pages"]["limit"][key]["median"] * 1e3))
    table.add_row("product limit", *limit, style="italic")
    return table


def _costs(result: Result) -> Table:
    """Returns the table of cells, compile times, memory and page faults."""
    tokens, huge = result["workload"]["tokens"], _huge_pages(result)
    headings = ["cells", "real", "compile s", "temp MiB", "page faults", *(["huge pages"] if huge else [])]
    table = start_table("Cost", *headings)
    for peer in result["peers"]:
        cells = [
            f"{peer['cells']:,}",
            f"{tokens / peer['cells']:.0%}",
            _optional(peer["compile_seconds"], lambda found: f"{found['training']:.2f}"),
            _optional(peer["temp_bytes"], lambda found: digits(found["training"] / _MIB)),
            f"{peer['training']['page_faults']:,.0f}",
        ]
        if huge:
            cells.append(_optional(huge.get(peer["name"]), lambda other: f"{other['training']['page_faults']:,.0f}"))
        _row(table, peer, cells)
    return table


def turns(result: Result) -> str:
    """Returns the number of turns in words."""
    return "1 turn" if result["repeats"] == 1 else f"{result['repeats']} turns"


def _legend(result: Result) -> str:
    return (
        f"Median of {turns(result)} in one process, all libraries in each, in an order that is drawn anew; ratios are "
        f"taken turn by turn. Untimed runs of the same library precede each timed one. Backward: "
        f"with respect to weights and inputs. Cells are steps of rows, in each direction of a layer. Compile time, "
        f"temporary memory and page faults are those of forward and backward."
    )


def busy_warning(machine: Result, more: str = "") -> list[Text]:
    """Returns a warning if other processes used more than half of the processors; `more` ends it."""
    load = machine["load_before"]
    if load is None or load <= machine["threads"] / 2:
        return []
    warning = (
        f"The machine was busy before this run (load {load:.1f} on {machine['threads']} CPUs): times are not to be "
        f"trusted{more}."
    )
    return [Text(warning, style="bold red")]


def _missing(result: Result) -> Table:
    table = Table.grid(padding=(0, 2))
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for peer in result["missing"]:
        table.add_row("missing", peer["name"], peer["reason"])
    return table


def _huge_pages(result: Result) -> dict[str, Result]:
    """Returns the results of the process with huge pages by library."""
    other = result["huge_pages"]
    return {} if other is None else {peer["name"]: peer for peer in other["peers"]}


def start_table(title: str, *headings: str, width: int = 20) -> Table:
    """Returns a table of numbers, with names under its title; `width` is the least of the names' column."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(title, no_wrap=True, min_width=width)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _row(table: Table, peer: Result, cells: list[str]) -> None:
    table.add_row(peer["name"], *cells, style="bold" if peer["name"] == "jaxpack" else "")


def _optional(value: Any, write: Callable[[Any], str]) -> str:
    return "-" if value is None else write(value)


def digits(value: float) -> str:
    """Formats a number with three digits, or with all before the point."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _flops(count: int) -> str:
    """Formats a number of operations with a suitable unit."""
    unit, name = (1e9, "GFLOP") if count >= 1e8 else (1e6, "MFLOP")
    return f"{count / unit:.2g} {name}" if count < unit else f"{digits(count / unit)} {name}"


def quartiles(spread: Result, unit: float) -> str:
    """Formats the range from 25 to 75 %."""
    return f"{digits(spread['low'] / unit)}-{digits(spread['high'] / unit)}"
