"""What the terminal shows: bars where there is one, plain lines where there is none, figures for people."""

from __future__ import annotations

import io
import sys

import pytest

from proxsparse_triton.commands.console import console_progress, figure, print_table, size


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def draw() -> None:
    with console_progress() as progress:
        progress.note("a plain [note] of 10 %")
        with progress.task("learning the mask", total=3) as bar:
            for step in range(3):
                bar.advance(loss=f"{3.5 - step:.3f}", sparse=f"{10 * step}.0%")
        with progress.task("unknown end") as bar:
            bar.advance()


def test_without_a_terminal_only_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(variable, raising=False)
    err, out = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "stdout", out)
    draw()
    assert err.getvalue() == "a plain [note] of 10 %\n"
    assert out.getvalue() == ""


def test_live_bar_with_loss_and_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("NO_COLOR", raising=False)
    err, out = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "stdout", out)
    draw()
    shown = err.getvalue()
    for part in ("learning the mask", "3/3", "ETA", "loss 1.500  sparse 20.0%", "a plain [note] of 10 %", "unknown end"):
        assert part in shown
    assert out.getvalue() == ""


def test_table_is_one_line_a_row_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("a [title]", ("name", "value"), [("long " * 12, "1"), ("[bold]x", "2")], note="read [this]")
    lines = capsys.readouterr().out.splitlines()
    assert sum("long" in line for line in lines) == 1
    text = "\n".join(lines)
    for part in ("a [title]", "[bold]x", "read [this]"):  # markup is text
        assert part in text


def test_figures() -> None:
    assert figure(5.86978) == "5.870"
    assert figure(None) == "not measured"
    assert size(820_000_000) == "820 MB"
    assert size(13_500_000_000) == "13.50 GB"
