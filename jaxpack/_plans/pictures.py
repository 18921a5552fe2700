"""Pictures of plans: characters for terminals, inline SVG for notebooks.

Time runs right, rows run down, longest first; slots that share a row alternate in shade. Large plans are sampled, so
that a picture stays small. In HTML, text and lines take the page's own colour, cells differ in lightness on light and
on dark pages alike, and whatever a caller writes is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxpack._plans.bucket_plan import BucketPlan

_Entry = tuple[tuple[int, ...], str]  # of a legend: marks, and what they stand for

_NOTHING, _REAL, _REAL_TOO, _SLACK, _MISFIT = range(5)  # what a cell is; real ones in the two shades of slots
_CHARACTERS = np.array(list(" █▓░!"))
_COLORS = ("", "#0072B2", "#56B4E9", "#0072B2", "#D55E00")  # Okabe and Ito's
_OPACITIES = (0.0, 1.0, 1.0, 0.35, 1.0)

_WIDTH, _HEIGHT = 384, 192  # of the cells of an SVG picture at most, in pixels
_CELL_WIDTH, _CELL_HEIGHT = 28, 18  # of one cell at most
_LINES = 64  # rows that are drawn at most
_COLUMNS = (384, 192, 96, 48)  # steps that are told apart at most: the first that leave no more runs than
_RUNS = 2400  # that is some 20 kB
_OUTLINES = 32  # buckets at most whose edges are drawn
_CHARACTER = 6.5  # the width of one, in pixels


def text_picture(plan: BucketPlan, filled: np.ndarray, columns: int, lines: int) -> str:
    """The plan in characters: █ and ▓ are real cells of slots that take turns in a row, ░ slack, ! misfits.

    Args:
      plan: what to draw.
      filled: [B] the steps of each slot that are real, or a negative number where its sequence does not fit.
      columns: the widest picture in characters; a longer plan is sampled.
      lines: the highest; a plan of more rows is sampled.
    """
    marks = _CHARACTERS[_sampled(plan, filled, columns, lines)]
    return "\n".join("".join(line).rstrip() for line in marks)


def html_picture(plan: BucketPlan, filled: np.ndarray | None, caption: Iterable[str]) -> str:
    """The plan as a figure: a caption, and an SVG whose axes name the last steps and the rows of its buckets.

    Args:
      plan: what to draw.
      filled: as in `text_picture`; None for the plan alone.
      caption: its lines, in plain text.
    """
    caption = list(caption)
    if not plan.rows[0]:  # a batch of none
        return _figure(
            "<figcaption>" + "".join(f"<div>{html.escape(line)}</div>" for line in caption) + "</figcaption>"
        )
    marks = _small_enough(plan, plan.room if filled is None else filled)
    width, height = min(_WIDTH, _CELL_WIDTH * plan.num_steps), min(_HEIGHT, _CELL_HEIGHT * plan.rows[0])
    if len(marks) < plan.rows[0]:
        caption.append(f"{len(marks)} of {plan.rows[0]:,} rows are drawn")
    left, top = _CHARACTER * len(counted(plan.rows[0], "row")) + 10, 20
    right = _CHARACTER * len(f"{plan.num_steps:,} steps") + 4
    legend, legend_width = _legend(_counts(plan, filled))
    drawing = (
        f'<g transform="translate({left} {top})">{_cells(marks, width, height)}'
        f"{_outlines(plan, width, height)}{_step_axis(plan, width)}{_row_axis(plan, height)}</g>"
        f'<g transform="translate({left} {top + height + 18})">{legend}</g>'
    )
    svg = _svg(left + max(width + right, legend_width), top + height + 24, "; ".join(caption), drawing)
    return _figure(_caption(caption) + svg)


def _caption(lines: Iterable[str]) -> str:
    return f"<figcaption>{''.join(f'<div>{html.escape(line)}</div>' for line in lines)}</figcaption>"


def html_counts(texts: Mapping[str, str], real: int, cells: int) -> str:
    """A table of one row, and below it a bar of how many cells are real.

    Args:
      texts: under each column's title, in plain text, what stands in it.
      real: how many cells are.
      cells: how many there are.
    """
    style = "padding:2px 8px;text-align:right"
    titles, values = (
        "".join(f'<{tag} style="{style}">{html.escape(text)}</{tag}>' for text in row)
        for tag, row in (("th", texts.keys()), ("td", texts.values()))
    )
    width, height, share = _WIDTH, 14, real / cells if cells else 0.0
    legend, legend_width = _legend([((_REAL,), f"{real:,} real"), ((_SLACK,), f"{cells - real:,} slack")])
    bar = _box(_REAL, 0, 0, width * share, height) + _box(_SLACK, width * share, 0, width * (1 - share), height)
    drawing = f'{bar}<g transform="translate(0 {height + 16})">{legend}</g>'
    svg = _svg(max(width, legend_width), height + 22, f"{share:.1%} of {counted(cells, 'cell')} real", drawing)
    return _figure(f"<table><thead><tr>{titles}</tr></thead><tbody><tr>{values}</tr></tbody></table>{svg}")


def counted(number: int, noun: str) -> str:
    """A number of things: "1 row", "4,096 rows"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _sampled(plan: BucketPlan, filled: np.ndarray, columns: int, lines: int) -> np.ndarray:
    """What each cell is, [rows, steps], at most [lines, columns] of them spread evenly.

    It looks cells up slot by slot, and so takes no more memory than the plan has slots and the picture has cells.
    """
    steps, rows = _samples(plan.num_steps, columns), _samples(plan.rows[0], lines)[:, None]
    if not rows.size:
        return np.zeros((0, len(steps)), int)
    by_row = np.lexsort((plan.slot_starts, plan.slot_rows))
    first = plan.slot_starts[by_row] == 0  # in its row
    order = np.arange(len(by_row))
    places = order - np.maximum.accumulate(np.where(first, order, 0))  # in its row
    begins = plan.slot_rows[by_row].astype(np.int64) * plan.num_steps + plan.slot_starts[by_row]
    found = np.searchsorted(begins, rows.astype(np.int64) * plan.num_steps + steps, side="right") - 1
    slots = by_row[found]
    steps_in_slot = steps - plan.slot_starts[slots]
    marks = np.where(steps_in_slot < filled[slots], _REAL + places[found] % 2, _SLACK)
    marks = np.where(filled[slots] < 0, _MISFIT, marks)
    return np.where(rows < plan.batch_sizes[steps], marks, _NOTHING)


