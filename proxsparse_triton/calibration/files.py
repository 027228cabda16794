"""Local files of text: their kinds, reading them a block or a line at a time, and every way that can fail in one line."""

from __future__ import annotations

import codecs
import gzip
import importlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, cast

from ..errors import BackendError, DataError
from .documents import DOCUMENT_BYTES, LongText
from .rows import TOO_LONG

PLAIN = (".txt", ".md", ".py")
LINES = (".jsonl", ".json", ".csv")
BINARY = (".parquet", ".arrow")  # pyarrow reads them
GZIP = ".gz"
SUFFIXES = (*PLAIN, *LINES, *BINARY)
ACCEPTED_FILES = ".txt, .md, .py, .jsonl, .json, .csv (each also as .gz), .parquet or .arrow"
BLOCK = 2**16  # bytes read at once
# What unpacks to more than this, and to more than EXPANSION times its size, is no text: people's text packs 3 to 20 times.
UNPACKED, EXPANSION = 2**26, 200


def suffix_of(name: str) -> str | None:
    """The ending of `name` that says how to read it, without .gz, or None for a file this package does not read."""
    lowered = name.lower()
    plain = lowered.removesuffix(GZIP)
    kinds = SUFFIXES if plain == lowered else (*PLAIN, *LINES)
    return next((suffix for suffix in kinds if plain.endswith(suffix)), None)


def decode(raw: bytes) -> str:
    """UTF-8 text without a byte order mark and with Unix line ends, so that a checkout on Windows gives the same tokens.

    Raises: UnicodeDecodeError: `raw` is not UTF-8; its `start` counts from the first byte of `raw`.
    """
    return raw.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")


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


def unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: expected a readable file, got {error.strerror or first_line(error)}. Check the path and its permissions.")


def not_utf8(where: object, offset: int, byte: int) -> DataError:
    return DataError(f"{where}: expected UTF-8 text, got the byte 0x{byte:02x} at byte offset {offset}. Convert the file to UTF-8.")


def check_expansion(path: Path, unpacked: int, packed: int) -> None:
    """Raise DataError for a file that unpacks to what no text does: `unpacked` bytes so far, out of `packed`."""
    if unpacked > UNPACKED and unpacked > EXPANSION * max(packed, 1):
        raise DataError(
            f"{path}: expected text, which unpacks to less than {EXPANSION} times its size, got {unpacked / 1e6:.0f} MB out of "
            f"{packed:,} bytes. Unpack the file yourself if it is what you want."
        )


class Bytes:
    """The bytes of a regular file in order, unpacked where its name ends in .gz, and how many were given."""

    def __init__(self, path: Path, raw: BinaryIO) -> None:
        self.given = 0
        self._path = path
        self._raw = raw
        self._packed = path.name.lower().endswith(GZIP)
        # GzipFile reads like any binary file; its stub says otherwise.
        self._stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if self._packed else raw

    def read(self, count: int) -> bytes:
        return self._counted(self._stream.read(count))

    def line(self, limit: int) -> bytes:
        """The next line with its end, cut at `limit` bytes."""
        return self._counted(self._stream.readline(limit))

    def skip(self, count: int) -> None:
        if not self._packed:
            self._stream.seek(count, 1)
            self.given += count
            return
        while count > 0 and (block := self.read(min(count, BLOCK))):
            count -= len(block)

    def _counted(self, block: bytes) -> bytes:
        self.given += len(block)
        if self._packed:
            check_expansion(self._path, self.given, self._raw.tell())
        return block


@contextmanager
def opened(path: Path) -> Iterator[Bytes]:
    """The bytes of one file. DataError: no regular file, not readable, a damaged gzip file (with how far it could be read)."""
    stream = None
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: expected a regular file, got a pipe, device or folder. Copy the text into a file.")
        with path.open("rb") as raw:
            stream = Bytes(path, raw)
            yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}, after byte {stream.given if stream else 0}: expected a whole gzip file, got a damaged or cut one "
            f"({first_line(error)}). Fetch it again."
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text with its line end) of every line. DataError: not UTF-8, or a line too long to be a document."""
    number = 0
    with opened(path) as stream:
        while raw := stream.line(DOCUMENT_BYTES + 1):
            number += 1
            if len(raw) > DOCUMENT_BYTES:
                raise DataError(f"{path}, line {number}: {TOO_LONG}")
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                at = stream.given - len(raw) + error.start
                raise not_utf8(f"{path}, line {number}", at, raw[error.start]) from error
            yield number, line.removeprefix("\ufeff") if number == 1 else line


@dataclass(frozen=True)
class FileText:
    """The text of a plain file from byte `start` to byte `end` (None: to its end), read a block at a time. A `LongText`."""

    path: Path
    start: int = 0
    end: int | None = None

    def blocks(self) -> Iterator[str]:
        """As `decode` has it. DataError: not UTF-8, and what `opened` raises."""
        with opened(self.path) as stream:
            stream.skip(self.start)
            rest, held, first = b"", "", self.start == 0
            while True:
                room = BLOCK if self.end is None else min(BLOCK, self.end - stream.given)
                raw = stream.read(room) if room > 0 else b""
                rest += raw
                try:
                    text, used = codecs.utf_8_decode(rest, "strict", not raw)
                except UnicodeDecodeError as error:
                    raise not_utf8(self.path, stream.given - len(rest) + error.start, rest[error.start]) from error
                rest = rest[used:]
                text = held + text
                if first and text:
                    text, first = text.removeprefix("\ufeff"), False
                # A carriage return at the very end may belong to a line end that goes on in the next block.
                held = "\r" if raw and text.endswith("\r") else ""
                text = text.removesuffix("\r") if held else text
                if text:
                    yield text.replace("\r\n", "\n")
                if not raw:
                    return

    def halves(self, share: float) -> tuple[LongText, LongText]:
        """The text up to a line break near `share` of its bytes, and the rest."""
        with opened(self.path) as stream:
            if self.path.name.lower().endswith(GZIP):
                stream.skip(2**63)
                size = stream.given
            else:
                size = self.path.stat().st_size
        at = int(size * share)
        with opened(self.path) as stream:
            stream.skip(at)
            near = stream.read(BLOCK)
        line = near.find(b"\n") + 1
        # Without a line break at the start of a character: those inside of one begin with the bits 10.
        at += line or next((i for i, byte in enumerate(near) if byte & 0xC0 != 0x80), 0)
        return replace(self, end=at), replace(self, start=at)


def plain_document(path: Path) -> str | FileText:
    """The text of a plain file: a string, or a FileText where it is longer than a document held in memory."""
    with opened(path) as stream:
        raw = stream.read(DOCUMENT_BYTES + 1)
    if len(raw) > DOCUMENT_BYTES:
        return FileText(path)
    try:
        return decode(raw)
    except UnicodeDecodeError as error:
        raise not_utf8(path, error.start, raw[error.start]) from error
