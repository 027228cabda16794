"""Rows of JSON: one object a line, or an array of objects, parsed one at a time and never whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from .documents import DOCUMENT_BYTES
from .files import FileText, first_line, lines_of
from .rows import TOO_LONG, RowText


def json_lines(path: Path, rows: RowText, rule: str = "one JSON object a line", advice: str = "Mend or remove it") -> Iterator[str]:
    """One object a line. `rule` and `advice` are what a malformed line is told."""
    for number, line in lines_of(path):
        if not (line := line.strip()):
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: expected {rule}, got malformed JSON ({first_line(error)}). {advice}.") from error
        yield rows.of(row, where)


def json_rows(path: Path, rows: RowText) -> Iterator[str]:
    """An array of objects, or JSON lines under another name."""
    start = next((block.lstrip()[:1] for block in FileText(path).blocks() if not block.isspace()), "")
    if start == "[":
        return _json_array(path, rows)
    return json_lines(path, rows, "an array of objects or one object a line", "Mend it, or write each object on a line of its own")


def _json_array(path: Path, rows: RowText) -> Iterator[str]:
    for number, row in enumerate(_elements(path), start=1):
        yield rows.of(row, f"{path}, element {number}")


def _elements(path: Path) -> Iterator[Any]:
    """The elements of a JSON array, each parsed as soon as it is there."""
    decoder, blocks = json.JSONDecoder(), FileText(path).blocks()
    text, at, number = "", 0, 0

    def more(least: int) -> bool:
        """Whether another `least` characters could be appended; drops what is behind `at`."""
        nonlocal text, at
        parts, count = [text[at:]], 0
        while count < least and (block := next(blocks, None)) is not None:
            parts.append(block)
            count += len(block)
        text, at = "".join(parts), 0
        return count > 0

    def sign() -> str:
        """The next character that is not white space, which it steps over; empty at the end."""
        nonlocal at
        while True:
            rest = text[at : at + 64].lstrip()
            if rest:
                at = text.index(rest[0], at) + 1
                return rest[0]
            at = min(at + 64, len(text))
            if at == len(text) and not more(1):
                return ""

    def wrong(got: str) -> DataError:
        return DataError(f"{path}, element {number + 1}: expected an array of JSON objects, got {got}. Mend or remove it.")

    if sign() != "[":  # the caller has seen it
        raise wrong("something else")
    mark = sign()
    while mark != "]":
        at -= bool(mark)
        while True:
            try:
                element, at = decoder.raw_decode(text, at)
                break
            except (ValueError, RecursionError) as error:
                if len(text) - at > DOCUMENT_BYTES and isinstance(error, ValueError):
                    raise DataError(f"{path}, element {number + 1}: {TOO_LONG}") from error
                # What is read is doubled each time, so that parsing again stays linear in the length.
                if isinstance(error, RecursionError) or not more(max(len(text) - at, 1)):
                    raise wrong(f"malformed JSON ({first_line(error)})") from error
        yield element
        number += 1
        mark = sign()
        if mark not in (",", "]"):
            raise wrong(f"{mark!r} behind the one before" if mark else "its end")
        if mark == ",":
            mark = sign()
            if mark == "]":
                raise wrong("a comma before the end")
