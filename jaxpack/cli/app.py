"""The command line `jaxpack`, composed of its commands."""

from __future__ import annotations

from typing import Annotated

import typer

import jaxpack
from jaxpack.cli.bench.command import bench
from jaxpack.cli.demo.command import demo
from jaxpack.cli.demo.g2p.command import g2p
from jaxpack.cli.plan import plan
from jaxpack.cli.serve_bench import serve_bench

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_show_locals=False)
demos = typer.Typer()
demos.callback(invoke_without_command=True)(demo)
demos.command()(g2p)
app.add_typer(demos, name="demo")
for command in (bench, plan, serve_bench):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"jaxpack {jaxpack.__version__}")
        raise typer.Exit


@app.callback()
def _jaxpack(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Packed sequences and recurrent layers for JAX."""
