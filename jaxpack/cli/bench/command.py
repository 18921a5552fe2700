"""The command `jaxpack bench`: the speed of packed layers on this machine, beside other libraries."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.console import Console

from jaxpack import plot
from jaxpack.cli._devices import CpuDevices, cpu_mesh
from jaxpack.cli._files import STANDARD_INPUT, JsonFile, check_plot, name_of, read_lengths, write_json, writing
from jaxpack.cli.bench.epoch import BATCH_SIZE, BATCHERS, measure_epoch
from jaxpack.cli.bench.epoch_report import print_epoch
from jaxpack.cli.bench.measure import HUGE_PAGES, measure
from jaxpack.cli.bench.peers import PEERS
from jaxpack.cli.bench.progress import with_progress
from jaxpack.cli.bench.report import print_bench
from jaxpack.cli.bench.workloads import CELLS, EPOCH, Workload, named_workload, with_cell, workload_names

_TUNABLES = "GLIBC_TUNABLES"
_FIRST_GLIBC = (2, 35)  # the first with HUGE_PAGES
_MOST_BYTES = 2**32  # of inputs or outputs
_REPEATS, _REPEATS_OF_EPOCH = 15, 3


Lengths = Annotated[
    pathlib.Path | None,
    typer.Option(
        "--lengths", metavar="FILE", help="Your lengths: of one batch, or of a corpus for epoch. - for standard input."
    ),
]
Cell = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"Run this layer in place of the workload's own: {', '.join(CELLS)}.",
        show_default="the workload's; lstm for --lengths",
    ),
]
Repeats = Annotated[
    int | None,
    typer.Option(min=1, help="Turns to time.", show_default=f"{_REPEATS}; {_REPEATS_OF_EPOCH} for epoch"),
]
Peer = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help=f"Measure only this; repeatable: {', '.join(PEERS)}. For epoch: {', '.join(BATCHERS)}.",
        show_default="all",
    ),
]
PlotFile = Annotated[
    pathlib.Path | None,
    typer.Option("--plot", metavar="FILE", callback=check_plot, help="Draw the ratios (.png, .svg, .pdf, ...)."),
]


def bench(
    workload: Annotated[
        str | None, typer.Argument(metavar="WORKLOAD", help=f"One of {', '.join(workload_names())}.")
    ] = None,
    lengths: Lengths = None,
    cell: Cell = None,
    features: Annotated[
        int | None, typer.Option(min=1, help="Input features, with --lengths.", show_default="128; 4 of images")
    ] = None,
    hidden_size: Annotated[
        int | None, typer.Option(min=1, help="Hidden size, with --lengths.", show_default="256; 8 of images")
    ] = None,
    repeats: Repeats = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of lengths, inputs and weights.")] = 0,
    peer: Peer = None,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
    cpu_devices: CpuDevices = 1,
    huge_pages: Annotated[
        bool,
        typer.Option("--huge-pages", help="Measure again in a process with that variable set: twice the time."),
    ] = False,
) -> None:
    """Measure packed and padded layers of jaxpack, Flax, PyTorch, Haiku and Keras.

    --cell runs any layer on any batch. Layers that are linear in their state run
    beside scans over the padded batch, memax, memorax and mamba2-jax; those that
    run step by step beside their equations in flax.nnx.RNN.

    All libraries run in one process, in turns, with the same batch and the same
    number of threads; those that are not installed are listed. The default
    WORKLOAD is lognormal: 64 sequences, half of them longer than 50 steps.

    The workload epoch trains one layer of jaxpack on 4,096 such sequences, or
    on those of --lengths, in batches of 64 that are padded, bucketed and
    slot-filled. Its times include the host's work. The command bench gpu
    measures plans on a CUDA device, and bench rollout measures resets and
    episodes.

    On Linux, temporary memory above 32 MiB costs page faults, which the report
    counts: glibc's malloc returns it to the system after every call, and gets
    it again page by page. There are few page faults if the environment variable
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 is set before Python starts;
    --huge-pages shows the difference.

    --cpu-devices N uses the CPU as N devices: beside jaxpack on one of them runs
    jaxpack-devices, or slot-filled-devices, with a shard of each batch on each.
    """
    is_epoch = workload == EPOCH
    if is_epoch:
        _check_options_of_epoch(huge_pages, plot_file)
    if huge_pages:
        _check_huge_pages(lengths)
    names = peer_names(peer, BATCHERS if is_epoch else PEERS)
    chosen = _workload(workload, lengths, cell, features, hidden_size, seed)
    chosen = _on_devices(chosen, cpu_devices, is_epoch=is_epoch)
    repeats = repeats or (_REPEATS_OF_EPOCH if is_epoch else _REPEATS)
    result = with_progress(functools.partial(measure_epoch if is_epoch else measure, chosen, names, repeats))
    if huge_pages:
        result["huge_pages"] = _with_huge_pages(_arguments(chosen, lengths, names, repeats))
    (print_epoch if is_epoch else print_bench)(result, Console())
    write_json(json_file, result)
    if plot_file is not None:
        with writing(plot_file):
            plot.plot_bench(result).savefig(plot_file)


def peer_names(given: list[str] | None, known: Iterable[str]) -> list[str]:
    """Returns the known names that were given, or all of them, in the order of the report."""
    known = list(known)
    unknown = [name for name in given or () if name not in known]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is unknown. Choose from {', '.join(known)}.", param_hint="'--peer'")
    return [name for name in known if not given or name in given]


def _on_devices(workload: Workload, count: int, *, is_epoch: bool) -> Workload:
    """Returns the workload with a mesh of so many devices, which must divide a batch."""
    batch_size = BATCH_SIZE if is_epoch else workload.batch_size
    return dataclasses.replace(workload, mesh=cpu_mesh(count, batch_size, "Pass a divisor of it."))


def _workload(
    name: str | None,
    path: pathlib.Path | None,
    cell: str | None,
    features: int | None,
    hidden_size: int | None,
    seed: int,
) -> Workload:
    """Returns the workload with a name and any cell, or that of the user's lengths."""
    cell = None if cell is None else _cell_name(cell)
    sizes = {"features": features, "hidden_size": hidden_size}
    given = {option: value for option, value in sizes.items() if value is not None}
    if path is None:
        workload = _named(name or "lognormal", cell, given, seed)
    else:
        if name not in (None, EPOCH):
            raise typer.BadParameter(f"pass a workload ({name}) or lengths, not both.", param_hint="'--lengths'")
        workload = Workload(pathlib.Path(name_of(path)).name, read_lengths(path, "--lengths"), seed=seed)
        workload = with_cell(workload, cell or workload.cell, **given)
    try:
        _ = workload.layer
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--cell'") from error
    if path is not None:
        _check_lengths(workload, path, is_epoch=name == EPOCH)
    return workload


