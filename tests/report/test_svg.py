"""Drawn charts, read back as XML: where values lie, what is written beside them, and that nothing is left unescaped."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

import pytest

from proxsparse_triton.report.charts import Bar, Bars, Curves, HeatMap, Line, Panel, heat_color
from proxsparse_triton.report.grid import grid
from proxsparse_triton.report.svg import WIDTH, draw

EVIL = "<b>&\"'</b>"


def texts(svg: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in svg.iter("text")]


def curves(*panels: Panel, ticks: tuple[float, ...] = (), log: bool = False) -> ElementTree.Element:
    return ElementTree.fromstring(draw(Curves("n", "Title", "What is seen", "step", panels, ticks, log)))


def points(svg: ElementTree.Element) -> list[list[tuple[float, float]]]:
    lines = [(line.get("points") or "").split() for line in svg.iter("polyline")]
    return [[(float(pair.split(",")[0]), float(pair.split(",")[1])) for pair in line] for line in lines]


def test_a_line_lies_where_its_values_are() -> None:
    svg = curves(Panel("y", (Line("end", ((0, 0), (5, 0.5), (10, 1))),), height=100, low=0, high=1))
    ((first, middle, last),) = points(svg)
    assert middle == pytest.approx(((first[0] + last[0]) / 2, (first[1] + last[1]) / 2), abs=0.1)
    assert first[1] - last[1] == 100  # y grows downwards
    (label,) = [text for text in svg.iter("text") if text.text == "end"]
    assert float(label.get("x") or 0) > last[0]
    assert float(label.get("y") or 0) == pytest.approx(last[1] + 4)
    assert {"y", "step", "0", "0.5", "1", "4", "10"} <= set(texts(svg))


def test_panels_stand_below_each_other_on_one_axis() -> None:
    line = Line("", ((1, 1.0), (2, 2.0)))
    upper, lower = points(curves(Panel("a", (line,)), Panel("b", (line,))))
    assert max(y for _, y in upper) < min(y for _, y in lower)
    assert [x for x, _ in upper] == [x for x, _ in lower]


def test_a_logarithmic_axis_has_the_given_ticks() -> None:
    svg = curves(Panel("y", (Line("", ((4, 1), (16, 2), (64, 3))),)), ticks=(4, 16, 64), log=True)
    ((first, middle, last),) = points(svg)
    assert middle[0] - first[0] == pytest.approx(last[0] - middle[0], abs=0.2)
    ticks = {text.text: float(text.get("x") or 0) for text in svg.iter("text")}
    assert [ticks["4"], ticks["16"], ticks["64"]] == pytest.approx([first[0], middle[0], last[0]])


def test_one_point_is_a_dot() -> None:
    svg = curves(Panel("y", (Line("only", ((1, 2.0),)),)))
    assert len(list(svg.iter("circle"))) == 1
    assert not points(svg)


def test_labels_do_not_lie_on_each_other_nor_below_the_axis() -> None:
    lines = tuple(Line(f"line {index}", ((0, 0), (1, 0.001 * index))) for index in range(5))
    svg = curves(Panel("y", lines, low=0, high=1, level=("dense", 0.0)))
    heights = sorted(float(text.get("y") or 0) for text in svg.iter("text") if (text.get("class") or "").startswith("label"))
    assert len(heights) == 6
    assert min(b - a for a, b in pairwise(heights)) >= 13.9
    assert heights[-1] <= max(y for line in points(svg) for _, y in line) + 4.1


def bars(*values: float, level: tuple[str, float] | None = None, log: bool = False) -> ElementTree.Element:
    drawn = tuple(Bar(f"bar {index}", value, f"{value} shown", index) for index, value in enumerate(values))
    return ElementTree.fromstring(draw(Bars("n", "Title", "What is seen", "perplexity", drawn, level, log)))


def lengths(svg: ElementTree.Element) -> list[float]:
    return [float(rect.get("width") or 0) for rect in svg.iter("rect")]


def test_bars_are_as_long_as_their_values() -> None:
    svg = bars(10.0, 40.0, level=("dense", 5.0))
    first, second = lengths(svg)
    assert second / first == pytest.approx(4, rel=1e-3)
    assert {"bar 0", "bar 1", "10.0 shown", "40.0 shown", "dense 5.000", "perplexity"} <= set(texts(svg))
    (level,) = [line for line in svg.iter("line") if line.get("class") == "level"]
    start = float(next(svg.iter("rect")).get("x") or 0)
    assert (float(level.get("x1") or 0) - start) / first == pytest.approx(0.5, rel=1e-2)


def test_logarithmic_bars_show_ratios_to_the_level() -> None:
    svg = bars(20.0, 1000.0, level=("dense", 10.0), log=True)
    first, second = lengths(svg)
    assert second / first == pytest.approx(6.644, rel=1e-2)  # log 100 / log 2
    assert any("a bar's length is the ratio to dense" in text for text in texts(svg))


def heat(values: dict[str, float], percent: bool = True) -> ElementTree.Element:
    return ElementTree.fromstring(draw(HeatMap("n", "Title", "What is seen", "decoder block", "2:4 blocks", grid(values), percent)))


def test_cells_have_their_colour_number_and_name() -> None:
    svg = heat({"layers.0.q.weight": 0.614, "layers.0.k.weight": 0.8, "layers.1.q.weight": 0.951})
    cells = [(group.find("title"), group.find("rect"), group.find("text")) for group in svg.iter("g")]
    found = [(title.text, rect.get("fill"), text.text) for title, rect, text in cells if None not in (title, rect, text)]  # type: ignore[union-attr]
    assert found == [
        ("layers.0.q.weight: 61.4 %", heat_color(0.614, 0.6, 1)[0], "61.4"),
        ("layers.0.k.weight: 80.0 %", heat_color(0.8, 0.6, 1)[0], "80.0"),
        ("layers.1.q.weight: 95.1 %", heat_color(0.951, 0.6, 1)[0], "95.1"),
    ]
    assert {"q", "k", "0", "1", "60 %", "100 %   2:4 blocks", "decoder block ↓"} <= set(texts(svg))


def test_cells_of_experts_say_so_and_changes_are_no_percentages() -> None:
    svg = heat({f"layers.{block}.experts.{index}.up.weight": 0.5 + block for block in range(2) for index in range(8)}, percent=False)
    title = next(iter(svg.iter("g"))).find("title")
    assert title is not None
    assert title.text == "mean of 8 layers, layers.0.experts.0.up.weight and on: 0.500"
    assert "1.50" in texts(svg)


def test_many_columns_are_narrow_slanted_and_inside() -> None:
    svg = heat({f"layers.{block}.projection_{column}_with_a_long_name.weight": 0.5 for block in range(2) for column in range(60)})
    width = float((svg.get("viewBox") or "").split()[2])
    assert width > WIDTH
    assert max(float(rect.get("x") or 0) + float(rect.get("width") or 0) for rect in svg.iter("rect")) <= width
    slanted = [text for text in svg.iter("text") if "rotate" in (text.get("transform") or "")]
    assert len(slanted) == 60
    assert not any(text.get("class", "").startswith("on-") for text in svg.iter("text"))  # no room for numbers


def test_titles_are_read_aloud() -> None:
    svg = bars(1.0)
    assert svg.get("role") == "img"
    title, description = svg.find("title"), svg.find("desc")
    assert title is not None
    assert description is not None
    assert (svg.get("aria-labelledby") or "").split() == [title.get("id"), description.get("id")]
    assert (title.text, description.text) == ("Title", "What is seen")


def test_everything_is_escaped() -> None:
    charts = [
        Curves(EVIL, EVIL, EVIL, EVIL, (Panel(EVIL, (Line(EVIL, ((0, 0), (1, 1))),), level=(EVIL, 0.5)),)),
        Bars(EVIL, EVIL, EVIL, EVIL, (Bar(EVIL, 1.0, EVIL),), (EVIL, 0.5)),
        HeatMap(EVIL, EVIL, EVIL, EVIL, EVIL, grid({f"layers.0.{EVIL}": 0.5, f"{EVIL}.1.q": 0.6})),
    ]
    for chart in charts:
        text = draw(chart)
        assert "<b>" not in text
        assert EVIL in [element.text for element in ElementTree.fromstring(text).iter()]
