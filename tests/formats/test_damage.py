"""What was changed after it was written does not pass, and does not leave with fresh hashes; what is no file of the model is not read."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from packing import ASSET, edit_json, magnitude_run, pack, rehash
from safetensors.torch import load_file, save_file

from proxsparse_triton.cli import main
from proxsparse_triton.errors import ModelError
from proxsparse_triton.export import export_run, load_packed
from proxsparse_triton.formats.manifest import read_manifest, write_manifest
from proxsparse_triton.formats.masks import load_masks, save_masks
from proxsparse_triton.formats.packed import read_packed
from proxsparse_triton.formats.records import file_records
from proxsparse_triton.formats.shards import load_bin
from proxsparse_triton.formats.verify import verify_folder

pytestmark = pytest.mark.usefixtures("one_thread")
SHARD = "packed-00001-of-00001.safetensors"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = magnitude_run(tmp_path / "run")
    write_manifest(folder, {**read_manifest(folder), "files": file_records(folder)})
    return folder


@pytest.fixture
def packed(run: Path, tmp_path: Path) -> Path:
    return pack(run, tmp_path / "packed")


def flip(path: Path) -> None:
    """The lowest exponent bit of a bf16 weight that is kept."""
    content = bytearray(path.read_bytes())
    at = next(at for at in range(len(content) - 1, 0, -2) if content[at])
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("format", ["dense", "packed", "masks"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damage_is_not_exported(run: Path, tmp_path: Path, name: str, format: str) -> None:
    if name == "model.safetensors":
        flip(run / name)
    else:
        edit_json(run / name, changed_by_hand=1)
    with pytest.raises(ModelError, match=rf"export: expected {run} as it was written, got {name}: is not the file"):
        export_run(str(run), tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()
    problem = f"{name}: is not the file that was written, its SHA-256 in manifest.json is another"
    assert problem in verify_folder(run).problems


def test_eval_says_what_is_damaged(run: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("def f(x):\n    return x\n" * 200)
    command = [
        "eval",
        str(run),
        "--perplexity",
        str(tmp_path / "t.txt"),
        "--seqlen",
        "16",
        "--windows",
        "1",
        "--no-dense",
        "--device",
        "cpu",
    ]
    assert "as it was written" not in CliRunner().invoke(main, command).stderr
    edit_json(run / "config.json", changed_by_hand=1)
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.stderr
    assert "is not as it was written" in result.stderr
    assert "config.json: is not the file" in result.stderr


def test_a_record_that_is_none(run: Path) -> None:
    manifest = read_manifest(run)
    write_manifest(run, {**manifest, "files": {**manifest["files"], "../other": {"bytes": 1}, "x" * 300: {"bytes": 1, "sha256": "a"}}})
    problems = verify_folder(run).problems
    assert any("has no size and SHA-256 of '../other'" in problem for problem in problems)
    assert any("is missing" in problem for problem in problems)


def test_a_manifest_that_cannot_be_read_is_not_taken_for_none(run: Path) -> None:
    (run / "manifest.json").write_text('{"tool": "proxsparse-triton", ')
    with pytest.raises(ModelError, match="expected JSON"):
        verify_folder(run)
    (run / "manifest.json").unlink()
    os.mkfifo(run / "manifest.json")
    for read in (verify_folder, lambda place: export_run(str(place), place.parent / "out", format="masks")):
        with pytest.raises(ModelError, match=r"expected a file, got a pipe \(FIFO\)"):
            read(run)


@pytest.mark.parametrize("name", [SHARD, "config.json", "packed.safetensors.index.json"])
def test_every_file_of_a_packed_model_has_its_hash(packed: Path, name: str) -> None:
    manifest = read_manifest(packed)
    del manifest["files"][name]
    (packed / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=f"size and hash of every file of the model in manifest.json, got none of {name}"):
        verify_folder(packed)


@pytest.mark.parametrize("word", [0x0000, 0x4440, 0x4441, 0x1444, 0x4544, -1])
@pytest.mark.parametrize("verify_hashes", [True, False])
def test_positions_that_are_no_pair(packed: Path, word: int, verify_hashes: bool) -> None:
    """i0 == i1, i0 > i1: no kernel looks at them."""
    state = load_file(packed / SHARD)
    state["model.layers.2.mlp.up_proj.metadata"][5, 3] = word
    save_file(state, packed / SHARD, {"format": "proxsparse-packed"})
    rehash(packed)
    with pytest.raises(ModelError, match=r"well-formed metadata in model\.layers\.2\.mlp\.up_proj, got positions .* block \(5, 1"):
        load_packed(packed, device="cpu", verify_hashes=verify_hashes)
    with pytest.raises(ModelError, match="well-formed metadata"):
        dict(read_packed(packed).masks)


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F8_E5M2", "F16", "I8", "BOOL"])
def test_masks_of_another_dtype(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "masks.safetensors"
    save_masks(path, {"w": torch.tensor([True, True, False, False]).repeat(12, 2)})
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    size = header["w"]["shape"][0]
    header["w"] |= {"dtype": dtype, "shape": [size // 2 if dtype in ("BF16", "F16") else size]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    with pytest.raises(ModelError, match=f"{size} uint8 values for w of shape .*, got {dtype}"):
        load_masks(path)


def test_masks_of_too_many_dimensions(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1, dtype=torch.uint8)}, tmp_path / "m", {"format": "proxsparse-masks", "version": "1", "shapes": "{}"})
    metadata = {"format": "proxsparse-masks", "version": "1", "shapes": json.dumps({"w": [1] * 70 + [4]})}
    save_file({"w": torch.zeros(1, dtype=torch.uint8)}, tmp_path / "m", metadata)
    with pytest.raises(ModelError, match="a shape in blocks of 4 for w"):
        load_masks(tmp_path / "m")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({7: torch.ones(2)}, "tensors by name"),
        ({"w": torch.ones(2).to_sparse()}, "a sparse tensor in w"),
        ({"w": torch.empty(2, device="meta")}, "a tensor without data in w"),
        ({"w": torch.ones(1).expand(10**6, 10**6)}, r"shape \(1000000, 1000000\) on 4 bytes in w"),
        (OrderedDict(w=[1]), "tensors by name"),
    ],
    ids=str,
)
def test_pickles_of_something_else(tmp_path: Path, state: Any, message: str) -> None:
    folder = Path(shutil.copytree(ASSET, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    for read in (load_bin, lambda path: verify_folder(path.parent), lambda path: export_run(str(folder), tmp_path / "o", format="dense")):
        with pytest.raises(ModelError, match=message):
            read(folder / "pytorch_model.bin")


def test_links_that_lead_out_are_not_published(run: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("not for others")
    folder = Path(shutil.copytree(ASSET, tmp_path / "model"))
    (folder / "vocab.txt").symlink_to(secret)
    command = ["prune", str(folder), "-o", str(tmp_path / "out"), "--method", "magnitude", "--device", "cpu"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert f"got the link vocab.txt to {secret}, outside of its folder" in result.stderr
    assert not (tmp_path / "out").exists()
    (run / "LICENSE").symlink_to(secret)
    with pytest.raises(ModelError, match="got the link LICENSE"):
        export_run(str(run), tmp_path / "out", format="packed")
    (run / "LICENSE").unlink()
    (run / "vocab.txt").symlink_to("tokenizer.json")  # inside
    export_run(str(run), tmp_path / "out", format="packed")
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == (run / "tokenizer.json").read_bytes()
