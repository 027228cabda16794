"""Loading the built-in model whole, and refusing everything that transformers would load in part."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from proxsparse_triton.errors import BackendError, ConfigError, ModelError, ResourceError
from proxsparse_triton.models.loading import (
    SAMPLE_TEXT,
    ModelSource,
    _check_keys,
    file_hashes,
    load_model,
    load_tokenizer,
    max_seqlen,
    resolve_model,
)
from proxsparse_triton.progress import Progress

ASSET = resolve_model("demo").folder
HELDOUT = Path(__file__).parents[1] / "data" / "heldout.jsonl.gz"


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ASSET, tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(folder: Path, **options: object) -> str:
    source = resolve_model(str(folder))
    with pytest.raises(ModelError) as caught:
        load_model(source, dtype=None, **options)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{folder}: expected ")
    return text


def tokenizer_refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_tokenizer(resolve_model(str(folder)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- models ------------------------------------------------------------------------------------------------------------------


def test_demo_model_is_the_trained_one() -> None:
    source = resolve_model("demo")
    model = load_model(source, dtype=torch.float32)
    assert model.dtype == torch.float32
    assert not model.training
    assert model.config.use_cache is False
    with gzip.open(HELDOUT, "rt", encoding="utf-8") as file:
        text = json.loads(file.readline())["text"]
    ids = load_tokenizer(source)(text, return_tensors="pt")["input_ids"][:, :512]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert loss < 2.5  # 4096 tokens: random weights give 8.3


def test_dtype_none_is_as_stored(copy: Path) -> None:
    stored = load_file(copy / "model.safetensors")
    edit_config(copy, dtype="float32")  # the files decide, not the configuration
    model = load_model(resolve_model(str(copy)), dtype=None)
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(stored)  # the tied head is neither missing nor a parameter of its own
    assert all(parameters[name].dtype == torch.bfloat16 and torch.equal(parameters[name], stored[name]) for name in stored)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_shards_and_pickles_give_the_same_model(copy: Path) -> None:
    stored = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(stored, copy / "pytorch_model.bin")
    pickled = load_model(resolve_model(str(copy)), dtype=None)
    (copy / "pytorch_model.bin").unlink()
    pickled.save_pretrained(copy, max_shard_size="1MB")
    source = resolve_model(str(copy))
    assert len(source.weight_files) > 3
    for model in (pickled, load_model(source, dtype=None)):
        assert all(torch.equal(parameter, stored[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("pickled", [False, True])
def test_changing_the_model_leaves_its_files_alone(copy: Path, pickled: bool) -> None:
    if pickled:
        torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
        (copy / "model.safetensors").unlink()
    source = resolve_model(str(copy))
    before = file_hashes(source)
    model = load_model(source, dtype=None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    del model
    assert file_hashes(source) == before  # weights may be memory-mapped


def test_missing_tensors_are_not_filled_at_random(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    text = refusal(copy)
    assert "got 1 missing (model.layers.2.mlp.up_proj.weight). The weights are incomplete" in text
    edit_tensors(copy, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.1." in name])
    assert "got 10 missing (model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight, model.layers." in refusal(copy)
    assert "and 7 more" in refusal(copy)


def test_unexpected_tensors(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.update({"model.layers.0.mlp.extra.weight": torch.zeros(4)}))
    assert "got 1 unexpected (model.layers.0.mlp.extra.weight)" in refusal(copy)


def test_known_buffers_are_no_tensors(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16)}))
    edit_tensors(copy, lambda tensors: tensors.update({"model.layers.0.attn.masked_bias": torch.zeros(())}))
    load_model(resolve_model(str(copy)), dtype=None)


def test_a_parameter_that_is_called_like_a_buffer_counts() -> None:
    model = torch.nn.ModuleDict({"h": torch.nn.ModuleDict({"attn": torch.nn.Linear(4, 4)})})
    keys = {"missing_keys": {"h.attn.bias"}, "unexpected_keys": set(), "mismatched_keys": set()}
    with pytest.raises(ModelError, match=r"got 1 missing \(h\.attn\.bias\)"):
        _check_keys(resolve_model("demo"), model, keys)


def test_names_without_the_prefix_of_the_base_model(copy: Path) -> None:
    def strip(tensors: dict[str, torch.Tensor]) -> None:  # as the files of facebook/opt-1.3b have them
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    stored = load_file(copy / "model.safetensors")
    edit_tensors(copy, strip)
    model = load_model(resolve_model(str(copy)), dtype=None)
    assert all(torch.equal(parameter, stored[name]) for name, parameter in model.named_parameters())


def test_tensors_of_another_shape(copy: Path) -> None:
    edit_config(copy, intermediate_size=256)
    assert "got 12 of another shape (model.layers.0.mlp.down_proj.weight, " in refusal(copy)


def test_loading_is_silent_and_leaves_no_trace(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit_tensors(copy, lambda tensors: tensors.update({"extra": torch.zeros(4)}))
    logger, bars = logging.getLogger("transformers"), transformers.utils.logging.is_progress_bar_enabled()
    before = logger.level
    refusal(copy)
    load_model(resolve_model("demo"), dtype=None)
    load_tokenizer(resolve_model("demo"))
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert logger.level == before
    assert transformers.utils.logging.is_progress_bar_enabled() == bars
    transformers.AutoModelForCausalLM.from_pretrained(ASSET)
    assert "Loading weights" in capfd.readouterr().err  # the noise would be there


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (transformers.T5Config(), "expected a causal language model, got an encoder-decoder (t5)"),
        (transformers.BartConfig(), "expected a causal language model, got an encoder-decoder (bart)"),
        (transformers.ViTConfig(), "expected a causal language model, got another kind of model (vit)"),
        (transformers.BertConfig(), "expected a causal language model, got an encoder (bert)"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_other_kinds_of_models(copy: Path, config: transformers.PreTrainedConfig, words: str) -> None:
    config.save_pretrained(copy)
    assert words in refusal(copy)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama99"}, "expected a model type that transformers knows, got 'llama99'"),
        ({"model_type": None}, "expected a model type that transformers knows, got None"),
        ({"model_type": ["llama"]}, "expected a model type that transformers knows, got ['llama']"),
        ({"hidden_size": "wide"}, "expected a valid config.json"),
        ({"hidden_act": "no-such-activation"}, "expected a model that transformers can build"),
        ({"num_hidden_layers": 5}, "got 9 missing"),
    ],
    ids=str,
)
def test_configurations_that_make_no_model(copy: Path, changes: dict[str, object], words: str) -> None:
    edit_config(copy, **changes)
    assert words in refusal(copy)


def test_own_code_runs_only_when_trusted(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = tmp_path / "ran"
    (copy / "modeling_own.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(ran)!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit_config(copy, model_type="own", auto_map=auto_map)
    assert "got one with Python code of its own. Read that code, then allow it with --trust-remote-code." in refusal(copy)
    assert not ran.exists()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = load_model(resolve_model(str(copy)), dtype=None, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert ran.exists()


def test_own_code_for_a_known_configuration(copy: Path) -> None:
    transformers.ViTConfig().save_pretrained(copy)
    edit_config(copy, auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    assert "--trust-remote-code" in refusal(copy)


def test_device_and_dtype() -> None:
    source = resolve_model("demo")
    with pytest.raises(ConfigError, match="expected a device such as cpu or cuda, got 'gpu'"):
        load_model(source, dtype=None, device="gpu")
    for dtype in (torch.int8, torch.float8_e4m3fn):
        with pytest.raises(ConfigError, match=f"expected a dtype to compute in, got {dtype}"):
            load_model(source, dtype=dtype)
    with pytest.raises(BackendError, match="expected a CUDA GPU for cuda:99, got"):
        load_model(source, dtype=None, device="cuda:99")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_names_the_setting(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(transformers.LlamaForCausalLM, "to", fail)
    with pytest.raises(ResourceError, match=r"expected room for the model on cpu, got out of memory\. Use --dtype bfloat16"):
        load_model(resolve_model("demo"), dtype=None)


@pytest.mark.gpu
def test_on_the_gpu() -> None:
    model = load_model(resolve_model("demo"), dtype=None, device="cuda")
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (transformers.LlamaConfig(max_position_embeddings=4096), 4096),
        (transformers.OPTConfig(max_position_embeddings=2048), 2048),  # its table has two rows more
        (transformers.GPT2Config(n_positions=1024), 1024),
        (transformers.GPTNeoXConfig(max_position_embeddings=2048), 2048),
        (transformers.MptConfig(max_seq_len=512), 512),
        (transformers.Phi3Config(max_position_embeddings=131072, pad_token_id=0), 131072),
        (transformers.Gemma3Config(text_config={"max_position_embeddings": 777}), 777),
        (transformers.FalconConfig(max_position_embeddings=2048, alibi=False), 2048),
        (transformers.FalconConfig(alibi=True), None),
        (transformers.BloomConfig(), None),
        (transformers.MambaConfig(), None),
        (transformers.LlamaConfig(max_position_embeddings=10**12), None),
        (transformers.LlamaConfig(max_position_embeddings=-1), None),
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_max_seqlen(config: transformers.PreTrainedConfig, limit: int | None) -> None:
    assert max_seqlen(config) == limit


# --- tokenizers --------------------------------------------------------------------------------------------------------------


def test_demo_tokenizer_needs_no_note() -> None:
    notes = Notes()
    tokenizer = load_tokenizer(resolve_model("demo"), progress=notes)
    assert notes.lines == []
    assert tokenizer.decode(tokenizer(SAMPLE_TEXT, add_special_tokens=False)["input_ids"]) == SAMPLE_TEXT


def test_a_replaced_tokenizer_is_noted(copy: Path) -> None:
    edit_config(copy, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    notes = Notes()
    tokenizer = load_tokenizer(resolve_model(str(copy)), progress=notes)
    own = Tokenizer.from_file(str(copy / "tokenizer.json")).encode(SAMPLE_TEXT, add_special_tokens=False).ids
    ids = tokenizer(SAMPLE_TEXT, add_special_tokens=False)["input_ids"]
    assert ids != own  # the reproduction is real
    (line,) = notes.lines
    assert "loads a Qwen2Tokenizer that splits text differently from the folder's tokenizer.json" in line
    assert f"({len(ids)} against {len(own)} tokens of a sample, from token " in line
    assert "\n" not in line


def test_truncation_in_tokenizer_json_is_no_difference(copy: Path) -> None:
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=512)
    tokenizer.save(str(copy / "tokenizer.json"))
    notes = Notes()
    load_tokenizer(resolve_model(str(copy)), progress=notes)
    assert notes.lines == []


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "gemma", "gpt_neox"])
def test_missing_tokenizer(copy: Path, model_type: str) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    edit_config(copy, model_type=model_type)  # for all but llama transformers makes an empty one up
    text = tokenizer_refusal(copy)
    assert text.startswith(f"{copy}: expected a tokenizer, got ")
    assert text.endswith("Copy tokenizer.json and tokenizer_config.json of the model into its folder.")


@pytest.mark.parametrize("content", ["", "{", "{}", "[1]", '{"model": {"type": "BPE"}}'])
def test_broken_tokenizer(copy: Path, content: str) -> None:
    (copy / "tokenizer.json").write_text(content)
    assert "expected a tokenizer" in tokenizer_refusal(copy)


def test_tokenizer_that_cannot_encode(copy: Path) -> None:
    edit_config(copy, model_type="gemma")
    (copy / "tokenizer_config.json").write_text("{}")  # Gemma's own class looks for an <unk> that is not there
    assert "expected a tokenizer for any text, got Exception: Unk token" in tokenizer_refusal(copy)


def test_tokenizer_of_another_model(copy: Path) -> None:
    edit_config(copy, vocab_size=300)
    assert "expected token ids below the model's vocabulary of 300, got " in tokenizer_refusal(copy)


def test_tokenizer_with_code(copy: Path) -> None:
    config = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    edit_config(copy, model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    assert "--trust-remote-code" in tokenizer_refusal(copy)


def test_source_is_a_plain_record() -> None:
    source = resolve_model("demo")
    assert source == ModelSource("demo", source.folder, None, source.weight_files)
