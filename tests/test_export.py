"""`export_run` writes, `load_packed` loads: the same model, or one line that says why not."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packing import ASSET, edit_json, magnitude_run, rehash, tensors_of
from safetensors.torch import load_file, save_file
from torch import nn

import proxsparse_triton
from proxsparse_triton import export
from proxsparse_triton.errors import ConfigError, ModelError, OutputError
from proxsparse_triton.export import ExportRecord, export_run, load_packed
from proxsparse_triton.formats.masks import apply_masks, load_masks
from proxsparse_triton.formats.verify import verify_folder
from proxsparse_triton.inference.linear import SparseLinear
from proxsparse_triton.models.loading import load_model, resolve_model

LAYER = "model.layers.0.mlp.up_proj"
SHARD = "packed-00001-of-00001.safetensors"
INDEX = "packed.safetensors.index.json"
TOKENS = torch.arange(5, 29)[None]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return magnitude_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def packed(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(run, tmp_path_factory.mktemp("packed") / "packed").folder


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """A packed folder to damage."""
    return Path(shutil.copytree(packed, tmp_path / "packed"))


def exported(run: Path | str, output: Path, format: str = "packed", **options: Any) -> ExportRecord:
    return export_run(str(run), output, format=format, **options)


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS.to(next(model.parameters()).device)).logits
    return logits.cpu()


def saved(folder: Path, config: Any) -> Path:
    """A small random model with all its biases and norms at random too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder


def assert_loads_as(packed: Path, dense: Path, dtype: torch.dtype | None = None) -> Any:
    """The packed model is the dense one with zeros: weights bit for bit, logits (of products that share a launch: their sums may be in
    another order), buffers, ties."""
    model = load_packed(packed, dtype=dtype, device="cpu")
    expected = load_model(resolve_model(str(dense)), dtype=dtype)
    for name, module in load_packed(packed, dtype=dtype, device="cpu", fuse=False).named_modules():
        if isinstance(module, SparseLinear):
            assert torch.equal(module.weight, expected.get_submodule(name).weight)
    torch.testing.assert_close(logits_of(model), logits_of(expected))
    assert type(model) is type(expected)
    assert not model.training
    assert model.dtype == expected.dtype
    buffers = dict(model.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in expected.named_buffers())
    tied = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (model, expected)]
    assert tied[0] == tied[1]
    return model


