"""A folder of text: which of its files are read, which are left out and why, and in which order the documents come."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import DataError
from .documents import Document, document_digest
from .files import ACCEPTED_FILES, PLAIN, suffix_of
from .readers import read_documents
from .rows import RowText, Tally

FOLDER_CHARACTERS = 2**26  # of documents that are held in memory to be ordered; a folder with more is read file by file
OPEN_FILES = 8  # read in turn where a folder is too large to be ordered
NAMED = 5  # files left out that a note names
# Names up to the first dot. Beside rows these files are about the data, not data; alone they are text like any other.
ABOUT = ("readme", "license", "licence", "copying", "notice", "citation", "changelog", "contributing", "code_of_conduct")


@dataclass(frozen=True)
class TextFolder:
    """The files of a folder in a fixed order, and (name, reason) of those left out."""

    path: Path
    files: tuple[Path, ...]
    left_out: tuple[tuple[str, str], ...]

    def note(self) -> str:
        """One line for the user; empty where every file is read."""
        count = len(self.files)
        return f"{self.path}: reads {count} {'file' if count == 1 else 'files'}, not {self._listed()}." if self.left_out else ""

    def _listed(self) -> str:
        named = ", ".join(f"{_printable(name)} ({why})" for name, why in self.left_out[:NAMED])
        more = len(self.left_out) - NAMED
        return named + (f" and {more} more" if more > 0 else "")

    def documents(self, rows: RowText) -> Iterator[Document]:
        """By the digests of the documents: fixed, the same on every file system, and without topics.

        Above FOLDER_CHARACTERS a document of each of OPEN_FILES files in turn, the files by the digest of their names.
        """
        held: list[Document] = []
        room = FOLDER_CHARACTERS
        for file in self.files:
            for document in read_documents(file, rows):
                held.append(document)
                room -= len(document) if isinstance(document, str) else 0  # the others are not in memory
                if room < 0:
                    del held
                    rows.tally.clear()
                    return self._in_turn(rows)
        return iter(sorted(held, key=document_digest))

    def _in_turn(self, rows: RowText) -> Iterator[Document]:
        def digest(file: Path) -> bytes:
            return hashlib.sha256(os.fsencode(file.relative_to(self.path).as_posix())).digest()

        waiting = iter(sorted(self.files, key=digest))
        running: deque[Iterator[Document]] = deque()
        while True:
            while len(running) < OPEN_FILES and (file := next(waiting, None)) is not None:
                running.append(read_documents(file, rows))
            if not running:
                return
            reader = running.popleft()
            if (document := next(reader, None)) is not None:
                yield document
                running.append(reader)


def open_folder(path: Path, rows: RowText) -> TextFolder:
    """Every readable file anywhere below `path`; hidden files and folders and __pycache__ are left out without a word.

    A .json or .csv file whose first row has no text is left out, since these hold settings as often as text; so are files about
    the data (README.md, LICENSE.txt) where others hold rows.

    Raises: DataError: no file to read, or a folder that cannot be listed.
    """
    files, left_out = [], []
    for file in walk(path, _hidden):
        why = _why_not(file, rows)
        if why is None:
            files.append(file)
        else:
            left_out.append((file.relative_to(path).as_posix(), why))
    if any(suffix_of(file.name) not in PLAIN for file in files):
        about = [file for file in files if suffix_of(file.name) in PLAIN and file.name.lower().partition(".")[0] in ABOUT]
        files = [file for file in files if file not in about]
        left_out += [(file.relative_to(path).as_posix(), "about the data") for file in about]
    folder = TextFolder(path, tuple(files), tuple(left_out))
    if not files:
        got = f"none below it but {folder._listed()}" if left_out else "none below it"
        raise DataError(f"{path}: expected a folder with {ACCEPTED_FILES} files, got {got}. Convert its text to one of these.")
    return folder


def is_plain(path: Path) -> bool:
    """Whether a folder has text, and none of it in rows."""
    kinds = {suffix_of(file.name) for file in walk(path, _hidden)} - {None}
    return bool(kinds) and kinds <= set(PLAIN)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _why_not(file: Path, rows: RowText) -> str | None:
    """Why a file of a folder is not read; None where it is."""
    if not file.is_file():
        return "no regular file"
    suffix = suffix_of(file.name)
    if suffix is None:
        return "another kind"
    if suffix in (".json", ".csv"):
        try:
            next(read_documents(file, replace(rows, tally=Tally())), None)
        except DataError:
            return "no rows with text"
    return None


def _printable(name: str) -> str:
    """A name for a message, though its bytes are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def walk(folder: Path, skip: Callable[[str], bool]) -> Iterator[Path]:
    """Everything below `folder` that is not a folder, sorted by name in each; names that `skip` holds for are not entered or given.

    Links to folders are given and not entered.

    Raises: DataError: a folder cannot be listed.
    """

    def unreadable(error: OSError) -> None:
        raise DataError(f"{error.filename}: expected a readable folder, got {error.strerror}. Check its permissions.") from error

    for here, folders, names in os.walk(folder, onerror=unreadable):
        links = [name for name in folders if os.path.islink(os.path.join(here, name))]
        folders[:] = sorted(name for name in folders if not skip(name))
        yield from (Path(here, name) for name in sorted([*names, *links]) if not skip(name))
