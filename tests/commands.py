"""Calls of the command line in process, as a user types them."""

import re

from typer.testing import CliRunner

from jaxpack.cli.app import app


def bench(*arguments):
    """Runs `jaxpack bench` in a terminal of 80 columns without colours."""
    environment = {"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}
    return CliRunner().invoke(app, [str(a) for a in ("bench", *arguments)], env=environment)


def message(result):
    """Returns an error or a help text without its box and line breaks."""
    return " ".join(re.sub(r"\x1b\[[\d;]*m|[│╭╮╰╯─]", " ", result.output).split())
