"""A checkpoint with a weight that is no number is refused by every method, whatever text there is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from proxsparse_triton.comparison import compare
from proxsparse_triton.errors import ModelError
from proxsparse_triton.methods.base import method_names
from proxsparse_triton.pipeline import RunConfig, prune

ASSET = Path(__file__).parents[1] / "proxsparse_triton" / "assets" / "pylm-2m"


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken") / "model"
    shutil.copytree(ASSET, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


REFUSED = r"prune: expected finite weights, got nan in model\.layers\.1\.mlp\.up_proj\.weight at \[2, 3\]"


@pytest.mark.parametrize("method", method_names())
def test_every_method(method: str, broken: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"  # nothing can be held out, so that no perplexity shows it
    short.write_text("some words are here\n" * 20)
    run = RunConfig(str(broken), tmp_path / "run", method=method, calibration=str(short), samples=2, seqlen=16, device="cpu")
    with pytest.raises(ModelError, match=REFUSED):
        prune(run)
    assert not (tmp_path / "run").exists()


def test_comparison(broken: Path, text: str, tmp_path: Path) -> None:
    run = RunConfig(str(broken), tmp_path / "run", calibration=text, samples=2, seqlen=16, evaluation_windows=2, device="cpu")
    with pytest.raises(ModelError, match=REFUSED):
        compare(run, ["magnitude", "wanda"], {})
