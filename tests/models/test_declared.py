"""What config.json declares is held to the weight files before anything is allocated, and files that have no end are refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packing import ASSET, edit_json

from proxsparse_triton.errors import ModelError
from proxsparse_triton.models.declared import skeleton
from proxsparse_triton.models.loading import load_config, load_model, load_tokenizer, resolve_model
from proxsparse_triton.models.source import ModelSource
from proxsparse_triton.pipeline import RunConfig
from proxsparse_triton.planning import plan_run

pytestmark = pytest.mark.usefixtures("one_thread")

MOST_GROWN = 300 << 20  # bytes
MOST_SECONDS = 20


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ASSET, tmp_path / "model"))


def limited(work: Callable[[], object]) -> None:
    """Run `work` in a fork, which may take little time and memory."""
    process = os.fork()
    if process == 0:
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        code = 1
        try:
            work()
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
            code = 0 if grown < MOST_GROWN and time.monotonic() - start < MOST_SECONDS else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


HUGE = [
    ({"intermediate_size": 2_000_000}, r"mlp.gate_proj.weight \(2000000, 192\) for \(512, 192\)"),
    ({"vocab_size": 10**6}, r"embed_tokens.weight \(1000000, 192\)"),
    ({"vocab_size": 10**12}, "embed_tokens.weight"),
    ({"num_hidden_layers": 10**7}, "at most 100,000 for num_hidden_layers"),
    ({"num_hidden_layers": 60_000}, "got 60,000 layers and"),
    ({"num_hidden_layers": 10**400}, "more than 15 digits"),
    ({"num_labels": 10**9}, "at most 100,000 for num_labels"),
    ({"num_attention_heads": 10**9}, "at most 100,000 for num_attention_heads"),
    ({"head_dim": 90_000}, "sizes that config.json describes|self_attn.q_proj"),
]


@pytest.mark.parametrize(("changes", "message"), HUGE, ids=lambda value: str(value)[:40])
def test_sizes_that_the_files_do_not_have(copy: Path, changes: dict[str, Any], message: str) -> None:
    """One line, in seconds, in little memory: by the loader and by the plan."""
    edit_json(copy / "config.json", **changes)

    def work() -> None:
        with pytest.raises(ModelError, match=message):
            load_model(resolve_model(str(copy)), dtype=None)
        with pytest.raises(ModelError, match=message):
            plan_run(RunConfig(str(copy), copy.parent / "out", seqlen=16, settings={}))

    limited(work)


@pytest.mark.parametrize("name", ["block_size", "block_length", "head_dim_len", "multistage_offset", "stage_token_id", "blockade"])
def test_numbers_that_count_nothing(copy: Path, name: str) -> None:
    """A context length, a width or a token that only sounds like a number of layers."""
    edit_json(copy / "config.json", **{name: 131072})
    load_config(resolve_model(str(copy)))


@pytest.mark.parametrize("name", ["n_routed_experts", "first_k_dense_replace", "numLayers", "depths", "block_sizes"])
def test_numbers_that_count(copy: Path, name: str) -> None:
    edit_json(copy / "config.json", **{name: 131072})
    with pytest.raises(ModelError, match=rf"at most 100,000 for {name} in config\.json, got 131,072\. Correct {name} in config\.json\.$"):
        load_config(resolve_model(str(copy)))


def test_parts_that_no_tensor_is_for(copy: Path) -> None:
    """Where the number goes by a name that nobody knows, building stops."""
    source = resolve_model(str(copy))
    config = load_config(source)
    config.num_hidden_layers = 50_000
    with pytest.raises(ModelError, match="as many parts as the weight files have tensors for"):
        skeleton(source, config)
    assert next(torch.nn.Linear(2, 2).parameters()).device.type == "cpu"
    torch.nn.Sequential(*[torch.nn.Identity() for _ in range(30_000)])  # nothing is counted any more


def test_tables_that_no_weights_are_for(tmp_path: Path) -> None:
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(vocab_size=32, hidden_size=8, num_layers=1, attention_types=[[["global"], 1]], num_heads=2)
    config.max_position_embeddings = 32
    GPTNeoForCausalLM(config).save_pretrained(tmp_path)
    source = resolve_model(str(tmp_path))
    assert load_model(source, dtype=None).num_parameters() > 0
    large = load_config(source)
    large.max_position_embeddings = 10**5  # a causal mask of 10 GB
    with pytest.raises(ModelError, match=r"tables that suit the weights, got transformer\.h\.0\.attn\.attention\.bias|for \(32, 8\)"):
        skeleton(source, large)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "device", "endless"])
def test_what_is_no_file_is_not_waited_for(copy: Path, name: str, kind: str) -> None:
    path = copy / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)

    def work() -> None:
        with pytest.raises(ModelError):
            load_tokenizer(resolve_model(str(copy)))

    limited(work)


@pytest.mark.parametrize("value", [["model.safetensors"], {"a": 1}, 3, None, "../model.safetensors", "a\0b", ""], ids=str)
def test_a_shard_index_with_other_values(copy: Path, value: Any) -> None:
    (copy / "model.safetensors").rename(copy / "weights.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": value}}))
    with pytest.raises(ModelError, match=r"plain file names in weight_map|missing"):
        resolve_model(str(copy))


def test_a_source_without_weights_is_compared_with_nothing(copy: Path) -> None:
    """As `--plan` has it of the Hub, where only config.json travels."""
    source = ModelSource("model", copy, None, ())
    assert skeleton(source, load_config(source)).num_parameters() > 10**6