class TestDense:
    def test_the_model_alone(self, run: Path, tmp_path: Path) -> None:
        record = exported(run, tmp_path / "dense", "dense")
        assert {path.name for path in record.folder.iterdir()} == {
            *("config.json", "manifest.json", "model.safetensors", "model.safetensors.index.json"),
            *("tokenizer.json", "tokenizer_config.json", "training.json"),
        }
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            assert (record.folder / name).read_bytes() == (run / name).read_bytes()
        assert verify_folder(record.folder, original=ASSET).ok

    def test_it_loads_anywhere(self, run: Path, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        model, info = AutoModelForCausalLM.from_pretrained(exported(run, tmp_path / "dense", "dense").folder, output_loading_info=True)
        assert not any(info.values())
        assert torch.equal(logits_of(model), logits_of(AutoModelForCausalLM.from_pretrained(run)))


class TestMasks:
    def test_for_the_original(self, run: Path, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        record = exported(run, tmp_path / "masks", "masks")
        assert {path.name for path in record.folder.iterdir()} == {"masks.safetensors", "manifest.json"}
        assert (record.folder / "masks.safetensors").read_bytes() == (run / "masks.safetensors").read_bytes()
        model = AutoModelForCausalLM.from_pretrained(ASSET)
        apply_masks(model, load_masks(record.folder))
        assert torch.equal(logits_of(model), logits_of(AutoModelForCausalLM.from_pretrained(run)))

    def test_of_a_folder_without_any(self, run: Path, tmp_path: Path) -> None:
        dense = exported(run, tmp_path / "dense", "dense").folder
        (dense / "manifest.json").unlink()
        found, masks = load_masks(exported(dense, tmp_path / "masks", "masks").folder), load_masks(run)
        assert set(found) == set(masks)
        assert all(torch.equal(found[name], mask) for name, mask in masks.items())


class TestPacked:
    def test_the_same_model(self, run: Path, packed: Path) -> None:
        model = assert_loads_as(packed, run)
        assert model.config.use_cache
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        kinds = Counter(type(module).__name__ for module in model.modules())
        assert (kinds["SparseLinear"], kinds["SparseGroup"], kinds["GroupMember"]) == (8, 8, 20)  # of 7 x 4 layers, 5 in groups
        apart = Counter(type(module).__name__ for module in load_packed(packed, fuse=False).modules())
        assert (apart["SparseLinear"], apart["SparseGroup"]) == (28, 0)
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        assert model.config.name_or_path == str(packed)
        assert proxsparse_triton.load_packed is load_packed

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_in_another_dtype(self, run: Path, packed: Path, dtype: torch.dtype) -> None:
        assert_loads_as(packed, run, dtype)

    @pytest.mark.gpu
    def test_on_the_gpu(self, run: Path, packed: Path) -> None:
        model = load_packed(packed)
        assert model.device.type == "cuda"
        assert not any(tensor.device.type == "cpu" for tensor in (*model.parameters(), *model.buffers()))
        expected = load_model(resolve_model(str(run)), dtype=None, device="cuda")
        torch.testing.assert_close(logits_of(model), logits_of(expected), rtol=0.02, atol=0.1)

    def test_it_generates(self, run: Path, packed: Path) -> None:
        from transformers import AutoModelForCausalLM

        packed_model, dense = load_packed(packed, device="cpu"), AutoModelForCausalLM.from_pretrained(run)
        settings = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(packed_model.generate(TOKENS, **settings), dense.generate(TOKENS, **settings))

    def test_generation_settings(self, copy: Path) -> None:
        (copy / "generation_config.json").write_text(json.dumps({"max_length": 77, "temperature": 0.3, "do_sample": True}))
        config = load_packed(copy, device="cpu").generation_config
        assert (config.max_length, config.temperature) == (77, 0.3)

    def test_what_is_recorded(self, run: Path, packed: Path, tmp_path: Path) -> None:
        manifest = json.loads((packed / "manifest.json").read_text())
        assert manifest["model"] == {"spec": str(ASSET)}
        assert manifest["export"]["source"] == str(run)
        assert set(manifest["export"]["files"]) == {"config.json", "model.safetensors"}
        assert manifest["parameters"] == list(load_masks(run))
        record = exported(run, tmp_path / "packed")
        assert (record.format, len(record.layers)) == ("packed", 28)
        assert record.bytes == (packed / SHARD).stat().st_size
        assert record.source_bytes == (run / "model.safetensors").stat().st_size

    def test_shards(self, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(ASSET).save_pretrained(tmp_path / "model", max_shard_size="1800KB")
        run = magnitude_run(tmp_path / "run", tmp_path / "model")
        assert len(list(exported(run, tmp_path / "packed").folder.glob("packed-*"))) == 3
        assert_loads_as(tmp_path / "packed", run)

    def test_biases_and_an_untied_head(self, tmp_path: Path) -> None:
        from transformers import Qwen2Config

        sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = Qwen2Config(**sizes, num_key_value_heads=1, tie_word_embeddings=False)
        run = magnitude_run(tmp_path / "run", saved(tmp_path / "model", config))
        model = assert_loads_as(exported(run, tmp_path / "packed").folder, run)
        assert model.get_submodule("model.layers.0.self_attn.q_proj").bias is not None
        assert model.get_submodule("model.layers.0.self_attn.o_proj").bias is None

    def test_files_of_a_base_model(self, tmp_path: Path) -> None:
        """OPTModel saves `decoder.layers...`, OPTForCausalLM calls the same weight `model.decoder.layers...`."""
        from transformers import OPTConfig, OPTModel

        torch.manual_seed(0)
        config = OPTConfig(vocab_size=64, hidden_size=8, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=8)
        OPTModel(config).save_pretrained(tmp_path / "model")
        run = magnitude_run(tmp_path / "run", tmp_path / "model", pattern=(".fc1.", "_proj."))
        assert_loads_as(exported(run, tmp_path / "packed").folder, run)

    def test_experts_that_transformers_fuses_while_loading(self, tmp_path: Path) -> None:
        from transformers import MixtralConfig

        sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=2)
        model = saved(tmp_path / "model", config)
        assert any(".experts.1." in name for name in tensors_of(model))
        run = magnitude_run(tmp_path / "run", model, pattern=(".self_attn.",))
        assert_loads_as(exported(run, tmp_path / "packed").folder, run)


class TestAnyFolderThatIs24:
    @pytest.fixture
    def dense(self, run: Path, tmp_path: Path) -> Path:
        """2:4 weights, and no word about them."""
        folder = exported(run, tmp_path / "dense", "dense").folder
        (folder / "manifest.json").unlink()
        shutil.copy(ASSET / "config.json", folder)
        return folder

    def test_layers_are_those_that_prune_would_choose(self, run: Path, dense: Path, tmp_path: Path) -> None:
        record = exported(dense, tmp_path / "packed")
        assert len(record.layers) == 28
        assert_loads_as(record.folder, run)
        assert json.loads((record.folder / "config.json").read_text())["proxsparse"]["pattern"] == "2:4"

    @pytest.mark.parametrize("format", ["dense", "masks", "packed"])
    def test_a_third_weight_in_a_block(self, dense: Path, tmp_path: Path, format: str) -> None:
        state = load_file(dense / "model.safetensors")
        state[f"{LAYER}.weight"][7, 8:11] = 1.0
        state[f"{LAYER}.weight"][7, 11] = 0.0
        save_file(state, dense / "model.safetensors")
        with pytest.raises(ModelError, match=rf"got 3 in block \(7, 2\) of {LAYER}.weight .* leave it dense with --skip"):
            exported(dense, tmp_path / "out", format)
        assert not list(tmp_path.glob("out*"))
        assert len(exported(dense, tmp_path / "out", format, skip=[r"layers\.0\.mlp\.up_proj"]).layers) == 27

    def test_the_dense_original(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"expected at most 2 non-zeros of every 4 weights, got 4 in block \(0, 0\) of model.layers.0"):
            exported("demo", tmp_path / "out")


class TestExportRefuses:
    def test_settings(self, run: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="--format dense, masks, packed, got 'gguf'"):
            exported(run, tmp_path / "out", "gguf")
        for options in ({"include": ["mlp"]}, {"skip": ["mlp"]}):
            with pytest.raises(ConfigError, match=r"no --include or --skip, as .* records its pruned layers"):
                exported(run, tmp_path / "out", **options)
        assert not list(tmp_path.iterdir())

    def test_what_is_no_dense_model(self, packed: Path, tmp_path: Path) -> None:
        for path in (tmp_path, tmp_path / "absent", packed):
            with pytest.raises(ModelError, match=r"expected"):
                exported(path, tmp_path / "out")

    def test_an_output_that_holds_the_run(self, run: Path, tmp_path: Path) -> None:
        outer = magnitude_run(tmp_path / "outer")
        inner = Path(shutil.copytree(run, outer / "inner"))
        for source, output in ((inner, inner), (inner, outer)):
            with pytest.raises(OutputError, match="output folder of its own"):
                exported(source, output, overwrite=True)
        assert exported(inner, inner / "packed").folder.is_dir()

    @pytest.mark.parametrize("format", ["dense", "masks", "packed"])
    def test_a_full_disk_before_work_starts(self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
        asked: list[int] = []
        monkeypatch.setattr(export, "check_space", lambda path, needed: asked.append(needed))
        written = exported(run, tmp_path / "out", format).bytes
        assert asked == [pytest.approx(written, abs=8192)]  # the headers, which count in a model this small

    def test_overwrite_replaces_exports_and_nothing_else(self, run: Path, tmp_path: Path) -> None:
        exported(run, tmp_path / "out", "masks")
        with pytest.raises(OutputError, match="an earlier run"):
            exported(run, tmp_path / "out")
        exported(run, tmp_path / "out", overwrite=True)
        assert (tmp_path / "out" / SHARD).is_file()
        assert not (tmp_path / "out" / "masks.safetensors").exists()
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").write_text("x")
        with pytest.raises(OutputError, match="which are kept"):
            exported(run, tmp_path / "mine", overwrite=True)


def edit_shard(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / SHARD)
    change(state)
    save_file(state, folder / SHARD)
    edit_json(folder / INDEX, weight_map=dict.fromkeys(state, SHARD))
    rehash(folder)


class TestLoadRefuses:
    @pytest.mark.parametrize("load", ["AutoModelForCausalLM", "AutoModel"])
    def test_transformers_does(self, packed: Path, load: str) -> None:
        """It would fill what it does not find at random, with a warning at best."""
        import transformers

        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            getattr(transformers, load).from_pretrained(packed)

    def test_our_own_dense_loader_does(self, packed: Path) -> None:
        with pytest.raises(ModelError, match=r"got a packed folder .* Load it with proxsparse_triton.load_packed"):
            resolve_model(str(packed))

    def test_a_dense_folder(self, run: Path) -> None:
        with pytest.raises(ModelError, match=r"Load it with AutoModelForCausalLM\.from_pretrained"):
            load_packed(run)

    def test_changed_files_before_a_model_is_built(self, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(export, "skeleton", lambda *arguments, **options: pytest.fail("built"))
        content = bytearray((copy / SHARD).read_bytes())
        content[-1] ^= 1
        (copy / SHARD).write_bytes(bytes(content))
        with pytest.raises(ModelError, match=rf"{SHARD}: expected SHA-256"):
            load_packed(copy)
        (copy / SHARD).unlink()
        with pytest.raises(ModelError, match=f"got 1 missing: {SHARD}"):
            load_packed(copy, verify_hashes=False)

    def test_hashes_are_checked_unless_told_otherwise(self, packed: Path, copy: Path) -> None:
        edit_json(copy / "tokenizer_config.json", added=1)
        with pytest.raises(ModelError, match=r"tokenizer_config\.json"):
            load_packed(copy)
        assert torch.equal(logits_of(load_packed(copy, verify_hashes=False, device="cpu")), logits_of(load_packed(packed, device="cpu")))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"intermediate_size": 1024}, r"model.layers.0.mlp.\w+ of shape \(\d+, \d+\), which config.json describes, got \(\d+, \d+\)"),
            (
                {"num_hidden_layers": 3},
                "the packed layers among the linear layers of the model that config.json describes, got others \\(model.layers.3",
            ),
            ({"num_hidden_layers": 5}, r"exactly the tensors of the model that config.json describes, got 9 missing"),
            ({"vocab_size": 100}, r"exactly the tensors of the model .* got 1 of another shape \(model.embed_tokens.weight\)"),
            ({"model_type": "gpt2"}, "the packed layers among the linear layers of the model"),
            ({"model_type": "bert"}, "expected a causal language model, got an encoder"),
            ({"model_type": "nonsense"}, "a model type that transformers knows, got 'nonsense'"),
            ({"hidden_act": "nonsense"}, "expected a model that transformers can build, got KeyError"),
        ],
    )
    def test_a_config_of_another_model(self, copy: Path, changes: dict[str, object], message: str) -> None:
        edit_json(copy / "config.json", **changes)
        rehash(copy)
        with pytest.raises(ModelError, match=message) as caught:
            load_packed(copy)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda state: state.pop("model.norm.weight"), r"got 1 missing \(model.norm.weight\)"),
            (lambda state: state.update(x=torch.ones(1)), r"got 1 unexpected \(x\)"),
            (lambda state: state.update({f"{LAYER}.weight": torch.ones(512, 192)}), rf"got 1 unexpected \({LAYER}.weight\)"),
            (lambda state: state.update({"model.norm.weight": torch.ones(8)}), r"got 1 of another shape \(model.norm.weight\)"),
        ],
    )
    def test_tensors_of_another_model(self, copy: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str) -> None:
        edit_shard(copy, change)
        with pytest.raises(ModelError, match=message):
            load_packed(copy)

    def test_settings(self, packed: Path) -> None:
        with pytest.raises(ConfigError, match=r"expected a dtype to compute in, got torch.int8"):
            load_packed(packed, dtype=torch.int8)
        with pytest.raises(ConfigError, match=r"expected a device such as cpu or cuda, got 'tpu\?'"):
            load_packed(packed, device="tpu?")

    def test_saving_what_nobody_could_load(self, packed: Path, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="expected a dense model, got one with packed layers"):
            load_packed(packed, device="cpu").save_pretrained(tmp_path / "saved")
        assert not list(tmp_path.iterdir())
