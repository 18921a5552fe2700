"""The committed counts, and the guide's tables of them.

cd tests
../.venv/bin/python -m accelerators.table              # counts every program anew: ten CPU minutes
../.venv/bin/python -m accelerators.table h100-GRU     # counts those whose names start so, and keeps the others
../.venv/bin/python -m accelerators.table --changed    # counts those whose lowered programs are others than before
"""

import argparse
import concurrent.futures
import hashlib
import json
import multiprocessing
import pathlib
import re
import sys
from typing import Any, NamedTuple

import jaxlib

from accelerators.cases import Case
from accelerators.counts import Counts, renewed
from accelerators.matrix import CASES
from accelerators.targets import GPUS, TARGETS, missing

HERE = pathlib.Path(__file__).parent
PAGE = HERE.parent.parent / ".docs" / "guide" / "accelerators.md"
_FILE = HERE / "counts.json"
_MARKS = "<!-- tables: python -m accelerators.table -->", "<!-- end of tables -->"
_TITLES = {"h100": "NVIDIA H100", "v5e": "TPU v5e", "v6e": "TPU v6e", "tpu7x": "TPU7x"}


class Table(NamedTuple):
    """Counts by the name of their case, and the version of jaxlib that they are of."""

    jaxlib: str
    counts: dict[str, Counts]

    @property
    def turn(self) -> int:
        """Which of the unchanged programs tests compile: others each time that a program changes."""
        digests = "".join(counts.digest for counts in self.counts.values())
        return int(hashlib.sha256(digests.encode()).hexdigest(), 16)


def read() -> Table:
    """Returns the committed counts."""
    version, rows = json.loads(_FILE.read_text()).values()
    counts = {name: Counts(**{"digest": ""} | {key: _as_given(row[key]) for key in row}) for name, row in rows.items()}
    return Table(version, counts)


def _as_given(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def write(table: Table) -> None:
    """Writes counts, a line a case, and the guide's tables of them."""
    rows = [f"{json.dumps(case.name)}: {json.dumps(table.counts[case.name]._asdict())}" for case in counted(table)]
    lines = ["{", f'"jaxlib": {json.dumps(table.jaxlib)},', '"counts": {', ",\n".join(rows), "}", "}", ""]
    _FILE.write_text("\n".join(lines))
    PAGE.write_text(page_with(table))


def counted(table: Table) -> list[Case]:
    """Returns the cases that the table has, in their order."""
    return [case for case in CASES if case.name in table.counts]


def page_with(table: Table) -> str:
    """Returns the guide with tables of these counts: one a target, with a row for a layer and how it runs."""
    tables = "\n".join(_rendered(target, table) for target in TARGETS)
    pattern = re.compile(f"({re.escape(_MARKS[0])}\n).*({re.escape(_MARKS[1])})", re.DOTALL)
    made_with = f"Compiled with jaxlib {table.jaxlib}.\n\n{tables}"
    text, places = pattern.subn(lambda found: f"{found.group(1)}\n{made_with}\n{found.group(2)}", PAGE.read_text())
    if places != 1:
        raise ValueError(f"{PAGE.name} needs one place for tables, between {_MARKS[0]} and {_MARKS[1]}.")
    return text


def _rendered(target: str, table: Table) -> str:
    unit, decimals = ("kernels", ",.2f") if target in GPUS else ("cycles", ",")
    lines = [
        f"### {_TITLES[target]}",
        "",
        f"| layer | runs as | directions | dtype | {unit} a step: forward | training: forward + backward "
        "| steps in loops | MiB: forward | training | compiled in s: forward | training |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    cases = counted(table)
    for case in cases:
        if case.target != target or case.training or case._replace(training=True) not in cases:
            continue
        both = [table.counts[each.name] for each in (case, case._replace(training=True))]
        a_step = [each.kernels if target in GPUS else each.cycles for each in both]
        cells = [case.layer, f"`{case.form}`", str(case.directions), case.dtype]
        cells += [" + ".join(format(cost, decimals) for cost in costs) for costs in a_step]
        cells += [format(min(share for each in both for share in each.share), ".0%")]
        cells += [format(each.temporaries / 2**20, ".1f") for each in both]
        cells += [format(each.seconds, ".1f") for each in both]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main(prefixes: list[str], changed_only: bool, workers: int | None) -> None:
    """Counts the cases whose names start with a prefix, or all of them, in parallel, and writes what was counted."""
    if reasons := {reason for target in TARGETS if (reason := missing(target))}:
        sys.exit("; ".join(sorted(reasons)))
    table = read() if prefixes or changed_only else Table(jaxlib.__version__, {})
    if table.jaxlib != jaxlib.__version__:
        sys.exit(f"The table is of jaxlib {table.jaxlib}, and this is {jaxlib.__version__}: count all cases.")
    chosen = [case for case in CASES if case.name.startswith(tuple(prefixes) or "")]
    known = [table.counts.get(case.name) if changed_only else None for case in chosen]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        for case, found in zip(chosen, pool.map(renewed, chosen, known), strict=True):
            if found != table.counts.get(case.name):
                print(case.name, found, flush=True)
                table.counts[case.name] = found
                write(table)  # so that a run that is interrupted keeps what it has


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m accelerators.table", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prefixes", nargs="*", help="how names of cases start, such as h100-LSTM; without them all")
    parser.add_argument("--changed", action="store_true", help="only programs that the table does not have as they are")
    parser.add_argument("--workers", type=int, help="how many programs are compiled at a time; otherwise one a core")
    options = parser.parse_args()
    main(options.prefixes, options.changed, options.workers)