def _samples(size: int, most: int) -> np.ndarray:
    """Indices into range(size), all of them or `most` spread evenly."""
    return np.arange(size) if size <= most else ((np.arange(most) + 0.5) * size / most).astype(int)


def _small_enough(plan: BucketPlan, filled: np.ndarray) -> np.ndarray:
    """The cells, in as many columns as leave the picture small."""
    for columns in _COLUMNS:
        marks = _sampled(plan, filled, columns, _LINES)
        if np.count_nonzero(np.diff(marks)) <= _RUNS:
            break
    return marks


def _counts(plan: BucketPlan, filled: np.ndarray | None) -> list[_Entry]:
    """The legend's entries: how many cells of each kind there are."""
    real: tuple[int, ...] = (_REAL, _REAL_TOO) if plan.starts else (_REAL,)
    if filled is None:
        return [(real, counted(plan.size, "cell") + (", slots in two shades" if plan.starts else ""))]
    misfit, tokens = int(plan.room[filled < 0].sum()), int(filled[filled > 0].sum())
    entries: list[_Entry] = [(real, f"{tokens:,} real"), ((_SLACK,), f"{plan.size - tokens - misfit:,} slack")]
    return entries + [((_MISFIT,), f"{misfit:,} cells of misfits")] * bool(misfit)


