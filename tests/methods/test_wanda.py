from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from proxsparse_triton.methods.base import PruneTask
from proxsparse_triton.methods.wanda import Wanda, wanda_scores
from proxsparse_triton.models.selection import plan_layers


def tiny(device: str, layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=28, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2
    )
    return LlamaForCausalLM(config).eval().to(device)


def windows(lengths: tuple[int, ...] = (11, 7, 11)) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randint(48, (length,), generator=generator) for length in lengths)


def two_largest(scores: Tensor) -> Tensor:
    blocks = scores.cpu().unflatten(-1, (-1, 4))
    return torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, blocks.topk(2).indices, True).flatten(-2)


def inputs_of(model: nn.Module, names: list[str], texts: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What each Linear sees in ordinary forward passes: [tokens of all windows, in_features]."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: seen[name].append(args[0].flatten(0, -2)))
        for name in names
    ]
    with torch.no_grad():
        for text in texts:
            model(input_ids=text[None].to(next(model.parameters()).device))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores(dtype: torch.dtype) -> None:
    w, norm = torch.tensor([[1.0, -2.0, 0.5, 0.0]], dtype=dtype), torch.tensor([3.0, 0.5, 8.0, 1.0])
    assert torch.equal(wanda_scores(w, norm), torch.tensor([[3.0, 1.0, 4.0, 0.0]]))


def test_by_hand_block_after_block(device: str) -> None:
    """Block 1 must be judged on what comes out of the pruned block 0: computed here with whole forward passes only."""
    model, texts = tiny(device), windows()
    plan = plan_layers(model)
    result = Wanda().prune(PruneTask(tiny(device), plan, texts))
    assert result.weights is None
    for block in range(2):
        names = [name for name in plan.selected() if f"layers.{block}." in name]
        for name, x in inputs_of(model, names, texts).items():
            linear = model.get_submodule(name)
            mask = two_largest(linear.weight.detach().abs() * x.norm(dim=0))
            assert torch.equal(result.masks[f"{name}.weight"], mask), name
            linear.weight.data[~mask.to(device)] = 0.0


def test_one_block_of_four_by_hand() -> None:
    """One Linear of four inputs whose norms are 5, 1, 2, 1: 3*1 > 1*2 > 0.3*5 > 0.1*1."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 1, bias=False)
            self.linear.weight.data = torch.tensor([[0.3, 3.0, -1.0, 0.1]])

        def forward(self, hidden: Tensor) -> Tensor:
            return self.linear(hidden)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(2, 4)
            self.embed.weight.data = torch.tensor([[3.0, 1.0, 0.0, 0.0], [-4.0, 0.0, 2.0, 1.0]])
            self.layers = nn.ModuleList([Block()])

        def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
            return self.layers[0](self.embed(input_ids))

    model = Model()
    result = Wanda().prune(PruneTask(model, plan_layers(model), (torch.tensor([0, 1]),)))
    assert result.masks["layers.0.linear.weight"].tolist() == [[False, True, True, False]]


def test_a_feature_that_never_fires_is_pruned_first(device: str) -> None:
    model = tiny(device, layers=1)
    plan = plan_layers(model, include=["q_proj"])
    model.model.layers[0].input_layernorm.weight.data[[0, 1]] = 0.0
    mask = Wanda().prune(PruneTask(model, plan, windows())).masks["model.layers.0.self_attn.q_proj.weight"]
    assert not mask[:, :2].any()
