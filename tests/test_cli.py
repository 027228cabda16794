"""The group: help without work, one line for an explained error, a traceback for a bug."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from proxsparse_triton import cli
from proxsparse_triton.cli import COMMANDS, main
from proxsparse_triton.errors import ConfigError, ModelError, ProxSparseError


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """`pst fail` raises what the test puts in."""
    error: list[BaseException] = []

    @click.command()
    def fail() -> None:
        raise error[0]

    monkeypatch.setattr(cli._Group, "get_command", lambda self, ctx, name: fail)
    return error


@pytest.mark.parametrize("kind", [ConfigError, ModelError, ProxSparseError])
def test_an_explained_error_is_one_line(failing: list[BaseException], kind: type[ProxSparseError]) -> None:
    failing.append(kind("prune: expected one thing,\n  got another.\n"))
    result = CliRunner().invoke(main, ["fail"])
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "pst: prune: expected one thing, got another.\n")
    assert CliRunner().invoke(main, ["--debug", "fail"]).exception is failing[0]


def test_an_interrupt_exits_with_130(failing: list[BaseException]) -> None:
    failing.append(KeyboardInterrupt())
    result = CliRunner().invoke(main, ["fail"])
    assert result.exit_code == 130
    assert len(result.stderr.splitlines()) == 1


def test_a_bug_shows_itself(failing: list[BaseException]) -> None:
    """Only problems that are explained are made short."""
    failing.append(ZeroDivisionError())
    assert CliRunner().invoke(main, ["fail"]).exception is failing[0]


def test_debug_in_a_real_process(tmp_path: Path) -> None:
    code = "from proxsparse_triton.cli import main; main()"
    arguments = ["verify", str(tmp_path / "absent")]
    short, long = (
        subprocess.run([sys.executable, "-c", code, *flags, *arguments], capture_output=True, text=True, check=False)
        for flags in ([], ["--debug"])
    )
    assert (short.returncode, long.returncode) == (1, 1)
    assert len(short.stderr.splitlines()) == 1
    assert "Traceback" in long.stderr
    assert short.stderr.strip().removeprefix("pst: ") in long.stderr


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_command(flag: str) -> None:
    result = CliRunner().invoke(main, [flag])
    assert result.exit_code == 0
    for name, (_, _, text) in COMMANDS.items():
        assert f"{name} " in result.stdout
        assert text in " ".join(result.stdout.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


def test_usage_errors() -> None:
    assert CliRunner().invoke(main, ["no-such-command"]).exit_code == 2
    assert CliRunner().invoke(main, ["--nope"]).exit_code == 2
