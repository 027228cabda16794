"""`pst prune`: options of the recipe, repair and what is measured besides, and those that contradict each other."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from proxsparse_triton.cli import main
from proxsparse_triton.errors import ConfigError
from proxsparse_triton.formats.verify import verify_folder
from proxsparse_triton.methods import proxsparse

ROOT = Path(__file__).parents[2]
ASSET = ROOT / "proxsparse_triton" / "assets" / "pylm-2m"
SMALL = ["--samples", "4", "--seqlen", "32", "--eval-windows", "2", "--device", "cpu"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "code.jsonl"
    with gzip.open(ROOT / "tests" / "data" / "calibration.jsonl.gz", "rt", encoding="utf-8") as lines:
        documents = [json.loads(next(lines)) for _ in range(60)]
    path.write_text("".join(json.dumps({"text": document["text"][:2000]}) + "\n" for document in documents))
    return str(path)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["prune", "demo", *map(str, arguments)])


def manifest(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return read


def asked(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> proxsparse.ProxSparse:
    """The settings that the command hands to the method."""
    seen: list[proxsparse.ProxSparse] = []

    def stop(self: proxsparse.ProxSparse, task: object) -> None:
        seen.append(self)
        raise ConfigError("stop here")

    monkeypatch.setattr(proxsparse.ProxSparse, "prune", stop)
    result = run(*arguments, *SMALL)
    assert "stop here" in result.stderr, result.output
    return seen[0]


def test_every_part_has_its_option(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = ["-o", tmp_path / "run", "--calibration", text]
    assert asked(monkeypatch, *base) == proxsparse.ProxSparse()
    assert asked(monkeypatch, *base, "--lambda1", "auto", "--lr", "auto", "--recipe", "auto") == proxsparse.ProxSparse()
    options = ["--recipe", "paper", "--loss", "kl", "--forward", "masked", "--prox-scale", "activations", "--train", "pruned"]
    options += ["--temperature", "3", "--layer-weight", "0.25"]
    given = asked(monkeypatch, *base, *options, "--lambda1", "0.5", "--lr", "1e-3", "--steps", "7")
    expected = proxsparse.ProxSparse("paper", "kl", "masked", "activations", "pruned", 3.0, 0.25, lambda1=0.5, lr=1e-3, steps=7)
    assert given == expected
    preset = asked(monkeypatch, *base, "--preset", "llama-2-7b")
    assert (preset.recipe, preset.lambda1, preset.lr) == ("paper", 0.25, 1e-4)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--preset", "llama-2-7b", "--recipe", "auto"], 1, "expected --preset llama-2-7b, published values, without --recipe auto"),
        (["--preset", "llama-2-7b", "--lambda1", "auto"], 1, "expected --preset llama-2-7b, published values, without --lambda1 auto"),
        (["--preset", "llama-2-7b", "--lr", "auto"], 1, "published values, without --lr auto. Leave one of them out."),
        (["--loss", "ce", "--temperature", "2"], 1, "expected --temperature with --loss kl, got ce"),
        (["--recipe", "paper", "--temperature", "2"], 1, "expected --temperature with --loss kl, got ce (recipe paper)"),
        (["--loss", "ce", "--layer-weight", "1"], 1, "expected --layer-weight with --loss kl, got ce"),
        (["--steps", "5", "--epochs", "1"], 1, "expected --steps or --epochs, got both (5 and 1)"),
        (["--temperature", "0"], 1, "expected a finite temperature > 0, got 0.0"),
        (["--layer-weight", "-1"], 1, "expected a finite layer_weight >= 0, got -1.0"),
        (["--repair-steps", "5"], 1, "expected --repair-steps with --repair, got it alone"),
        (["--repair", "least-squares", "--repair-steps", "5"], 1, "expected --repair-steps with fine-tuning"),
        (["--repair", "both", "--repair-steps", "0"], 1, "expected --repair-steps of at least 1, got 0"),
        (["--restore-windows", "-1"], 1, "expected --restore-windows of at least 0, got -1"),
        (["--method", "wanda", "--loss", "kl"], 1, "expected only its own settings, got --loss. Leave it out, or use --method proxsparse."),
        (["--lambda1", "much"], 2, "expected auto or a number, got 'much'"),
        (["--recipe", "own"], 2, "'own' is not one of 'auto', 'paper'"),
    ],
)
def test_what_contradicts(options: list[str], code: int, message: str, text: str, tmp_path: Path) -> None:
    result = run("-o", tmp_path / "run", "--calibration", text, *SMALL, *options)
    assert result.exit_code == code, result.output
    assert message in result.stderr.splitlines()[-1]
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_fewer_windows_than_steps_are_passed_over_and_said(text: str, tmp_path: Path) -> None:
    result = run("-o", tmp_path / "run", "--calibration", text, *SMALL, "--steps", "6")
    assert result.exit_code == 0, result.output
    assert "recipe auto: 6 steps of 1 window (1.5 passes over 4)" in result.stderr
    assert manifest(tmp_path / "run")["method"]["steps"] == 6
    assert verify_folder(tmp_path / "run", original=ASSET).ok


@pytest.mark.parametrize(("options", "kind"), [(["--repair"], "both"), (["--repair", "least-squares"], "least-squares")])
def test_repair(options: list[str], kind: str, text: str, tmp_path: Path) -> None:
    """Alone it is both; the record knows that weights changed, and they are still 2:4."""
    result = run("-o", tmp_path / "run", "--calibration", text, *SMALL, "--method", "wanda", *options)
    assert result.exit_code == 0, result.output
    entry = manifest(tmp_path / "run")
    assert entry["weights_updated"] is True
    assert entry["config"]["repair"] == kind
    assert entry["method"]["repair"]["kind"] == kind
    assert ("steps" in entry["method"]["repair"]) == (kind == "both")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert next(value for value in config.values() if isinstance(value, dict) and "weights_updated" in value)["weights_updated"] is True
    report = verify_folder(tmp_path / "run")
    assert report.ok


def test_restore_test_and_command_line_are_recorded(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["pst", "prune", "demo", "-o", "a b"])
    options = ["--method", "magnitude", "--include", r"layers\.0\.mlp", "--restore-windows", "1"]
    result = run("-o", tmp_path / "run", "--calibration", text, *SMALL, *options)
    assert result.exit_code == 0, result.output
    entry = manifest(tmp_path / "run")
    assert entry["command"] == "pst prune demo -o 'a b'"
    restored = entry["method"]["restore"]
    assert {row["layer"] for row in restored} == {f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    figures = [row["perplexity"] for row in restored]
    assert figures == sorted(figures)
    assert figures[0] < entry["method"]["restore_pruned"]
    assert entry["method"]["restore_windows"] == 1
