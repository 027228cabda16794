import errno
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from formats.folders import prune, tiny
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from proxsparse_triton.errors import OutputError
from proxsparse_triton.formats import dense as dense_module
from proxsparse_triton.formats.folder import output_folder
from proxsparse_triton.formats.masks import apply_masks
from proxsparse_triton.formats.owned import MARKER
from proxsparse_triton.formats.shards import model_files, read_header, write_safetensors

ASSET = Path(__file__).parents[2] / "proxsparse_triton" / "assets" / "pylm-2m"

LOAD = """
import hashlib, json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
report = {}
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        logits = model(torch.arange(5, 69)[None]).logits
    report[folder] = {
        "wrong": sorted(str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs") for key in info[kind]),
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "logits": hashlib.sha256(logits.float().numpy().tobytes()).hexdigest(),
        "tokens": AutoTokenizer.from_pretrained(folder)("def f(x):")["input_ids"],
        "proxsparse": model.config.proxsparse,
    }
assert "proxsparse_triton" not in sys.modules
print(json.dumps(report))
"""


def mask_of(weight: Tensor) -> Tensor:
    scores = weight.abs().float().unflatten(-1, (-1, 4))
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(2, dim=-1).indices, True).flatten(-2)


def masks_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: mask_of(weight) for name, weight in state.items() if ".self_attn." in name or ".mlp." in name}


