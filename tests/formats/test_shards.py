import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from proxsparse_triton.errors import ModelError
from proxsparse_triton.formats.shards import (
    WeightFiles,
    bits,
    load_bin,
    model_files,
    read_bits,
    read_header,
    resolve_names,
    write_safetensors,
)

ASSET = Path(__file__).parents[2] / "proxsparse_triton" / "assets" / "pylm-2m"


class Opens:
    """Pickles to something that runs code when it is loaded."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (eval, ("1/0",))


def test_header_and_bits_agree_with_the_library() -> None:
    path = ASSET / "model.safetensors"
    header = read_header(path)
    with safe_open(path, framework="pt") as file, path.open("rb") as raw:
        assert [entry.name for entry in header.entries] == file.offset_keys()
        for entry in header.entries:
            tensor = file.get_tensor(entry.name)
            assert torch.equal(read_bits(raw, entry), tensor.view(torch.int16))
            assert torch.equal(bits(tensor), tensor.view(torch.int16))
    assert len(header.raw) == header.entries[0].start
    assert header.entries[-1].end == path.stat().st_size


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(8)}, path)
    entry = read_header(path).entries[0]
    path.write_bytes(path.read_bytes()[:-1])
    with path.open("rb") as raw, pytest.raises(ModelError, match="expected 32 bytes of a, got the end"):
        read_bits(raw, entry)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = (ASSET / "model.safetensors").read_bytes()
    for length in (0, 4, 8, 100, 3000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "m.safetensors").write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"m\.safetensors: expected .*[cC]opy or download it again"):
            read_header(tmp_path / "m.safetensors")
    with pytest.raises(ModelError):
        read_header(tmp_path / "absent")
    with pytest.raises(ModelError):
        read_header(tmp_path)


def test_written_files_are_read_by_the_library(tmp_path: Path) -> None:
    tensors = {
        "f64": torch.randn(3, dtype=torch.float64),
        "bf16": torch.randn(2, 3).bfloat16().T,
        "fp8": torch.randn(5).to(torch.float8_e4m3fn),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3),
        "bool ü": torch.tensor([True, False]),
    }
    codes = {"f64": "F64", "bf16": "BF16", "fp8": "F8_E4M3", "empty": "F32", "scalar": "I64", "bool ü": "BOOL"}
    layout = [(name, codes[name], tensor.shape) for name, tensor in tensors.items()]
    write_safetensors(tmp_path / "m", layout, (bits(tensor) for tensor in tensors.values()), {"format": "pt"})
    with safe_open(tmp_path / "m", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            read = file.get_tensor(name)
            assert read.dtype == tensor.dtype
            assert read.shape == tensor.shape
            assert torch.equal(bits(read), bits(tensor))


class TestBin:
    def test_old_and_new_formats(self, tmp_path: Path) -> None:
        for modern in (True, False):
            torch.save({"a": torch.ones(2)}, tmp_path / "m.bin", _use_new_zipfile_serialization=modern)
            assert torch.equal(load_bin(tmp_path / "m.bin")["a"], torch.ones(2))

    def test_refusals(self, tmp_path: Path) -> None:
        path = tmp_path / "m.bin"
        torch.save({"a": Opens()}, path)
        for content in (None, b"", b"garbage", path.read_bytes()[:50]):
            if content is not None:
                path.write_bytes(content)
            with pytest.raises(ModelError, match=r"weights_only=True|such file") as caught:
                load_bin(path)
            assert "\n" not in str(caught.value)
        for state in ([torch.ones(1)], {"model": {"a": torch.ones(1)}}):
            torch.save(state, path)
            with pytest.raises(ModelError, match="state dict of tensors"):
                load_bin(path)


def test_weight_files_read_both_kinds(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.zeros(1, 4)}, tmp_path / "x.safetensors")
    torch.save({"c": torch.full((3,), 2.0)}, tmp_path / "y.bin")
    files = WeightFiles([tmp_path / "x.safetensors", tmp_path / "y.bin"])
    assert files.shapes == {"a": (2,), "b": (1, 4), "c": (3,)}
    assert torch.equal(files.tensor("c"), torch.full((3,), 2.0))
    assert torch.equal(files.tensor("a"), torch.ones(2))


class TestFind:
    def model(self, folder: Path, **shards: str) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        for name in shards.values():
            save_file({"a": torch.ones(1)}, folder / name)

    def test_what_a_loader_takes(self, tmp_path: Path) -> None:
        self.model(tmp_path, a="z.safetensors", b="b.safetensors", c="masks.safetensors")
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"y": "z.safetensors", "x": "b.safetensors"}}))
        assert [path.name for path in model_files(tmp_path)] == ["z.safetensors", "b.safetensors"]
        self.model(tmp_path, a="model.safetensors")
        assert [path.name for path in model_files(tmp_path)] == ["model.safetensors"]

    def test_bin(self, tmp_path: Path) -> None:
        self.model(tmp_path)
        torch.save({}, tmp_path / "pytorch_model.bin")
        assert [path.name for path in model_files(tmp_path)] == ["pytorch_model.bin"]

    def test_refusals(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for path, message in (("absent", "which does not exist"), ("file", "which is a file"), (".", r"which has no config\.json")):
            with pytest.raises(ModelError, match=message):
                model_files(tmp_path / path)
        self.model(tmp_path, a="masks.safetensors")  # masks are no model
        with pytest.raises(ModelError, match="expected weights"):
            model_files(tmp_path)
        index = tmp_path / "model.safetensors.index.json"
        for content, message in (("{", "JSON"), ("{}", "weight_map"), ('{"weight_map": {"a": "x"}}', "missing: x")):
            index.write_text(content)
            with pytest.raises(ModelError, match=message):
                model_files(tmp_path)


class TestResolveNames:
    def test_prefixes_in_both_directions(self) -> None:
        assert resolve_names("f", ["transformer.h.0.a.weight", "lm.weight"], ["h.0.a.weight", "h.10.a.weight", "lm.weight"]) == {
            "transformer.h.0.a.weight": "h.0.a.weight",
            "lm.weight": "lm.weight",
        }
        assert resolve_names("f", ["layers.1.up.weight"], ["model.layers.1.up.weight", "model.layers.11.up.weight"]) == {
            "layers.1.up.weight": "model.layers.1.up.weight"
        }

    def test_refusals(self) -> None:
        with pytest.raises(ModelError, match=r"got 5 without a key of their own: q0\.w, q1\.w, q2\.w\. Use"):
            resolve_names("f", [f"q{i}.w" for i in range(5)], ["a.w"])
        with pytest.raises(ModelError, match=r"1 without a key of their own: layers\.0\.w"):  # ambiguous
            resolve_names("f", ["layers.0.w"], ["encoder.layers.0.w", "decoder.layers.0.w"])
        with pytest.raises(ModelError, match=r"a\.h\.0\.w"):  # two names, one key
            resolve_names("f", ["h.0.w", "a.h.0.w"], ["h.0.w"])
        with pytest.raises(ModelError, match="xlayers"):  # a suffix starts at a dot
            resolve_names("f", ["xlayers.0.w"], ["layers.0.w"])
