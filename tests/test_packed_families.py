"""Packed folders of families whose code does more with a layer than call it: each loads again, with the logits of the dense run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packing import magnitude_run
from torch import nn

from proxsparse_triton import export
from proxsparse_triton.errors import ModelError
from proxsparse_triton.export import export_run, load_packed
from proxsparse_triton.inference.linear import SparseLinear
from proxsparse_triton.inference.slots import Slot, with_slots
from proxsparse_triton.models.loading import load_model, resolve_model
from proxsparse_triton.models.selection import plan_layers

pytestmark = pytest.mark.usefixtures("one_thread")

USUAL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
STATES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    # `_init_weights` of a block goes through the weights of its layers
    "gpt_bigcode": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mamba2": {**STATES, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "recurrent_gemma": {**USUAL, "attention_window_size": 16, "num_hidden_layers": 3},
    "modernbert-decoder": USUAL,
    "nanochat": USUAL,
    # so does the forward pass
    "mamba": {**STATES, "state_size": 8, "time_step_rank": 8},
    "falcon_mamba": {**STATES, "state_size": 8, "time_step_rank": 8},
    # several modules share their weights
    "zamba": {
        **USUAL,
        **MAMBA,
        "num_hidden_layers": 6,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "mamba_dt_rank": 8,
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
    },
    "zamba2": {
        **STATES,
        **MAMBA,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "n_mamba_heads": 4,
        "num_mem_blocks": 2,
        "chunk_size": 16,
        "adapter_rank": 8,
        "layers_block_type": ["mamba", "hybrid"] * 3,
    },
    # a class of its own whose forward only repeats nn.Linear's
    "falcon": {**STATES, "num_attention_heads": 4, "bias": True},
}


def pruned_run(kind: str, folder: Path) -> Path:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SPECIAL, **FAMILIES[kind]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder / "model")
    names = tuple(f"{name}.weight" for name in plan_layers(model).selected())
    return magnitude_run(folder / "run", folder / "model", pattern=names)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(5, 37)[None], use_cache=False).logits
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_it_loads_again(kind: str, tmp_path: Path) -> None:
    run = pruned_run(kind, tmp_path)
    record = export_run(str(run), tmp_path / "packed", format="packed")
    packed, dense = load_packed(record.folder, device="cpu", dtype=torch.float32), load_model(resolve_model(str(run)), dtype=torch.float32)
    torch.testing.assert_close(logits(packed), logits(dense), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, Slot) for module in packed.modules())
    assert not any(parameter.is_meta for parameter in packed.parameters())


def test_shared_weights_are_packed_once(tmp_path: Path) -> None:
    run = pruned_run("zamba", tmp_path)
    export_run(str(run), tmp_path / "packed", format="packed")
    model = load_packed(tmp_path / "packed", device="cpu")
    layers = {id(module) for module in model.modules() if isinstance(module, SparseLinear)}
    assert len(layers) == len(export.read_packed(tmp_path / "packed").layers)


def test_slots_are_not_initialised(tmp_path: Path) -> None:
    """A block that scales its layer's weight in place finds one that holds nothing."""
    run = pruned_run("mamba", tmp_path)
    config = resolve_model(str(run))
    from transformers import MambaConfig, MambaForCausalLM

    kind = with_slots(MambaForCausalLM, [["backbone.layers.0.mixer.out_proj"]])
    model = kind(MambaConfig.from_pretrained(config.folder, rescale_prenorm_residual=True))
    slot = model.get_submodule("backbone.layers.0.mixer.out_proj")
    assert isinstance(slot, Slot)
    assert slot.weight.is_meta
    assert "backbone.layers.0.mixer.out_proj.weight" not in model.state_dict()
    model.initialize_weights()


def test_what_does_not_load_again_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = pruned_run("nanochat", tmp_path)

    def broken(*arguments: Any, **options: Any) -> Any:
        raise AttributeError("'Slot' object has no attribute 'weight'")

    monkeypatch.setattr(export, "_without_packed", broken)
    pytest.importorskip("accelerate")
    with pytest.raises(ModelError, match="has no attribute 'weight'"):
        export_run(str(run), tmp_path / "packed", format="packed")
    assert not (tmp_path / "packed").exists()


def test_a_layer_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = pruned_run("nanochat", tmp_path)
    monkeypatch.setattr(export, "computes_linear", lambda module: False)
    with pytest.raises(ModelError, match=r"compute as nn\.Linear does, got .*--format dense"):
        export_run(str(run), tmp_path / "packed", format="packed")
