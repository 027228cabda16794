"""`prunable_parameters`: what a training loop of one's own gives to the prox."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from proxsparse_triton import ProxAdamW, attach_prox, prunable_parameters
from proxsparse_triton.errors import ConfigError, ShapeError
from proxsparse_triton.models.selection import plan_layers


def tiny() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=True))


def test_they_are_the_weights_that_pst_prunes() -> None:
    model = tiny()
    found = prunable_parameters(model)
    assert [name for name, _ in found] == [f"{name}.weight" for name in plan_layers(model).selected()]
    assert all(model.get_parameter(name) is p for name, p in found)
    assert len(prunable_parameters(model, include=["mlp"], skip=["down_proj"])) == 4
    with pytest.raises(ConfigError, match="matches none"):
        prunable_parameters(model, skip=["experts"])


def test_all_parameters_of_a_model_are_refused_by_the_prox() -> None:
    """Norms among them show that nobody has chosen; the advice names what to pass."""
    model = tiny()
    for make in (
        lambda: ProxAdamW(model.named_parameters(), lambda1=0.1),
        lambda: attach_prox(torch.optim.SGD(model.parameters()), model.named_parameters(), 0.1),
    ):
        with pytest.raises(ShapeError, match=r"got shape \(16,\) in model\..*norm\.weight\. .*prunable_parameters\(model\)"):
            make()


def test_the_loop_of_the_guide() -> None:
    model = tiny()
    linears = prunable_parameters(model)
    names = {name for name, _ in linears}
    rest = [(name, p) for name, p in model.named_parameters() if name not in names]
    optimizer = ProxAdamW([{"params": linears, "lambda1": 20.0}, {"params": rest, "prox": False}], lr=1e-3, max_norm=1.0)
    tokens = torch.arange(24).view(2, 12)
    embedding = model.get_input_embeddings().weight
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 0 < optimizer.figures().share_24 <= 1
    assert (embedding != 0).all()
