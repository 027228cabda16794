"""How long-running code reports progress, without knowing who listens.

Library functions take a `Progress` and call it; the default says nothing, the command line draws bars.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self


class Task:
    """One bar: `advance` moves it, `fields` are short figures shown beside it (loss, share of 2:4 blocks)."""

    def advance(self, amount: int = 1, **fields: object) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass


class Progress:
    """Null progress: the base class is the silent implementation."""

    def task(self, description: str, total: int | None = None) -> Task:
        """Start one bar. `total` is None where the end is not known. Use it as a context manager."""
        return Task()

    def note(self, message: str) -> None:
        """One line for the user: a warning or a fact worth knowing (never a result)."""


class Once(Progress):
    """Passes everything on, but each note only once."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._said: set[str] = set()

    def task(self, description: str, total: int | None = None) -> Task:
        return self._progress.task(description, total)

    def note(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            self._progress.note(message)


SILENT = Progress()
