"""Pictures of the rows of `pst bench linear` and `decode`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import BackendError, ConfigError
from ..formats.folder import atomic_file

PLOTTED = ("linear", "decode")
SUFFIXES = (".png", ".svg", ".pdf")
PANEL = (4.2, 3.2)  # inches
INSTALL = "Install it with pip install 'proxsparse-triton[report]', or leave --plot out."

Rows = Sequence[Mapping[str, Any]]


def check_plot(path: Path) -> None:
    """Raise what can be said before the work. ConfigError: not a picture's name. BackendError: no matplotlib."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"bench: expected --plot with a name in {', '.join(SUFFIXES)}, got {path}. Choose another name.")
    _figure_class()


def _figure_class() -> Any:
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise BackendError(f"bench: expected matplotlib for --plot, found none. {INSTALL}") from error


def curves(rows: Rows) -> dict[tuple[str, str], dict[str, list[tuple[int, float]]]]:
    """(mode, shape) -> backend -> (tokens, speed-up against dense), of `pst bench linear`; dense itself is 1."""
    found: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        if row.get("bench") == "linear" and row.get("speed_up") is not None and row["backend"] != "dense":
            panel = found.setdefault((row["mode"], f"{row['out']}x{row['in']}"), {})
            panel.setdefault(row["backend"], []).append((row["tokens"], row["speed_up"]))
    return {panel: {name: sorted(points) for name, points in lines.items()} for panel, lines in found.items()}


def bars(rows: Rows) -> dict[str, dict[str, dict[int, float]]]:
    """model -> variant -> batch -> tokens a second, of `pst bench decode`."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        if row.get("bench") == "decode" and row.get("tokens_per_s") is not None:
            found.setdefault(Path(row["model"]).name, {}).setdefault(row["variant"], {})[row["batch"]] = row["tokens_per_s"]
    return found


def plot(rows: Rows, path: Path) -> None:
    """Speed-up over tokens, one panel a shape and mode, one line a backend; tokens a second as bars, one panel a model.

    Raises: ConfigError: no such rows. BackendError: no matplotlib. OutputError: `path` cannot be written.
    """
    lines, groups = curves(rows), bars(rows)
    if not lines and not groups:
        raise ConfigError(f"bench: expected figures of {' or '.join(PLOTTED)} for --plot, got none. Leave --plot out.")
    # One row of panels for each mode, and one for the models.
    grid: list[list[tuple[str, Any]]] = []
    for mode in dict.fromkeys(mode for mode, _ in lines):
        grid.append([(f"{shape}, {mode}", panel) for (one, shape), panel in lines.items() if one == mode])
    if groups:
        grid.append(list(groups.items()))
    width = max(map(len, grid))
    figure = _figure_class()(figsize=(PANEL[0] * width, PANEL[1] * len(grid)), layout="constrained")
    colors = {name: f"C{index}" for index, name in enumerate(dict.fromkeys(name for panel in lines.values() for name in panel))}
    axes = figure.subplots(len(grid), width, squeeze=False)
    for row, panels in zip(axes, grid, strict=True):
        for axis, (title, content) in zip(row, panels, strict=False):
            if groups and panels is grid[-1]:
                _draw_bars(axis, title, content)
            else:
                _draw_lines(axis, title, content, colors)
        for axis in row[len(panels) :]:
            axis.set_axis_off()
    with atomic_file(path) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(partial, format=path.suffix[1:].lower(), dpi=150)


def _draw_lines(axis: Any, title: str, lines: Mapping[str, Sequence[tuple[int, float]]], colors: Mapping[str, str]) -> None:
    for name, points in lines.items():
        width = 2.5 if name == "SparseLinear" else 1.2
        axis.plot(*zip(*points, strict=True), label=name, color=colors[name], marker="o", markersize=3, linewidth=width)
    axis.axhline(1, color="black", linewidth=0.6)
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    axis.set(title=title, xlabel="tokens", ylabel="speed-up against dense")
    axis.legend(fontsize=7)


def _draw_bars(axis: Any, title: str, variants: Mapping[str, Mapping[int, float]]) -> None:
    batches = sorted({batch for values in variants.values() for batch in values})
    width = 0.8 / len(variants)
    for index, (name, values) in enumerate(variants.items()):
        places = [batches.index(batch) + index * width for batch in values]
        axis.bar_label(axis.bar(places, list(values.values()), width, label=name), fmt="{:,.0f}", fontsize=7)
    axis.set_yscale("log")
    axis.set_xticks([place + width * (len(variants) - 1) / 2 for place in range(len(batches))], batches)
    axis.set(title=title, xlabel="batch", ylabel="tokens / s")
    axis.legend(fontsize=7)
