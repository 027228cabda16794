"""Which reader a file has: by its ending."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import DataError
from .files import ACCEPTED_FILES, PLAIN, FileText, plain_document, suffix_of
from .json_rows import json_lines, json_rows
from .rows import RowText
from .tables import arrow_rows, csv_rows, explained, parquet_rows

READERS: dict[str, Callable[[Path, RowText], Iterator[str]]] = {
    ".jsonl": json_lines,
    ".json": json_rows,
    ".csv": csv_rows,
    ".parquet": explained("Parquet", parquet_rows),
    ".arrow": explained("Arrow", arrow_rows),
}


def read_documents(path: Path, rows: RowText) -> Iterator[str | FileText]:
    """The documents of one file in its order, read lazily: one for plain text, one a line or row otherwise (blank ones too).

    Raises: DataError: the file cannot be read, is not UTF-8, is malformed, lacks the field (with line or row), holds too long a document
        or unpacks to what no text does. BackendError: pyarrow is missing and needed.
    """
    suffix = suffix_of(path.name)
    if suffix is None:
        raise DataError(f"{path}: expected a file ending in {ACCEPTED_FILES}, got {path.name!r}. Rename or convert it.")
    if suffix in PLAIN:
        yield plain_document(path)
    else:
        yield from READERS[suffix](path, rows)
