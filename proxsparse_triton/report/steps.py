"""metrics.jsonl as curves, and the numbers and texts of files that anything may have written."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

from ..files import UnfitFileError, open_regular, parse_json

MAX_FILE, MAX_LINE = 1 << 30, 1 << 24  # bytes
MOST_ROWS = 500_000
MOST, LEAST = 1e100, 1e-100  # what can be drawn: axes take differences, ratios and sums of it
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")

Points = list[tuple[float, float]]


@dataclass
class Steps:
    """metrics.jsonl: figures over steps, each without the rows that do not have it, and the layers after the last step."""

    rows: int = 0
    loss: Points = field(default_factory=list)
    share: Points = field(default_factory=list)  # of 2:4 blocks, 0 to 1
    lr: Points = field(default_factory=list)
    changed: Points = field(default_factory=list)  # share of blocks whose mask changed since the last such row, mean over layers
    layers: dict[str, float] = field(default_factory=dict)  # parameter name -> share of 2:4 blocks
    changes: dict[str, float] = field(default_factory=dict)  # parameter name -> sum of its shares of changed blocks
    warnings: dict[str, list[int]] = field(default_factory=dict)  # text -> the steps that said it


def number(value: object) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def drawable(value: object) -> float | None:
    """A number that a chart can show, else None; what is next to nothing is 0."""
    found = number(value)
    if found is None or abs(found) > MOST:
        return None
    return found if abs(found) >= LEAST else 0.0


def numbers(value: object) -> dict[str, float]:
    """The drawable numbers of an object, by name; empty for anything else."""
    if not isinstance(value, Mapping):
        return {}
    return {str(name): found for name, item in value.items() if (found := drawable(item)) is not None}


def printable(value: Any) -> Any:
    """A JSON value whose texts can be written anywhere: without halves of surrogate pairs and control characters."""
    if isinstance(value, str):
        return CONTROL.sub("\ufffd", value.encode("utf-8", "replace").decode())
    if isinstance(value, list):
        return [printable(item) for item in value]
    return {printable(key): printable(item) for key, item in value.items()} if isinstance(value, dict) else value


def read_steps(path: Path) -> tuple[Steps, list[str]]:
    """metrics.jsonl, and what could not be read of it. A missing file has no steps."""
    steps, broken, last = Steps(), [], 0
    try:
        with open_regular(path, MAX_FILE) as file:
            for last, line in enumerate(_lines(file), start=1):
                row = _row(line)
                if row is not None:
                    if row.get("phase") != "repair":  # steps of their own, after those of the mask
                        _add(steps, row)
                elif line.strip():
                    broken.append(last)
                if last == MOST_ROWS:
                    return steps, [f"Only the first {MOST_ROWS:,} lines of {path.name} were read."]
    except FileNotFoundError:
        return steps, []
    except UnfitFileError as error:
        return steps, [f"{path.name} is not read: it is {error.strerror}."]
    except OSError as error:
        return steps, [f"{path.name} cannot be read: {error.strerror}."]
    if broken == [last] and last:
        return steps, [f"The last line of {path.name} is half-written and was ignored."]
    lines = ", ".join(map(str, broken[:5])) + (" ..." if len(broken) > 5 else "")
    return steps, [f"{len(broken)} lines of {path.name} are no JSON objects and were ignored: {lines}."] if broken else []


def _lines(file: BufferedReader) -> Iterator[bytes]:
    """Each line, of one that is too long its beginning."""
    while line := file.readline(MAX_LINE):
        yield line
        while len(line) == MAX_LINE and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = printable(parse_json(line))
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _add(steps: Steps, row: Mapping[str, Any]) -> None:
    steps.rows += 1
    given = drawable(row.get("step"))
    step = float(steps.rows) if given is None else given
    for points, key in ((steps.loss, "loss"), (steps.share, "share_24"), (steps.lr, "lr")):
        value = drawable(row.get(key))
        if value is not None:
            points.append((step, value))
    steps.layers = numbers(row.get("layers")) or steps.layers
    changes = numbers(row.get("mask_changes"))
    if changes:
        steps.changed.append((step, sum(changes.values()) / len(changes)))
        for name, share in changes.items():
            steps.changes[name] = steps.changes.get(name, 0.0) + share
    warnings = row.get("warnings")
    for warning in warnings if isinstance(warnings, list) else []:
        steps.warnings.setdefault(str(warning), []).append(int(step))