def _cells(marks: np.ndarray, width: float, height: float) -> str:
    """Runs of equal cells as strokes one row high, a path for each kind."""
    lines, columns = marks.shape
    row, start = np.nonzero(np.diff(marks, axis=1, prepend=-1))
    stop = np.append(start[1:], columns)
    stop[stop == 0] = columns
    kind = marks[row, start]
    across, down = width / columns, height / lines
    thickness = 1 - 1 / down if down > 4 else 1  # a gap of a pixel between rows that have room for it
    paths = []
    for mark in range(_REAL, _MISFIT + 1):
        runs = np.stack([start, row, stop - start])[:, kind == mark].T
        if len(runs):
            moves = "".join(f"M{x} {y}h{length}" for x, y, length in runs)
            opacity = "" if _OPACITIES[mark] == 1 else f' stroke-opacity="{_OPACITIES[mark]}"'
            paths.append(f'<path d="{moves}" stroke="{_COLORS[mark]}"{opacity}/>')
    scale = f"scale({across:.6g} {down:.6g}) translate(0 .5)"
    return f'<g transform="{scale}" stroke-width="{thickness:.3g}" shape-rendering="crispEdges">{"".join(paths)}</g>'


def _outlines(plan: BucketPlan, width: float, height: float) -> str:
    """The edges of buckets, if they are few."""
    if plan.num_buckets > _OUTLINES:
        return ""
    x, y = width / plan.num_steps, height / plan.rows[0]
    boxes = "".join(
        f"M{b.start * x:.1f} 0h{b.steps * x:.1f}v{b.rows * y:.1f}h{-b.steps * x:.1f}z" for b in plan.buckets
    )
    return f'<path d="{boxes}" fill="none" stroke="currentColor" stroke-opacity=".6"/>'


def _step_axis(plan: BucketPlan, width: float) -> str:
    """The end steps of buckets, above the cells."""
    x = width / plan.num_steps
    wide = _CHARACTER * len(f"{plan.num_steps:,}")
    ticks = "".join(
        f'<text x="{end * x:.1f}" y="-6" text-anchor="middle">{end:,}</text>'
        for end in _apart((0, *plan.boundaries), x, wide + 6)
    )
    return f'{ticks}<text x="{width + wide / 2 + 4:.1f}" y="-6">steps</text>'


def _row_axis(plan: BucketPlan, height: float) -> str:
    """The rows of buckets, left of the cells."""
    y = height / plan.rows[0]
    last, *others = _apart(sorted(set(plan.rows)), y, 16)
    labels = {last: counted(last, "row")} | {end: f"{end:,}" for end in others}
    return "".join(f'<text x="-6" y="{end * y:.1f}" text-anchor="end">{label}</text>' for end, label in labels.items())


def _apart(ends: Sequence[int], scale: float, distance: float) -> list[int]:
    """Those of increasing numbers that lie as far apart, from the last to the first."""
    kept = [ends[-1]]
    for end in reversed(ends):
        if (kept[-1] - end) * scale >= distance:
            kept.append(end)
    return kept


def _legend(entries: Iterable[_Entry]) -> tuple[str, float]:
    """Squares and what they stand for, on one line, and its width."""
    parts, x = [], 0.0
    for marks, text in entries:
        for mark in marks:
            parts.append(_box(mark, x, -9, 10, 10))
            x += 12
        parts.append(f'<text x="{x + 3:.1f}">{text}</text>')
        x += 3 + _CHARACTER * len(text) + 12
    return "".join(parts), x


def _box(mark: int, x: float, y: float, width: float, height: float) -> str:
    """A rectangle filled as cells of a kind are."""
    color, opacity = _COLORS[mark], _OPACITIES[mark]
    return f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}" fill="{color}" fill-opacity="{opacity}"/>'


def _figure(contents: str) -> str:
    return f'<figure style="margin:4px 0;font-family:system-ui,sans-serif;font-size:13px">{contents}</figure>'


def _svg(width: float, height: float, title: str, drawing: str) -> str:
    """A drawing in the page's text colour, with a title for those who cannot see it."""
    return (
        f'<svg role="img" width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'style="max-width:100%;height:auto" fill="currentColor" font-size="11"><title>{html.escape(title)}</title>'
        f"{drawing}</svg>"
    )
