"""What is drawn, without how: `svg.py` draws it into the page, `png.py` into pictures.

Also the arithmetic of axes and colours that both share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .grid import Grid

Points = tuple[tuple[float, float], ...]

# Okabe and Ito's colours, told apart by colour-blind readers; the page has lighter twins of them for dark screens.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#b2568f", "#b07900", "#56a0d3")
# cividis, nine stops: dark to light whatever a reader's colours are.
SCALE = ("#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#fee838")


@dataclass(frozen=True)
class Line:
    label: str  # at its end; empty for none
    points: Points
    color: int = 0  # of COLORS
    style: str = "line"  # line, thin, faint or dots


@dataclass(frozen=True)
class Panel:
    label: str  # of the y axis, with the unit
    lines: tuple[Line, ...]
    height: int = 150
    low: float | None = None  # ends of the axis, unless points lie beyond them; None: from the points
    high: float | None = None
    percent: bool = False  # values are shares
    level: tuple[str, float] | None = None  # a labelled horizontal line


@dataclass(frozen=True)
class Curves:
    """Panels above each other that share the x axis."""

    name: str  # unique on a page: id, and stem of the picture
    title: str
    description: str
    x_label: str
    panels: tuple[Panel, ...]
    ticks: tuple[float, ...] = ()  # of the x axis; empty: round numbers
    log: bool = False  # of the x axis


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    text: str  # at its end
    color: int = 0


@dataclass(frozen=True)
class Bars:
    """Horizontal bars from 0; with `log` from the level, so that a bar's length is a ratio."""

    name: str
    title: str
    description: str
    x_label: str
    bars: tuple[Bar, ...]
    level: tuple[str, float] | None = None  # a labelled vertical line
    log: bool = False


@dataclass(frozen=True)
class HeatMap:
    name: str
    title: str
    description: str
    row_label: str
    legend: str  # what the colours mean, with the unit
    grid: Grid
    percent: bool = True


Chart = Curves | Bars | HeatMap


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten that cover [low, high]; the first and last may lie outside."""
    if not high - low > max(1e-9 * max(abs(low), abs(high)), 1e-200):  # one value, but for rounding
        room = abs(low) * 0.1 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def step_ticks(low: float, high: float, count: int = 7) -> list[float]:
    """Whole numbers inside [low, high]."""
    ticks = [tick for tick in nice_ticks(low, high, count) if low <= tick <= high and tick == round(tick)]
    return ticks or [low]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten inside [low, high]; the powers alone where these are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(powers) > 4 else (1, 2, 5)
    return [tick for power in powers for factor in factors if low <= (tick := float(factor * 10**power)) <= high]


def panel_ticks(panel: Panel) -> list[float]:
    """Of its y axis; the first and the last are the axis' ends."""
    values = [y for line in panel.lines for _, y in line.points] + ([panel.level[1]] if panel.level else [])
    low = min(values, default=0.0) if panel.low is None else min([panel.low, *values])
    high = max(values, default=1.0) if panel.high is None else max([panel.high, *values])
    return nice_ticks(low, high, 5 if panel.height >= 100 else 2)


def tick_text(value: float, *, percent: bool = False) -> str:
    if percent:
        return f"{100 * value:g} %"
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,g}"


def x_range(chart: Curves) -> tuple[float, float]:
    values = [x for panel in chart.panels for line in panel.lines for x, _ in line.points]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if chart.log:
        room = (high / low) ** 0.04 if high > low else 2.0
        return low / room, high * room
    room = max(1.0, abs(low) / 10)
    return (low, high) if high - low > 1e-9 * max(abs(low), abs(high)) else (low - room, high + room)


def fraction(value: float, low: float, high: float, *, log: bool = False) -> float:
    """Where `value` lies between the ends of an axis, 0 to 1."""
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low) if high > low else 0.5


def bar_range(chart: Bars) -> tuple[float, float]:
    """Of the x axis."""
    values = [bar.value for bar in chart.bars] + ([chart.level[1]] if chart.level else [])
    if chart.log:
        low = chart.level[1] if chart.level else min(values)
        return low, max(*values, low * 1.1)
    low, high = min([0.0, *values]), max([0.0, *values])
    return (low, high) if high > low else (low, low + 1.0)


def bar_ticks(chart: Bars) -> list[float]:
    low, high = bar_range(chart)
    return log_ticks(low, high) if chart.log else [tick for tick in nice_ticks(low, high, 6) if low <= tick <= high]


def heat_range(chart: HeatMap) -> tuple[float, float]:
    """Ends of the colour scale: round numbers around the values, as most of a good run's shares lie close together."""
    values = [cell.value for cell in chart.grid.cells.values()]
    ticks = nice_ticks(min(values), max(values), 6)
    low, high = ticks[0], ticks[-1]
    return (max(0.0, low), min(1.0, high)) if chart.percent and high > 0 and low < 1 else (low, high)


def heat_color(value: float, low: float, high: float) -> tuple[str, bool]:
    """Colour of the scale, and whether text on it must be dark."""
    place = min(1.0, max(0.0, (value - low) / (high - low) if high > low else 1.0)) * (len(SCALE) - 1)
    index = min(int(place), len(SCALE) - 2)
    first, second = (tuple(int(stop[at : at + 2], 16) for at in (1, 3, 5)) for stop in SCALE[index : index + 2])
    red, green, blue = (round(a + (b - a) * (place - index)) for a, b in zip(first, second, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}", 0.299 * red + 0.587 * green + 0.114 * blue > 125


def thinned(points: Sequence[tuple[float, float]], most: int = 800) -> Points:
    """At most so many points with the same extremes: of each stretch the lowest and the highest."""
    if len(points) <= most:
        return tuple(points)
    count = most // 2
    kept = []
    for index in range(count):
        stretch = points[index * len(points) // count : (index + 1) * len(points) // count]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return tuple(kept)


def running_mean(points: Sequence[tuple[float, float]], width: int) -> list[tuple[float, float]]:
    """Of `width` (odd) neighbours; fewer at the ends, as many on either side."""
    total = [0.0]
    for _, value in points:
        total.append(total[-1] + value)
    smooth = []
    for index, (x, _) in enumerate(points):
        half = min(width // 2, index, len(points) - 1 - index)
        smooth.append((x, (total[index + half + 1] - total[index - half]) / (2 * half + 1)))
    return smooth
