"""Signals that ask a run to end: Ctrl-C, a scheduler's SIGTERM, the SIGHUP of a terminal that is gone.

Each arrives as one exception on the main thread, and is not lost where Python swallows exceptions (a destructor during a garbage
collection, a library that catches everything): it is raised again until somebody has answered it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # SIGHUP: not on Windows
PATIENCE = 0.5  # seconds; a repetition within it is the same wish, passed on by a wrapper; raised again after it
SOON = 0.01


class Interrupted(KeyboardInterrupt):
    """A signal asked for the end. `number` is the signal's; str() says it in words."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__("interrupted" if number == signal.SIGINT else f"interrupted by {signal.Signals(number).name}")


@dataclass
class _Heard:
    """What was heard so far, of this process alone."""

    process: int = 0
    number: int | None = None
    since: float = 0.0
    answered: bool = False
    over: bool = False  # the work is done: nothing is left to interrupt


_heard = _Heard()


def listen() -> None:
    """Turn the signals into `Interrupted` from now on. Those that are ignored (nohup, a shell's background job) stay ignored."""
    if _heard.process == os.getpid():
        return
    _heard.process = os.getpid()
    with suppress(ValueError):  # not the main thread: whoever runs it decides
        for name in NAMES:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, _hear)
        if hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, _raise_again)
            _watch_unraisable()


def pending() -> Interrupted | None:
    """The interruption that was heard, whatever exception it became on its way."""
    return None if _heard.number is None else Interrupted(_heard.number)


def answer() -> None:
    """The interruption has arrived: it is not raised again, and what must be tidied up can be."""
    _heard.answered = True
    if _heard.number is not None:
        _wake(0)


def finish() -> None:
    """The work is done, and only its last words are left: signals change nothing any more."""
    _heard.over = True
    answer()


def _hear(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _heard.process:  # a child that inherited this: as if nobody listened
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    if _heard.over:
        return
    if _heard.number is not None:
        if time.monotonic() - _heard.since > PATIENCE:
            with suppress(OSError):  # plain, as print may wait for a lock that this very thread holds
                os.write(
                    2, b"pst: interrupted again; ended at once. The next run of that name clears up what was left in its .partial folder.\n"
                )
            os._exit(128 + number)
        return
    _heard.number, _heard.since = number, time.monotonic()
    _wake(PATIENCE)
    raise Interrupted(number)


def _raise_again(number: int, frame: FrameType | None) -> None:
    if _heard.number is not None and not _heard.answered and os.getpid() == _heard.process:
        _wake(PATIENCE)
        raise Interrupted(_heard.number)


def _wake(seconds: float) -> None:
    """Let `_raise_again` run after `seconds`; 0: not at all."""
    if hasattr(signal, "setitimer"):
        with suppress(OSError, ValueError):
            signal.setitimer(signal.ITIMER_REAL, seconds)


def _watch_unraisable() -> None:
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, Interrupted):
            before(unraisable)
        elif not _heard.answered:  # not here, where it would be swallowed once more
            _wake(SOON)

    sys.unraisablehook = hook
