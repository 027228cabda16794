"""The output folder appears atomically: everything is written to `<path>.partial`, flushed, then renamed.

A folder under the output's own name is therefore always a finished run. An earlier run is exchanged for the new one in one step where
the system can do that. Only what is this tool's own is deleted, see owned.py. Every write error becomes one explained line.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .. import interrupts
from ..errors import OutputError
from ..marks import TOOL
from .exchange import exchange
from .locks import BusyError, Lock
from .owned import COMPARISON, FILES, MANIFEST_NAME, MARKER, delete, is_marked, is_run, is_whole, manifest_of, mark, strangers
from .writing import atomic_file, explained, flush, flush_one, readable_bytes

# Those of the modules around too: whoever writes or knows a folder needs no other.
__all__ = [
    "FILES",
    "MANIFEST_NAME",
    "TOOL",
    "atomic_file",
    "check_apart",
    "check_output",
    "check_space",
    "is_run",
    "output_folder",
    "readable_bytes",
]

ROOM = 100  # characters for a file's name below the folder, where paths are limited
ATTEMPTS = 100  # to lock a folder that others remove at the same moment


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise OutputError unless a run may be written to `path`; to be called before any work.

    An existing folder must be empty. With `overwrite` it may also hold an earlier run of this tool whose manifest.json lists its files,
    and nothing but these (and what `pst report` added); nothing else is ever replaced. `<path>.partial` may be what an unfinished run
    left. Missing parents are allowed. What a kill left of an earlier replacement is completed first.
    """
    with explained(path):
        target, partial = _names(path)
        _recover(target, partial)
        if target.exists() and not target.is_dir():
            raise OutputError(f"output folder: expected a new or empty folder, got the file {path}. Choose another name with -o.")
        if os.path.lexists(partial) and (partial.is_symlink() or not partial.is_dir()):
            what = "link" if partial.is_symlink() else "file"
            raise OutputError(f"output folder: expected a free name for the unfinished run, got the {what} {partial}. Move it away.")
        if os.path.ismount(target):
            raise OutputError(
                f"output folder: expected a folder that can be renamed, got the mount point {path}. Choose a folder below it."
            )
        if target.is_dir() and any(target.iterdir()):
            _check_replaceable(path, target, overwrite)
        made = _make_folders(target.parent)
        try:
            if partial.is_dir():  # left over by an interrupted run, or in use by one that still writes
                with _locked(partial):
                    _check_leftover(partial)
            else:
                partial.mkdir()
                partial.rmdir()
            if not os.access(target.parent, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target.parent))
        finally:
            _remove_empty(made)


def check_apart(path: Path, model: Path) -> None:
    """Raise OutputError where a run at `path` would replace the model in the folder `model` that it is made from. It may lie in it.

    Links are followed, those of single files too. The unfinished run's name counts as well.
    """
    with explained(path):
        target, partial = _names(path)
        read = [Path(os.path.realpath(place)) for place in (model, *(file for file in model.iterdir() if file.is_file()))]
        if any(_within(place, folder) for folder in (target, partial) for place in read):
            raise OutputError(
                f"output folder: expected an output folder of its own, got {path}, which holds files of the model {read[0]}. "
                "Choose another name with -o."
            )


def check_space(path: Path, needed: int) -> None:
    """Raise OutputError unless about `needed` bytes are free where `path` is or will be."""
    with explained(path):
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
def output_folder(
    path: Path,
    *,
    overwrite: bool = False,
    keep_on_error: Sequence[str] = (),
    needed: int | None = None,
    source: Path | None = None,
) -> Iterator[Path]:
    """Yield `<path>.partial`, a folder to write to that is empty but for a marker; it becomes `path` when the block ends well.

    On any exception, KeyboardInterrupt included, everything in it is removed except the files of `keep_on_error` that
    exist and are not empty, and an earlier run at `path` stays as it was. Where only the last renaming fails, the finished run stays
    in the partial folder as it is. A partial folder left by an interrupted run is replaced; one that another process is writing to,
    that is a finished run, or that holds anything else, is refused.

    Args:
        overwrite: as for `check_output`, which is called first.
        keep_on_error: names directly inside the folder (metrics.jsonl); a folder of that name is kept whole.
        needed: bytes the whole run takes, named in the message when the disk is full.
        source: the model whose files are copied under their own names; what a kill leaves of them is known by these.
    Raises: OutputError: `path` may not be written, the disk is full, or the final rename failed. What is kept, and where, is added to
        any exception as a note.
    """
    check_output(path, overwrite=overwrite)
    with explained(path):
        target, partial = _names(path)
        made = _make_folders(target.parent)
        lock = _claim(partial, source)
    finished = False
    try:
        with explained(path, writing=partial, needed=needed):
            yield partial
        with explained(path, needed=needed):
            flush(partial)
            finished = True
            _publish(path, target, partial, overwrite)
            (target / MARKER).unlink(missing_ok=True)
    except BaseException as error:
        interrupts.answer()
        if lock.holds(partial):  # by its name alone it might be another run's by now
            if finished:  # without a marker it is a run like any other, which nothing deletes
                (partial / MARKER).unlink(missing_ok=True)
            else:
                _discard(partial, keep_on_error, made)
        _note_what_is_kept(error, path, target, partial, lock, finished)
        raise
    finally:
        lock.release()


