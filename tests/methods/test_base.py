"""The protocol: names from files, settings from options, and that one file is all a method takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from methods.tiny import Notes
from methods.tiny import task as tiny_task
from torch import nn

from proxsparse_triton import methods as package
from proxsparse_triton.errors import ConfigError, ModelError
from proxsparse_triton.methods.base import PruneTask, build_method, method_class, method_names
from proxsparse_triton.methods.magnitude import magnitude_mask
from proxsparse_triton.methods.proxsparse import ProxSparse
from proxsparse_triton.methods.sparsegpt import SparseGPT
from proxsparse_triton.models.selection import LayerChoice, LayerPlan

NEW_METHOD = '''
"""Keeps the last two of every four weights."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from proxsparse_triton.methods.base import PruneResult, PruneTask
from proxsparse_triton.models.selection import LayerPlan


@dataclass(frozen=True)
class LastTwo:
    extra: float = 1.0
    needs_calibration: ClassVar[bool] = False

    def check(self, plan: LayerPlan) -> None:
        pass

    def prune(self, task: PruneTask) -> PruneResult:
        pattern = torch.tensor([False, False, True, True])
        return PruneResult({name: pattern.repeat(*l.weight.shape[:-1], l.in_features // 4) for name, l in task.linears().items()})


METHOD = LastTwo
'''


def test_names_are_the_files_of_the_folder() -> None:
    files = {path.stem for path in Path(package.__file__).parent.glob("*.py")} - {
        "__init__",
        "base",
        "presets",
        "recipes",
        "repair",
        "walk",
    }
    assert method_names() == sorted(files)
    assert set(method_names()) >= {"magnitude", "wanda", "sparsegpt", "proxsparse"}


def test_a_new_method_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "last_two.py").write_text(NEW_METHOD)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    assert "last_two" in method_names()
    method = build_method("last_two", {"extra": 2.0})
    model = nn.Sequential(nn.ModuleList([nn.Linear(8, 3)]))
    result = method.prune(PruneTask(model, LayerPlan((LayerChoice("0.0", (3, 8), True, "", 0),), "0"), ()))
    assert result.masks["0.0.weight"][0].tolist() == [False, False, True, True] * 2


def test_none_means_the_default() -> None:
    assert build_method("sparsegpt", {"dampening": None, "mask_only": True}) == SparseGPT(mask_only=True)
    assert build_method("proxsparse", {}) == ProxSparse()


def test_unknown_method() -> None:
    with pytest.raises(ConfigError, match=r"method: expected one of magnitude, .*, got 'wnada'"):
        build_method("wnada", {})
    for helper in ("base", "presets", "recipes", "repair", "__init__"):  # files of the folder that are no methods
        with pytest.raises(ConfigError):
            method_class(helper)


def test_settings_of_another_method() -> None:
    with pytest.raises(
        ConfigError, match=r"method wanda: expected only its own settings, got --frozen-eps, --lr\. Leave .* --method proxs"
    ):
        build_method("wanda", {"frozen_eps": 1.0, "lr": 1.0, "dampening": None})
    with pytest.raises(ConfigError, match=r"sparsegpt: expected only its own settings, got --lambda1\. "):
        build_method("sparsegpt", {"lambda1": 0.1})


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("proxsparse", {"lambda1": -0.1}, "lambda1 >= 0, got -0.1"),
        ("proxsparse", {"lambda1": float("nan")}, "lambda1 >= 0, got nan"),
        ("proxsparse", {"lambda2": float("inf")}, "lambda2 >= 0, got inf"),
        ("proxsparse", {"lambda2": -1.0}, "lambda2 >= 0, got -1.0"),
        ("proxsparse", {"frozen_eps": 0.0}, "frozen_eps > 0, got 0.0"),
        ("proxsparse", {"lr": 0.0}, "lr > 0, got 0.0"),
        ("proxsparse", {"lr": float("nan")}, "lr > 0, got nan"),
        ("proxsparse", {"batch_size": 0}, "batch_size >= 1, got 0"),
        ("proxsparse", {"epochs": -1}, "epochs >= 1, got -1"),
        ("sparsegpt", {"dampening": 0.0}, "dampening > 0, got 0.0"),
        ("sparsegpt", {"dampening": float("nan")}, "dampening > 0, got nan"),
        ("sparsegpt", {"dampening": float("inf")}, "dampening > 0, got inf"),
        ("sparsegpt", {"column_block": 6}, "column_block divisible by 4, got 6"),
        ("sparsegpt", {"column_block": 0}, "column_block divisible by 4, got 0"),
    ],
)
def test_values_that_make_no_sense(name: str, settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_method(name, settings)


def test_layers_outside_the_blocks_are_refused_by_block_wise_methods() -> None:
    """They would be left dense without a word: the walk never comes to them."""
    choices = (LayerChoice("0.0", (3, 8), True, "", 0), LayerChoice("head", (3, 8), True, "", None))
    task = PruneTask(nn.Sequential(nn.ModuleList([nn.Linear(8, 3)])), LayerPlan(choices, "0"), (torch.zeros(4, dtype=torch.int64),))
    for name in ("wanda", "sparsegpt"):
        with pytest.raises(ConfigError, match=f"{name}: expected layers inside the decoder blocks 0, got head"):
            build_method(name, {}).prune(task)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_layer_that_no_token_reached_is_pruned_by_magnitude(method: str, device: str) -> None:
    """As an expert that was never chosen: zeros or the first two of each block would be no better than chance."""
    notes = Notes()
    given = tiny_task(device, progress=notes)
    given.model.model.layers[1].post_attention_layernorm.weight.data.zero_()  # type: ignore[union-attr, index]
    unseen = [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    before = {name: given.model.get_parameter(name).detach().clone() for name in unseen}
    result = build_method(method, {}).prune(given)
    assert [line.split(": ")[0] for line in notes.lines if line.endswith("It is pruned by magnitude.")] == unseen
    for name in unseen:
        assert torch.equal(result.masks[name], magnitude_mask(before[name]))
        if result.weights is not None:
            assert torch.equal(result.weights[name], (before[name].cpu() * result.masks[name]).to(before[name].dtype))


ONLY_MAGNITUDE = "It is pruned by magnitude."


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_why_a_layer_is_pruned_by_magnitude(method: str) -> None:
    """Read without a call, reached by no token, or given zeros: three reasons."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=48, hidden_size=64, num_hidden_layers=2, state_size=8)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.backbone.layers[1].mixer.expert = nn.Linear(8, 8)
    model.backbone.layers[0].norm.weight.data.zero_()
    notes = Notes()
    given = tiny_task("cpu", model=model, progress=notes)
    before = {name: linear.weight.detach().clone() for name, linear in given.linears().items()}
    result = build_method(method, {}).prune(given)
    reads = "the model reads its weight without calling the layer, so that its inputs are not known"
    zero = "every input that reached it in the calibration text was zero"
    none = "no token of the calibration text reached it in its decoder block"
    mixers = [f"backbone.layers.{index}.mixer" for index in range(2)]
    assert notes.lines[:2] == [
        f"{mixers[0]}.in_proj.weight: {zero}. {ONLY_MAGNITUDE}",
        f"{mixers[0]}.x_proj.weight: {zero}. {ONLY_MAGNITUDE}",
    ]
    said = [f"{mixer}.dt_proj.weight: {reads}. {ONLY_MAGNITUDE}" for mixer in mixers]
    assert set(said) <= set(notes.lines)
    assert f"{mixers[1]}.expert.weight: {none}. {ONLY_MAGNITUDE}" in notes.lines
    for mixer in mixers:
        name = f"{mixer}.dt_proj.weight"
        assert torch.equal(result.masks[name], magnitude_mask(before[name]))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_inputs_that_are_no_numbers_are_refused(method: str, device: str) -> None:
    """Not blamed on the number of windows, and not pruned as if nothing were."""
    given = tiny_task(device)
    given.model.model.layers[1].input_layernorm.weight.data[3] = float("inf")  # type: ignore[union-attr, index]
    with pytest.raises(
        ModelError, match=rf"{method}: expected finite inputs of model\.layers\.1\.self_attn\.q_proj\.weight, got NaN or inf"
    ):
        build_method(method, {}).prune(given)


def test_blocks_that_run_again_are_told(device: str) -> None:
    """A model whose blocks see more than the block before hands on takes longer: said, with how much."""

    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layers = nn.Embedding(48, 8), nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(3)])

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            hidden = self.embed(input_ids)
            for layer in (*self.layers, *self.layers):
                hidden = hidden + layer(hidden)
            return hidden

    notes = Notes()
    build_method("wanda", {}).prune(tiny_task(device, model=Looped().to(device), progress=notes))
    assert notes.lines[0].startswith("wanda: blocks of Looped are given more than what the block before hands on, ")
