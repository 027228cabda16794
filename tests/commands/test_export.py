"""`pst export`: one line on stdout, and every bad input as one line with exit code 1 and nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from packing import magnitude_run
from safetensors.torch import load_file, save_file

from proxsparse_triton.cli import main
from proxsparse_triton.formats import packed as packed_module
from proxsparse_triton.formats.masks import load_masks
from proxsparse_triton.formats.packed import read_packed

LAYER = "model.layers.0.mlp.up_proj.weight"
SHARD = "packed-00001-of-00001.safetensors"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return magnitude_run(tmp_path_factory.mktemp("run") / "run")


def pst(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def failed(*arguments: object, output: Path) -> str:
    """The message of an export that fails: one line on stderr, nothing on stdout, nothing new beside the output."""
    before = sorted(output.parent.iterdir())
    result = pst("export", *arguments, "-o", output)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert sorted(output.parent.iterdir()) == before
    return result.stderr


@pytest.mark.parametrize(
    ("format", "line"),
    [
        ("dense", "dense, 28 pruned layers, 4.8 MB, 1.000 of the dense weights (4.8 MB)"),
        ("masks", "masks, 28 pruned layers, 139.5 kB, 0.029 of the dense weights (4.8 MB)"),
        ("packed", "packed, 28 pruned layers, 3.4 MB, 0.706 of the dense weights (4.8 MB)"),
    ],
)
def test_one_line_on_stdout(run: Path, tmp_path: Path, format: str, line: str) -> None:
    result = pst("export", run, "--format", format, "-o", tmp_path / "new" / "out")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{tmp_path / 'new' / 'out'}: {line}\n", "")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"out"}


def test_json_for_machines(run: Path, tmp_path: Path) -> None:
    result = pst("export", run, "--format", "packed", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    size, dense = (tmp_path / "out" / SHARD).stat().st_size, (run / "model.safetensors").stat().st_size
    assert json.loads(result.stdout) == {
        "format": "packed",
        "output": str(tmp_path / "out"),
        "layers": 28,
        "bytes": size,
        "source_bytes": dense,
        "share": round(size / dense, 4),
    }


def test_options_reach_the_export(run: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    assert pst("export", run, "--format", "dense", "-o", dense).exit_code == 0
    (dense / "manifest.json").unlink()
    options = ["--include", "layers.0", "--include", "layers.1", "--skip", "mlp"]
    result = pst("export", dense, "--format", "masks", "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert len(load_masks(tmp_path / "out")) == 8
    assert pst("export", run, "--format", "packed", "-o", tmp_path / "out", "--overwrite").exit_code == 0
    assert len(read_packed(tmp_path / "out").layers) == 28


def test_errors_are_one_line(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "got no such folder" in failed(tmp_path / "absent", "--format", "packed", output=out)
    assert "got 4 in block (0, 0) of model.layers.0.mlp.down_proj.weight" in failed("demo", "--format", "packed", output=out)
    broken = Path(shutil.copytree(run, tmp_path / "broken"))
    state = load_file(broken / "model.safetensors")
    state[LAYER][0, :4] = 1.0
    save_file(state, broken / "model.safetensors")
    for format in ("dense", "masks", "packed"):
        assert f"got 2 non-zero weights in {LAYER}, the first in block (0, 0)" in failed(broken, "--format", format, output=out)
    (out / "mine").mkdir(parents=True)
    assert "a folder with other files, which is kept" in failed(run, "--format", "packed", output=out)


def test_an_interrupt_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(packed_module, "copy_small_files", interrupt)
    result = pst("export", run, "--format", "packed", "-o", tmp_path / "out")
    assert result.exit_code == 130
    assert not list(tmp_path.iterdir())


def test_usage_errors_exit_with_2(run: Path, tmp_path: Path) -> None:
    assert pst("export", run, "-o", tmp_path / "out").exit_code == 2
    assert pst("export", run, "--format", "packed").exit_code == 2
    assert pst("export", run, "--format", "gguf", "-o", tmp_path / "out").exit_code == 2


def test_the_other_commands_on_a_packed_folder(run: Path, tmp_path: Path) -> None:
    """`verify` checks it, `eval` runs it (see there); those that need a dense model say what it is."""
    out = tmp_path / "out"
    assert pst("export", run, "--format", "packed", "-o", out).exit_code == 0
    result = pst("verify", out, "--original", "demo")
    assert result.exit_code == 0, result.output
    assert "28 of 28 layers are 2:4, 100 % of the decoder's weights; kept weights equal" in result.stdout
    for arguments in (["prune", out], ["export", out, "--format", "dense"]):
        result = pst(*arguments, "-o", tmp_path / "again")
        assert result.exit_code == 1
        assert "got a packed folder (pst export --format packed). Load it with proxsparse_triton.load_packed" in result.stderr
        assert len(result.stderr.splitlines()) == 1
    content = bytearray((out / SHARD).read_bytes())
    content[-1] ^= 1
    (out / SHARD).write_bytes(bytes(content))
    result = pst("verify", out)
    assert result.exit_code == 1
    assert f"{SHARD}: expected SHA-256" in result.stderr
    assert len(result.stderr.splitlines()) == 1
