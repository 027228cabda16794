"""Whatever stands in a file of a model or a run: the right result or one explained error, never a traceback, in little memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import Clock, changed_bytes, changed_json, fuzz, in_child, json_bytes
from hypothesis import given
from hypothesis import strategies as st
from packing import magnitude_run, pack
from run_folders import manifest as run_manifest
from run_folders import rows, write_run
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from proxsparse_triton.errors import ProxSparseError
from proxsparse_triton.export import load_packed
from proxsparse_triton.formats.manifest import read_manifest, write_manifest
from proxsparse_triton.formats.masks import load_masks
from proxsparse_triton.formats.packed import read_packed
from proxsparse_triton.formats.records import file_records
from proxsparse_triton.formats.shards import WeightFiles, bits, model_files, read_bits, read_header
from proxsparse_triton.formats.verify import verify_folder
from proxsparse_triton.models.loading import load_model, resolve_model
from proxsparse_triton.models.source import ModelSource
from proxsparse_triton.report import write_report
from proxsparse_triton.sparsity import check_mask

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "model"
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    load_model(resolve_model(str(folder)), dtype=None)  # so that the examples do not count what is imported
    return folder


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = magnitude_run(tmp_path_factory.mktemp("run") / "run", model)
    write_manifest(folder, {**read_manifest(folder), "files": file_records(folder)})
    return folder


def of_a_header(path: Path) -> st.SearchStrategy[bytes]:
    """A safetensors file with another header, or with other bytes."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    headers = changed_json(header).map(json_bytes).map(lambda text: struct.pack("<Q", len(text)) + text + data)
    return headers | changed_bytes(content[: 8 + length]).map(lambda start: start + data)


