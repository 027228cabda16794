import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from proxsparse_triton.cli import main
from proxsparse_triton.errors import ModelError
from proxsparse_triton.formats.dense import write_pruned_model
from proxsparse_triton.formats.masks import save_masks

ASSET = Path(__file__).parents[2] / "proxsparse_triton" / "assets" / "pylm-2m"
LAYER = "model.layers.0.mlp.up_proj.weight"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pylm-2m with one pruned layer."""
    out = tmp_path_factory.mktemp("run") / "run"
    mask = torch.tensor([True, False, False, True]).repeat(512, 48)
    write_pruned_model(ASSET, [ASSET / "model.safetensors"], out, {LAYER: mask}, config_entry={})
    save_masks(out, {LAYER: mask})
    return out


def test_a_good_run_prints_a_table(finished: Path) -> None:
    result = CliRunner().invoke(main, ["verify", str(finished), "--original", "demo"])
    assert result.exit_code == 0, result.output
    assert LAYER in result.stdout
    assert "1 of 1 layers are 2:4, 6.0 % of the decoder's weights; kept weights equal" in result.stdout
    assert result.stderr == ""


def test_json_for_machines(finished: Path) -> None:
    result = CliRunner().invoke(main, ["verify", str(finished), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["ok"] is True
    assert report["problems"] == []
    assert report["layers"][0]["name"] == LAYER
    assert report["layers"][0]["wrong_blocks"] == 0


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_failure_is_one_line_after_the_report(finished: Path, tmp_path: Path, flags: list[str]) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    state = load_file(run / "model.safetensors")
    state[LAYER][0, 1] = 1.0
    state[LAYER][0, 6] = -0.0
    save_file(state, run / "model.safetensors")
    result = CliRunner().invoke(main, ["verify", str(run), *flags])
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert f"got: {LAYER}: 1 of 24576 blocks keep more than 2 of 4 weights; 2 pruned weights are not +0.0." in result.stderr
    if flags:
        assert json.loads(result.stdout)["ok"] is False
    else:
        assert "1 weights are -0.0" in result.stdout
    with pytest.raises(ModelError):
        CliRunner().invoke(main, ["--debug", "verify", str(run)], catch_exceptions=False)


def test_a_dense_model_fails(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["verify", str(ASSET)])
    assert result.exit_code == 1
    assert "got: not one layer that is 2:4 (28 more)" in result.stderr


@pytest.mark.parametrize("arguments", [["absent"], ["."], ["file"], [str(ASSET), "--original", "/absent/model"]])
def test_not_a_model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    result = CliRunner().invoke(main, ["verify", *arguments])
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert "expected" in result.stderr
    assert result.stdout == ""


def test_usage_errors_exit_with_2() -> None:
    assert CliRunner().invoke(main, ["verify"]).exit_code == 2
    assert CliRunner().invoke(main, ["verify", "x", "--nope"]).exit_code == 2
