"""The progress bar of `jaxpack bench`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from jaxpack.cli.bench.turns import Tell


def with_progress(run: Callable[[Tell], dict[str, Any]], width: int = 26) -> dict[str, Any]:
    """Runs a measurement with a progress bar, whose descriptions have `width` characters."""
    columns = TextColumn(f"{{task.description:{width}}}"), BarColumn(24), TimeElapsedColumn()
    # The bar is drawn only by `tell`: an automatic refresh would take time from the timed calls.
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
        task = progress.add_task("", total=1)

        def tell(doing: str, done: float) -> None:
            progress.update(task, description=doing, completed=done, refresh=True)

        return run(tell)