def _cell_name(given: str) -> str:
    """Returns the name of a cell, given in any case."""
    if given.lower() not in CELLS:
        raise typer.BadParameter(f"{given!r} is no cell. Choose one of {', '.join(CELLS)}.", param_hint="'--cell'")
    return given.lower()


def _named(name: str, cell: str | None, sizes: dict[str, int], seed: int) -> Workload:
    """Returns the workload with a name, which has sizes of its own, with this cell, or its own one."""
    for option in sizes:
        raise typer.BadParameter(
            f"the workload {name} has a fixed one. Use it with --lengths FILE.", param_hint=f"'--{_dashed(option)}'"
        )
    try:
        workload = named_workload(name, seed)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'WORKLOAD'") from error
    return workload if cell in (None, workload.cell) else with_cell(workload, cell)


def _check_lengths(workload: Workload, path: pathlib.Path, *, is_epoch: bool) -> None:
    """Raises if all lengths are 0, or the inputs or outputs would not fit in memory."""
    if not workload.tokens:
        raise typer.BadParameter(
            f"all lengths in {name_of(path)} are 0: there is nothing to compute.", param_hint="'--lengths'"
        )
    _check_size(workload, path, is_epoch=is_epoch)


def _check_size(workload: Workload, path: pathlib.Path, *, is_epoch: bool) -> None:
    """Raises if the inputs or outputs would not fit in memory."""
    sequences = BATCH_SIZE if is_epoch else workload.batch_size
    cells = sequences * workload.longest
    what = f"makes one padded batch of {sequences:,} x {workload.longest:,} steps"
    way_out = "Pass the lengths of one batch, or those of a whole corpus to the workload epoch."
    if is_epoch:
        way_out = "Pass those of a part of the corpus."
        if workload.tokens > cells:
            cells, what = workload.tokens, f"has {workload.tokens:,} steps in all"
    size = cells * max(math.prod(workload.input_shape), math.prod(workload.output_shape)) * 4
    if size > _MOST_BYTES:
        raise typer.BadParameter(f"{name_of(path)} {what}, {size / 2**30:.0f} GiB. {way_out}", param_hint="'--lengths'")


