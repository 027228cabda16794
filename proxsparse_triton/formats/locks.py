"""Who has a folder: a lock on the folder itself, whatever its name becomes."""

from __future__ import annotations

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no advisory locks: two runs into one folder are then not told apart
    fcntl = None  # type: ignore[assignment]


class BusyError(Exception):
    """Another process has the lock."""


class Lock:
    """The lock of a folder that exists, held until `release` or the end of the process.

    Raises: BusyError. OSError: the folder cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = -1 if fcntl is None else os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        if fcntl is not None:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.release()
                raise BusyError from None
            except OSError:  # a file system without locks: go on unlocked
                pass
        self._status = os.stat(folder) if self._descriptor < 0 else os.fstat(self._descriptor)

    def holds(self, path: Path) -> bool:
        """True if `path` is the name of the very folder that was locked."""
        try:
            return os.path.samestat(os.stat(path), self._status)
        except OSError:
            return False

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
