"""The command `jaxpack bench gpu`: layers and plans on a CUDA device, beside cuDNN, in a bounded time."""

from __future__ import annotations

import enum
import functools
import os
import pathlib
from typing import Annotated

import jax
import typer
from rich.console import Console

from jaxpack.cli._files import JsonFile, check_file, write_json, writing
from jaxpack.cli.bench.gpu.cases import TINY, Case, all_cases
from jaxpack.cli.bench.gpu.report import markdown, print_gpu
from jaxpack.cli.bench.gpu.run import Options, measure_gpu
from jaxpack.cli.bench.progress import with_progress

_BUDGET = 450  # seconds


class GraphsName(enum.StrEnum):
    """The keys of GRAPHS."""

    DEFAULT = "default"
    OFF = "off"
    LOOPS = "loops"


def bench_gpu(
    budget: Annotated[int, typer.Option(min=1, metavar="SECONDS", help="The time to spend.")] = _BUDGET,
    repeats: Annotated[int, typer.Option(min=1, help="Turns to time in each case.")] = 10,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of lengths, inputs and weights.")] = 0,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Measure only cases with this text in their names; repeatable."),
    ] = None,
    graphs: Annotated[
        GraphsName | None,
        typer.Option(
            help="What XLA makes a CUDA graph: loop bodies, nothing, or whole loops.",
            show_default="default, and two cases with the others",
        ),
    ] = None,
    cpu: Annotated[
        bool, typer.Option("--cpu", help=f"Try the command out on the CPU, with all sizes divided by {TINY}.")
    ] = False,
    json_file: JsonFile = None,
    markdown_file: Annotated[
        pathlib.Path | None,
        typer.Option("--markdown", metavar="FILE", callback=check_file, help="Write tables to FILE, as Markdown."),
    ] = None,
) -> None:
    """Measure plans of jaxpack on a CUDA device, beside Flax, cuDNN and PyTorch.

    LSTM, GRU and RNN in float32 and bfloat16, for batches of 64 and 256 and
    hidden sizes of 256, 512 and 1,024, on log-normal and equal lengths and in
    two bidirectional layers; and for 16 sequences of 1,024 steps, hidden size
    768. Cases come in an order in which each says most about what is not known
    yet: first an LSTM in float32, then those that differ from it in one
    respect, then in two. Each runs in a process of its own. The report says
    which were left out when the time was over.

    jax-cudnn is jax.experimental.rnn, which has an LSTM in float32 only.
    """
    cases = _chosen(all_cases(graphs and graphs.value, TINY if cpu else 1), only or [])
    if not cpu:
        _check_device()
    run = functools.partial(measure_gpu, cases, Options(budget, repeats, seed))
    result = with_progress(run, width=40)
    print_gpu(result, Console())
    write_json(json_file, result)
    if markdown_file is not None:
        with writing(markdown_file):
            markdown_file.write_text(markdown(result), encoding="utf-8")
    if not result["cases"] or any(case["failed"] for case in result["cases"]):
        raise typer.Exit(1)


def _chosen(cases: list[Case], texts: list[str]) -> list[Case]:
    """Returns the cases whose names have one of the texts; all without texts."""
    chosen = [case for case in cases if not texts or any(text in case.name for text in texts)]
    if not chosen:
        raise typer.BadParameter(
            f"no case has {' or '.join(map(repr, texts))} in its name. Names are such as {cases[0].name} and "
            f"{cases[-1].name}.",
            param_hint="'--only'",
        )
    return chosen


def _check_device() -> None:
    """Raises unless JAX runs on a GPU."""
    # This process holds the device too, while others measure: it must not take most of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        backend = jax.default_backend()
    except RuntimeError as error:  # JAX_PLATFORMS names one that is not there
        backend = f"nothing ({str(error).splitlines()[0]})"
    if backend != "gpu":
        raise typer.BadParameter(
            f"it needs a CUDA device, and JAX runs on {backend} here. Install jax[cuda12] on a machine with a GPU, or "
            f"pass --cpu to try the command out at tiny sizes.",
            param_hint="'bench gpu'",
        )
