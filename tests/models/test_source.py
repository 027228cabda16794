"""From a spec to a checked folder: local folders, broken ones, and a Hub that is played by a local server."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from proxsparse_triton.errors import ConfigError, ModelError
from proxsparse_triton.models.source import file_hashes, resolve_model

ASSET = resolve_model("demo").folder
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ASSET, tmp_path / "model"))


def shard(folder: Path) -> list[str]:
    """Split the weights of `folder` into three files with an index."""
    tensors = load_file(folder / "model.safetensors")
    weight_map = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return sorted(set(weight_map.values()))


def refusal(spec: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_model(str(spec))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_demo_is_the_asset() -> None:
    source = resolve_model("demo")
    assert source.spec == "demo"
    assert source.folder.name == "pylm-2m"
    assert source.revision is None
    assert source.weight_files == (source.folder / "model.safetensors",)
    assert source.is_safetensors


def test_hashes_are_of_the_files(copy: Path) -> None:
    shards = shard(copy)
    hashes = file_hashes(resolve_model(str(copy)))
    assert set(hashes) == {"config.json", *shards}
    assert hashes["config.json"] == hashlib.sha256((ASSET / "config.json").read_bytes()).hexdigest()


def test_local_folder_forms(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(copy)).folder == copy
    assert resolve_model(f"{copy}/").weight_files == (copy / "model.safetensors",)
    monkeypatch.chdir(copy.parent)
    assert resolve_model("model").weight_files == (Path("model/model.safetensors"),)  # exists: local, though it could be a Hub id
    monkeypatch.setenv("HOME", str(copy.parent))
    assert resolve_model("~/model").folder == copy


def test_sharded(copy: Path) -> None:
    shards = shard(copy)
    assert sorted(path.name for path in resolve_model(str(copy)).weight_files) == shards


def test_pickled(copy: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    assert resolve_model(str(copy)).is_safetensors  # preferred where both exist
    (copy / "model.safetensors").unlink()
    source = resolve_model(str(copy))
    assert source.weight_files == (copy / "pytorch_model.bin",)
    assert not source.is_safetensors


def test_revision_needs_the_hub(copy: Path) -> None:
    for spec in ("demo", str(copy)):
        with pytest.raises(ConfigError, match="expected a Hub id with a revision"):
            resolve_model(spec, revision="main")


@pytest.mark.parametrize("spec", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "runs/a/b", "", "a b", "org/name/", "..", "x" * 5000])
def test_no_such_folder(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert len(text := refusal(spec)) < 300
    assert "expected a model folder" in text or (spec == ".." and "expected config.json" in text)


def test_broken_folders(copy: Path, tmp_path: Path) -> None:
    assert "got a file. Give the folder" in refusal(copy / "model.safetensors")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "got an empty one" in refusal(empty)
    (copy / "config.json").unlink()
    assert "expected config.json, got model.safetensors, tokenizer.json, tokenizer_config.json and 1 more" in refusal(copy)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "expected JSON"),
        (b"{'model_type': 'llama'}", "expected JSON"),
        (b"\xff\xfe\x00", "expected JSON"),
        (b"[1]", "expected a JSON object, got a list"),
        (b'{"quantization_config": {"quant_method": "awq"}}', "got a quantised model (awq). Prune the dense original"),
        (b'{"transformers_weights": "consolidated.safetensors"}', "expected weights in consolidated.safetensors"),
    ],
)
def test_broken_config(copy: Path, content: bytes, words: str) -> None:
    (copy / "config.json").write_bytes(content)
    assert words in refusal(copy)


def test_null_quantization_config_is_dense(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    resolve_model(str(copy))


def test_adapter(copy: Path) -> None:
    (copy / "adapter_config.json").write_text("{}")
    assert "got an adapter (adapter_config.json). Merge it" in refusal(copy)


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "weights.gguf")
    assert "expected weights in model.safetensors or model.safetensors.index.json, got config.json, tokenizer.json" in refusal(copy)


def test_broken_weights_name_the_file(copy: Path) -> None:
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate((copy / "model.safetensors").stat().st_size - 100)
    assert f"{copy / 'model.safetensors'}: expected" in refusal(copy)


def test_absent_shards(copy: Path) -> None:
    first, second, _ = shard(copy)
    (copy / second).unlink()
    assert f"expected the 3 shards that model.safetensors.index.json names, got 1 missing: {second}. " in refusal(copy)
    weight_map = {f"t{i}": f"absent-{i}.safetensors" for i in range(5)} | {"t": first}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "got 5 missing: absent-0.safetensors, absent-1.safetensors, absent-2.safetensors and 2 more. " in refusal(copy)


def test_a_truncated_shard_is_found(copy: Path) -> None:
    last = shard(copy)[-1]
    (copy / last).write_bytes((copy / last).read_bytes()[:-1])
    assert last in refusal(copy)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder(copy: Path) -> None:
    copy.chmod(0)
    assert "expected a readable folder" in refusal(copy)


# --- a Hub -------------------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's HTTP interface as a download needs; `repositories` maps ids to folders."""

    repositories: dict[str, Path]
    fetched: list[str]

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0].removeprefix("/")
        api = path.startswith("api/models/")
        repository = "/".join(path.removeprefix("api/models/").split("/")[:2])
        if repository == "org/gated":
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="gated")
        if repository not in self.repositories:
            return self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="not found")
        folder, rest = self.repositories[repository], path.removeprefix("api/models/").split("/")[2:]
        if rest[1:2] not in ([], [COMMIT], ["main"]):
            return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="no such revision")
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if api and rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size, "oid": digest(f)} for f in files]
            return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        if api:
            info = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": str(f.relative_to(folder))} for f in files]}
            return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        file = folder / "/".join(rest[2:])
        if self.command == "GET":
            self.fetched.append(f"{repository}/{'/'.join(rest[2:])}")
        return self.answer(200, file.read_bytes(), ETag=f'"{digest(file)}"')


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[type[Hub], dict[str, str]]]:
    """A running Hub with org/model (shards, a pickle, an ONNX folder), org/quantised and org/pickled; its environment variables."""
    folders = {f"org/{name}": Path(shutil.copytree(ASSET, tmp_path / name)) for name in ("model", "quantised", "pickled")}
    torch.save(load_file(ASSET / "model.safetensors"), folders["org/pickled"] / "pytorch_model.bin")
    (folders["org/pickled"] / "model.safetensors").unlink()
    shard(folders["org/model"])
    (folders["org/model"] / "onnx").mkdir()
    for name in ("pytorch_model.bin", "consolidated.safetensors", "onnx/config.json"):
        (folders["org/model"] / name).write_text("never fetched")
    (folders["org/quantised"] / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    handler = type("Handler", (Hub,), {"repositories": folders, "fetched": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    yield handler, environment
    server.shutdown()
    server.server_close()


# The Hub's address is read when huggingface_hub is imported, hence a process of its own for each environment.
PROBE = """
import json, sys
from proxsparse_triton.errors import ModelError
from proxsparse_triton.models.source import resolve_model
for spec in sys.argv[1:]:
    spec, _, revision = spec.partition("@")
    try:
        source = resolve_model(spec, revision=revision or None)
        print(json.dumps([str(source.folder), source.revision, [path.name for path in source.weight_files]]))
    except ModelError as error:
        print(json.dumps(str(error)))
"""


def probe(environment: dict[str, str], *specs: str) -> list[object]:
    done = subprocess.run([sys.executable, "-c", PROBE, *specs], env=environment, capture_output=True, text=True, check=True, timeout=120)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hub(hub: tuple[type[Hub], dict[str, str]]) -> None:
    handler, environment = hub
    found, quantised, pickled, gated, unknown, revision = probe(
        environment, "org/model", "org/quantised", "org/pickled", "org/gated", "org/unknown", "org/model@v9"
    )
    shards = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    assert isinstance(found, list)
    folder, commit, names = found
    assert (commit, sorted(names)) == (COMMIT, shards)
    assert set(os.listdir(folder)) == {
        "config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
        *shards,
    }
    assert "got a quantised model (gptq)" in str(quantised)
    assert pickled[2] == ["pytorch_model.bin"]  # type: ignore[index]
    assert "got a gated one. Accept its terms" in str(gated)
    assert "got neither (or a private model)" in str(unknown)
    assert "got 'v9', which the Hub does not have" in str(revision)
    assert "org/quantised/model.safetensors" not in handler.fetched  # refused before its weights travelled
    unwanted = ("pytorch_model.bin", "consolidated.safetensors", "onnx/config.json")
    assert not {f"org/model/{name}" for name in unwanted} & set(handler.fetched)

    # Without a network: what is in the cache works, what is not is one line.
    for offline in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        cached, absent = probe({**environment, **offline}, "org/model", "org/unknown")
        assert cached == found
        assert "and the Hub cannot be reached" in str(absent)
        assert "\n" not in str(absent)
