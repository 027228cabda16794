import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest
import torch

from proxsparse_triton.errors import ConfigError, ModelError
from proxsparse_triton.formats import manifest as manifest_module
from proxsparse_triton.formats.manifest import read_manifest, versions, write_manifest


@dataclass(frozen=True)
class Settings:
    lambda1: float
    dtype: torch.dtype
    source: Path


def test_round_trip_with_what_is_added(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"z": [1, 2.5, None, True, "ü"], "settings": Settings(0.1, torch.bfloat16, Path("text")), "tool": "other"})
    manifest = read_manifest(tmp_path)
    assert manifest == read_manifest(tmp_path / "manifest.json")
    assert manifest["tool"] == "proxsparse-triton"
    assert manifest["z"] == [1, 2.5, None, True, "ü"]
    assert manifest["settings"] == {"lambda1": 0.1, "dtype": "torch.bfloat16", "source": "text"}
    assert datetime.fromisoformat(manifest["created"]).utcoffset().total_seconds() == 0
    assert manifest["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert {"version", "platform", "gpu"} <= manifest.keys()
    text = (tmp_path / "manifest.json").read_text(encoding="utf-8")
    assert text == json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_manifest_can_be_extended(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"created": "2026-01-01T00:00:00+00:00"})
    write_manifest(tmp_path, {**read_manifest(tmp_path), "perplexity": 5.87})
    assert read_manifest(tmp_path)["created"] == "2026-01-01T00:00:00+00:00"
    assert read_manifest(tmp_path)["perplexity"] == 5.87


def test_versions_of_absent_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> str:
        raise manifest_module.importlib.metadata.PackageNotFoundError(package)

    assert versions().keys() == {"python", "torch", "triton", "transformers", "safetensors"}
    monkeypatch.setattr(manifest_module.importlib.metadata, "version", absent)
    assert versions()["triton"] == "not installed"
    assert manifest_module.package_version("proxsparse-triton", "unknown") == "unknown"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": {"b": [1.0, float("nan")]}}, r"finite numbers, got nan at a\.b\[1\]"),
        ({"a": float("-inf")}, r"got -inf at a"),
        ({"a": {1: 2}}, r"string keys, got 1 at a"),
        ({"a": torch.zeros(1)}, r"got a Tensor at a"),
        ({"a": {"x", "y"}}, r"got a set at a"),
    ],
)
def test_what_is_not_json_is_refused_and_nothing_written(tmp_path: Path, content: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write_manifest(tmp_path, content)
    assert list(tmp_path.iterdir()) == []


def test_reading_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        read_manifest(tmp_path)
    for content, message in (
        (b"{", "JSONDecodeError"),
        (b"\xff", "UnicodeDecodeError"),
        (b"[]", "got a list"),
        (b'{"tool": 1}', "got tool 1"),
    ):
        (tmp_path / "manifest.json").write_bytes(content)
        with pytest.raises(ModelError, match=message) as caught:
            read_manifest(tmp_path)
        assert "\n" not in str(caught.value)