def _check_options_of_epoch(huge_pages: bool, plot_file: pathlib.Path | None) -> None:
    """Raises if an option does not apply to the workload epoch."""
    if huge_pages:
        raise typer.BadParameter(
            f"the workload epoch runs in one process. Set {_TUNABLES}={HUGE_PAGES} for another run, and compare.",
            param_hint="'--huge-pages'",
        )
    if plot_file is not None:
        raise typer.BadParameter(
            "the workload epoch has no plot. --json FILE writes its numbers.", param_hint="'--plot'"
        )


def _check_huge_pages(lengths: pathlib.Path | None) -> None:
    """Raises unless a process with huge pages would differ from this one, and can read the lengths again."""
    name, version = platform.libc_ver()
    hint = "'--huge-pages'"
    if str(lengths) == STANDARD_INPUT:
        raise typer.BadParameter("it reads the lengths twice, which standard input does not allow.", param_hint=hint)
    if name != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < _FIRST_GLIBC:
        first, found = ".".join(map(str, _FIRST_GLIBC)), f"{name} {version}".strip() or "another C library"
        raise typer.BadParameter(f"it needs glibc {first} or newer; this system has {found}.", param_hint=hint)
    if HUGE_PAGES in os.environ.get(_TUNABLES, ""):
        raise typer.BadParameter(f"{_TUNABLES} already has {HUGE_PAGES}: leave out one of the two.", param_hint=hint)


def _arguments(workload: Workload, path: pathlib.Path | None, names: list[str], repeats: int) -> list[str]:
    """Returns the command line of the same run."""
    arguments = ["bench", "--repeats", str(repeats), "--seed", str(workload.seed)]
    if workload.mesh is not None:
        arguments += ["--cpu-devices", str(workload.mesh.size)]
    for name in names:
        arguments += ["--peer", name]
    arguments += ["--cell", workload.cell]
    if path is None:
        return [*arguments, workload.name]
    for option in ("features", "hidden_size"):
        arguments += [f"--{_dashed(option)}", str(getattr(workload, option))]
    return [*arguments, "--lengths", str(path)]


def _with_huge_pages(arguments: list[str]) -> dict[str, Any]:
    """Runs the same command in a new process, since malloc reads the variable only at the start."""
    tunables = ":".join(filter(None, (os.environ.get(_TUNABLES), HUGE_PAGES)))
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "result.json"
        command = [sys.executable, "-m", "jaxpack", *arguments, "--json", str(file)]
        subprocess.run(command, env={**os.environ, _TUNABLES: tunables}, stdout=subprocess.DEVNULL, check=True)
        return json.loads(file.read_text(encoding="utf-8"))


def _dashed(option: str) -> str:
    return option.replace("_", "-")
