"""The output folder appears atomically: everything is written to `<path>.partial`, flushed, then renamed.

A folder under the output's own name is therefore always a finished run. Every write error becomes one explained line.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import OutputError

try:
    import fcntl
except ImportError:  # Windows has no advisory locks: two runs into one folder are then not told apart
    fcntl = None  # type: ignore[assignment]

TOOL = "proxsparse-triton"
MANIFEST_NAME = "manifest.json"
FILES = "files"  # of the manifest: what the folder held when it was written, see records.py
ADDED = ("report.html", "report/")  # what pst adds to a run later on
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
NO_PERMISSION = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO})


def readable_bytes(count: float) -> str:
    """A size for people: 13.5 GB, 820.0 MB, 12 bytes."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise OutputError unless a run may be written to `path`; to be called before any work.

    An existing folder must be empty. With `overwrite` it may also hold an earlier run of this tool, recognised by a
    manifest.json whose `tool` is proxsparse-triton; nothing else is ever replaced. Missing parents are allowed.
    """
    with _explained(path):
        target, partial = _names(path)
        if target.exists() and not target.is_dir():
            raise OutputError(f"output folder: expected a new or empty folder, got the file {path}. Choose another name with -o.")
        if partial.exists() and not partial.is_dir():
            raise OutputError(f"output folder: expected a free name for the unfinished run, got the file {partial}. Move it away.")
        if os.path.ismount(target):
            raise OutputError(
                f"output folder: expected a folder that can be renamed, got the mount point {path}. Choose a folder below it."
            )
        if target.is_dir() and any(target.iterdir()):
            _check_replaceable(path, target, overwrite)
        made = _make_folders(target.parent)
        try:
            if partial.is_dir():  # left over by an interrupted run, or in use by one that still writes
                _unlock(_lock(partial))
            else:
                partial.mkdir()
                partial.rmdir()
            if not os.access(target.parent, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target.parent))
        finally:
            _remove_empty(made)


def check_space(path: Path, needed: int) -> None:
    """Raise OutputError unless about `needed` bytes are free where `path` is or will be."""
    with _explained(path):
        place = _names(path)[0]
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
    if free < needed:
        raise OutputError(
            f"output folder: expected about {needed / 1e9:.2f} GB free on {place}, got {free / 1e9:.2f} GB. "
            "Free some space or choose another disk with -o."
        )


@contextmanager
def output_folder(path: Path, *, overwrite: bool = False, keep_on_error: Sequence[str] = (), needed: int | None = None) -> Iterator[Path]:
    """Yield `<path>.partial`, a fresh folder to write to; it becomes `path` when the block ends without an exception.

    On any exception, KeyboardInterrupt included, everything in it is removed except the files of `keep_on_error` that
    exist and are not empty, and an earlier run at `path` stays as it was. A partial folder left by an interrupted run is
    replaced; one that another process is writing to is refused.

    Args:
        overwrite: as for `check_output`, which is called first.
        keep_on_error: names directly inside the folder (metrics.jsonl); a folder of that name is kept whole.
        needed: bytes the whole run takes, named in the message when the disk is full.
    Raises: OutputError: `path` may not be written, the disk is full, or the final rename failed.
    """
    check_output(path, overwrite=overwrite)
    with _explained(path):
        target, partial = _names(path)
        made = _make_folders(target.parent)
        if partial.exists():
            _unlock(_lock(partial))
            shutil.rmtree(partial)
        partial.mkdir()
        lock = _lock(partial)
    try:
        with _explained(path, writing=partial, needed=needed):
            yield partial
        with _explained(path, needed=needed):
            _flush(partial)
            _publish(partial, target, overwrite)
    except BaseException as error:
        _discard(partial, keep_on_error, made)
        if partial.exists():
            kept = ", ".join(sorted(entry.name for entry in partial.iterdir()))
            error.add_note(f"Kept in {path}.partial until the next run of that name: {kept}.")
        raise
    finally:
        _unlock(lock)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; the file written there replaces `path` when the block ends well.

    Raises: OutputError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with _explained(path):
        try:
            yield temporary
            _flush_one(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def is_run(folder: Path) -> bool:
    """True if `folder` holds a manifest.json written by this tool."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("tool") == TOOL


def _names(path: Path) -> tuple[Path, Path]:
    """The real folder behind `path` (links and '.' resolved, since a link cannot be renamed over) and its partial twin."""
    target = Path(os.path.realpath(path))
    return target, target.with_name(f"{target.name}.partial") if target.name else target


