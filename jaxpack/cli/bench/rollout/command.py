"""The command `jaxpack bench rollout`: layers over rollouts in which episodes begin, beside Flax and PyTorch."""

from __future__ import annotations

import enum
import functools
from typing import Annotated

import typer
from rich.console import Console

from jaxpack.cli._files import JsonFile, write_json
from jaxpack.cli.bench.command import peer_names
from jaxpack.cli.bench.progress import with_progress
from jaxpack.cli.bench.rollout.cases import CELLS, PROBABILITIES, Sizes, rollouts
from jaxpack.cli.bench.rollout.measure import measure_rollout
from jaxpack.cli.bench.rollout.peers import PEERS
from jaxpack.cli.bench.rollout.report import print_rollout

_SIZES = Sizes()


class RolloutCell(enum.StrEnum):
    """The layers that run over rollouts."""

    GRU = "gru"
    LSTM = "lstm"


def bench_rollout(
    cell: Annotated[
        RolloutCell | None, typer.Option(help="The layer.", show_default="both", case_sensitive=False)
    ] = None,
    probability: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            max=1,
            metavar="P",
            help="The probability that a step begins an episode; repeatable.",
            show_default=", ".join(f"{each:g}" for each in PROBABILITIES),
        ),
    ] = None,
    environments: Annotated[int, typer.Option(min=1, help="Rows of the rollout.")] = _SIZES.environments,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each row.")] = _SIZES.steps,
    features: Annotated[int, typer.Option(min=1, help="Input features.")] = _SIZES.features,
    hidden_size: Annotated[int, typer.Option(min=1, help="Hidden size.")] = _SIZES.hidden_size,
    repeats: Annotated[int, typer.Option(min=1, help="Turns to time in each case.")] = 15,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of resets, inputs and weights.")] = 0,
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"Measure only this; repeatable: {', '.join(PEERS)}.", show_default="all"),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure rollouts in which episodes begin, beside Flax and PyTorch.

    A layer runs over a rollout of 128 environments and 128 steps, each of which
    begins an episode with a fixed probability: with resets=, without resets,
    and cut into fragments of episodes that are packed. Beside it run a
    flax.linen.scan over a cell, with a where on the carry, and torch's module
    on packed fragments. All start from the same weights, and outputs are
    compared before anything is timed.
    """
    names = peer_names(peer, PEERS)
    sizes = Sizes(environments, steps, features, hidden_size)
    cases = rollouts([cell.value] if cell else CELLS, probability or PROBABILITIES, sizes, seed)
    result = with_progress(functools.partial(measure_rollout, cases, names, repeats), width=40)
    print_rollout(result, Console())
    write_json(json_file, result)
