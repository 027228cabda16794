"""Weight files are checked from their headers: every way a file can be broken, on copies of the built-in model."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from proxsparse_triton.errors import ModelError
from proxsparse_triton.models.checkpoint import check_weight_files, find_weight_files, safetensors_header, shard_names, stored_dtype
from proxsparse_triton.models.source import resolve_model

ASSET = resolve_model("demo").folder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return Path(shutil.copy(ASSET / "model.safetensors", tmp_path))


def with_header(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def message(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        check_weight_files([path])
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{path}: expected ")
    return text


def test_a_whole_file_passes(weights: Path) -> None:
    check_weight_files([weights])
    assert set(safetensors_header(weights)) == set(load_file(weights))
    assert stored_dtype([weights]) == torch.bfloat16


@pytest.mark.parametrize("missing", [1, 100, 4_000_000])
def test_truncated(weights: Path, missing: int) -> None:
    size = weights.stat().st_size
    with weights.open("r+b") as file:
        file.truncate(size - missing)
    assert f"expected {size} bytes as its header says, got {size - missing}. The file is truncated" in message(weights)


def test_truncated_inside_the_header(weights: Path) -> None:
    with weights.open("r+b") as file:
        file.truncate(60)
    assert "got a file of 60 bytes. The file is truncated" in message(weights)


def test_trailing_bytes(weights: Path) -> None:
    with weights.open("ab") as file:
        file.write(b"x")
    assert f"as its header says, got {weights.stat().st_size}. The file is corrupt" in message(weights)


@pytest.mark.parametrize("content", [b"", b"\0" * 7])
def test_empty(weights: Path, content: bytes) -> None:
    weights.write_bytes(content)
    assert f"got {len(content)} bytes" in message(weights)


def test_garbage(weights: Path) -> None:
    data = bytearray(weights.read_bytes())
    data[8:200] = bytes(192)
    weights.write_bytes(data)
    assert "got one that does not parse" in message(weights)
    weights.write_bytes(b"\xff" * 1000)
    assert "got a header length of 18446744073709551615" in message(weights)


@pytest.mark.parametrize("header", [b"[1, 2]", b"{}x", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b"\xff\xfe{}", b"[" * 100_000])
def test_headers_that_are_not_headers(tmp_path: Path, header: bytes) -> None:
    assert "got one that does not parse" in message(with_header(tmp_path / "model.safetensors", header))


def test_what_only_the_library_sees(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    assert "SafetensorError" in message(with_header(tmp_path / "model.safetensors", header, b"\0" * 8))


def test_git_lfs_pointer(weights: Path) -> None:
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4824440\n")
    assert "got a Git LFS pointer. Fetch the weights with `git lfs pull`" in message(weights)


def test_unreadable(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    assert "expected a file, got a folder" in message(tmp_path / "model.safetensors")


def test_stored_dtype_goes_by_bytes(tmp_path: Path) -> None:
    save_file({"big": torch.zeros(64, dtype=torch.float16), "small": torch.zeros(8)}, tmp_path / "a.safetensors")
    assert stored_dtype([tmp_path / "a.safetensors"]) == torch.float16
    save_file({"q": torch.zeros(64, dtype=torch.int8)}, tmp_path / "b.safetensors")
    with pytest.raises(ModelError, match=r"got mostly I8\. Prune the dense original"):
        stored_dtype([tmp_path / "b.safetensors"])


def test_file_order_is_that_of_the_index(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"}}))
    for name in ("1.safetensors", "2.safetensors", "0.safetensors"):
        save_file({"t": torch.zeros(1)}, tmp_path / name)
    assert find_weight_files(tmp_path, {}) == (tmp_path / "2.safetensors", tmp_path / "1.safetensors")
    assert find_weight_files(tmp_path, {"transformers_weights": "0.safetensors"}) == (tmp_path / "0.safetensors",)
    save_file({"t": torch.zeros(1)}, tmp_path / "model.safetensors")  # wins over an index, as in transformers
    assert find_weight_files(tmp_path, {}) == (tmp_path / "model.safetensors",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "expected JSON"),
        ("[]", "expected a JSON object, got a list"),
        ("{}", "expected a weight_map"),
        ('{"weight_map": {}}', "expected a weight_map"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', r"expected plain file names in weight_map, got \.\./secret"),
        ('{"weight_map": {"a": "/etc/passwd", "b": 3}}', "expected plain file names in weight_map, got /etc/passwd, 3"),
    ],
)
def test_broken_index(tmp_path: Path, content: str, words: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(ModelError, match=words):
        shard_names(index)


class Malicious:
    """Its pickle touches a file when it is loaded without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path, legacy: bool) -> None:
    path, target = tmp_path / "pytorch_model.bin", tmp_path / "ran"
    state = {"w": torch.zeros(2), "x": Malicious(target)}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    assert "Convert the model to safetensors" in message(path)
    assert not target.exists()
    torch.load(path, weights_only=False)  # the trap is real
    assert target.exists()


def test_plain_pickle_with_code(tmp_path: Path) -> None:
    path, target = tmp_path / "pytorch_model.bin", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Malicious(target)))
    assert "got pickled code or a damaged file" in message(path)
    assert not target.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_tensors_pass(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(OrderedDict(w=torch.zeros(2)), path, _use_new_zipfile_serialization=not legacy)
    check_weight_files([path])
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    assert "a damaged file" in message(path)


@pytest.mark.parametrize("state", [[torch.zeros(2)], {"step": 3, "w": torch.zeros(2)}, torch.zeros(2)], ids=["list", "number", "tensor"])
def test_pickle_of_something_else(tmp_path: Path, state: object) -> None:
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert "expected a state dict of tensors" in message(tmp_path / "pytorch_model.bin")
