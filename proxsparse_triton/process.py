"""`pst` as a process of its own: signals, streams that may fail, and for every ending one line and an honest exit code."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

from . import interrupts
from .errors import ConfigError, ProxSparseError

PACKAGE = Path(__file__).parent
EPIPE_CODE = 141  # what a shell says of a program that wrote to a pipe nobody reads
REPORT = "please report it with what `pst --debug ...` shows"


def run(command: Callable[[], object]) -> NoReturn:
    """Run `command`, all that this process is for, and exit: 0, or 1 and one line on stderr, or 128 + the signal's number.

    A traceback is shown only with --debug. What stdout or stderr do not take never ends the command; lost results are told at the end.
    """
    interrupts.listen()
    output = _open_streams()
    try:
        code = _code_of(command)
    except BaseException as error:
        try:
            code = end_of(error)
        except interrupts.Interrupted as late:  # while the first was being told
            code = end_of(late)
    sys.exit(_flushed(output, code))


def _code_of(command: Callable[[], object]) -> int:
    """The exit code of what runs to its end."""
    heard = interrupts.pending()  # before there was anybody to tell
    if heard is not None:
        raise heard
    try:
        _check_alone()
        command()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else _say(str(end.code))
    heard = interrupts.pending()
    if heard is not None and code != 128 + heard.number:  # it became something else on its way
        raise heard
    interrupts.finish()
    return code


def end_of(error: BaseException) -> int:
    """Say how it ended, in one line on stderr; the exit code."""
    stopped = interrupts.pending() or (error if isinstance(error, KeyboardInterrupt) else None)
    interrupts.answer()
    if stopped is not None:
        words = f"{str(stopped) or 'interrupted'}; nothing half-written was left under the output's name"
        _say(". ".join([words, *_notes(error)]))
        return 128 + (stopped.number if isinstance(stopped, interrupts.Interrupted) else 2)
    if "--debug" in sys.argv:
        traceback.print_exception(error)
        return 1
    return _say(" ".join([words_of(error), *_notes(error)]))


def words_of(error: BaseException) -> str:
    """The one line for an exception: the explanation of our own errors, and the best that can be said of others."""
    if isinstance(error, ProxSparseError):
        return _one_line(error)
    who = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "start")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's; it is not imported for this
        return f"{who}: expected enough memory, got none left. Lower --seqlen, --samples or --batch-size, or close other programs."
    if isinstance(error, RecursionError):
        return f"{who}: expected input nested less deeply, got Python's limit at {_place(error)}. Is an input damaged? If not, {REPORT}."
    if isinstance(error, UnicodeError):
        return f"{who}: expected names and text in UTF-8, got {_one_line(error)} at {_place(error)}. Rename or convert the input."
    if isinstance(error, OSError):
        where = error.filename if error.filename is not None else _place(error)
        reason = (error.strerror or _one_line(error) or type(error).__name__).lower()
        return f"{who}: expected files and devices that can be used, got {reason} at {where!s}. Check the path, the disk and permissions."
    text = f"{type(error).__name__}: {_one_line(error)}".rstrip(" :")
    return f"{who}: expected no error here, got {text} at {_place(error)}. This is a fault of pst: {REPORT}."


def _one_line(error: BaseException, limit: int = 1000) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[:limit]}..."


def _notes(error: BaseException) -> list[str]:
    """What was added on its way up: where that which was done is kept."""
    return getattr(error, "__notes__", [])


def _place(error: BaseException) -> str:
    """File and line of this package that the error passed last."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE) and frame.filename != __file__]
    for frame in reversed(own or frames):
        path = Path(frame.filename)
        return f"{path.relative_to(PACKAGE) if own else path.name}:{frame.lineno}"
    return "an unknown place"


def _check_alone() -> None:
    """Refuse to be one of several: they would all do the same work, into the same folder."""
    size = os.environ.get("WORLD_SIZE", "")
    if "RANK" in os.environ and size.isdecimal() and int(size) > 1 and not {"-h", "--help", "--version"} & set(sys.argv):
        raise ConfigError(
            f"start: expected to be the only process, got rank {os.environ['RANK']} of {size} (torchrun's RANK and WORLD_SIZE). "
            "Start it without torchrun; it works on one GPU."
        )


class _Stream(io.RawIOBase):
    """A descriptor whose failing writes are remembered, not raised: a run is not given up for its words."""

    def __init__(self, descriptor: int, closed: bool) -> None:
        self._descriptor = descriptor
        self._refused = OSError(errno.EBADF, os.strerror(errno.EBADF)) if closed else None
        self.lost: OSError | None = None  # why something written here reached nobody

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        while self._refused is None:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # a terminal that another program left non-blocking
                select.select([], [self._descriptor], [])
            except OSError as error:
                self._refused = error
        self.lost = self._refused
        return len(data)


def _open_streams() -> _Stream:
    """Put streams that never raise in the place of stdout (returned) and stderr; what their encoding lacks is escaped."""
    for descriptor in range(3):  # a closed one would be given to the next file that is opened, and written to
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    output = _Stream(1, closed=sys.stdout is None)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(output, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(_Stream(2, closed=sys.stderr is None), sys.stderr, by_line=True)
    return output


def _text(stream: _Stream, before: TextIO | None, *, by_line: bool = False) -> TextIO:
    encoding = "utf-8" if before is None else before.encoding
    by_line = by_line or bool(before is not None and before.line_buffering)
    through = isinstance(before, io.TextIOWrapper) and before.write_through
    buffer = io.BufferedWriter(stream)
    return io.TextIOWrapper(buffer, encoding=encoding, errors="backslashreplace", line_buffering=by_line, write_through=through)


def _say(line: str) -> int:
    sys.stderr.write(f"pst: {line}\n")
    sys.stderr.flush()
    return 1


def _flushed(output: _Stream, code: int) -> int:
    """`code`, or that of results which stdout did not take."""
    sys.stdout.flush()
    if output.lost is None:
        return code
    if output.lost.errno == errno.EPIPE:  # `pst verify RUN | head`: the reader has seen enough
        return code or EPIPE_CODE
    reason = (output.lost.strerror or str(output.lost)).lower()
    done = "What the command writes to the disk is complete" if code == 0 else "The command failed as well"
    _say(f"stdout: expected a place for the results, got {reason}. {done}; give stdout another place.")
    return code or 1
