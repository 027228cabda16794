"""Charts as inline SVG: text and shapes with classes, whose colours the page's style sheet sets for light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from .charts import (
    SCALE,
    Bars,
    Chart,
    Curves,
    HeatMap,
    Line,
    Panel,
    bar_range,
    bar_ticks,
    fraction,
    heat_color,
    heat_range,
    panel_ticks,
    step_ticks,
    tick_text,
    x_range,
)
from .text import percent

WIDTH = 760
LEFT = 64
CHARACTER = 6.8  # mean width of one at the size of 12
SLANTED = 180.0  # longest slanted name
LABEL_GAP = 14  # between two lines of text


@dataclass(frozen=True)
class Scale:
    """Values to places on the page."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * fraction(value, self.low, self.high, log=self.log)


def draw(chart: Chart) -> str:
    """One <svg> element."""
    if isinstance(chart, Curves):
        return _curves(chart)
    return _bars(chart) if isinstance(chart, Bars) else _heat_map(chart)


def _svg(chart: Chart, width: float, height: float, parts: Sequence[str]) -> str:
    """The title and description are read aloud in place of the picture."""
    name = escape(chart.name)
    return (
        f'<svg id="{name}" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(chart.title)}</title><desc id="{name}-d">{escape(chart.description)}</desc>{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, kind: str = "", *, anchor: str = "start", more: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    anchor = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}"{kind}{anchor}{more}>{escape(text)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _wide(texts: Sequence[str]) -> float:
    """Width of the longest."""
    return CHARACTER * max(map(len, texts), default=0)


def _shortened(text: str, width: float) -> str:
    """With an ellipsis in its middle where it is wider than `width`."""
    most = max(5, int(width / CHARACTER))
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[most // 2 - most :]}"


def _curves(chart: Curves) -> str:
    labels = [line.label for panel in chart.panels for line in panel.lines] + [panel.level[0] for panel in chart.panels if panel.level]
    right = WIDTH - min(240.0, 16 + _wide(labels))
    x = Scale(*x_range(chart), LEFT, right, chart.log)
    ticks = list(chart.ticks) or step_ticks(x.low, x.high)
    parts: list[str] = []
    top = -8.0
    for panel in chart.panels:
        top += 34
        parts.append(_text(0, top - 10, panel.label, "name"))
        parts += [_rule(x(tick), top, x(tick), top + panel.height, "grid") for tick in ticks]
        parts += _panel(panel, x, top)
        top += panel.height
    parts += [_text(x(tick), top + 16, tick_text(tick), "tick", anchor="middle") for tick in ticks]
    parts.append(_text((LEFT + right) / 2, top + 34, chart.x_label, "name", anchor="middle"))
    return _svg(chart, WIDTH, top + 42, parts)


def _panel(panel: Panel, x: Scale, top: float) -> list[str]:
    ticks = panel_ticks(panel)
    y = Scale(ticks[0], ticks[-1], top + panel.height, top)
    parts = []
    for tick in ticks:
        parts.append(_rule(x.start, y(tick), x.end, y(tick), "axis" if tick == ticks[0] else "grid"))
        parts.append(_text(x.start - 8, y(tick) + 4, tick_text(tick, percent=panel.percent), "tick", anchor="end"))
    parts += [_line(line, x, y) for line in panel.lines if line.points]
    ends = [(line.label, y(line.points[-1][1]), f"label c{line.color % 6}") for line in panel.lines if line.label and line.points]
    if panel.level:
        parts.append(_rule(x.start, y(panel.level[1]), x.end, y(panel.level[1]), "level"))
        ends.append((panel.level[0], y(panel.level[1]), "label"))
    for (text, _, kind), place in zip(ends, _apart([place for _, place, _ in ends], top + panel.height), strict=True):
        parts.append(_text(x.end + 8, place + 4, _shortened(text, WIDTH - x.end - 8), kind))
    return parts


def _line(line: Line, x: Scale, y: Scale) -> str:
    color = line.color % 6
    if line.style == "dots" or len(line.points) == 1:
        return "".join(f'<circle class="c{color}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.5"/>' for a, b in line.points)
    points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points)
    return f'<polyline class="{line.style} c{color}" points="{points}"/>'


def _apart(places: Sequence[float], bottom: float) -> list[float]:
    """The places of texts, moved as little as keeps them from lying on each other and above `bottom`."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = list(places)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + LABEL_GAP)
    limit = bottom
    for index in reversed(order):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - LABEL_GAP
    return moved


def _bars(chart: Bars) -> str:
    height, thick, top = 30, 18, 24
    left = min(260.0, 12 + _wide([bar.label for bar in chart.bars]))
    low, high = bar_range(chart)
    x = Scale(low, high, left, WIDTH - 24 - _wide([bar.text for bar in chart.bars]), chart.log)
    bottom = top + height * len(chart.bars)
    parts = []
    for tick in bar_ticks(chart):
        parts.append(_rule(x(tick), top, x(tick), bottom, "grid"))
        parts.append(_text(x(tick), bottom + 16, tick_text(tick), "tick", anchor="middle"))
    for index, bar in enumerate(chart.bars):
        y = top + height * index + (height - thick) / 2
        length = max(1.0, x(bar.value) - x.start)
        parts.append(_text(left - 8, y + 13, _shortened(bar.label, left - 12), anchor="end"))
        parts.append(f'<rect class="c{bar.color % 6}" x="{left:.1f}" y="{y:.1f}" width="{length:.1f}" height="{thick}"/>')
        parts.append(_text(left + length + 6, y + 13, bar.text, "value"))
    parts.append(_rule(left, top, left, bottom, "axis"))
    if chart.level:
        name, value = chart.level
        parts.append(_rule(x(value), top - 4, x(value), bottom, "level"))
        parts.append(_text(x(value), top - 9, f"{name} {value:.3f}", "label", anchor="start" if x(value) < left + 60 else "middle"))
    scale = ", logarithmic: a bar's length is the ratio to dense" if chart.log and chart.level else ""
    parts.append(_text((x.start + x.end) / 2, bottom + 36, chart.x_label + scale, "name", anchor="middle"))
    return _svg(chart, WIDTH, bottom + 44, parts)


def _heat_map(chart: HeatMap) -> str:
    rows, columns = chart.grid.rows, chart.grid.columns
    left = 16 + max(24.0, min(200.0, _wide(rows)))
    width = min(84.0, max(16.0, (WIDTH - left) / len(columns)))
    height = 22.0
    flat = _wide(columns) + 8 <= width  # else the names of the columns are slanted
    top = 44.0 if flat else 40 + 0.62 * min(_wide(columns), SLANTED)
    bottom = top + height * len(rows)
    low, high = heat_range(chart)
    parts = [_text(0, 12, chart.row_label + " ↓", "name")]
    for index, column in enumerate(columns):
        x = left + width * (index + 0.5)
        if flat:
            parts.append(_text(x, top - 8, column, "tick", anchor="middle"))
        else:
            parts.append(_text(x, top - 8, _shortened(column, SLANTED), "tick", more=f' transform="rotate(-38 {x:.1f} {top - 8:.1f})"'))
    for index, row in enumerate(rows):
        parts.append(_text(left - 8, top + height * index + 15, _shortened(row, left - 16), "tick", anchor="end"))
    for (row_index, column_index), cell in chart.grid.cells.items():
        color, dark = heat_color(cell.value, low, high)
        x, y = left + width * column_index, top + height * row_index
        what = cell.layers[0] if len(cell.layers) == 1 else f"mean of {len(cell.layers)} layers, {cell.layers[0]} and on"
        shown = percent(cell.value) if chart.percent else f"{cell.value:.3f}"
        parts.append(
            f'<g><title>{escape(what)}: {shown}</title><rect x="{x:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="{height - 1:.1f}" '
            f'fill="{color}"/>'
        )
        if width >= 34:
            number = f"{100 * cell.value:.1f}" if chart.percent else f"{cell.value:.2f}"
            parts.append(_text(x + width / 2, y + 15, number, "on-light" if dark else "on-dark", anchor="middle"))
        parts.append("</g>")
    right = 0.0 if flat else 0.79 * min(_wide(columns[-3:]), SLANTED)
    total = max(left + width * len(columns) + right, 420.0)
    parts += _legend(chart, left, bottom + 14, {"low": low, "high": high})
    return _svg(chart, total, bottom + 46, parts)


def _legend(chart: HeatMap, left: float, top: float, ends: Mapping[str, float]) -> list[str]:
    """A bar of the scale's colours between its two ends."""
    low, high = (tick_text(ends[end], percent=chart.percent) for end in ("low", "high"))
    start, wide = left + _wide([low]) + 8, 16.0
    parts = [_text(left, top + 12, low, "tick")]
    parts += [
        f'<rect x="{start + wide * index:.1f}" y="{top:.1f}" width="{wide + 0.5}" height="14" fill="{c}"/>' for index, c in enumerate(SCALE)
    ]
    end = start + wide * len(SCALE) + 8
    parts.append(_text(end, top + 12, f"{high}   {chart.legend}", "tick"))
    return parts
