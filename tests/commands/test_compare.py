"""`pst compare`: one table for people, one object for machines."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from proxsparse_triton.cli import main
from proxsparse_triton.commands.compare import DEFAULT_METHODS, DESCRIPTIONS, _description
from proxsparse_triton.methods.base import method_names
from proxsparse_triton.pipeline import RunRecord

ROOT = Path(__file__).parents[2]
SMALL = ["--samples", "4", "--seqlen", "64", "--eval-windows", "4", "--device", "cpu"]

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, arguments), *SMALL])


def failed(*arguments: object, output: Path) -> str:
    result = run(*arguments, "-o", output)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    assert list(output.parent.iterdir()) == []
    return result.stderr.strip().splitlines()[-1]


def test_table_with_dense_on_top(text: str, tmp_path: Path) -> None:
    result = run("demo", "-o", tmp_path / "run", "--calibration", text, "--methods", "wanda, magnitude")
    assert result.exit_code == 0, result.output
    lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
    assert lines[0] == "demo: 2 of every 4 weights removed"
    for column in ("method", "perplexity", "time", "peak memory", "same blocks as magnitude"):
        assert column in lines[1]
    names = [line.split()[0] for line in lines if line.split()[0] in ("dense", "wanda", "magnitude")]
    assert names == ["dense", "wanda", "magnitude"]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    dense, wanda, magnitude = (next(line for line in lines if line.startswith(name)) for name in names)
    assert f"{manifest['perplexity']['dense']:.3f}" in dense
    assert magnitude.endswith("100.0 %")
    assert f"{manifest['comparison'][0]['perplexity']:.3f}" in wanda
    assert not wanda.endswith("100.0 %")
    assert "Perplexity (lower is better) on 4 windows of 64 tokens of" in result.stdout
    assert "Calibrated on 4 windows of" in result.stdout
    assert "pruning 28 of 29 layers" in result.stderr
    assert "pruning" not in result.stdout


def test_json_for_machines(text: str, tmp_path: Path) -> None:
    arguments = ["--methods", "magnitude,sparsegpt", "--mask-only", "--dampening", "0.02"]
    result = run("demo", "-o", tmp_path / "run", "--calibration", text, *arguments, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert report["model"] == "demo"
    assert report["dense_perplexity"] == manifest["perplexity"]["dense"]
    assert [row["method"] for row in report["rows"]] == ["magnitude", "sparsegpt"]
    assert [row["perplexity"] for row in report["rows"]] == [entry["perplexity"] for entry in manifest["comparison"]]
    assert report["rows"][0]["magnitude_agreement"] == 1.0
    assert 0 < report["rows"][1]["magnitude_agreement"] < 1
    # a method's options go to the method that has them, and to no other
    settings = {
        name: json.loads((tmp_path / "run" / name / "manifest.json").read_text())["method"]["settings"] for name in manifest_names(report)
    }
    assert settings["magnitude"] == {}
    assert settings["sparsegpt"] == {"dampening": 0.02, "column_block": 128, "mask_only": True}


def test_options_of_the_recipe_and_of_repair(text: str, tmp_path: Path) -> None:
    """The first go to proxsparse alone, repair to all; `auto` is what leaving the option out means."""
    options = ["--methods", "magnitude,proxsparse", "--include", r"layers\.0\.mlp", "--lambda1", "auto", "--lr", "auto"]
    more = ["--recipe", "paper", "--forward", "masked", "--steps", 3, "--repair", "finetune", "--repair-steps", 2, "--json"]
    result = run("demo", "-o", tmp_path / "run", "--calibration", text, *options, *more)
    assert result.exit_code == 0, result.output
    found = {name: json.loads((tmp_path / "run" / name / "manifest.json").read_text()) for name in ("magnitude", "proxsparse")}
    assert found["magnitude"]["config"]["settings"] == {}
    assert found["proxsparse"]["config"]["settings"] == {"recipe": "paper", "forward": "masked", "steps": 3}
    assert (found["proxsparse"]["method"]["forward"], found["proxsparse"]["method"]["loss"]) == ("masked", "ce")
    assert [row["repair"] for row in json.loads(result.stdout)["rows"]] == ["finetune", "finetune"]
    for entry in found.values():
        assert (entry["method"]["repair"]["kind"], entry["method"]["repair"]["steps"]) == ("finetune", 2)


def manifest_names(report: dict[str, list[dict[str, str]]]) -> list[str]:
    return [row["method"] for row in report["rows"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "wanda,wnada"], "expected one of magnitude, proxsparse, sparsegpt, wanda, got 'wnada'"),
        (["--methods", ""], "compare: expected at least one method, each once, got none"),
        (["--methods", "wanda,wanda"], "each once, got wanda, wanda"),
        (["--methods", "magnitude,wanda", "--lr", "1e-4"], "options of the methods magnitude, wanda, got --lr. Leave it out."),
        (["--methods", "wanda", "--frozen-eps", "1"], "got --frozen-eps"),
        (["--lambda1", "-1"], "lambda1 >= 0, got -1.0"),
        (["--methods", "magnitude,wanda", "--recipe", "paper"], "options of the methods magnitude, wanda, got --recipe. Leave it out."),
        (["--recipe", "paper", "--temperature", "3"], "expected --temperature with --loss kl, got ce (recipe paper). Leave it out."),
        (["--repair-steps", "5"], "prune: expected --repair-steps with --repair, got it alone. Add --repair, or leave it out."),
        (["--include", "nothing"], "'nothing', which matches none"),
        (["--calibration", "absent.txt"], "'absent.txt': expected a source of text"),
    ],
)
def test_bad_settings(arguments: list[str], message: str, text: str, tmp_path: Path) -> None:
    assert message in failed("demo", "--calibration", text, *arguments, output=tmp_path / "run")


def test_an_earlier_comparison_is_kept_and_can_be_replaced(text: str, tmp_path: Path) -> None:
    arguments = ["demo", "-o", tmp_path / "run", "--calibration", text, "--methods", "magnitude"]
    assert run(*arguments).exit_code == 0
    before = (tmp_path / "run" / "manifest.json").read_bytes()
    second = run(*arguments)
    assert second.exit_code == 1
    assert "an earlier run, which is kept" in second.stderr
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before
    assert run(*arguments, "--overwrite").exit_code == 0


def test_every_method_is_compared_and_described() -> None:
    """A newcomer reads what each method does beside its name."""
    assert sorted(DEFAULT_METHODS.split(",")) == method_names()
    assert set(DESCRIPTIONS) == set(method_names())


def test_what_was_repaired_is_not_described_as_original() -> None:
    record = RunRecord("proxsparse", Path("run"), 1.0, 1.0, 1.0, 1, (), {"repair": {"kind": "both"}})
    assert _description(record) == "learned end to end; kept weights repaired (both)"
    assert _description(dataclasses.replace(record, summary={})) == DESCRIPTIONS["proxsparse"]


def test_usage_errors_exit_with_2() -> None:
    assert CliRunner().invoke(main, ["compare", "demo"]).exit_code == 2
    assert CliRunner().invoke(main, ["compare", "demo", "-o", "x", "--preset", "llama-2-7b"]).exit_code == 2
