"""Pictures in HTML: every cell once, in its kind; axes and legend say what is drawn; small, escaped, in any theme."""

import functools
import re
from xml.etree import ElementTree

import jax.numpy as jnp
import numpy as np
import pytest
import strategies
from flax import nnx
from hypothesis import given

import jaxpack
from jaxpack import BucketPlan
from jaxpack._plans.pictures import counted, html_counts, html_picture

STAIRS = BucketPlan(boundaries=(2, 4), rows=(3, 1))
ROWS = BucketPlan(boundaries=(4,), rows=(2,), starts=((0,), (0, 2)))
EVEN, ODD, SLACK, MISFIT = ("#0072B2", 1.0), ("#56B4E9", 1.0), ("#0072B2", 0.35), ("#D55E00", 1.0)


def draw(plan, filled, caption):
    """The picture of a plan whose slots are filled so far; None for the plan alone."""
    return html_picture(functools.partial(plan._marks, filled), caption)


def drawn_cells(figure):
    """The kind of each cell that is drawn, a colour and an opacity, by row and step."""
    cells = {}
    for path in figure.iter("path"):
        kind = path.get("stroke"), float(path.get("stroke-opacity", 1))
        for step, row, length in re.findall(r"M(\d+) (\d+)h(\d+)(?=M|$)", path.get("d")):
            for i in range(int(step), int(step) + int(length)):
                assert (int(row), i) not in cells
                cells[int(row), i] = kind
    return cells


def found(figure, path):
    """The one element at a path."""
    element = figure.find(path)
    assert element is not None
    return element


def texts_of(figure):
    return [text.text for text in figure.iter("text")]


@given(strategies.plans)
def test_every_cell_is_drawn_once_and_neighbouring_slots_differ(plan):
    cells = drawn_cells(ElementTree.fromstring(draw(plan, None, [])))
    assert cells.keys() == {(row, step) for step, rows in enumerate(plan.batch_sizes) for row in range(rows)}
    slots = {}
    for row, start, room in zip(plan.slot_rows, plan.slot_starts, plan.room, strict=True):
        slots[row, start] = {cells[row, step] for step in range(start, start + room)}
        assert len(slots[row, start]) == 1
    places = {row: sorted(start for other, start in slots if other == row) for row in plan.slot_rows}
    assert all(slots[row, start] == {(EVEN, ODD)[i % 2]} for row in places for i, start in enumerate(places[row]))


@given(strategies.lengths_and_plan())
def test_real_cells_and_slack_are_as_many_as_the_lengths_say(drawn):
    lengths, plan = drawn
    figure = ElementTree.fromstring(draw(plan, plan.filled(lengths), []))
    kinds = list(drawn_cells(figure).values())
    assert kinds.count(SLACK) == plan.size - sum(lengths)
    assert kinds.count(EVEN) + kinds.count(ODD) == sum(lengths)
    assert {f"{sum(lengths)} real", f"{plan.size - sum(lengths)} slack"} <= set(texts_of(figure))


def test_a_row_is_drawn_from_its_own_start_and_a_misfit_in_its_whole_room():
    cells = drawn_cells(ElementTree.fromstring(draw(ROWS, np.array([3, -1, 1]), [])))
    assert [cells[0, step] for step in range(4)] == [EVEN, EVEN, EVEN, SLACK]
    assert [cells[1, step] for step in range(4)] == [MISFIT, MISFIT, ODD, SLACK]


def test_axes_name_the_last_steps_and_the_rows_of_buckets():
    texts = texts_of(ElementTree.fromstring(draw(STAIRS, STAIRS.filled([4, 1]), [])))
    assert texts == ["4", "2", "0", "steps", "3 rows", "1", "5 real", "3 slack"]
    assert texts_of(ElementTree.fromstring(draw(BucketPlan((1,), (1,)), None, []))) == [
        *("1", "0", "steps", "1 row", "1 cell")
    ]


def test_labels_of_many_buckets_do_not_overlap():
    plan = BucketPlan(tuple(range(1, 301)), tuple(range(300, 0, -1)))
    figure = ElementTree.fromstring(draw(plan, None, []))
    steps = [float(text.attrib["x"]) for text in figure.iter("text") if text.get("text-anchor") == "middle"]
    rows = [float(text.attrib["y"]) for text in figure.iter("text") if text.get("text-anchor") == "end"]
    assert len(steps) > 5
    assert len(rows) > 5
    assert np.diff(steps).max() < -3 * 6  # three digits of some 6 pixels
    assert np.diff(rows).max() < -11  # the size of the font


