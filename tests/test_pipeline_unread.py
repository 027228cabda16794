"""Layers that no forward pass reads: the text says nothing about them, so they stay dense, with the true reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ASSET
from torch import nn

from proxsparse_triton import pipeline
from proxsparse_triton.errors import ModelError
from proxsparse_triton.formats.masks import load_masks
from proxsparse_triton.models.selection import UNREAD, plan_layers
from proxsparse_triton.pipeline import RunConfig, prune

SKIPPED = "model.layers.1.mlp"


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's second block leaves its MLP out."""
    load = pipeline.load_model

    class Nothing(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            for name, child in mlp.named_children():
                self.add_module(name, child)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    def loaded(*args: Any, **options: Any) -> Any:
        model = load(*args, **options)
        model.set_submodule(SKIPPED, Nothing(model.get_submodule(SKIPPED)))
        return model

    monkeypatch.setattr(pipeline, "load_model", loaded)


@pytest.mark.parametrize("method", ["wanda", "proxsparse"])
def test_they_stay_dense_and_are_told(method: str, idle: None, tmp_path: Path, text: str) -> None:
    more = {"settings": {"steps": 2}} if method == "proxsparse" else {}
    config = RunConfig(
        model=str(ASSET), output=tmp_path / "run", method=method, calibration=text, samples=2, seqlen=16, evaluation_windows=1, **more
    )
    prune(config)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    left = {name for name, reason in manifest["skipped"].items() if reason == UNREAD}
    assert left == {f"{SKIPPED}.{part}_proj" for part in ("gate", "up", "down")}
    assert not {f"{name}.weight" for name in left} & load_masks(tmp_path / "run").keys()


def test_a_plan_without_all_of_its_layers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    plan = plan_layers(LlamaForCausalLM(LlamaConfig(**shape)))
    assert len(plan.without(["model.layers.0.mlp.up_proj"], UNREAD).selected()) == len(plan.selected()) - 1
    with pytest.raises(ModelError, match="expected at least one layer to prune, got none: no forward pass"):
        plan.without(plan.selected(), UNREAD)