def contents(path: Path) -> set[str]:
    return {str(found.relative_to(path)) for found in path.rglob("*") if found.is_file()}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def masks() -> dict[str, Tensor]:
    masks = masks_of(load_file(ASSET / "model.safetensors"))
    assert len(masks) == 28
    return masks


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pylm-2m in three shards, written by transformers."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("sharded") / "model"
    AutoModelForCausalLM.from_pretrained(ASSET).save_pretrained(folder, max_shard_size="1800KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSET / name, folder)
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder


@pytest.fixture(scope="module")
def pickled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pylm-2m in two .bin files; the tied head is stored beside the embedding, sharing its memory, as torch.save does."""
    folder = tmp_path_factory.mktemp("bin") / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSET / name, folder)
    state = load_file(ASSET / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    names = [f"pytorch_model-0000{part}-of-00002.bin" for part in (1, 2)]
    weight_map = {key: names[".layers.2." in key or ".layers.3." in key] for key in state}
    for name in names:
        torch.save({key: tensor for key, tensor in state.items() if weight_map[key] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def assert_pruned_bit_for_bit(before: Tensor, after: Tensor, mask: Tensor | None) -> None:
    assert after.dtype == before.dtype
    old, new = before.view(torch.int16), after.view(torch.int16)
    if mask is None:
        assert torch.equal(old, new)
    else:
        assert torch.equal(old[mask], new[mask])
        assert not new[~mask].any()


def test_one_file(tmp_path: Path, masks: dict[str, Tensor]) -> None:
    prune(ASSET, tmp_path / "out", masks)
    before, after = load_file(ASSET / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert_pruned_bit_for_bit(weight, after[name], masks.get(name))
    assert read_header(ASSET / "model.safetensors") == read_header(tmp_path / "out" / "model.safetensors")
    assert contents(tmp_path / "out") == {
        *("config.json", "masks.safetensors", "model.safetensors", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json", "training.json"),
    }
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(weight.nbytes for weight in before.values())}
    assert index["weight_map"] == dict.fromkeys(before, "model.safetensors")


def test_three_shards_keep_names_order_and_metadata(tmp_path: Path, sharded: Path, masks: dict[str, Tensor]) -> None:
    prune(sharded, tmp_path, masks)
    assert contents(tmp_path) == contents(sharded) | {"masks.safetensors"}
    index = "model.safetensors.index.json"
    assert (tmp_path / index).read_bytes() == (sharded / index).read_bytes()
    for path in model_files(sharded):
        assert read_header(path).raw == read_header(tmp_path / path.name).raw
        before, after = load_file(path), load_file(tmp_path / path.name)
        for name, weight in before.items():
            assert_pruned_bit_for_bit(weight, after[name], masks.get(name))


def test_a_fresh_process_loads_every_kind_without_a_word(tmp_path: Path, sharded: Path, pickled: Path, masks: dict[str, Tensor]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = {}
    for name, source in (("single", ASSET), ("sharded", sharded), ("bin", pickled)):
        folders[name] = str(tmp_path / name)
        prune(source, tmp_path / name, masks)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "warning", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, "-c", LOAD, *folders.values()], check=False, capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    model = AutoModelForCausalLM.from_pretrained(ASSET)
    apply_masks(model, masks)
    with torch.no_grad():
        logits = model(torch.arange(5, 69)[None]).logits
    expected = {
        "wrong": [],
        "tied": True,
        "logits": hashlib.sha256(logits.float().numpy().tobytes()).hexdigest(),
        "tokens": AutoTokenizer.from_pretrained(ASSET)("def f(x):")["input_ids"],
        "proxsparse": {"method": "magnitude"},
    }
    for folder in folders.values():
        assert report[folder] == expected
    assert not any(word in result.stderr.lower() for word in ("missing", "unexpected", "mismatch", "newly initialized"))


def test_bin_becomes_safetensors(tmp_path: Path, pickled: Path, masks: dict[str, Tensor]) -> None:
    before = {path.name: path.read_bytes() for path in pickled.iterdir()}
    prune(pickled, tmp_path, masks)
    assert {name for name in contents(tmp_path) if "model-" in name} == {f"model-0000{part}-of-00002.safetensors" for part in (1, 2)}
    assert not list(tmp_path.glob("*.bin*"))
    written = {}
    for path in model_files(tmp_path):
        written.update(load_file(path))
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    original = load_file(ASSET / "model.safetensors")
    assert written.keys() == original.keys() | {"lm_head.weight"}
    for name, weight in original.items():
        assert_pruned_bit_for_bit(weight, written[name], masks.get(name))
    assert before == {path.name: path.read_bytes() for path in pickled.iterdir()}  # mapped files were not written through


def test_base_model_files_under_the_language_model_s_names(tmp_path: Path) -> None:
    """OPTModel saves `decoder.layers...`, OPTForCausalLM calls the same weight `model.decoder.layers...`."""
    from transformers import AutoModelForCausalLM, OPTConfig, OPTModel

    torch.manual_seed(0)
    config = OPTConfig(vocab_size=32, hidden_size=8, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=8)
    OPTModel(config).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    masks = {name: mask_of(p.detach()) for name, p in model.named_parameters() if name.endswith(("fc1.weight", "out_proj.weight"))}
    assert all(name.startswith("model.decoder.layers") for name in masks)
    assert "decoder.layers.0.fc1.weight" in load_file(tmp_path / "base" / "model.safetensors")
    prune(tmp_path / "base", tmp_path / "out", masks)
    pruned = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    for name, mask in masks.items():
        assert not pruned[name][~mask].any()
        assert torch.equal(pruned[name][mask], dict(model.named_parameters())[name][mask])


def test_unsorted_keys_odd_dtypes_and_metadata_survive(tmp_path: Path) -> None:
    """Files of other writers: an order that the library would not write, metadata, types that torch cannot compute with."""
    folder = tiny(tmp_path / "in")
    w = torch.randn(3, 8, dtype=torch.float64)
    tensors = {"z": torch.arange(7, dtype=torch.uint8), "h.0.w": w, "a": torch.randn(2, 2).to(torch.float8_e5m2), "e": torch.zeros(0, 4)}
    codes = {"z": "U8", "h.0.w": "F64", "a": "F8_E5M2", "e": "F32"}
    layout = [(name, codes[name], tensor.shape) for name, tensor in tensors.items()]
    write_safetensors(
        folder / "model.safetensors", layout, (t.view(torch.uint8) if t.numel() else t for t in tensors.values()), {"b": "2", "a": "1"}
    )
    mask = mask_of(w)
    prune(folder, tmp_path / "out", {"h.0.w": mask})
    before, after = (folder / "model.safetensors").read_bytes(), (tmp_path / "out" / "model.safetensors").read_bytes()
    start = read_header(folder / "model.safetensors").entries[1].start
    assert after[:start] == before[:start]
    assert after[start + w.nbytes :] == before[start + w.nbytes :]
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["h.0.w"], torch.where(mask, w, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_negative_zeros_and_nans(tmp_path: Path, dtype: torch.dtype) -> None:
    w = torch.tensor([[-1.0, math.nan, -0.0, -3.0], [math.inf, -2.0, -0.0, math.nan]], dtype=dtype)
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]]).bool()
    prune(tiny(tmp_path / "in", {"w": w}), tmp_path / "out", {"w": mask})
    after = load_file(tmp_path / "out" / "model.safetensors")["w"]
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    assert not after.view(integer)[~mask].any()
    assert torch.equal(after.view(integer)[mask], w.view(integer)[mask])
    assert torch.signbit(after[0, 2])


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_updated_weights_are_cast_and_masked(tmp_path: Path, kind: str) -> None:
    state = {"h.0.w": torch.randn(4, 8).bfloat16(), "h.0.b": torch.randn(4).bfloat16(), "x": torch.randn(3)}
    folder = tiny(tmp_path / "in", state if kind == "safetensors" else None)
    if kind == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    new = torch.randn(4, 8)
    kept = new.clone()
    mask = mask_of(new)
    prune(folder, tmp_path / "out", {"h.0.w": mask}, weights={"h.0.w": new, "h.0.b": torch.ones(4)})
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after["h.0.w"], torch.where(mask, new.bfloat16(), 0.0))
    assert torch.equal(after["h.0.b"], torch.ones(4).bfloat16())
    assert torch.equal(after["x"], state["x"])
    assert torch.equal(new, kept)  # the caller's tensor is not touched


def test_config_and_small_files(tmp_path: Path, masks: dict[str, Tensor]) -> None:
    folder = tmp_path / "in"
    shutil.copytree(ASSET, folder)
    config = {"z": "ü", **json.loads((folder / "config.json").read_text()), "quantization_config": {"quant_method": "x"}, "custom": [1, 2]}
    (folder / "config.json").write_text(json.dumps(config))
    wanted = [
        "generation_config.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "modeling_x.py",
        "LICENSE",
        "LICENSE.md",
        "NOTICE",
    ]
    unwanted = [
        "README.md",
        "README",
        "pytorch_model.bin",
        "model.onnx",
        "tf_model.h5",
        "flax_model.msgpack",
        "optimizer.pt",
        "training_args.bin",
    ]
    unwanted += [
        "x.gguf",
        "consolidated.00.pth",
        "other.safetensors",
        "model.fp16.safetensors.index.json",
        "pytorch_model.bin.index.json",
        "x.npz",
    ]
    unwanted += ["trainer_state.json", "rng_state.pkl", ".gitattributes", "manifest.json", "metrics.jsonl", "original/params.json"]
    (folder / "original").mkdir()
    (folder / "additional_chat_templates").mkdir()
    for name in [*wanted, *unwanted, "additional_chat_templates/tools.jinja"]:
        (folder / name).write_text(f"content of {name}")
    prune(folder, tmp_path / "out", masks)
    ours = {"config.json", "masks.safetensors", "model.safetensors", "model.safetensors.index.json"}
    assert contents(tmp_path / "out") == ours | {*wanted, "additional_chat_templates/tools.jinja"} | {
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert (tmp_path / "out" / "LICENSE").read_text() == "content of LICENSE"
    del config["quantization_config"]
    written = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert list(written.items()) == [*config.items(), ("proxsparse", {"method": "magnitude"})]


def test_links_of_a_download_cache_are_followed(tmp_path: Path, masks: dict[str, Tensor]) -> None:
    repository = tmp_path / "models--org--name"
    shutil.copytree(ASSET, repository / "blobs")
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in ASSET.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    prune(snapshot, tmp_path / "out", masks)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == (ASSET / "model.safetensors").stat().st_size


class TestInterrupted:
    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OutputError),
            (OSError(errno.EROFS, os.strerror(errno.EROFS)), OutputError),
            (KeyboardInterrupt(), KeyboardInterrupt),
            (MemoryError(), MemoryError),
        ],
    )
    def test_in_the_middle_of_a_shard(
        self,
        tmp_path: Path,
        sharded: Path,
        masks: dict[str, Tensor],
        monkeypatch: pytest.MonkeyPatch,
        error: BaseException,
        expected: type[BaseException],
    ) -> None:
        copy: Callable[..., None] = dense_module._copy_range
        calls = []

        def fail_later(*arguments: object) -> None:
            calls.append(arguments)
            if len(calls) == 8:
                raise error
            copy(*arguments)

        monkeypatch.setattr(dense_module, "_copy_range", fail_later)
        before = {path.name: path.read_bytes() for path in sharded.iterdir()}

        def run() -> None:
            with output_folder(tmp_path / "run", keep_on_error=["metrics.jsonl"]) as partial:
                (partial / "metrics.jsonl").write_text("{}\n")
                prune(sharded, partial, masks)

        with pytest.raises(expected) as caught:
            run()
        assert len(calls) == 8
        assert contents(tmp_path) == {"run.partial/metrics.jsonl", f"run.partial/{MARKER}"}
        assert "\n" not in str(caught.value)
        assert before == {path.name: path.read_bytes() for path in sharded.iterdir()}
