"""A mixture of experts from plan to report: every command says how little of it is 2:4."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from families.building import build, write_text, write_tokenizer
from families.configurations import FAMILIES

from proxsparse_triton.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

SHARE = "14.2 % of the decoder's weights"
TOLD = f"Warning: only {SHARE} are 2:4. The largest part left dense: experts (model.layers.*.mlp.experts), 85.2 % of the decoder's weights"
IN_FILES = TOLD.replace("mlp.experts", "block_sparse_moe.experts")
WINDOWS = ("--samples", "2", "--seqlen", "16", "--eval-windows", "2", "--device", "cpu")


def pst(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    build(FAMILIES["mixtral"], folder / "model")
    write_tokenizer(folder / "model")
    write_text(folder / "text.jsonl")
    pst("compare", folder / "model", "-o", folder / "both", "--methods", "magnitude", "--calibration", folder / "text.jsonl", *WINDOWS)
    return folder


def prune(folder: Path, *more: object) -> str:
    return pst("prune", folder / "model", "--method", "magnitude", "--calibration", folder / "text.jsonl", *WINDOWS, *more)


def test_plan(folder: Path) -> None:
    out = pst("prune", folder / "model", "--plan", "--dtype", "bfloat16", "--seqlen", "16")
    assert SHARE in out
    assert TOLD in out
    assert (
        json.loads(pst("prune", folder / "model", "--plan", "--dtype", "bfloat16", "--seqlen", "16", "--json"))["decoder"]["pruned"] == 9216
    )


def test_prune_says_it_last(folder: Path) -> None:
    out = prune(folder, "-o", folder / "run")
    assert SHARE in " ".join(out.split())
    assert out.strip().splitlines()[-1].startswith(TOLD)
    decoder = json.loads((folder / "run" / "manifest.json").read_text())["decoder"]
    assert decoder["share"] == decoder["pruned"] / decoder["weights"] == pytest.approx(0.142, abs=1e-3)
    assert decoder["left_dense"][0]["part"] == "model.layers.*.mlp.experts"
    assert json.loads(prune(folder, "-o", folder / "again", "--json"))["decoder"] == decoder


def test_compare(folder: Path) -> None:
    arguments = ("--methods", "magnitude", "--calibration", folder / "text.jsonl", *WINDOWS, "--overwrite")
    out = pst("compare", folder / "model", "-o", folder / "both", *arguments)
    out = " ".join(out.split())  # notes are wrapped at the width of the table, which a long path widens
    assert f"Pruned to 2:4 is {SHARE}." in out
    assert TOLD in out
    report = json.loads(pst("compare", folder / "model", "-o", folder / "both", *arguments, "--json"))
    assert report["decoder"]["share"] == report["rows"][0]["share"] == pytest.approx(0.142, abs=1e-3)


def test_verify(folder: Path) -> None:
    run = folder / "both" / "magnitude"
    out = pst("verify", run)
    assert f"12 of 12 layers are 2:4, {SHARE}" in out
    assert TOLD in out
    assert json.loads(pst("verify", run, "--json"))["decoder"] == json.loads((run / "manifest.json").read_text())["decoder"]
    bare = Path(shutil.copytree(run, folder / "bare", ignore=shutil.ignore_patterns("manifest.json")))
    out = pst("verify", bare)  # by names and shapes in the files
    assert f"12 of 12 layers are 2:4, {SHARE}" in out
    assert IN_FILES in out


def test_eval_of_the_run_and_of_its_exports(folder: Path) -> None:
    run, text = (
        folder / "both" / "magnitude",
        ("--perplexity", folder / "text.jsonl", "--seqlen", "16", "--windows", "2", "--device", "cpu"),
    )
    for kind in ("dense", "packed"):
        pst("export", run, "--format", kind, "-o", folder / kind)
    for path in (run, folder / "packed"):
        out = pst("eval", path, "--no-dense", *text)
        assert f"Pruned to 2:4 is {SHARE}." in out
        assert TOLD in out
    decoder = json.loads((run / "manifest.json").read_text())["decoder"]
    assert json.loads(pst("eval", folder / "dense", "--no-dense", *text, "--json"))["decoder"] == decoder
    assert json.loads(pst("eval", folder / "model", *text, "--json"))["decoder"] is None


def test_report(folder: Path) -> None:
    pst("report", folder / "both" / "magnitude", "-o", folder / "page.html")
    page = (folder / "page.html").read_text()
    assert TOLD.replace("'", "&#x27;") in page
    assert "weights pruned to 2:4" in page
