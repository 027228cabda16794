"""Files that somebody else may have written: regular ones only, and never more of one than its kind can need.

A FIFO would be waited for, a device read without end, a sparse file of a terabyte taken into memory.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

MAX_JSON = 64 << 20  # bytes; the shard index of a model with 100,000 tensors has 10 MB
MAX_SMALL = 256 << 20  # bytes of a tokenizer file; the largest known have 35 MB
MAX_DEPTH = 100  # of lists and objects in each other

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


class UnfitFileError(OSError):
    """No regular file, or larger than a file of its kind may be; `strerror` says what it is."""


def open_regular(path: str | Path, most: int | None = None) -> BufferedReader:
    """The regular file `path` for reading; it never waits.

    Args:
        most: bytes that it may have at most; None: any number.
    Raises: UnfitFileError: something else under that name, or more bytes. OSError: as the file system says.
    """
    _check(os.stat(path), path, most)  # before it is opened, which may do something to a device
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check(os.fstat(descriptor), path, most)  # the name may have changed hands
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | Path, most: int) -> bytes:
    """All bytes of a regular file of at most `most`. Raises: as `open_regular`."""
    with open_regular(path, most) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise _too_large(path, len(content), most)
    return content


def read_json(path: str | Path, most: int = MAX_JSON) -> Any:
    """The JSON value of a UTF-8 file. Raises: as `open_regular` and `parse_json`."""
    return parse_json(read_regular(path, most))


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text, at most MAX_DEPTH deep, so that whoever walks through it needs no care.

    Raises: ValueError: not UTF-8, not JSON, or nested deeper.
    """
    try:
        value = json.loads(text.decode() if isinstance(text, bytes) else text)
    except RecursionError as error:
        raise ValueError(f"lists or objects nested more than {MAX_DEPTH} deep") from error
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for node in level if isinstance(node, dict | list) for item in (node.values() if isinstance(node, dict) else node)]
        if not level:
            return value
    raise ValueError(f"lists or objects nested more than {MAX_DEPTH} deep")


def is_regular(path: str | Path) -> bool:
    """True for a regular file, links followed; False too for a name that no file can have, or that may not be looked at."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return False


def _check(status: os.stat_result, path: str | Path, most: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for matches, name in KINDS if matches(status.st_mode)), "something else than a file")
        raise UnfitFileError(errno.EINVAL, kind, str(path))
    if most is not None and status.st_size > most:
        raise _too_large(path, status.st_size, most)


def _too_large(path: str | Path, size: int, most: int) -> UnfitFileError:
    return UnfitFileError(errno.EFBIG, f"{size / 1e6:,.0f} MB, more than the {most / 1e6:,.0f} MB of any file of its kind", str(path))
