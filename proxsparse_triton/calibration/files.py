"""Local text files: one reader a format, and every way a file can be wrong explained in one line."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

from ..errors import BackendError, DataError

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".parquet")
ACCEPTED_FILES = ".txt, .md, .py, .jsonl, .jsonl.gz or .parquet"
BOM = b"\xef\xbb\xbf"


def suffix_of(name: str) -> str | None:
    """The ending of `name` that says how to read it, or None for a file this package does not read."""
    lowered = name.lower()
    return next((suffix for suffix in SUFFIXES if lowered.endswith(suffix)), None)


def read_documents(path: Path, text_field: str) -> Iterator[str]:
    """The documents of one file in its order, read lazily: one for plain text, one a line or row otherwise.

    Raises: DataError: the file cannot be read, is not UTF-8, is malformed or lacks `text_field` (with line or row).
    """
    suffix = suffix_of(path.name)
    if suffix is None:
        raise DataError(f"{path}: expected a file ending in {ACCEPTED_FILES}, got {path.name!r}. Rename or convert it.")
    if suffix == ".parquet":
        return _parquet(path, text_field)
    if suffix in (".jsonl", ".jsonl.gz"):
        return _json_lines(path, text_field)
    return _plain(path)


def text_files(folder: Path) -> list[Path]:
    """Readable files anywhere below `folder`, in a fixed order; hidden files and folders and __pycache__ are left out."""

    def left_out(name: str) -> bool:
        return name.startswith(".") or name == "__pycache__"

    return [path for path in walk(folder, left_out) if suffix_of(path.name)]


def walk(folder: Path, skip: Callable[[str], bool]) -> Iterator[Path]:
    """Every regular file below `folder`, sorted by name in each folder; names that `skip` holds for are not entered or given.

    Raises: DataError: a folder cannot be listed.
    """

    def unreadable(error: OSError) -> None:
        raise DataError(f"{error.filename}: expected a readable folder, got {error.strerror}. Check its permissions.") from error

    for here, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not skip(name))
        yield from (path for name in sorted(names) if not skip(name) and (path := Path(here, name)).is_file())


def decode(raw: bytes) -> str:
    """UTF-8 text without a byte order mark and with Unix line ends, so that a checkout on Windows gives the same tokens.

    Raises: UnicodeDecodeError: `raw` is not UTF-8; its `start` counts from the first byte of `raw`.
    """
    return raw.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")


def text_of(row: object, where: str, text_field: str) -> str:
    """The text of one JSON object or table row. `where` opens the message of an error.

    Raises: DataError: not an object, no such field, not a string, or a string that has no UTF-8 form.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object with a field {text_field!r}, got {_kind(row)}. Write one object a line.")
    if text_field not in row:
        fields = ", ".join(map(repr, row)) or "none"
        raise DataError(f"{where}: expected a field {text_field!r}, got the fields {fields}. Name the one with the text as text_field.")
    text = row[text_field]
    if not isinstance(text, str):
        raise DataError(f"{where}: expected a string in the field {text_field!r}, got {_kind(text)}. Mend or remove it.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: expected valid Unicode, got a lone surrogate at character {error.start}. Mend or remove it.") from error
    return text


def require(module: str, subject: str) -> ModuleType:
    """Import a library of the `data` extra. Raises: BackendError: it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise BackendError(
            f"{subject}: expected the library {library}, got {type(error).__name__}. Run: pip install 'proxsparse-triton[data]'"
        ) from error


def first_line(error: BaseException) -> str:
    """What a library's error says, shortened to one line."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .") if lines else type(error).__name__


def _kind(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: expected a readable file, got {error.strerror or first_line(error)}. Check the path and its permissions.")


def _not_utf8(path: Path, offset: int, byte: int, line: int | None = None) -> DataError:
    where = f"{path}" if line is None else f"{path}, line {line}"
    return DataError(f"{where}: expected UTF-8 text, got the byte 0x{byte:02x} at byte offset {offset}. Convert the file to UTF-8.")


def _plain(path: Path) -> Iterator[str]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        text = decode(raw)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error.start, raw[error.start]) from error
    yield text


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, offset of its first byte in the uncompressed text, bytes) of a plain or gzip file."""
    number = offset = 0
    try:
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as stream:
            for raw in stream:
                number += 1
                yield number, offset, raw
                offset += len(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}, after line {number}: expected a whole gzip file, got a damaged or cut one ({first_line(error)}). Fetch it again."
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _json_lines(path: Path, text_field: str) -> Iterator[str]:
    for number, offset, raw in _lines(path):
        try:
            # Decoded here because json.loads guesses UTF-16 and UTF-32 from bytes.
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, offset + error.start, raw[error.start], number) from error
        line = (line.removeprefix("\ufeff") if number == 1 else line).strip()
        if not line:
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: expected one JSON object a line, got malformed JSON ({first_line(error)}). Mend or remove it."
            ) from error
        yield text_of(row, where, text_field)


def _parquet(path: Path, text_field: str) -> Iterator[str]:
    require("pyarrow", str(path))
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            columns = table.schema_arrow.names
            if text_field not in columns:  # raises, with the columns there are
                text_of(dict.fromkeys(columns), str(path), text_field)
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                for text in batch.column(text_field).to_pylist():
                    number += 1
                    yield text_of({text_field: text}, f"{path}, row {number}", text_field)
    except DataError:
        raise
    except (ArrowException, ValueError, OSError) as error:
        raise DataError(
            f"{path}: expected a whole Parquet file, got {first_line(error)} after row {number}. Write or fetch it again."
        ) from error
