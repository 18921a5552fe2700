"""The command `jaxpack`: its door, which opens only if the extra `demo` is installed."""

from __future__ import annotations

import sys

_EXTRA = ("typer", "rich")  # what the extra `demo` brings


def main() -> None:
    """Runs the command line."""
    try:
        from jaxpack.cli.app import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        print(
            f"The command jaxpack needs {missing}, which is not installed: pip install 'jaxpack[demo]'", file=sys.stderr
        )
        sys.exit(1)
    app()
