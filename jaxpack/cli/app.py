"""The command line `jaxpack`, composed of its commands."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import jaxpack
from jaxpack.cli.bench.command import bench
from jaxpack.cli.bench.gpu.command import bench_gpu
from jaxpack.cli.bench.rollout.command import bench_rollout
from jaxpack.cli.demo.command import demo
from jaxpack.cli.demo.g2p.command import g2p
from jaxpack.cli.launch import launch
from jaxpack.cli.plan import plan
from jaxpack.cli.serve_bench import serve_bench


class _OneOrTwoWords(TyperGroup):
    """Commands of one word or two: `bench gpu` stands beside `bench WORKLOAD`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Finds the command that the arguments begin with."""
        both = " ".join(args[:2])
        return super().resolve_command(ctx, [both, *args[2:]] if both in self.commands else args)


app = typer.Typer(cls=_OneOrTwoWords, add_completion=False, no_args_is_help=True, pretty_exceptions_show_locals=False)
demos = typer.Typer()
demos.callback(invoke_without_command=True)(demo)
demos.command()(g2p)
app.add_typer(demos, name="demo")
app.command()(bench)
app.command("bench gpu")(bench_gpu)
app.command("bench rollout")(bench_rollout)
app.command(context_settings={"allow_interspersed_args": False})(launch)
for command in (plan, serve_bench):
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