def test_captions_are_escaped():
    caption = ["<script>alert('&')</script>", 'x"y']
    figure = ElementTree.fromstring(draw(STAIRS, None, caption))
    assert [line.text for line in found(figure, "figcaption")] == caption
    assert found(figure, "svg/title").text == "; ".join(caption)
    assert "<script" not in draw(STAIRS, None, caption)
    assert "<b>" not in html_counts({"<b>": "<b>"}, 1, 2)


def luminance(kind, page):
    """How light a colour is on a grey page, by WCAG's weights."""
    color, opacity = kind
    channels = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.dot((0.2126, 0.7152, 0.0722), (opacity * channels + (1 - opacity) * page) ** 2.2)


@pytest.mark.parametrize("page", [1.0, 0.07])
def test_kinds_differ_in_lightness_on_light_and_on_dark_pages(page):
    real, other, slack = (luminance(kind, page) for kind in (EVEN, ODD, SLACK))
    background = page**2.2
    for lighter, darker in ((real, slack), (real, other), (slack, background), (other, slack)):
        lighter, darker = max(lighter, darker), min(lighter, darker)
        assert (lighter + 0.05) / (darker + 0.05) > 1.25


def test_text_and_lines_take_the_colour_of_the_page_and_the_picture_has_a_name():
    figure = ElementTree.fromstring(draw(STAIRS, None, ["a plan"]))
    svg = found(figure, "svg")
    assert (svg.get("role"), svg.get("fill"), svg[0].tag, svg[0].text) == ("img", "currentColor", "title", "a plan")
    assert all(text.get("fill") is None for text in figure.iter("text"))
    assert figure.findall(".//path[@fill='none'][@stroke='currentColor']")
    assert "color:" not in figure.attrib["style"]


@pytest.mark.parametrize(
    "plan",
    [
        jaxpack.plan_padded(4096, 10_000),
        BucketPlan(tuple(range(2, 6001, 2)), tuple(range(3000, 0, -1))),
        BucketPlan((2000,), (100,), (tuple(range(2000)),) * 100),
        BucketPlan((2000,), (70,), tuple((0, *range(1 + row % 7, 2000, 2)) for row in range(70))),
        BucketPlan((20_000,), (1,), (tuple(range(20_000)),)),
    ],
    ids=["padded", "stairs", "slots of one step", "uneven slots", "one row"],
)
def test_pictures_of_large_plans_are_small(plan):
    for filled in (None, plan.room // 2):
        html = draw(plan, filled, [])
        assert len(html) < 30_000
        figure = ElementTree.fromstring(html)
        drawn = min(plan.rows[0], 64)
        assert {row for row, _ in drawn_cells(figure)} == set(range(drawn))
        assert (f"64 of {plan.rows[0]:,} rows are drawn" in html) == (plan.rows[0] > 64)
    assert "_cells" not in vars(plan)  # no vector of all its cells was made


def test_a_sampled_picture_keeps_the_proportions():
    plan = BucketPlan((5000, 10_000), (4096, 1024))
    cells = drawn_cells(ElementTree.fromstring(draw(plan, None, [])))
    assert len(cells) == 64 * 384 * (1 / 2 + 1 / 8)
    assert max(step for row, step in cells if row == 15) == 383
    assert max(step for row, step in cells if row == 16) == 191


def test_counts_are_a_table_and_a_bar_of_what_is_real():
    figure = ElementTree.fromstring(html_counts({"batches": "3", "cells": "40"}, 10, 40))
    assert [title.text for title in figure.iter("th")] == ["batches", "cells"]
    assert [value.text for value in figure.iter("td")] == ["3", "40"]
    real, slack = (float(box.attrib["width"]) for box in found(figure, "svg").findall("rect"))
    assert real / (real + slack) == pytest.approx(1 / 4)
    assert texts_of(figure) == ["10 real", "30 slack"]
    assert found(figure, "svg/title").text == "25.0% of 40 cells real"
    assert "0.0% of 0 cells" in html_counts({}, 0, 0)


def test_one_thing_is_singular():
    assert [counted(n, "row") for n in (0, 1, 4096)] == ["0 rows", "1 row", "4,096 rows"]


def test_treescope_shows_the_picture_once():
    treescope = pytest.importorskip("treescope", reason="treescope, which flax brings, is not installed")

    class Model(nnx.Module):
        def __init__(self):
            self.plan = STAIRS

    packed = jaxpack.PackedSequence(jnp.ones(8), jnp.array([4, 2, 1]), jnp.arange(3), jnp.arange(3), STAIRS)
    for shown in (STAIRS, packed, Model(), {"batch": [packed]}):
        html = treescope.render_to_html(shown, compressed=False)
        assert html.count("role=&quot;img&quot;") == 1
        assert "BucketPlan(" in treescope.render_to_text(shown)
