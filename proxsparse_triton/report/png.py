"""The charts of a page as PNG, drawn by matplotlib where it is installed."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..files import open_regular
from ..marks import HEAD_BYTES, PICTURE_MARK
from .charts import (
    COLORS,
    SCALE,
    Bars,
    Chart,
    Curves,
    HeatMap,
    Line,
    Panel,
    bar_range,
    bar_ticks,
    heat_color,
    heat_range,
    panel_ticks,
    step_ticks,
    tick_text,
    x_range,
)

DPI = 150


def installed() -> bool:
    """False also where it is there and broken: a page without pictures is better than none."""
    try:
        for name in ("matplotlib", "matplotlib.figure"):
            importlib.import_module(name)
    except Exception:
        return False
    return True


def check_folder(folder: Path, charts: Sequence[Chart]) -> None:
    """OutputError where a picture would replace something else."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"report: expected a folder for pictures, got the file {folder}. Choose another page with -o.")
    for chart in charts:
        path = _path(folder, chart)
        if path.exists() and not _own(path):
            raise OutputError(
                f"report: expected a picture that pst wrote, got the file {path}, which is kept. Choose another page with -o."
            )


def _own(path: Path) -> bool:
    """True for a picture that pst wrote, and for an empty file."""
    with open_regular(path) as file:
        head = file.read(HEAD_BYTES)
    return not head or PICTURE_MARK.encode() in head


def write(folder: Path, charts: Sequence[Chart]) -> tuple[Path, ...]:
    """One picture a chart; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    with importlib.import_module("matplotlib").rc_context({"text.parse_math": False}):  # a $ in a name is a $
        for chart in charts:
            figure = _draw(chart)
            figure.suptitle(chart.title, fontsize=10)
            path = _path(folder, chart)
            partial = path.with_name(f".{path.name}.partial")
            try:
                figure.savefig(partial, format="png", dpi=DPI, metadata={"Software": PICTURE_MARK})
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
    return tuple(_path(folder, chart) for chart in charts)


def _draw(chart: Chart) -> Any:
    if isinstance(chart, Curves):
        return _curves(chart)
    return _bars(chart) if isinstance(chart, Bars) else _heat_map(chart)


def _path(folder: Path, chart: Chart) -> Path:
    return folder / f"{chart.name}.png"


def _figure(width: float, height: float) -> Any:
    """In inches."""
    return importlib.import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")


def _curves(chart: Curves) -> Any:
    heights = [panel.height for panel in chart.panels]
    figure = _figure(7.5, 1 + sum(heights) / 70)
    axes = figure.subplots(len(chart.panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axis, panel in zip(axes, chart.panels, strict=True):
        _panel(axis, panel)
    low, high = x_range(chart)
    ticks = list(chart.ticks) or step_ticks(low, high)
    if chart.log:
        axes[-1].set_xscale("log")
        axes[-1].minorticks_off()
    axes[-1].set_xlim(low, high)
    axes[-1].set_xticks(ticks, [tick_text(tick) for tick in ticks])
    axes[-1].set_xlabel(chart.x_label)
    return figure


def _panel(axis: Any, panel: Panel) -> None:
    for line in panel.lines:
        _line(axis, line)
    if panel.level:
        axis.axhline(panel.level[1], color="black", linewidth=0.8, linestyle="--")
        _label(axis, panel.level[1], panel.level[0], "black")
    ticks = panel_ticks(panel)
    axis.set_ylim(ticks[0], ticks[-1])
    axis.set_yticks(ticks, [tick_text(tick, percent=panel.percent) for tick in ticks], fontsize=8)
    axis.set_title(panel.label, fontsize=8, loc="left")
    axis.grid(alpha=0.3, linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)


def _line(axis: Any, line: Line) -> None:
    if not line.points:
        return
    x, y = zip(*line.points, strict=True)
    color = COLORS[line.color % len(COLORS)]
    if line.style == "dots" or len(x) == 1:
        axis.plot(x, y, "o", color=color, markersize=4, clip_on=False)
    else:
        faint = line.style == "faint"
        axis.plot(x, y, color=color, linewidth=1.6 if line.style == "line" else 0.7, alpha=0.35 if faint else 1.0)
    if line.label:
        _label(axis, y[-1], line.label, color)


def _label(axis: Any, height: float, text: str, color: str) -> None:
    """Right of the axis, at the line's last value."""
    place = {"xy": (1, height), "xycoords": ("axes fraction", "data"), "xytext": (4, 0), "textcoords": "offset points"}
    axis.annotate(text, **place, color=color, fontsize=8, va="center")


def _bars(chart: Bars) -> Any:
    figure = _figure(7.5, 1.1 + 0.35 * len(chart.bars))
    axis = figure.subplots()
    low, high = bar_range(chart)
    labels = [bar.label for bar in chart.bars]
    places = range(len(labels))
    colors = [COLORS[bar.color % len(COLORS)] for bar in chart.bars]
    # From the start of the axis, which on a logarithmic one is not 0.
    drawn = axis.barh(places, [bar.value - low for bar in chart.bars], left=low, color=colors, height=0.6)
    axis.bar_label(drawn, [bar.text for bar in chart.bars], padding=3, fontsize=8)
    if chart.level:
        axis.axvline(chart.level[1], color="black", linewidth=0.8, linestyle="--")
        axis.set_title(f"{chart.level[0]} {chart.level[1]:.3f} (dashed)", fontsize=8, loc="left")
    axis.set_yticks(places, labels, fontsize=8)
    axis.invert_yaxis()
    if chart.log:
        axis.set_xscale("log")
        axis.minorticks_off()
    axis.set_xlim(low, high * (1.2 if chart.log else 1.1))
    ticks = bar_ticks(chart)
    axis.set_xticks(ticks, [tick_text(tick) for tick in ticks], fontsize=8)
    axis.set_xlabel(chart.x_label + (", logarithmic" if chart.log else ""), fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _heat_map(chart: HeatMap) -> Any:
    rows, columns = chart.grid.rows, chart.grid.columns
    figure = _figure(max(4.0, 1.8 + 0.62 * len(columns)), 1.8 + 0.25 * len(rows))
    axis = figure.subplots()
    low, high = heat_range(chart)
    values = [[float("nan")] * len(columns) for _ in rows]
    for (row, column), cell in chart.grid.cells.items():
        values[row][column] = cell.value
        number = f"{100 * cell.value:.1f}" if chart.percent else f"{cell.value:.2f}"
        axis.text(
            column, row, number, color="black" if heat_color(cell.value, low, high)[1] else "white", fontsize=7, ha="center", va="center"
        )
    scale = importlib.import_module("matplotlib.colors").LinearSegmentedColormap.from_list("scale", list(SCALE))
    image = axis.imshow(values, cmap=scale, vmin=low, vmax=high, aspect="auto")
    axis.set_xticks(range(len(columns)), columns, fontsize=8, rotation=30, ha="left")
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    axis.set_ylabel(chart.row_label, fontsize=8)
    bar = figure.colorbar(image, ax=axis)
    bar.set_label(chart.legend, fontsize=8)
    bar.ax.yaxis.set_major_formatter(lambda value, _: tick_text(round(value, 6), percent=chart.percent))
    bar.ax.tick_params(labelsize=8)
    return figure
