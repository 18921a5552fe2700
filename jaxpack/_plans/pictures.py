"""Pictures of plans, drawn from their marks: characters for terminals, inline SVG for notebooks.

Time runs right, rows run down, longest first; slots that share a row alternate in shade. Large plans are sampled, so
that a picture stays small. In HTML, text and lines take the page's own colour, cells differ in lightness on light and
on dark pages alike, and all text from a caller is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from jaxpack._plans.marks import MISFIT, REAL, REAL_TOO, SLACK, Marks

_Entry = tuple[tuple[int, ...], str]  # of a legend: kinds of cells, and their text

_CHARACTERS = np.array(list(" █▓░!"))
_COLORS = ("", "#0072B2", "#56B4E9", "#0072B2", "#D55E00")  # Okabe and Ito's
_OPACITIES = (0.0, 1.0, 1.0, 0.35, 1.0)

_WIDTH, _HEIGHT = 384, 192  # of the cells of an SVG picture at most, in pixels
_CELL_WIDTH, _CELL_HEIGHT = 28, 18  # of one cell at most
_LINES = 64  # rows that are drawn at most
_COLUMNS = (384, 192, 96, 48)  # steps that are told apart at most: the first that makes no more runs of cells than
_RUNS = 2400  # this, which is some 20 kB
_OUTLINES = 32  # buckets at most whose edges are drawn
_CHARACTER = 6.5  # the width of one, in pixels


def text_picture(marks: Marks) -> str:
    """Draws marks in characters: █ and ▓ are real cells of slots that take turns in a row, ░ is slack, ! a misfit."""
    return "\n".join("".join(line).rstrip() for line in _CHARACTERS[marks.cells])


def html_picture(sample: Callable[[int, int], Marks], caption: Iterable[str]) -> str:
    """Draws a plan as a figure: a caption, and an SVG whose axes name the last steps and the rows of its buckets.

    Args:
      sample: sample(columns, lines) returns the marks of the plan in at most as many columns and lines.
      caption: the lines of the caption, in plain text.
    """
    caption, marks = list(caption), _small_enough(sample)
    if not marks.num_rows:  # a batch of no sequences
        return _figure(_caption(caption))
    width, height = min(_WIDTH, _CELL_WIDTH * marks.num_steps), min(_HEIGHT, _CELL_HEIGHT * marks.num_rows)
    if len(marks.cells) < marks.num_rows:
        caption.append(f"{len(marks.cells)} of {marks.num_rows:,} rows are drawn")
    left, top = _CHARACTER * len(counted(marks.num_rows, "row")) + 10, 20
    right = _CHARACTER * len(f"{marks.num_steps:,} steps") + 4
    legend, legend_width = _legend(_entries(marks))
    drawing = (
        f'<g transform="translate({left} {top})">{_cells(marks.cells, width, height)}'
        f"{_outlines(marks, width, height)}{_step_axis(marks, width)}{_row_axis(marks, height)}</g>"
        f'<g transform="translate({left} {top + height + 18})">{legend}</g>'
    )
    svg = _svg(left + max(width + right, legend_width), top + height + 24, "; ".join(caption), drawing)
    return _figure(_caption(caption) + svg)


def html_counts(texts: Mapping[str, str], real: int, cells: int) -> str:
    """Draws a table of one row, and below it a bar with the share of real cells.

    Args:
      texts: the entry under each column's title, in plain text.
      real: the number of real cells.
      cells: the number of all cells.
    """
    style = "padding:2px 8px;text-align:right"
    titles, values = (
        "".join(f'<{tag} style="{style}">{html.escape(text)}</{tag}>' for text in row)
        for tag, row in (("th", texts.keys()), ("td", texts.values()))
    )
    width, height, share = _WIDTH, 14, real / cells if cells else 0.0
    legend, legend_width = _legend([((REAL,), f"{real:,} real"), ((SLACK,), f"{cells - real:,} slack")])
    bar = _box(REAL, 0, 0, width * share, height) + _box(SLACK, width * share, 0, width * (1 - share), height)
    drawing = f'{bar}<g transform="translate(0 {height + 16})">{legend}</g>'
    svg = _svg(max(width, legend_width), height + 22, f"{share:.1%} of {counted(cells, 'cell')} real", drawing)
    return _figure(f"<table><thead><tr>{titles}</tr></thead><tbody><tr>{values}</tr></tbody></table>{svg}")


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun: "1 row", "4,096 rows"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _small_enough(sample: Callable[[int, int], Marks]) -> Marks:
    """Samples a plan to as many columns as keep the picture small."""
    for columns in _COLUMNS:
        marks = sample(columns, _LINES)
        if np.count_nonzero(np.diff(marks.cells)) <= _RUNS:
            break
    return marks


def _entries(marks: Marks) -> list[_Entry]:
    """Returns the entries of the legend: the number of cells of each kind."""
    real: tuple[int, ...] = (REAL, REAL_TOO) if marks.shares_rows else (REAL,)
    if marks.slack is None:
        return [(real, counted(marks.real, "cell") + (", slots in two shades" if marks.shares_rows else ""))]
    entries: list[_Entry] = [(real, f"{marks.real:,} real"), ((SLACK,), f"{marks.slack:,} slack")]
    return entries + [((MISFIT,), f"{marks.misfit:,} cells of misfits")] * bool(marks.misfit)


def _cells(kinds: np.ndarray, width: float, height: float) -> str:
    """Draws runs of equal cells as strokes one row high, in a path for each kind."""
    lines, columns = kinds.shape
    row, start = np.nonzero(np.diff(kinds, axis=1, prepend=-1))
    stop = np.append(start[1:], columns)
    stop[stop == 0] = columns
    kind_of_run = kinds[row, start]
    across, down = width / columns, height / lines
    thickness = 1 - 1 / down if down > 4 else 1  # a gap of a pixel between rows that have room for it
    paths = []
    for kind in range(REAL, MISFIT + 1):
        runs = np.stack([start, row, stop - start])[:, kind_of_run == kind].T
        if len(runs):
            moves = "".join(f"M{x} {y}h{length}" for x, y, length in runs)
            opacity = "" if _OPACITIES[kind] == 1 else f' stroke-opacity="{_OPACITIES[kind]}"'
            paths.append(f'<path d="{moves}" stroke="{_COLORS[kind]}"{opacity}/>')
    scale = f"scale({across:.6g} {down:.6g}) translate(0 .5)"
    return f'<g transform="{scale}" stroke-width="{thickness:.3g}" shape-rendering="crispEdges">{"".join(paths)}</g>'


def _outlines(marks: Marks, width: float, height: float) -> str:
    """Draws the edges of buckets, if they are few."""
    if len(marks.stairs) > _OUTLINES:
        return ""
    x, y = width / marks.num_steps, height / marks.num_rows
    boxes = "".join(
        f"M{start * x:.1f} 0h{(stop - start) * x:.1f}v{rows * y:.1f}h{(start - stop) * x:.1f}z"
        for start, stop, rows in marks.stairs
    )
    return f'<path d="{boxes}" fill="none" stroke="currentColor" stroke-opacity=".6"/>'


def _step_axis(marks: Marks, width: float) -> str:
    """Writes the end steps of buckets above the cells."""
    x = width / marks.num_steps
    wide = _CHARACTER * len(f"{marks.num_steps:,}")
    ticks = "".join(
        f'<text x="{end * x:.1f}" y="-6" text-anchor="middle">{end:,}</text>'
        for end in _apart((0, *(stop for _, stop, _ in marks.stairs)), x, wide + 6)
    )
    return f'{ticks}<text x="{width + wide / 2 + 4:.1f}" y="-6">steps</text>'


def _row_axis(marks: Marks, height: float) -> str:
    """Writes the rows of buckets left of the cells."""
    y = height / marks.num_rows
    last, *others = _apart(sorted({rows for _, _, rows in marks.stairs}), y, 16)
    labels = {last: counted(last, "row")} | {end: f"{end:,}" for end in others}
    return "".join(f'<text x="-6" y="{end * y:.1f}" text-anchor="end">{label}</text>' for end, label in labels.items())


def _apart(ends: Sequence[int], scale: float, distance: float) -> list[int]:
    """Thins increasing numbers out to those at least `distance` apart, from the last to the first."""
    kept = [ends[-1]]
    for end in reversed(ends):
        if (kept[-1] - end) * scale >= distance:
            kept.append(end)
    return kept


def _caption(lines: Iterable[str]) -> str:
    return f"<figcaption>{''.join(f'<div>{html.escape(line)}</div>' for line in lines)}</figcaption>"


def _legend(entries: Iterable[_Entry]) -> tuple[str, float]:
    """Draws squares with their texts on one line; returns it with its width."""
    parts, x = [], 0.0
    for kinds, text in entries:
        for kind in kinds:
            parts.append(_box(kind, x, -9, 10, 10))
            x += 12
        parts.append(f'<text x="{x + 3:.1f}">{text}</text>')
        x += 3 + _CHARACTER * len(text) + 12
    return "".join(parts), x


def _box(kind: int, x: float, y: float, width: float, height: float) -> str:
    """Draws a rectangle in the colour of a kind of cells."""
    color, opacity = _COLORS[kind], _OPACITIES[kind]
    return f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}" fill="{color}" fill-opacity="{opacity}"/>'


def _figure(contents: str) -> str:
    return f'<figure style="margin:4px 0;font-family:system-ui,sans-serif;font-size:13px">{contents}</figure>'


def _svg(width: float, height: float, title: str, drawing: str) -> str:
    """Wraps a drawing, in the page's text colour, with a title for readers who cannot see it."""
    return (
        f'<svg role="img" width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'style="max-width:100%;height:auto" fill="currentColor" font-size="11"><title>{html.escape(title)}</title>'
        f"{drawing}</svg>"
    )
