"""Files of somebody else beside a model: they go by our names, or by none of a model's, and stop no command."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from packing import ASSET, edit_json, magnitude_run
from safetensors.torch import save_file

from proxsparse_triton.cli import main
from proxsparse_triton.errors import ModelError
from proxsparse_triton.formats.dense import check_small_files, copy_small_files
from proxsparse_triton.formats.manifest import read_manifest, write_manifest
from proxsparse_triton.formats.records import file_records
from proxsparse_triton.formats.verify import recorded_share, verify_folder
from proxsparse_triton.models.source import resolve_model
from proxsparse_triton.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread")

FOREIGN: dict[str, Callable[[Path], object]] = {
    "masks of another tool": lambda folder: save_file({"mask": torch.ones(4)}, folder / "masks.safetensors"),
    "masks that are no tensors": lambda folder: (folder / "masks.safetensors").write_bytes(b"segmentation"),
    "a manifest that is no JSON": lambda folder: (folder / "manifest.json").write_text("name: model\n"),
    "a manifest of another tool": lambda folder: (folder / "manifest.json").write_text('{"name": "app"}'),
    "a pipe": lambda folder: os.mkfifo(folder / "manifest.json"),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ASSET, tmp_path / "model"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = magnitude_run(tmp_path_factory.mktemp("finished") / "run")
    write_manifest(folder, {**read_manifest(folder), "files": file_records(folder)})
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize("kind", FOREIGN)
def test_our_names_in_somebody_else_s_folder(model: Path, kind: str) -> None:
    FOREIGN[kind](model)
    assert recorded_share(model) is None
    assert verify_folder(model).problems[0] == "not one layer that is 2:4"


def test_eval_of_a_model_beside_such_files(model: Path, tmp_path: Path) -> None:
    FOREIGN["masks of another tool"](model)
    FOREIGN["a manifest that is no JSON"](model)
    (tmp_path / "t.txt").write_text("def f(x):\n    return x\n" * 200)
    text = ["--perplexity", str(tmp_path / "t.txt"), "--seqlen", "16", "--windows", "1"]
    result = CliRunner().invoke(main, ["eval", str(model), *text, "--no-dense", "--device", "cpu"])
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("by", ["config", "masks", "manifest"])
def test_our_own_records_are_not_taken_for_foreign_ones(run: Path, by: str) -> None:
    if by != "config":
        config = (ASSET / "config.json").read_bytes()
        (run / "config.json").write_bytes(config)
    if by == "manifest":
        (run / "masks.safetensors").write_bytes(b"damaged")
    else:
        (run / "manifest.json").write_text("{")
    with pytest.raises(ModelError, match="masks file written by this tool" if by == "manifest" else "expected JSON"):
        verify_folder(run)


def test_damaged_masks_of_ours_are_no_reason_not_to_measure(run: Path) -> None:
    (run / "manifest.json").unlink()
    (run / "masks.safetensors").write_bytes(b"damaged")
    assert recorded_share(run) is None
    with pytest.raises(ModelError, match="masks file written by this tool"):
        verify_folder(run)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "masks.safetensors", "config.json"])
def test_verify_of_a_changed_file_that_is_not_weights(run: Path, name: str) -> None:
    if name == "masks.safetensors":
        (run / name).unlink()
    else:
        edit_json(run / name, changed_by_hand=1)
    result = CliRunner().invoke(main, ["verify", str(run)])
    assert result.exit_code == 1
    assert f"verify: expected the files of {run} as they were written, got: {name}: is " in result.stderr
    assert result.stderr.endswith("Copy the folder again; if the change is yours, the weights are 2:4 all the same.\n")
    assert "Prune" not in result.stderr


def extra(folder: Path) -> None:
    """A corpus, a log and notes, as they come to lie beside a model."""
    with (folder / "corpus.txt").open("wb") as file:
        file.truncate(300 << 20)
    os.mkfifo(folder / "log.txt")
    (folder / "gone.txt").symlink_to("nowhere")


def test_what_no_loader_opens_stops_nothing_and_is_not_copied(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extra(model)
    (model / "notes.txt").write_text("mine")
    opened = os.open

    def refuse(path: str | Path, *arguments: int) -> int:
        """As the system does whoever is not root."""
        if Path(path).name == "notes.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    resolve_model(str(model))
    progress = _Notes()
    check_small_files(model, progress)
    assert [note.split()[0] for note in progress.notes] == ["corpus.txt", "notes.txt"]
    (tmp_path / "out").mkdir()
    copy_small_files(model, tmp_path / "out")
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in copied
    assert not copied & {"corpus.txt", "log.txt", "gone.txt", "notes.txt"}


class _Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_prune_beside_such_files(model: Path, tmp_path: Path) -> None:
    extra(model)
    command = ["prune", str(model), "-o", str(tmp_path / "out"), "--method", "magnitude", "--device", "cpu"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.stderr
    assert not (tmp_path / "out" / "corpus.txt").exists()


def test_advice_for_a_file_of_the_loader_that_is_too_large(model: Path) -> None:
    with (model / "vocab.txt").open("wb") as file:
        file.truncate(300 << 20)
    with pytest.raises(ModelError, match=r"vocab\.txt: expected a file, got 315 MB, .* Move it out of the folder\.$"):
        resolve_model(str(model))


@pytest.mark.parametrize("linked", ["blobs folder", "from a plain folder"])
def test_links_into_the_hub_s_cache(tmp_path: Path, linked: str) -> None:
    """A `blobs` folder on another disk, and a folder of links as older downloads left it."""
    repository = tmp_path / "models--org--name"
    repository.mkdir()
    if linked == "blobs folder":
        shutil.copytree(ASSET, tmp_path / "disk")
        (repository / "blobs").symlink_to(tmp_path / "disk")
        folder = repository / "snapshots" / "abc"
    else:
        shutil.copytree(ASSET, repository / "blobs")
        folder = tmp_path / "model"
    folder.mkdir(parents=True)
    for path in ASSET.iterdir():
        (folder / path.name).symlink_to(repository / "blobs" / path.name)
    check_small_files(folder)
    (folder / "vocab.txt").symlink_to("/etc/passwd")
    with pytest.raises(ModelError, match=r"got the link vocab\.txt to /etc/passwd"):
        check_small_files(folder)