def _check_replaceable(path: Path, target: Path, overwrite: bool) -> None:
    earlier = is_run(target)
    if overwrite and earlier:
        strangers = _strangers(target)
        if strangers:
            more = "" if len(strangers) == 1 else f" and {len(strangers) - 1} more"
            raise OutputError(
                f"output folder: expected only what was written with the run at {path}, got {strangers[0]}{more}, which --overwrite would "
                "delete. Move it away, or choose another name with -o."
            )
        return
    if overwrite:
        raise OutputError(
            f"output folder: expected an earlier run of this tool at {path}, got a folder with other files, which are kept. "
            f"--overwrite only replaces a folder whose {MANIFEST_NAME} has the tool {TOOL}; choose another name with -o."
        )
    holds = "an earlier run" if earlier else "a folder with other files"
    raise OutputError(
        f"output folder: expected a new or empty folder, got {path}, {holds}, which is kept. "
        "Choose another name with -o; --overwrite only replaces an earlier run of this tool."
    )


def _strangers(folder: Path) -> list[str]:
    """Files below a run or a comparison of runs that are in none of their records; none where there is no record."""
    manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    files, compared = manifest.get(FILES), manifest.get("comparison")
    if not isinstance(files, dict) and not isinstance(compared, list):
        return []
    known = set(files) if isinstance(files, dict) else set()
    runs = [path for path in folder.iterdir() if is_run(path)] if isinstance(compared, list) else []
    inside = [f"{run.name}/{name}" for run in runs for name in _strangers(run)]
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    skipped = (*ADDED, MANIFEST_NAME, *(f"{run.name}/" for run in runs))
    return inside + [name for name in names if name not in known and not name.startswith(skipped)]


def _make_folders(folder: Path) -> list[Path]:
    """Create `folder` with its parents; returns those that did not exist, innermost first."""
    made: list[Path] = []
    missing = folder
    while not missing.exists():
        made.append(missing)
        missing = missing.parent
    folder.mkdir(parents=True, exist_ok=True)
    return made


def _remove_empty(folders: Sequence[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _lock(folder: Path) -> int:
    """Descriptor of `folder`, locked until it is closed: a second run must not delete what a first one is writing."""
    if fcntl is None:
        return -1
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OutputError(
            f"output folder: expected a folder that no other run uses, got {folder}, which another process is writing. "
            "Wait for it or choose another name with -o."
        ) from None
    except OSError:  # a file system without locks: go on unlocked
        return descriptor
    return descriptor


def _unlock(descriptor: int) -> None:
    if descriptor >= 0:
        os.close(descriptor)


def _flush(folder: Path) -> None:
    """Force everything below `folder` to the disk: a rename may survive a power cut that its contents do not."""
    for current, _, files in os.walk(folder):
        for name in files:
            _flush_one(Path(current) / name)
        with suppress(OSError):  # some file systems cannot flush a folder
            _flush_one(Path(current))


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(partial: Path, target: Path, overwrite: bool) -> None:
    """Rename `partial` to `target`; an earlier run there is moved aside, put back on failure, deleted on success."""
    earlier = overwrite and target.is_dir() and is_run(target)
    aside = target.with_name(f"{target.name}.replaced-{os.getpid()}")
    try:
        if earlier:
            os.rename(target, aside)
        os.rename(partial, target)  # an empty folder is replaced; one that filled up meanwhile makes this fail
    except BaseException:
        if earlier and aside.exists() and not target.exists():
            os.rename(aside, target)
        raise
    with suppress(OSError):  # some file systems cannot flush a folder
        _flush_one(target.parent)
    try:
        if earlier:
            shutil.rmtree(aside)
    except OSError as error:
        warnings.warn(f"the replaced run could not be deleted and stays in {aside}: {error}", stacklevel=4)


def _discard(partial: Path, keep: Sequence[str], made: Sequence[Path]) -> None:
    """Empty `partial` except for the files worth keeping; never raises, since an exception is on its way already."""
    with suppress(OSError):
        for entry in list(partial.iterdir()):
            with suppress(OSError):
                if entry.is_dir() and not entry.is_symlink():
                    if entry.name not in keep:
                        shutil.rmtree(entry)
                elif entry.name not in keep or entry.stat().st_size == 0:
                    entry.unlink()
        partial.rmdir()
        _remove_empty(made)


@contextmanager
def _explained(path: Path, *, writing: Path | None = None, needed: int | None = None) -> Iterator[None]:
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
    if error.errno in NO_SPACE:
        return True
    if error.errno not in NO_PERMISSION:
        return False
    if error.filename is None:  # a failing write() knows no name
        return True
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
    where = path if error.filename is None else error.filename
    return f"output folder: expected a place to write, got {reason} at {where}. Choose another folder with -o or change its permissions."


def _size(folder: Path) -> int:
    total = 0
    with suppress(OSError):
        total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return total
