"""What a folder held when it was written: size and SHA-256 of every file, in its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..files import is_regular, open_regular
from .owned import FILES, MANIFEST_NAME, MARKER

Records = dict[str, dict[str, object]]


def file_records(folder: Path) -> Records:
    """Size and SHA-256 of every file below `folder` but the manifest itself, by its path in it."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: record_of(folder / name) for name in names if name not in (MANIFEST_NAME, MARKER)}


def record_of(path: Path) -> dict[str, object]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def is_record(name: str, record: Any) -> bool:
    inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
    return inside and isinstance(record, dict) and type(record.get("bytes")) is int and isinstance(record.get("sha256"), str)


def changed_files(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Files that are not as the manifest says, a line each; none where it says nothing. OSError: one cannot be read."""
    files = manifest.get(FILES)
    problems = []
    for name, record in files.items() if isinstance(files, dict) else ():
        path = folder / name
        if not is_record(name, record):
            problems.append(f"{MANIFEST_NAME}: has no size and SHA-256 of {name[:80]!r}")
        elif not is_regular(path):
            problems.append(f"{name}: is missing, {MANIFEST_NAME} lists it")
        elif path.stat().st_size != record["bytes"] or sha256(path) != record["sha256"]:
            problems.append(f"{name}: is not the file that was written, its SHA-256 in {MANIFEST_NAME} is another")
    return problems


def sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
