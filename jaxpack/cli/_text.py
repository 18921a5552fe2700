"""Text that several reports share: the picture of a plan, and the printing of a report's parts."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from rich.console import Console, RenderableType
from rich.text import Text

from jaxpack._plans.bucket_plan import BucketPlan

_ASCII = str.maketrans({"█": "#", "▓": "=", "░": "."})
_WIDTH = 64


def picture_of(plan: BucketPlan, lengths: np.ndarray, lines: int) -> str:
    """Draws a plan with a batch in it, indented. Marks of short plans are doubled, so a cell is as wide as high."""
    double = 2 if plan.num_steps <= _WIDTH // 2 else 1
    drawn = plan.picture(lengths, columns=_WIDTH, lines=lines).splitlines()
    return "\n".join("  " + "".join(mark * double for mark in line) for line in drawn)


def print_parts(parts: Iterable[RenderableType], console: Console) -> None:
    """Prints a report's parts, each after a blank line."""
    for part in parts:
        console.print()
        console.print(_plain_marks(part, console) if isinstance(part, Text) else part, highlight=False)


def _plain_marks(text: Text, console: Console) -> Text:
    """Returns the text in characters that the terminal can print."""
    if not console.options.ascii_only:
        return text
    return Text(text.plain.translate(_ASCII), style=text.style, no_wrap=text.no_wrap)
