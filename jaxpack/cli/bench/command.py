"""`jaxpack bench`: what packing buys on this machine, beside the libraries that one would use otherwise."""

from __future__ import annotations

import enum
import functools
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from jaxpack import plot
from jaxpack.cli._files import STANDARD_INPUT, check_json, check_plot, name_of, read_lengths, writing
from jaxpack.cli.bench.epoch import BATCH_SIZE, BATCHERS, measure_epoch
from jaxpack.cli.bench.epoch_report import print_epoch
from jaxpack.cli.bench.measure import HUGE_PAGES, Tell, measure
from jaxpack.cli.bench.peers import PEERS
from jaxpack.cli.bench.report import print_bench
from jaxpack.cli.bench.workloads import EPOCH, Workload, named_workload, workload_names

_TUNABLES = "GLIBC_TUNABLES"
_FIRST_GLIBC = (2, 35)  # that knows HUGE_PAGES
_MOST_BYTES = 2**32  # of inputs
_REPEATS, _REPEATS_OF_EPOCH = 15, 3


class CellName(enum.StrEnum):
    """The cells that can be measured on a user's own lengths."""

    LSTM = "lstm"
    GRU = "gru"
    RNN = "rnn"


Repeats = Annotated[
    int | None,
    typer.Option(min=1, help="Turns to time.", show_default=f"{_REPEATS}; of epoch {_REPEATS_OF_EPOCH}"),
]
Peer = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help=f"Measure only this; repeatable: {', '.join(PEERS)}. Of epoch: {', '.join(BATCHERS)}.",
        show_default="all",
    ),
]


def bench(
    workload: Annotated[
        str | None, typer.Argument(metavar="WORKLOAD", help=f"One of {', '.join(workload_names())}.")
    ] = None,
    lengths: Annotated[
        pathlib.Path | None,
        typer.Option(
            "--lengths", metavar="FILE", help="Your own lengths: of one batch; of epoch, all. - reads standard input."
        ),
    ] = None,
    cell: Annotated[
        CellName | None, typer.Option(help="The cell to run on --lengths.", show_default="lstm", case_sensitive=False)
    ] = None,
    features: Annotated[
        int | None, typer.Option(min=1, help="Input features, with --lengths.", show_default="128")
    ] = None,
    hidden_size: Annotated[
        int | None, typer.Option(min=1, help="Hidden size, with --lengths.", show_default="256")
    ] = None,
    repeats: Repeats = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of lengths, inputs and weights.")] = 0,
    peer: Peer = None,
    json_file: Annotated[
        pathlib.Path | None,
        typer.Option("--json", metavar="FILE", callback=check_json, help="Write all that was found."),
    ] = None,
    plot_file: Annotated[
        pathlib.Path | None,
        typer.Option("--plot", metavar="FILE", callback=check_plot, help="Draw the ratios (.png, .svg, .pdf, ...)."),
    ] = None,
    huge_pages: Annotated[
        bool,
        typer.Option("--huge-pages", help="Measure again in a process with that variable set; twice the time."),
    ] = False,
) -> None:
    """Measure packed and padded layers of jaxpack, Flax, PyTorch, Haiku and Keras.

    All run in one process, in turns, with the same batch and the same number
    of threads; what is not installed is listed. Without a WORKLOAD or --lengths
    it is lognormal: 64 sequences, half of them longer than 50 steps.

    The workload epoch is another: it trains one layer of jaxpack through 4,096
    such sequences, or as many as --lengths has, in batches of 64 that are
    padded, bucketed and slot-filled, and times what the host does for them too.

    On Linux, temporary memory above 32 MiB costs page faults: glibc's malloc
    hands it back to the system after every call, and gets it again page by
    page. The report counts them. Set the environment variable
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 before Python starts, and there are
    few; --huge-pages shows the difference.
    """
    is_epoch = workload == EPOCH
    if is_epoch:
        _check_options_of_epoch(huge_pages, plot_file)
    if huge_pages:
        _check_huge_pages(lengths)
    names = _peer_names(peer, BATCHERS if is_epoch else PEERS)
    chosen = _workload(workload, lengths, cell, features, hidden_size, seed)
    repeats = repeats or (_REPEATS_OF_EPOCH if is_epoch else _REPEATS)
    result = _with_progress(functools.partial(measure_epoch if is_epoch else measure, chosen, names, repeats))
    if huge_pages:
        result["huge_pages"] = _with_huge_pages(_arguments(chosen, lengths, names, repeats))
    (print_epoch if is_epoch else print_bench)(result, Console())
    if json_file is not None:
        with writing(json_file):
            json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if plot_file is not None:
        with writing(plot_file):
            plot.plot_bench(result).savefig(plot_file)


def _peer_names(given: list[str] | None, known: Iterable[str]) -> list[str]:
    """What to measure of what is known, in the order of the report."""
    known = list(known)
    unknown = [name for name in given or () if name not in known]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is not known. There are {', '.join(known)}.", param_hint="'--peer'")
    return [name for name in known if not given or name in given]