def _names(path: Path) -> tuple[Path, Path]:
    """The real folder behind `path` (links and '.' resolved, since a link cannot be renamed over) and its partial twin.

    OutputError: a name that cannot be used. OSError: one that is too long.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise OutputError(f"output folder: expected a name without NUL, got {text!a}. Choose another name with -o.")
    target = Path(os.path.realpath(path))
    try:
        str(target).encode("utf-8")
    except UnicodeEncodeError:
        raise OutputError(
            f"output folder: expected a name in UTF-8, got {str(target)!a}, below which weights cannot be written. "
            "Choose another name with -o."
        ) from None
    if target.is_symlink():
        raise OutputError(f"output folder: expected a folder, got {path}, a link that leads to itself. Choose another name with -o.")
    if not target.name:
        return target, target
    partial = target.with_name(f"{target.name}.partial")
    for longest in (_aside(target), partial / ("x" * ROOM)):
        with suppress(FileNotFoundError, NotADirectoryError):
            longest.lstat()
    return target, partial


def _aside(target: Path) -> Path:
    """Where an earlier run waits where it cannot be exchanged."""
    return target.with_name(f"{target.name}.replaced-{os.getpid()}")


def _check_replaceable(path: Path, target: Path, overwrite: bool) -> None:
    manifest = manifest_of(target)
    if overwrite and manifest:
        found = strangers(target)
        if not found:
            return
        more = "" if len(found) == 1 else f" and {len(found) - 1} more"
        recorded = isinstance(manifest.get(FILES), dict) or isinstance(manifest.get(COMPARISON), list)
        why = "" if recorded else f" (the {MANIFEST_NAME} there lists no files, as those of earlier versions)"
        raise OutputError(
            f"output folder: expected only what was written with the run at {path}, got {found[0]}{more}, which --overwrite would "
            f"delete{why}. Move it away, or choose another name with -o."
        )
    if overwrite:
        raise OutputError(
            f"output folder: expected an earlier run of this tool at {path}, got a folder with other files, which are kept. "
            f"--overwrite only replaces a folder whose {MANIFEST_NAME} has the tool {TOOL}; choose another name with -o."
        )
    holds = "an earlier run" if manifest else "a folder with other files"
    raise OutputError(
        f"output folder: expected a new or empty folder, got {path}, {holds}, which is kept. "
        "Choose another name with -o; --overwrite only replaces an earlier run of this tool."
    )


def _check_leftover(partial: Path) -> None:
    if not is_marked(partial) and is_whole(partial):
        raise OutputError(
            f"output folder: expected a free name for the unfinished run, got {partial}, which is a finished run. "
            "Give it another name, or choose another one with -o."
        )
    found = strangers(partial, unfinished=True)
    if not is_marked(partial):  # then whatever is there is not ours to delete
        found = found or sorted(os.listdir(partial))
    if found:
        more = "" if len(found) == 1 else f" and {len(found) - 1} more"
        raise OutputError(
            f"output folder: expected a free name for the unfinished run, got {partial} with {found[0]}{more}, which no run of this tool "
            "left there. Move it away, or choose another name with -o."
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """OutputError where another process has `folder`."""
    lock = _lock(folder)
    try:
        yield
    finally:
        lock.release()


def _lock(folder: Path) -> Lock:
    try:
        return Lock(folder)
    except BusyError:
        raise OutputError(
            f"output folder: expected a folder that no other run uses, got {folder}, which another process is writing. "
            "Wait for it or choose another name with -o."
        ) from None


def _claim(partial: Path, source: Path | None) -> Lock:
    """The lock of `partial`, which is made, or emptied of what a run left there; nobody else has it in between."""
    for _ in range(ATTEMPTS):
        with suppress(FileExistsError):
            partial.mkdir()
        try:
            lock = _lock(partial)
        except FileNotFoundError:  # whoever had it is done
            continue
        if lock.holds(partial):
            break
        lock.release()
    else:
        raise OutputError(f"output folder: expected a folder that stays, got {partial}, which others remove. Choose another name with -o.")
    try:
        _check_leftover(partial)
        delete(partial, keep_folder=True)
        mark(partial, source)
    except BaseException:
        lock.release()
        raise
    return lock


def _recover(target: Path, partial: Path) -> None:
    """Complete what a kill left of a replacement in two steps; RUN.replaced-PID goes, the run that is whole gets its name.

    Only folders with a marker, or with nothing in them: any other one with such a name is the user's.
    """
    if not os.access(target.parent, os.R_OK | os.X_OK):
        return
    pattern = re.compile(rf"{re.escape(target.name)}\.replaced-\d+")
    for aside in sorted(path for path in target.parent.iterdir() if pattern.fullmatch(path.name)):
        if aside.is_symlink() or not aside.is_dir():
            continue
        try:
            lock = Lock(aside)
        except BusyError:  # its run is at work
            continue
        try:
            ours = is_marked(aside) or not os.listdir(aside)  # the marker goes last, the empty folder after it
            if not ours or strangers(aside, unfinished=True):
                continue
            if not os.path.lexists(target) and is_whole(aside):
                done = is_marked(partial) and is_whole(partial) and not strangers(partial, unfinished=True)
                os.rename(partial if done else aside, target)
                (target / MARKER).unlink(missing_ok=True)
            if aside.exists():
                delete(aside)
        finally:
            lock.release()


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


def _publish(path: Path, target: Path, partial: Path, overwrite: bool) -> None:
    """Give `partial` the name `target`; an earlier run there is exchanged for it and deleted."""
    if not (overwrite and target.is_dir() and is_run(target)):
        os.rename(partial, target)  # an empty folder is replaced; one that filled up meanwhile makes this fail
        _flush_parent(target)
        return
    _check_replaceable(path, target, overwrite)  # again: hours may have passed
    with _locked(target):  # the earlier run, under whichever name it goes
        earlier = partial
        mark(target, None)  # what is deleted under another name is known as ours by it
        try:
            if not exchange(partial, target):
                earlier = _aside(target)
                os.rename(target, earlier)
                os.rename(partial, target)
        except BaseException:
            if earlier != partial and not os.path.lexists(target):
                os.rename(earlier, target)
            if partial.exists():  # still the new run
                (target / MARKER).unlink(missing_ok=True)
            raise
        _flush_parent(target)
        try:
            delete(earlier)
        except OSError as error:
            warnings.warn(f"the replaced run could not be deleted and stays in {earlier}: {error}", stacklevel=5)


def _flush_parent(target: Path) -> None:
    with suppress(OSError):  # some file systems cannot flush a folder
        flush_one(target.parent)


def _discard(partial: Path, keep: Sequence[str], made: Sequence[Path]) -> None:
    """Empty `partial` except for the files worth keeping; never raises, since an exception is on its way already."""
    with suppress(OSError):
        for entry in sorted(partial.iterdir()):
            with suppress(OSError):
                if entry.name == MARKER:
                    continue
                if entry.is_dir() and not entry.is_symlink():
                    if entry.name not in keep:
                        shutil.rmtree(entry)
                elif entry.name not in keep or entry.stat().st_size == 0:
                    entry.unlink()
        if os.listdir(partial) == [MARKER]:  # it says whose the files are that are kept
            (partial / MARKER).unlink()
        partial.rmdir()
        _remove_empty(made)


def _note_what_is_kept(error: BaseException, path: Path, target: Path, partial: Path, lock: Lock, finished: bool) -> None:
    if lock.holds(target):
        error.add_note(f"The run is complete in {path}; what is left of the one that it replaces goes with the next run of that name.")
    elif finished and lock.holds(partial):
        error.add_note(f"The finished run is whole in {partial}: give it another name.")
    elif lock.holds(partial):
        kept = ", ".join(sorted(name for name in os.listdir(partial) if name != MARKER))
        error.add_note(f"Kept in {path}.partial until the next run of that name: {kept}.")


def _within(path: Path, folder: Path) -> bool:
    """True if `path` is `folder` or lies in it, under whatever names."""
    try:
        wanted = folder.stat()
    except OSError:
        return False
    for place in (path, *path.parents):
        with suppress(OSError):
            if os.path.samestat(place.stat(), wanted):
                return True
    return False
