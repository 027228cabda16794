"""Rows of tables: CSV by the standard library, Parquet and Arrow by pyarrow, read a row at a time and never whole."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError, ProxSparseError
from .arrow import unpacked_sizes
from .documents import DOCUMENT_BYTES
from .files import check_expansion, first_line, lines_of, opened, require
from .rows import TOO_LONG, RowText

ROWS_AT_ONCE = 1024
BATCH_BYTES = 2**22  # of a column, by the average of its rows
READ_AHEAD = 2**20  # bytes of a column read at once, where a row group may have gigabytes
OTHER_SEPARATORS = ";\t|"  # of what other programs write under the name of CSV
ARROW_FILE = b"ARROW1"  # the first bytes of Arrow's file format; its stream format has none


def csv_rows(path: Path, rows: RowText) -> Iterator[str]:
    """Comma-separated values with the fields' names in the first row (RFC 4180)."""
    csv.field_size_limit(max(csv.field_size_limit(), DOCUMENT_BYTES))  # of the whole process; 131,072 characters as it comes
    number = 0
    try:
        table = csv.reader((line for _, line in lines_of(path)), strict=True)
        names = next(table, [])
        if len(names) == 1 and names[0] != rows.field and any(mark in names[0] for mark in OTHER_SEPARATORS):
            raise DataError(f"{path}, line 1: expected comma-separated values, got {names[0]!r}. Put commas between the values.")
        if names:
            rows.fields(names, f"{path}, line 1")
        for number, values in enumerate(table, start=1):  # noqa: B007
            if not values:
                continue
            where = f"{path}, line {table.line_num}"
            if len(values) != len(names):
                raise DataError(f"{where}: expected {len(names)} fields as in the first line, got {len(values)}. Mend or remove the row.")
            yield rows.of(dict(zip(names, values, strict=True)), where)
    except csv.Error as error:
        raise DataError(f"{path}, after row {number}: expected comma-separated values, got {first_line(error)}. Mend the file.") from error


def parquet_rows(path: Path, rows: RowText) -> Iterator[str]:
    from pyarrow import parquet

    with opened(path) as _:  # a regular file that can be read
        pass
    with parquet.ParquetFile(path) as table:
        names = rows.columns(table.schema_arrow.names, str(path))
        paths = [table.schema.column(i).path for i in range(len(table.schema))]
        wanted = [i for i, path_ in enumerate(paths) if path_ in names or path_.startswith(tuple(f"{name}." for name in names))]
        chunks = [table.metadata.row_group(g).column(i) for g in range(table.metadata.num_row_groups) for i in wanted]
        unpacked = sum(chunk.total_uncompressed_size for chunk in chunks)
        check_expansion(path, unpacked, sum(chunk.total_compressed_size for chunk in chunks))
        at_once = min(max(BATCH_BYTES * table.metadata.num_rows // max(unpacked, 1), 1), ROWS_AT_ONCE)
    # As dictionaries: the same long string in many rows is stored, and then held, once.
    plain = [name for name in names if str(table.schema_arrow.field(name).type) in ("string", "large_string")]
    with parquet.ParquetFile(path, read_dictionary=plain, buffer_size=READ_AHEAD) as table:
        yield from _batches(path, rows, table.iter_batches(batch_size=at_once, columns=list(names)))


def arrow_rows(path: Path, rows: RowText) -> Iterator[str]:
    """Arrow's file and stream formats; `datasets` saves the latter."""
    import pyarrow as pa

    with opened(path) as stream:
        is_file = stream.read(len(ARROW_FILE)) == ARROW_FILE
    with pa.memory_map(str(path)) as raw:
        for unpacked in unpacked_sizes(raw, is_file=is_file):
            check_expansion(path, unpacked, path.stat().st_size)
        raw.seek(0)
        if is_file:
            reader = pa.ipc.open_file(raw)
            batches: Iterator[Any] = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = reader = pa.ipc.open_stream(raw)
        rows.fields(reader.schema.names, str(path))
        yield from _batches(path, rows, _validated(batches))


def _validated(batches: Iterator[Any]) -> Iterator[Any]:
    """pyarrow believes the offsets in a file, and reads outside of the memory where they are wrong."""
    for batch in batches:
        batch.validate(full=True)
        yield batch


def _batches(path: Path, rows: RowText, batches: Iterator[Any]) -> Iterator[str]:
    number = given = 0
    size = path.stat().st_size
    for batch in batches:
        columns = {name: batch.column(name) for name in rows.columns(batch.schema.names, str(path))}
        for index in range(batch.num_rows):
            number += 1
            where = f"{path}, row {number}"
            text = rows.of(_Cells(columns, index, where), where)
            given += len(text)
            check_expansion(path, given, size)
            yield text


class _Cells(Mapping[str, Any]):
    """One row, whose cells become Python values when they are asked for."""

    def __init__(self, columns: Mapping[str, Any], index: int, where: str) -> None:
        self._columns, self._index, self._where = columns, index, where

    def __getitem__(self, name: str) -> Any:
        return _value(self._columns[name][self._index], self._where)

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


def _value(scalar: Any, where: str) -> Any:
    """The Python value of a cell. DataError: a string too long for a document, before it is copied."""
    scalar = getattr(scalar, "value", scalar) if type(scalar).__name__ == "DictionaryScalar" else scalar
    if scalar is not None and hasattr(scalar, "as_buffer") and scalar.is_valid and scalar.as_buffer().size > DOCUMENT_BYTES:
        raise DataError(f"{where}: {TOO_LONG}")
    return None if scalar is None else scalar.as_py()


def explained(kind: str, read: Callable[[Path, RowText], Iterator[str]]) -> Callable[[Path, RowText], Iterator[str]]:
    """`read` with whatever pyarrow raises about a file as one line. BackendError: there is no pyarrow."""

    def reader(path: Path, rows: RowText) -> Iterator[str]:
        require("pyarrow", str(path))
        from pyarrow import ArrowException

        number = 0
        try:
            for number, text in enumerate(read(path, rows), start=1):  # noqa: B007
                yield text
        except ProxSparseError:
            raise
        except (ArrowException, ValueError, OSError, LookupError) as error:
            raise DataError(
                f"{path}: expected a whole {kind} file, got {first_line(error)} after row {number}. Write or fetch it again."
            ) from error

    return reader
