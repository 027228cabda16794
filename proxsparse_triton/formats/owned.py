"""What in a folder is this tool's own, and may be deleted: regular files under whole names that a record of the folder holds.

A finished folder has its record in manifest.json; one that is being written has a marker with the names that may come.
Everything else is a stranger: other files, links, empty folders, runs that a comparison does not list.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..marks import HEAD_BYTES, PAGE_MARK, PICTURE_MARK, TOOL

MANIFEST_NAME = "manifest.json"
FILES = "files"  # of the manifest: what the folder held when it was written, see records.py
COMPARISON = "comparison"  # of the manifest: the runs of a comparison, each in a folder of its own
MARKER = ".unfinished-run.json"  # in a folder that is being written, or is about to be deleted
MAX_MANIFEST = 100_000_000  # bytes

# What `pst report` adds later on, and what a kill leaves of it.
PAGE = "report.html"
PICTURES = "report"
_PICTURE = re.compile(rf"{PICTURES}/[^/]+\.png")
_HALF_WRITTEN = re.compile(rf"(?:{PICTURES}/)?\.(?:report\.html|[^/]+\.png|manifest\.json|masks\.safetensors)\.partial")
# What every run writes, and keeps where it fails; beside a marker also the weights.
_UNFINISHED = frozenset({"metrics.jsonl", "masks.safetensors", MARKER})
_WEIGHTS = re.compile(r"(?:model|packed)(?:-\d+-of-\d+)?\.safetensors(?:\.index\.json)?|config\.json")


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest that this tool wrote to `folder`; empty where there is none."""
    path = folder / MANIFEST_NAME
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_MANIFEST:  # a FIFO would wait for ever
            return {}
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) and manifest.get("tool") == TOOL else {}


def is_run(folder: Path) -> bool:
    """True if `folder` holds a manifest.json written by this tool."""
    return bool(manifest_of(folder))


def is_whole(folder: Path) -> bool:
    """True for a run or comparison with all that its record lists."""
    manifest = manifest_of(folder)
    runs = _compared(manifest)
    files = manifest.get(FILES)
    if not manifest or (not runs and not isinstance(files, dict)):
        return False
    return all(is_whole(folder / run) for run in runs) and all((folder / name).is_file() for name in _recorded(manifest))


def is_marked(folder: Path) -> bool:
    """True for a folder that is being written or deleted, or was when its process ended: without strangers it may go."""
    return _marker(folder) is not None


def mark(folder: Path, source: Path | None) -> None:
    """Leave the marker in `folder`, which is ours: what is copied from the model in `source` is ours too."""
    copied = [*source.iterdir(), *source.glob("additional_chat_templates/*")] if source is not None else []
    names = [path.relative_to(source).as_posix() for path in copied if source is not None and path.is_file()]
    names += [str(PurePosixPath(name).with_suffix(".safetensors")) for name in names if name.endswith(".bin")]
    (folder / MARKER).write_text(json.dumps({"tool": TOOL, "names": sorted(names)}), encoding="utf-8")


def strangers(folder: Path, *, unfinished: bool = False) -> list[str]:
    """What lies in `folder` and no record of it holds, by its path in it, sorted; a folder with nothing in it ends in a slash.

    Args:
        unfinished: it may be a run that did not finish, or is half deleted; folders with nothing in them are then none.
    """
    manifest = manifest_of(folder)
    names = set(_recorded(manifest))
    if manifest:
        names |= {MANIFEST_NAME, MARKER}  # which a kill right after the renaming leaves
    marker = _marker(folder) if unfinished else None
    if marker is not None:
        names |= _UNFINISHED | set(marker)
    parents = {str(parent) for name in names for parent in PurePosixPath(name).parents} | {PICTURES}
    runs = {run for run in _compared(manifest) if _is_as_recorded(folder, f"{run}/{MANIFEST_NAME}", manifest)}

    def ours(name: str, path: Path) -> bool:
        if name in names or _HALF_WRITTEN.fullmatch(name) or (marker is not None and _WEIGHTS.fullmatch(name)):
            return True
        return (name == PAGE and _has(path, PAGE_MARK)) or (_PICTURE.fullmatch(name) is not None and _has(path, PICTURE_MARK))

    def foreign(place: Path, prefix: str) -> Iterator[str]:
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
            name, path = prefix + entry.name, Path(entry.path)
            if not entry.is_dir(follow_symlinks=False):
                if not entry.is_file(follow_symlinks=False) or not ours(name, path):
                    yield name
            elif name in runs or (unfinished and name not in parents):
                yield from (f"{name}/{inner}" for inner in strangers(path, unfinished=unfinished))
            elif name in parents:
                yield from foreign(path, f"{name}/")
            else:
                yield from [f"{name}/{inner}" for inner in _all(path)] or [f"{name}/"]

    return list(foreign(folder, ""))


def delete(folder: Path, *, keep_folder: bool = False) -> None:
    """Delete all of `folder`, its record last: what is left when this is killed is still known as ours."""
    entries = sorted(os.scandir(folder), key=lambda entry: (entry.name == MARKER, entry.name == MANIFEST_NAME, entry.name))
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            delete(Path(entry.path))
        else:
            os.unlink(entry.path)
    if not keep_folder:
        folder.rmdir()


def _recorded(manifest: Mapping[str, Any]) -> list[str]:
    files = manifest.get(FILES)
    return [name for name in files if isinstance(name, str)] if isinstance(files, dict) else []


def _compared(manifest: Mapping[str, Any]) -> set[str]:
    """Folders of the runs that a comparison lists, directly below it."""
    entries = manifest.get(COMPARISON)
    folders = [entry.get("folder") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return {name for name in folders if isinstance(name, str) and name not in ("", ".", "..") and PurePosixPath(name).name == name}


def _is_as_recorded(folder: Path, name: str, manifest: Mapping[str, Any]) -> bool:
    """False where a small file has another hash than the record says: a run that took the place of one that was compared."""
    files = manifest.get(FILES)
    record = files.get(name) if isinstance(files, dict) else None
    path = folder / name
    if not isinstance(record, dict) or not path.is_file():
        return True
    return hashlib.sha256(path.read_bytes()).hexdigest() == record.get("sha256")


def _marker(folder: Path) -> list[str] | None:
    """The names in the marker; None without one."""
    path = folder / MARKER
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return None
        names = json.loads(path.read_text(encoding="utf-8"))["names"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # killed while it was written
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _has(path: Path, marked: str) -> bool:
    """True for a file with our mark in its head, and for an empty one, which a kill left."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    return not head or marked.encode() in head


def _all(folder: Path) -> list[str]:
    """Everything below `folder` that is not a folder, links not followed."""
    found = []
    for current, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(current, name))]
        found += [Path(current, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)