def _workload(
    name: str | None,
    path: pathlib.Path | None,
    cell: CellName | None,
    features: int | None,
    hidden_size: int | None,
    seed: int,
) -> Workload:
    """The workload of a name, or of the user's own lengths."""
    options: dict[str, Any] = {"cell": cell and cell.value, "features": features, "hidden_size": hidden_size}
    given = {option: value for option, value in options.items() if value is not None}
    if path is None:
        name = "lognormal" if name is None else name
        for option in given:
            raise typer.BadParameter(
                f"the workload {name} has its own. It goes with --lengths FILE.", param_hint=f"'--{_dashed(option)}'"
            )
        try:
            return named_workload(name, seed)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="'WORKLOAD'") from error
    hint = "'--lengths'"
    if name not in (None, EPOCH):
        raise typer.BadParameter(f"give a workload ({name}) or lengths, not both.", param_hint=hint)
    workload = Workload(pathlib.Path(name_of(path)).name, read_lengths(path, "--lengths"), seed=seed, **given)
    if not workload.tokens:
        raise typer.BadParameter(f"all lengths in {name_of(path)} are 0: there is nothing to compute.", param_hint=hint)
    _check_size(workload, path, is_epoch=name == EPOCH)
    return workload


def _check_size(workload: Workload, path: pathlib.Path, *, is_epoch: bool) -> None:
    """Raises if the inputs, or outputs, would not fit in memory."""
    sequences = BATCH_SIZE if is_epoch else workload.batch_size
    cells = sequences * workload.longest
    what = f"makes one padded batch of {sequences:,} x {workload.longest:,} steps"
    way_out = "Give the lengths of one batch, or those of a whole corpus to the workload epoch."
    if is_epoch:
        way_out = "Give those of a part of the corpus."
        if workload.tokens > cells:
            cells, what = workload.tokens, f"has {workload.tokens:,} steps in all"
    size = cells * max(workload.features, workload.layer.output_size) * 4
    if size > _MOST_BYTES:
        raise typer.BadParameter(f"{name_of(path)} {what}, {size / 2**30:.0f} GiB. {way_out}", param_hint="'--lengths'")


def _check_options_of_epoch(huge_pages: bool, plot_file: pathlib.Path | None) -> None:
    """Raises if one was given that an epoch has no use for."""
    if huge_pages:
        raise typer.BadParameter(
            f"the workload epoch is measured in one process. Set {_TUNABLES}={HUGE_PAGES} for it, and compare.",
            param_hint="'--huge-pages'",
        )
    if plot_file is not None:
        raise typer.BadParameter(
            "the workload epoch has no drawing. Its numbers go to --json FILE.", param_hint="'--plot'"
        )


def _with_progress(run: Callable[[Tell], dict[str, Any]]) -> dict[str, Any]:
    """The result of a measurement, with a progress bar."""
    columns = TextColumn("{task.description:26}"), BarColumn(24), TimeElapsedColumn()
    # Drawn only when told: a bar that redraws itself would take time from what is being timed.
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
        task = progress.add_task("", total=1)

        def tell(doing: str, done: float) -> None:
            progress.update(task, description=doing, completed=done, refresh=True)

        return run(tell)


def _check_huge_pages(lengths: pathlib.Path | None) -> None:
    """Raises unless a process with huge pages would be another one, and can read the lengths again."""
    name, version = platform.libc_ver()
    hint = "'--huge-pages'"
    if str(lengths) == STANDARD_INPUT:
        raise typer.BadParameter("it reads the lengths twice, and so not from standard input.", param_hint=hint)
    if name != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < _FIRST_GLIBC:
        first = ".".join(map(str, _FIRST_GLIBC))
        raise typer.BadParameter(
            f"{_TUNABLES} is of glibc {first} and newer; here is {name} {version}.", param_hint=hint
        )
    if HUGE_PAGES in os.environ.get(_TUNABLES, ""):
        raise typer.BadParameter(f"{_TUNABLES} has {HUGE_PAGES} already: leave one of the two out.", param_hint=hint)


def _arguments(workload: Workload, path: pathlib.Path | None, names: list[str], repeats: int) -> list[str]:
    """The command line of the same run."""
    arguments = ["bench", "--repeats", str(repeats), "--seed", str(workload.seed)]
    for name in names:
        arguments += ["--peer", name]
    if path is None:
        return [*arguments, workload.name]
    for option in ("cell", "features", "hidden_size"):
        arguments += [f"--{_dashed(option)}", str(getattr(workload, option))]
    return [*arguments, "--lengths", str(path)]


def _with_huge_pages(arguments: list[str]) -> dict[str, Any]:
    """The result of the same command in a process of its own: malloc reads the variable only at the start."""
    tunables = ":".join(filter(None, (os.environ.get(_TUNABLES), HUGE_PAGES)))
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "result.json"
        command = [sys.executable, "-m", "jaxpack", *arguments, "--json", str(file)]
        subprocess.run(command, env={**os.environ, _TUNABLES: tunables}, stdout=subprocess.DEVNULL, check=True)
        return json.loads(file.read_text(encoding="utf-8"))


def _dashed(option: str) -> str:
    return option.replace("_", "-")