def state_of(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def test_safetensors_headers(model: Path, tmp_path: Path) -> None:
    """What is accepted has the tensors that the safetensors library reads."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    path = folder / "model.safetensors"

    def examine(clock: Clock) -> None:
        @fuzz
        @given(of_a_header(model / "model.safetensors"))
        def one(content: bytes) -> None:
            def accepted() -> bool:
                path.write_bytes(content)
                try:
                    resolve_model(str(folder))
                    verify_folder(folder)
                    load_model(resolve_model(str(folder)), dtype=None)
                    files, entries = WeightFiles([path]), read_header(path).entries
                except ProxSparseError:
                    return False
                expected = state_of(path)
                assert set(files.shapes) == set(expected) == {entry.name for entry in entries}
                with path.open("rb") as file:
                    for entry in entries:
                        assert torch.equal(bits(files.tensor(entry.name)), bits(expected[entry.name]))
                        assert torch.equal(read_bits(file, entry), bits(expected[entry.name]))
                return True

            clock(accepted)

        one()

    in_child("safetensors headers", examine)


def test_shard_indexes(model: Path, tmp_path: Path) -> None:
    """A model that loads is the original."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder, max_shard_size="8KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    assert len(set(content["weight_map"].values())) > 2
    expected = load_model(resolve_model(str(model)), dtype=None).state_dict()

    def examine(clock: Clock) -> None:
        @fuzz
        @given(changed_json(content).map(json_bytes) | changed_bytes(index.read_bytes()))
        def one(text: bytes) -> None:
            def accepted() -> bool:
                index.write_bytes(text)
                try:
                    verify_folder(folder)
                    loaded = load_model(resolve_model(str(folder)), dtype=None).state_dict()
                except ProxSparseError:
                    return False
                assert loaded.keys() == expected.keys()
                assert all(torch.equal(loaded[key], expected[key]) for key in expected)
                return True

            clock(accepted)

        one()

    in_child("shard indexes", examine)


def test_manifests(run: Path, tmp_path: Path) -> None:
    """A run or a packed folder that passes has the files that its manifest lists; and a page can be written."""
    folder, packed = Path(shutil.copytree(run, tmp_path / "run")), pack(run, tmp_path / "packed")
    texts = {place: (place / "manifest.json").read_bytes() for place in (folder, packed)}

    def examples(place: Path) -> st.SearchStrategy[tuple[Path, bytes]]:
        content = json.loads(texts[place])
        # Most changes of the whole would hit nothing that is compared.
        files = changed_json(content["files"]).map(lambda found: {**content, "files": found})
        return st.tuples(st.just(place), (changed_json(content) | files).map(json_bytes) | changed_bytes(texts[place]))

    def examine(clock: Clock) -> None:
        @fuzz
        @given(st.sampled_from(list(texts)).flatmap(examples))
        def one(example: tuple[Path, bytes]) -> None:
            place, text = example

            def accepted() -> bool:
                (place / "manifest.json").write_bytes(text)
                with contextlib.suppress(ProxSparseError):
                    write_report([folder], tmp_path / "page.html", pictures=False)
                try:
                    report = verify_folder(place)
                    if place == packed:
                        read_packed(packed)
                except ProxSparseError:
                    return False
                if report.ok:
                    found = json.loads(text)
                    listed = found.get("files") if isinstance(found, dict) and found.get("tool") == "proxsparse-triton" else None
                    for name, record in listed.items() if isinstance(listed, dict) else ():
                        written = (place / name).read_bytes()
                        assert record["bytes"] == len(written)
                        assert record["sha256"] == hashlib.sha256(written).hexdigest()
                return report.ok

            clock(accepted)

        one()

    in_child("manifests", examine)


def decoded(path: Path) -> dict[str, Tensor]:
    """The reader of the format's docstring."""
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    table = np.array([[i in pair for i in range(4)] for pair in pairs])
    masks = {}
    with safe_open(path, framework="numpy") as file:
        for name, shape in json.loads(file.metadata()["shapes"]).items():
            byte = file.get_tensor(name)
            patterns = np.stack([byte % 6, byte // 6 % 6, byte // 36], axis=1)
            masks[name] = torch.from_numpy(table[patterns].reshape(-1)[: int(np.prod(shape))].reshape(shape))
    return masks


def test_masks(run: Path, tmp_path: Path) -> None:
    """Masks that load are 2:4, and what the format's own reader finds."""
    source = run / "masks.safetensors"
    path = tmp_path / "masks.safetensors"
    content = source.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    shapes = json.loads(header["__metadata__"]["shapes"])

    def with_shapes(found: object) -> bytes:
        text = json_bytes({**header, "__metadata__": {**header["__metadata__"], "shapes": json.dumps(found)}})
        return struct.pack("<Q", len(text)) + text + data

    def examine(clock: Clock) -> None:
        @fuzz
        @given(
            of_a_header(source) | changed_json(shapes).map(with_shapes) | changed_bytes(data).map(lambda end: content[: 8 + length] + end)
        )
        def one(example: bytes) -> None:
            def accepted() -> bool:
                path.write_bytes(example)
                try:
                    masks = load_masks(path)
                except ProxSparseError:
                    return False
                expected = decoded(path)
                assert masks.keys() == expected.keys()
                for name, mask in masks.items():
                    check_mask("test", name, mask)
                    assert torch.equal(mask, expected[name])
                return True

            clock(accepted)

        one()

    in_child("masks", examine)


def test_metrics(tmp_path: Path) -> None:
    """A page, whatever the rows say, without a coordinate that is no number."""
    folder = write_run(tmp_path / "run", run_manifest(), rows(30))
    sound = rows(30)
    sound[3] |= {"mask_changes": {"a.0.b.weight": 0.5}, "warnings": ["slow"]}

    def lines(changed: list[object]) -> bytes:
        return b"".join(json_bytes(row) + b"\n" for row in changed)

    def examine(clock: Clock) -> None:
        @fuzz
        @given(changed_json(sound, most=12).map(lines) | changed_bytes(lines([*sound])))
        def one(content: bytes) -> None:
            def accepted() -> bool:
                (folder / "metrics.jsonl").write_bytes(content)
                page = write_report([folder], tmp_path / "page.html", pictures=False).page.read_text(encoding="utf-8")
                for drawing in page.split("<svg")[1:]:
                    shapes = drawing.partition("</svg>")[0]
                    for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height", "points"):
                        for value in shapes.split(f' {name}="')[1:]:
                            assert not {"nan", "inf"} & set(value.partition('"')[0].replace(",", " ").replace("-", "").split())
                return True

            clock(accepted)

        one()

    in_child("metrics", examine)


def test_configs(model: Path, run: Path, tmp_path: Path) -> None:
    """A model that loads has the weights of its files, whatever else its config.json says."""
    folder, packed = Path(shutil.copytree(model, tmp_path / "model")), pack(run, tmp_path / "packed")
    contents = {place: json.loads((place / "config.json").read_text()) for place in (folder, packed)}
    state = state_of(model_files(model)[0])
    dense = state_of(model_files(run)[0])
    choice = st.sampled_from([folder, folder, packed]).flatmap(
        lambda place: st.tuples(st.just(place), changed_json(contents[place]).map(json_bytes) | changed_bytes(json_bytes(contents[place])))
    )

    def examine(clock: Clock) -> None:
        @fuzz
        @given(choice)
        def one(example: tuple[Path, bytes]) -> None:
            place, text = example

            def accepted() -> bool:
                (place / "config.json").write_bytes(text)
                try:
                    if place == packed:
                        loaded = load_packed(packed, device="cpu", verify_hashes=False, fuse=False)
                        parameters = {name: getattr(module, "weight", None) for name, module in loaded.named_modules()}
                        for name, weight in dense.items():
                            found = parameters.get(name.removesuffix(".weight"))
                            assert found is None or torch.equal(found, weight.to(found.dtype)), name
                    else:
                        loaded = load_model(ModelSource("model", folder, None, resolve_model(str(folder)).weight_files), dtype=None)
                        for name, weight in loaded.state_dict().items():
                            assert torch.equal(weight, state.get(name, weight)), name
                except ProxSparseError:
                    return False
                return True

            clock(accepted)

        one()

    in_child("config.json", examine)
