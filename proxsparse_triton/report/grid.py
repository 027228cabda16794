"""Parameter names laid out as decoder blocks x projections, whatever the model calls them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

Parts = tuple[str, ...]
ANY = "*"
MOST_ROWS, MOST_COLUMNS = 400, 80
BESIDE = "-"  # the row of layers that no number is part of


@dataclass(frozen=True)
class Cell:
    value: float  # mean over its layers
    layers: tuple[str, ...]  # parameter names; several where a block holds numbered copies (experts)


@dataclass(frozen=True)
class Grid:
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[int, int], Cell]  # (row, column); a layer that is not there has none


def grid(values: Mapping[str, float]) -> Grid | None:
    """Rows are the first number in the names that varies, columns what stands behind it, in the order of `values`.

    None where they are more than can be shown.
    """
    split = {name: tuple(name.removesuffix(".weight").split(".")) for name in values}
    numbers = defaultdict(set)
    for parts in split.values():
        for number in _numbers(parts):
            numbers[parts[:number]].add(parts[number])
    placed: dict[tuple[Parts, int], dict[Parts, list[str]]] = {}
    columns: dict[Parts, None] = {}
    for name, parts in split.items():
        places = _numbers(parts)
        varying = [place for place in places if len(numbers[parts[:place]]) > 1]
        place = (varying or places or [-1])[0]
        row = ((), -1) if place < 0 else (parts[:place], int(parts[place]))
        rest = parts[place + 1 :]
        column = tuple(ANY if part.isdecimal() else part for part in rest)
        columns[column] = None
        placed.setdefault(row, {}).setdefault(column, []).append(name)
    if len(placed) > MOST_ROWS or len(columns) > MOST_COLUMNS:
        return None
    prefixes = list(dict.fromkeys(prefix for prefix, _ in placed))
    rows = sorted(placed, key=lambda row: (prefixes.index(row[0]), row[1]))
    cells = {
        (row_index, column_index): Cell(sum(values[name] for name in names) / len(names), tuple(names))
        for row_index, row in enumerate(rows)
        for column_index, column in enumerate(columns)
        if (names := placed[row].get(column))
    }
    return Grid(_row_labels(rows), _tails(list(columns)), cells)


def _numbers(parts: Parts) -> list[int]:
    return [place for place, part in enumerate(parts) if re.fullmatch(r"[0-9]{1,9}", part)]


def _row_labels(rows: list[tuple[Parts, int]]) -> tuple[str, ...]:
    """The number alone; where several stacks of blocks are numbered, with as much of their names as tells them apart."""
    prefixes = list(dict.fromkeys(prefix for prefix, block in rows if block >= 0))
    short = dict(zip(prefixes, _tails(prefixes), strict=True))
    if len(prefixes) < 2:
        return tuple(str(block) if block >= 0 else BESIDE for _, block in rows)
    return tuple(f"{short[prefix]}.{block}" if block >= 0 else BESIDE for prefix, block in rows)


def _tails(names: list[Parts]) -> tuple[str, ...]:
    """The shortest endings that are all different and begin with a word: q_proj; self_attn.out, cross_attn.out; experts.*.up_proj."""
    labels = []
    for parts in names:
        length = 1
        while length < len(parts) and (parts[-length] == ANY or sum(other[-length:] == parts[-length:] for other in names) > 1):
            length += 1
        labels.append(".".join(parts[-length:]) or "weight")
    return tuple(labels)
