"""The entry of the command `jaxpack`, which needs the extra `demo`."""

from __future__ import annotations

import errno
import os
import sys

_EXTRA = ("typer", "rich")  # packages of the extra `demo` that the commands need
_CANNOT_PRINT = (errno.EPIPE, errno.ENOSPC, errno.EIO)  # the reader has gone, or the device is full or broken


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
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.errno not in _CANNOT_PRINT or error.filename is not None:
            raise
        if error.errno != errno.EPIPE:
            print(f"The report cannot be written: {error.strerror}.", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        sys.exit(1)
