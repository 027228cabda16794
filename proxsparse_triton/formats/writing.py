"""Writing that survives a crash, and its errors explained: flushed to the disk, files replaced in one step, one line for an OSError."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import OutputError

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
NO_PERMISSION = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO})
LONGEST = 200  # characters of a name in a message


def readable_bytes(count: float) -> str:
    """A size for people: 13.5 GB, 820.0 MB, 12 bytes."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; the file written there replaces `path` when the block ends well.

    Raises: OutputError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with explained(path):
        try:
            yield temporary
            flush_one(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def flush(folder: Path) -> None:
    """Force everything below `folder` to the disk: a rename may survive a power cut that its contents do not."""
    for current, _, files in os.walk(folder):
        for name in files:
            flush_one(Path(current) / name)
        with suppress(OSError):  # some file systems cannot flush a folder
            flush_one(Path(current))


def flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained(path: Path, *, writing: Path | None = None, needed: int | None = None) -> Iterator[None]:
    """Turn an OSError into an OutputError.

    With `writing` (the caller's own code runs inside) only errors about that folder are turned: one about an input file is
    not ours to explain.
    """
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        if writing is not None and not _concerns(error, writing):
            raise
        raise OutputError(_explanation(error, path, writing, needed)) from error


def _concerns(error: OSError, folder: Path) -> bool:
    if error.errno in NO_SPACE or error.errno == errno.EFBIG:
        return True
    if error.filename is None:  # a failing write() knows no name
        return error.errno in NO_PERMISSION
    return isinstance(error.filename, str | os.PathLike) and Path(os.path.realpath(error.filename)).is_relative_to(folder)


def _explanation(error: OSError, path: Path, writing: Path | None, needed: int | None) -> str:
    reason = (error.strerror or str(error)).lower()
    if error.errno in NO_SPACE:
        if needed is None and writing is not None:
            size = f"more than the {readable_bytes(_size(writing))} written so far"
        else:
            size = f"about {readable_bytes(needed)}" if needed is not None else "more than what is free"
        return (
            f"output folder: expected room for the run, got no space left on {error.filename or path}: needs {size}. "
            "Free some space or choose another disk with -o."
        )
    if error.errno == errno.EFBIG:
        advice = "Raise `ulimit -f` or choose another disk with -o."
        return f"output folder: expected room for files of this size, got {reason} in {path}. {advice}"
    if error.errno == errno.EIO and error.filename is None:
        return f"output folder: expected disks that work, got {reason} while the model was read or {path} written. Check both disks."
    where = str(error.filename2 or error.filename or path)
    where = where if len(where) <= LONGEST else f"{where[:LONGEST]}..."
    return f"output folder: expected a place to write, got {reason} at {where}. Choose another folder with -o or change its permissions."


def _size(folder: Path) -> int:
    total = 0
    with suppress(OSError):
        total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return total
