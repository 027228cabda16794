"""Every layer-by-layer method sees what forward passes of the whole model show, in families whose blocks get more than hidden states."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable

import pytest
import torch
import whole_passes
from torch import Tensor, nn

from proxsparse_triton import mask_24
from proxsparse_triton.methods.base import PruneTask, build_method
from proxsparse_triton.methods.repair import Repair
from proxsparse_triton.models.selection import LayerPlan, decoder_blocks, plan_layers

LENGTHS = (12, 9, 12, 12, 5)  # of equal length too: what one window is given must not reach another


def by_whole_passes(model: nn.Module, plan: LayerPlan, texts: tuple[Tensor, ...], prune: Callable[[str, Tensor], None]) -> None:
    """`prune` gets (parameter name, inputs) of one block after the other and changes the model in between."""
    for index in range(len(decoder_blocks(model)[1])):
        for name, x in whole_passes.inputs_of_block(model, plan, index, texts).items():
            prune(name, x)


@pytest.mark.parametrize("family", whole_passes.FAMILIES)
def test_wanda(family: str, device: str) -> None:
    model, texts = whole_passes.build(family, device), whole_passes.windows(*LENGTHS)
    plan = plan_layers(model)
    result = build_method("wanda", {}).prune(PruneTask(copy.deepcopy(model), plan, texts))
    found = []

    def prune(name: str, x: Tensor) -> None:
        w, mask = model.get_parameter(name), result.masks[name].to(device)
        if len(x):
            scores = w.detach().double().abs() * x.square().sum(0).sqrt()
            kept = (scores * mask).unflatten(-1, (-1, 4)).sum(-1)  # at a tie either choice is right
            best = scores.unflatten(-1, (-1, 4)).topk(2).values.sum(-1)
            torch.testing.assert_close(kept, best, rtol=1e-5, atol=0, msg=lambda text: f"{name}: {text}")
            found.append(name)
        w.data.masked_fill_(~mask, 0.0)

    by_whole_passes(model, plan, texts, prune)
    assert len(found) >= 0.75 * len(plan.selected())


@pytest.mark.parametrize("method", ["sparsegpt", "repair"])
@pytest.mark.parametrize("family", ["llama", "gemma3n, shared keys", "zamba2", "glm_moe_dsa"])
def test_hessians(method: str, family: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SparseGPT and least squares stand on the same walk; their updates go into what later blocks are given."""
    model, texts = whole_passes.build(family, device), whole_passes.windows(*LENGTHS)
    plan = plan_layers(model)
    task = PruneTask(copy.deepcopy(model), plan, texts)
    seen: list[Tensor] = []
    module = importlib.import_module(f"proxsparse_triton.methods.{method}")
    solve = "sparsegpt_24" if method == "sparsegpt" else "masked_least_squares"
    real, at = getattr(module, solve), 1 if method == "sparsegpt" else 3

    def spied(*args: Tensor, **options: float) -> object:
        seen.append(args[at])
        return real(*args, **options)

    monkeypatch.setattr(module, solve, spied)
    if method == "sparsegpt":
        weights = build_method("sparsegpt", {}).prune(task).weights
    else:
        masks = build_method("magnitude", {}).prune(task)
        for name, mask in masks.masks.items():
            model.get_parameter(name).data.masked_fill_(~mask.to(device), 0.0)
        weights = Repair("least-squares").run(task, masks).weights
    assert weights is not None
    assert len(seen) >= 0.75 * len(plan.selected())

    def prune(name: str, x: Tensor) -> None:
        if len(x):
            expected = 2 / len(x) * x.T @ x
            torch.testing.assert_close(seen.pop(0).double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        model.get_parameter(name).data.copy_(weights[name])

    by_whole_passes(model, plan, texts, prune)
    assert not seen


def test_masks_are_those_of_whole_windows(device: str) -> None:
    """Guards the tests above: they tell masks of other inputs, here those of the first window alone."""
    model, texts = whole_passes.build("gemma4", device), whole_passes.windows(*LENGTHS)
    plan = plan_layers(model)
    one, all_ = (build_method("wanda", {}).prune(PruneTask(copy.deepcopy(model), plan, given)).masks for given in (texts[:1], texts))
    assert sum(not torch.equal(mask, all_[name]) for name, mask in one.items()) > len(one) // 2
    x = whole_passes.inputs_of_block(model, plan, 0, texts)
    name = next(iter(x))
    assert torch.equal(all_[name].to(device), mask_24(model.get_parameter(name).abs() * x[name].norm(dim=0).float()))


def test_a_weight_that_two_blocks_share(device: str) -> None:
    """It is pruned in the first, on its inputs there; later blocks compute with what is left."""
    model, texts = whole_passes.build("llama", device), whole_passes.windows(*LENGTHS)
    first, second = model.model.layers[:2]
    second.mlp.up_proj.weight = second.mlp.gate_proj.weight = first.mlp.gate_proj.weight = first.mlp.up_proj.weight
    plan = plan_layers(model)
    result = build_method("wanda", {}).prune(PruneTask(copy.deepcopy(model), plan, texts))
    shared = "model.layers.0.mlp.gate_proj.weight"
    assert shared in result.masks
    assert not {"model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.gate_proj.weight"} & result.masks.keys()

    def prune(name: str, x: Tensor) -> None:
        w, mask = model.get_parameter(name), mask_24(model.get_parameter(name).abs() * x.square().sum(0).sqrt().float())
        assert float((mask != result.masks[name].to(device)).float().mean()) < 1e-3, name
        w.data.masked_fill_(~result.masks[name].to(device), 0.0)

    by_whole_passes(model, plan, texts, prune)
