"""The report of `jaxpack bench rollout`, in 80 columns, from a result of `jaxpack.cli.bench.rollout.measure`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack.cli._text import print_parts
from jaxpack.cli.bench.calls import PASSES
from jaxpack.cli.bench.report import Result, busy_warning, digits, machine_line, start_table, turns
from jaxpack.cli.bench.workloads import layer_name

_MIB = 2**20


def print_rollout(result: Result, console: Console) -> None:
    """Prints the report."""
    parts: list[Text | Table] = [Text(machine_line(result["machine"]))]
    for case in result["cases"]:
        parts += [Text(_title(case), style="bold"), Text(_describe(case)), _table(case)]
    parts += [Text(_legend(result)), *busy_warning(result["machine"])]
    missing = {f"{peer['name']}: {peer['reason']}" for case in result["cases"] for peer in case["missing"]}
    if missing:
        parts.append(Text("\n".join(["Not measured:", *(f"- {line}" for line in sorted(missing))])))
    print_parts(parts, console)


def _title(case: Result) -> str:
    workload = case["workload"]
    sizes = f"{workload['features']} features, hidden size {workload['hidden_size']}, {workload['dtype']}"
    return f"{layer_name(workload['cell'])}, {sizes}; reset probability {workload['reset_probability']:g}"


def _describe(case: Result) -> str:
    workload, plan = case["workload"], BucketPlan(**case["plan"])
    fragments = "1 fragment" if workload["fragments"] == 1 else f"{workload['fragments']:,} fragments"
    return (
        f"{workload['environments']:,} environments, {workload['steps']:,} steps; {fragments}, the longest of "
        f"{workload['longest_fragment']:,} steps, in a plan of {plan.summary}. The host cuts them in "
        f"{digits(case['cut_seconds']['median'] * 1e3)} ms, which no row includes."
    )


def _table(case: Result) -> Table:
    """Returns the table of a case."""
    table = start_table("ms", "forward", "x", "training", "x", "steps", "cells", "MiB", "compile", width=17)

    def times(found: Result) -> list[str]:
        ratio = found["times_jaxpack"]
        return [digits(found["median"] * 1e3), f"{ratio['median']:.2f}" if ratio else "-"]

    for peer in case["peers"]:
        compiled, temporary = peer["compile_seconds"], peer["temp_bytes"]
        table.add_row(
            peer["name"],
            *(entry for key in PASSES for entry in times(peer[key])),
            f"{peer['steps']:,}",
            f"{peer['cells']:,}",
            digits(temporary["training"] / _MIB) if temporary else "-",
            f"{compiled['training']:.2f}" if compiled else "-",
            style="bold" if peer["name"] == "jaxpack" else "",
        )
    limit = [entry for key in PASSES for entry in times(case["limit"][key])]
    table.add_row("product limit", *limit, "", "", "", "", style="italic")
    return table


def _legend(result: Result) -> str:
    return (
        f"Median of {turns(result)}, all rows of a case in one process and in each turn; x: times jaxpack, turn by "
        f"turn. Training: the loss, a weighted sum of the outputs, and its gradients with respect to weights and "
        f"inputs. Steps: one after the other. MiB, compile: temporaries and seconds "
        f"to compile, in training. "
        f"jaxpack: resets= of the layer; no-resets: the same layer without, so other outputs; carried: run_rollout; "
        f"fragments: from packed data to packed outputs; in-out: packs fragments, and puts outputs back in place; "
        f"flax-scan: flax.linen.scan over a cell, with a where on the carry. All rows but no-resets were compared, and "
        f"have the same outputs. Product limit: the matrix products, all steps in one."
    )
